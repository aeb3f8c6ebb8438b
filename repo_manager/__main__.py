"""`python -m repo_manager`, and the `repo-manager` command."""

import gc
import importlib
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Ctrl-C while Python still imports it is Ctrl-C too, and no error of ours."""
    # Imports create many objects and no garbage, so garbage collection would cost a tenth of a short command's time.
    # The command runs with rare collections, because it imports more modules on demand.
    gc.disable()
    gc.set_threshold(200_000)
    try:
        try:
            run = importlib.import_module("repo_manager.cli.main").main
        except KeyboardInterrupt:
            sys.exit(130)
        run()
    finally:
        gc.freeze()  # avoids a final garbage collection at exit


if __name__ == "__main__":
    main()
