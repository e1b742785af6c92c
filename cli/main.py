"""``main()``, the ``casehard`` (and ``lightning``) command."""

import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from casehard.cli.orphans import end_with_parent
from casehard.metrics.errors import SettingError
from casehard.metrics.names import visible

TRAINING = {
    "fit": "train a defense, export its model and attack it",
    "validate": "score the model as it is",
    "test": "attack the model as it is",
}
OTHERS = {
    "study": "run defenses x attacks x seeds",
    "report": "write a page on runs",
    "card": "write the card of an exported model",
    "dashboard": "save a workspace on W&B",
    "judge": "score a run's answers by another judge",
    "sandbox": "print rows of the embedded data",
}
START = """\
to begin:
  casehard fit --config experiments/sbr.yaml

Names that start with experiments/ or models/ are those that come with casehard, unless the working directory has them.
`casehard COMMAND --help` lists the settings of a command."""


def main(args: list[str] | None = None) -> None:
    """The command line: ``fit``, ``validate`` and ``test`` through Lightning's CLI, and casehard's own commands beside them.

    What a user can mend, a ``SettingError`` or what the system refuses, ends in its one sentence and exit status 1;
    ``CASEHARD_TRACEBACK=1`` shows where it was raised. Whatever else goes wrong is a bug and keeps its traceback.
    """
    args = sys.argv[1:] if args is None else args
    name = command(args[:1])
    try:
        if name in TRAINING:
            end_with_parent()
            from casehard.cli.lightning_cli import train

            train(args)
        else:
            from casehard.cli.commands import run

            run(name, args[1:])
    except (SettingError, OSError) as error:
        if os.environ.get("CASEHARD_TRACEBACK"):
            raise
        sys.exit(visible(f"error: {error}"))
    except KeyboardInterrupt:  # Lightning ends a run of its own accord
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)


def command(args: list[str]) -> str:
    """The command that a line names; one that names none, or asks for help, ends here, and nothing else is imported for it."""
    parser = ArgumentParser(
        "casehard",
        description="Hardens open-weight language models and measures how hard they are to break.",
        epilog=START,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in (TRAINING | OTHERS).items():
        commands.add_parser(name, help=what, add_help=False)
    return str(parser.parse_args(args).command)


if __name__ == "__main__":
    main()
