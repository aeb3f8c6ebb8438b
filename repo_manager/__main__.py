"""`python -m repo_manager`."""

from repo_manager.cli.main import main

main()
