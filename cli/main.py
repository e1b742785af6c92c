"""``main()``, the ``casehard`` (and ``lightning``) command."""

import os
import signal
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from casehard.metrics.errors import SettingError
from casehard.shipped import PACKAGE

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

    A mistake of the user's ends in its one sentence and exit status 1, for which ``CASEHARD_TRACEBACK=1`` shows where it was
    raised. Whatever else goes wrong keeps its traceback.
    """
    args = sys.argv[1:] if args is None else args
    name = command(args[:1])
    try:
        if name in TRAINING:
            from casehard.cli.lightning_cli import train

            train(args)
        else:
            from casehard.cli.commands import run

            run(name, args[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("CASEHARD_TRACEBACK") or not is_mendable(error):
            raise
        sys.exit(f"error: {error}")
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


def is_mendable(error: ValueError | OSError) -> bool:
    """Whether an error is the user's to mend, so that its sentence says all; any other is a bug, and needs its traceback.

    A ``SettingError`` and what the system refuses are; so is a plain ValueError that casehard's own code raises on purpose. One
    from an author's own loss, or from within a library, is not.
    """
    if isinstance(error, SettingError | OSError):
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return innermost.filename.startswith(f"{PACKAGE}{os.sep}") and (innermost.line or "").startswith("raise ")


if __name__ == "__main__":
    main()
