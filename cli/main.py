"""``main()``, the ``casehard`` (and ``lightning``) command."""

import os
import signal
import sys

from casehard.cli.orphans import end_with_parent
from casehard.metrics.errors import Misread, SettingError
from casehard.metrics.names import guess, visible

TRAINING = {
    "fit": "train a defense, export its model and attack it",
    "validate": "score the model as it is",
    "test": "attack the model as it is",
}
OTHERS = {
    "init": "write a file to begin from: service, harden, study, or a class of your own",
    "preview": "show rows as the model reads them, and what is learnt",
    "study": "run defenses x attacks x seeds",
    "report": "write a page on runs",
    "answers": "write a page to read runs' answers on",
    "card": "write the card of an exported model",
    "dashboard": "save a workspace on W&B",
    "judge": "score a run's answers by another judge",
    "list": "list defenses, attacks, judges, metrics and experiments",
    "sandbox": "print rows of the embedded data",
}
ABOUT = "Hardens open-weight language models and measures how hard they are to break."
START = """\
to begin:
  casehard fit --config sbr
with your own model and rows:
  casehard init service --model FOLDER --rows customer.jsonl

Names of experiments are files of yours or those that come with casehard, with or without experiments/ and .yaml.
`casehard COMMAND --help` lists the settings of a command, `casehard --version` says which casehard this is."""
HELP = ("-h", "--help")
AT_ONCE = ("sandbox", "list")  # commands that need no word before they begin
CLASSES = (*TRAINING, "judge")  # commands whose settings are classes


def main(args: list[str] | None = None) -> None:
    """The command line: ``fit``, ``validate`` and ``test`` through Lightning's CLI, and casehard's own commands beside them.

    What a user can mend, a ``SettingError`` or what the system refuses, ends in its one sentence and exit status 1;
    ``CASEHARD_TRACEBACK=1`` shows where it was raised. Whatever else goes wrong is a bug and keeps its traceback.
    """
    args = sys.argv[1:] if args is None else args
    name = command(args[:1])
    try:
        if name in CLASSES and any(word in HELP or ".help" in word for word in args[1:]):
            from casehard.cli.help import asked

            if text := asked(name, (TRAINING | OTHERS)[name], args[1:]):
                print(text, flush=True)
                return
        if sys.stderr.isatty() and name not in AT_ONCE and os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"casehard {name}: reading the settings, and what they need\n")
        if name in TRAINING:
            end_with_parent()
            from casehard.cli.lightning_cli import train

            sys.argv[1:] = args  # launchers start further processes by it
            train(args)
        else:
            from casehard.cli.commands import run

            run(name, args[1:])
        sys.stdout.flush()
    except Misread as error:
        sys.stderr.write(f"{error.prog} --help lists the settings.\nerror: {error}\n")  # last: a study shows a log's last line
        raise
    except BrokenPipeError:  # whoever reads this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (SettingError, OSError) as error:
        if os.environ.get("CASEHARD_TRACEBACK"):
            raise
        sys.exit(visible(f"error: {error}"))
    except KeyboardInterrupt:  # Lightning ends a run of its own accord
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)


def command(args: list[str]) -> str:
    """The command that a line names; one that names none, or asks for help, ends here, and nothing else is imported for it."""
    name = args[0] if args else ""
    if name in TRAINING | OTHERS:
        return name
    if name in HELP:
        print(overview())
        sys.exit()
    if name == "--version":
        from casehard.version import described

        print(described())
        sys.exit()
    got = f"and {name!r} is none." if name else "and none was given."
    sys.stderr.write(f"{overview()}\n\nerror: the first word must be a command, {got}{guess(name, TRAINING | OTHERS)}\n")
    sys.exit(2)


def overview() -> str:
    """All commands, a line each, and how to begin."""
    commands = {"commands:": TRAINING, "more commands:": OTHERS}
    width = max(map(len, TRAINING | OTHERS)) + 2
    lists = "\n\n".join(
        "\n".join([heading, *(f"  {name:{width}}{what}" for name, what in which.items())]) for heading, which in commands.items()
    )
    return f"usage: casehard COMMAND [SETTINGS]\n\n{ABOUT}\n\n{lists}\n\n{START}"


if __name__ == "__main__":
    main()
