"""`python -m repo_manager.cli`."""

from repo_manager.cli.main import main

main()
