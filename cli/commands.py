"""The commands that train nothing; each imports what it needs when it runs."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI

import casehard
from casehard.cli.parsing import CommandParser, refusals
from casehard.shipped import experiment


def study(
    file: str,
    *,
    root: str = "runs",
    parallel: int | None = None,
    cluster: str | None = None,
    cluster_settings: dict[str, Any] | None = None,
) -> Path:
    """Run every attack on every defense with every seed, as a study file says, and go on where a study was cut off.

    A cell is done when its run's marker carries the hash of its resolved config, what it rested on is the same still (the code,
    casehard's and your own, rows, checkpoints), and so is what it left (its model, its results): that one is not run again, and
    one with other settings gets a folder of its own. Ends with exit status 1 if a cell failed; start again to repeat the failed
    ones only.

    Args:
        file: YAML with defenses, attacks and seeds, or the name of a study that comes with casehard, such as sandbox.
        root: where run folders are made; the study's own is ROOT/NAME.
        parallel: cells at a time; by default one a CUDA device, or one a core. Several that share the cores of a machine without
            CUDA get a thread each (OMP_NUM_THREADS=1, unless you set it); others as many as torch takes.
        cluster: send the cells out through submitit: slurm, local, or auto for what is there. null runs them here.
        cluster_settings: submitit's, such as {timeout_min: 60, slurm_partition: gpu, gpus_per_node: 1}.
    """
    from casehard.cli.lightning_cli import resolved
    from casehard.evidence.study import run_study

    return run_study(resolved, experiment(file, "experiments/studies"), root, parallel, cluster, cluster_settings or {})


def sandbox(split: str | None = None, kind: str | None = None, num_rows: int = 2, tokenizer: str | None = None) -> None:
    """Print sample rows of the sandbox for a person to read.

    Args:
        split: only this split (pretrain, defender, attacker, validation, test).
        kind: only this kind (harmful, refusals, refused_first, refused, translated, howto, mood, mood_held_out,
            sentiment, sums, repeat).
        num_rows: rows of each.
        tokenizer: instead of printing, train the sandbox's tokenizer and save it in this folder.
    """
    from casehard.datamodules.sandbox import SPLITS, kinds, sandbox_rows

    if tokenizer is not None:
        from casehard.datamodules.sandbox_tokenizer import build_tokenizer  # with transformers

        build_tokenizer().save_pretrained(tokenizer)
        return
    for name in [split] if split else SPLITS:
        for k in [kind] if kind else kinds(name):
            rows = sandbox_rows(name, k)
            print(f"\nsandbox:{name}/{k} ({len(rows)} rows)")
            for row in rows[:num_rows]:
                print(f"  {row.prompt}\n    -> {row.response}")


def report(args: list[str]) -> None:
    """``casehard report RUN ...``: one self-contained page, with the CSV and PNG files that it is made of."""
    parser = CommandParser(
        prog="casehard report", description="Write one page on runs, its tables as Markdown, and the CSV and PNG files behind it."
    )
    parser.add_argument("runs", nargs="+", type=str, help="run folders (also RUN/judged/JUDGE), or a study's")
    parser.add_argument("--out", type=str, default="report", help="folder of the report")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the page")
    parser.add_argument("--answers", type=bool, default=False, help="put a page of all answers beside it: casehard answers")
    settings = parser.parse_args(args)
    from casehard.evidence.report import write_report

    print(f"Report: {write_report(settings.runs, settings.out, settings.title, settings.answers)}")


def answers(args: list[str]) -> None:
    """``casehard answers RUN ...``: one self-contained page on which a person reads what the models said."""
    parser = CommandParser(
        prog="casehard answers",
        description="Write one page on which to read what models answered, by attack, defense, seed, step and verdict. Answers "
        "that were judged harmful, or not judged, stay closed until they are opened. With real data it holds harmful texts.",
    )
    parser.add_argument("runs", nargs="+", type=str, help="run folders (also RUN/judged/JUDGE), or a study's")
    parser.add_argument("--out", type=str, default="answers.html", help="the page")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the page")
    settings = parser.parse_args(args)
    from casehard.evidence.summary import collect, run_folders
    from casehard.evidence.viewer import write_viewer

    page = write_viewer(collect(settings.runs), run_folders(settings.runs), Path(settings.out), settings.title)
    print(f"Answers: {page}")


def card(args: list[str]) -> None:
    """``casehard card RUN ...``: the model card of what a run exported."""
    parser = CommandParser(
        prog="casehard card", description="Write RUN/model/README.md: what the model was made from, and how hard it was to break."
    )
    parser.add_argument("run", type=str, help="folder of a finished `fit` that exported its model")
    parser.add_argument("tests", nargs="*", type=str, help="folders of more runs that attacked this model, such as a study's")
    settings = parser.parse_args(args)
    from casehard.evidence.card import write_card

    print(f"Card: {write_card(settings.run, settings.tests)}")


def dashboard(args: list[str]) -> None:
    """``casehard dashboard RUN ...``: a saved W&B workspace on what runs logged."""
    parser = CommandParser(
        prog="casehard dashboard",
        description="Save a workspace on W&B with panels for all that runs logged: how long each defense held under each attack, "
        "the attacks' curves, and training. It shows the W&B runs of the groups that these runs are in, and averages over the "
        "seeds of a study's. Needs the key of a W&B account (WANDB_API_KEY, or `wandb login`); --dry_run needs neither.",
    )
    parser.add_argument("runs", nargs="+", type=str, help="run folders, or a study's, whose keys get panels")
    parser.add_argument("--project", type=str, default="casehard", help="W&B project that has the runs (run.project)")
    parser.add_argument("--entity", type=str | None, default=None, help="W&B user or team; by default the key's own")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the workspace")
    parser.add_argument("--dry_run", type=bool, default=False, help="print what would be saved, as JSON, and save nothing")
    settings = parser.parse_args(args)
    from casehard.evidence.dashboard import make_dashboard

    print(make_dashboard(settings.runs, settings.project, settings.entity, settings.title, settings.dry_run))


def list_all(args: list[str]) -> None:
    """``casehard list``: what there is to choose from."""
    parser = CommandParser(
        prog="casehard list",
        description="List what there is to choose from: short name, where it acts, whose it is, class path or file, and what it "
        "is. Classes of other packages are those that they declare as entry points of the group casehard.",
    )
    parser.add_argument(
        "kinds", nargs="*", type=str, default=[], help="defenses, attacks, judges, metrics, experiments; by default all"
    )
    parser.add_argument("--package", type=str | None, default=None, help="also list every class of this package, as of your own")
    settings = parser.parse_args(args)
    from casehard.cli.listing import listed

    print(listed(settings.kinds, settings.package))


def init(args: list[str]) -> None:
    """``casehard init KIND``: a commented file to begin from."""
    from casehard.cli.init import Given, templates, write

    parser = CommandParser(
        prog="casehard init",
        description="Write a commented file to begin from: service (a customer's fine-tuning job), harden (align your own model "
        "before release), study (defenses x attacks x seeds), or a class of your own. Rows that you name are read, and parts of "
        "them held out; what you do not name is a name to be replaced, or is not measured, and the file says so. service and "
        "study take all of the settings below, harden all but --anchors, a class --out alone; --harmful_rows of a service needs "
        "--harmful_prompts.",
    )
    parser.add_argument("kind", type=Literal[tuple(templates())], help="what to write")
    parser.add_argument("--out", type=str | None, default=None, help="the new file; by default my_job.yaml and the like")
    parser.add_argument("--model", type=str | None, default=None, help="your model: a folder, a hub id or a GGUF file")
    parser.add_argument("--rows", type=str, nargs="+", default=[], help="the customer's rows, or benign rows: one or more files")
    parser.add_argument(
        "--harmful_prompts",
        type=str | None,
        default=None,
        help="prompts to refuse; without --anchors half of them become anchors",
    )
    parser.add_argument("--anchors", type=str | None, default=None, help="harmful prompts that SBR holds in place")
    parser.add_argument("--harmful_rows", type=str | None, default=None, help="harmful prompts with harmful answers, for attacks")
    parser.add_argument("--benign_prompts", type=str | None, default=None, help="harmless prompts that look harmful")
    settings = vars(parser.parse_args(args))
    given = Given(**{name: settings[name] for name in Given._fields} | {"rows": tuple(settings["rows"])})
    path = write(settings["kind"], settings["out"], given)
    print(f"Written: {path}. It says on top what to do next.")


def preview(args: list[str]) -> None:
    """``casehard preview ...``: the rows of a run as its model reads them."""
    parser = ArgumentParser(
        "casehard preview",
        usage="casehard preview [--num_rows NUM_ROWS] --config NAME [--SETTING VALUE ...]",
        description="Show rows as the model reads them: rendered by its chat template, with what is learnt marked, their lengths "
        "in tokens, and how many are cut or poisoned. All other settings are those of `casehard fit`. No weights are loaded.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_rows", type=int, default=3, help="rows to print (default: 3)")
    own, settings = parser.parse_known_args(args)
    from casehard.cli.preview import main  # with torch

    main(settings, own.num_rows)


OWN_PARSER: dict[str, Callable[[list[str]], None]] = {
    "report": report,
    "answers": answers,
    "card": card,
    "dashboard": dashboard,
    "list": list_all,
    "init": init,
    "preview": preview,
}


def run(name: str, args: list[str]) -> Any:
    """Run a command: one of any number of words has a parser of its own, any other's settings are its function's.

    Returns:
        The folder of what it came to, where there is one.
    """
    if name in OWN_PARSER:
        return OWN_PARSER[name](args)
    command: Callable[..., Any] = study if name == "study" else sandbox
    if name == "judge":
        from casehard.evidence.rejudge import main as command

        for public in casehard.__all__:  # so that judges may stand without `casehard.` too, and --help lists them
            if public.endswith("Judge"):
                getattr(casehard, public)
    with refusals():
        return CLI(command, args=args, prog=f"casehard {name}", parser_class=CommandParser)
