"""`python -m repo_manager`, and the `repo-manager` command."""

import gc
import importlib
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Ctrl-C while Python still imports it is Ctrl-C too, and no error of ours."""
    # Imports make many objects and no garbage: a tenth of a short command's time. The command runs with it again, and
    # seldom: it imports more, as it needs it.
    gc.disable()
    gc.set_threshold(200_000)
    try:
        try:
            run = importlib.import_module("repo_manager.cli.main").main
        except KeyboardInterrupt:
            sys.exit(130)
        run()
    finally:
        gc.freeze()  # At the interpreter's end nothing is searched for garbage any more.


if __name__ == "__main__":
    main()
