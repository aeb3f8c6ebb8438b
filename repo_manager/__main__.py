"""`python -m repo_manager`, and the `repo-manager` command."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Ctrl-C while Python still imports it is Ctrl-C too, and no error of ours."""
    try:
        from repo_manager.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
