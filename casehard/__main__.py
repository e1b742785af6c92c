"""``python -m casehard``: the command, where nothing is installed."""

from casehard.cli.main import main

main()
