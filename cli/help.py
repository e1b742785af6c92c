"""``--help`` of the commands whose settings are classes, in a fraction of a second; what it says is read off the sources."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

import casehard
from casehard.cli.signatures import Setting, Source, find, of_lightning
from casehard.shipped import PACKAGE

BASES = {  # of a setting's classes
    "model": "Defense",
    "data.judge": "Judge",
    "data.evaluation.metrics": "Metric",
    "judge": "Judge",
    "trainer.callbacks": "Callback",
}
TRAINER = "https://lightning.ai/docs/pytorch/stable/common/trainer.html"
USELESS = {  # of Lightning's settings: what does nothing here, or only harm
    "barebones",
    "default_root_dir",
    "enable_autolog_hparams",
    "limit_predict_batches",
    "model_registry",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "sync_batchnorm",
    "use_distributed_sampler",
}
WORDS = {"None": "null", "True": "true", "False": "false"}
CHECKPOINT = {
    "fit": "go on from this checkpoint, in its run's folder, or from `last`, that of the newest run that did not end",
    "": "a checkpoint of fit, whose weights are taken",
}
COLUMN = 26  # where what an option is begins
ABOUT = """\
A setting stands in a config (model: {init_args: {anchor_rate: 0.5}}) or on the line (--model.init_args.anchor_rate 0.5).
What comes later wins. The defaults shown are those of a run without a config."""


def asked(command: str, what: str, args: list[str]) -> str | None:
    """The help that a line asks for, where it is about casehard's own; None leaves it to the parser, which imports all.

    Args:
        command: fit, validate, test or judge.
        what: it does.
        args: the words behind it.
    """
    if "-h" in args or "--help" in args:
        return _judge() if command == "judge" else _training(command, what)
    for word, following in zip(args, [*args[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.endswith(".help") and option.removeprefix("--").removesuffix(".help") in BASES:
            return class_help(value if equals else following)
    return None


def class_help(name: str) -> str | None:
    """The settings of a public class; None where ``name`` is none."""
    name = name.removeprefix("casehard.")
    source = find(casehard.MODULES.get(name, ""), name)
    if source is None:
        return None
    return "\n".join([f"casehard.{name}", "", source.text, "", "settings (init_args):", *options("", source)])


def public(base: str) -> dict[str, Source]:
    """Public classes that can be made and derive from ``base``, and it first."""
    named = {name: source for name in casehard.__all__ if (source := find(casehard.MODULES[name], name))}
    kin = [name for name, source in named.items() if source.is_a(base) and not source.is_abstract]
    return {name: named[name] for name in sorted(kin, key=lambda name: (name != base, name))}


def known_options() -> set[str]:
    """Names of all settings of the commands that train, but for those of a defense or an attack."""
    run, data = _of_every_run()
    return {"config", "ckpt_path", *run.names("run."), *data.names("data."), *(f"trainer.{s.name}" for s in trainer_settings())}


def _of_every_run() -> list[Source]:
    sources = find("casehard.cli.run_settings", "RunSettings"), find("casehard.datamodules.sft", "SFTDataModule")
    return [source for source in sources if source is not None]


def _training(command: str, what: str) -> str:
    run, data = _of_every_run()
    defenses, attacks = public("Defense"), public("Callback")
    defaults = yaml.safe_load((PACKAGE / "experiments" / "default.yaml").read_text(encoding="utf-8"))
    lines = [
        f"usage: casehard {command} --config NAME [--config NAME ...] [--SETTING VALUE ...]",
        *("", f"{what[0].upper()}{what[1:]}.", "", ABOUT, ""),
        "what runs:",
        *_entry(
            "-c, --config NAME",
            "a YAML file, or the name of an experiment that comes with casehard (sbr, attack/quantised)",
        ),
        *_entry("--ckpt_path FILE", CHECKPOINT["fit" if command == "fit" else ""]),
        *_entry("--seed_everything N", "seed of what is random outside of data and attacks, which have their own (default: 0)"),
        *_entry("--print_config", "print all settings that the line comes to, and run nothing"),
        *(
            []
            if command == "fit"
            else _entry(
                "--verbose true", f"also print Lightning's table of what was logged (default: {str(command != 'test').lower()})"
            )
        ),
        *("", "run: where it goes, and what it leaves", *options("--run.", run)),
        *("", "model: the defense"),
        *_entry("--model CLASS", "one of these, or a class of your own by its path; --model.help CLASS lists its settings"),
        *_listed(defenses),
        *("", "model.init_args: what every defense takes"),
        *options("--model.init_args.", defenses["Defense"], _under(defaults, "model", "init_args")),
        *("", "data: what is trained on, and how a model is scored", *options("--data.", data, _under(defaults, "data"))),
        *("", "trainer.callbacks: attacks and scorings, a list of classes"),
        *_entry("--trainer.callbacks", "of these, or of your own; --trainer.callbacks.help CLASS lists the settings of one"),
        *_listed({name: source for name, source in attacks.items() if name != "Results"}),  # which every run has
        *("", f"trainer: Lightning's settings, in full at {TRAINER}", *_of_trainer(_under(defaults, "trainer"))),
    ]
    return "\n".join(lines)


def _judge() -> str:
    source = find("casehard.evidence.rejudge", "main")
    assert source is not None
    run, _ = source.settings()
    lines = [
        *("usage: casehard judge RUN --judge CLASS [--judge.SETTING VALUE ...]", "", source.text, ""),
        *_entry("RUN", run.what),
        *_entry("--judge CLASS", "one of these, or a class of your own by its path; --judge.help CLASS lists its settings"),
        *_listed(public("Judge")),
        *_entry("--config FILE", "a YAML file with these settings"),
    ]
    return "\n".join(lines)


def options(prefix: str, source: Source, defaults: Any = None) -> Iterator[str]:
    """The lines of all that a class takes, what stands in a group one by one.

    Args:
        prefix: before every name.
        source: of the class.
        defaults: of the default config, which go before the class's own.
    """
    for setting in source.settings():
        name, default = f"{prefix}{setting.name}", defaults.get(setting.name) if isinstance(defaults, dict) else None
        if group := setting.group:
            yield from _entry(f"{name}.*", f"{setting.what} (default: null)" if setting.default == "None" else setting.what)
            yield from options(f"{name}.", group, default)
            continue
        yield from _entry(name, f"{setting.what} ({_kind(setting.kind)}{_default(setting, default)})")
        if (path := name.removeprefix("--")) in BASES:
            yield from _entry(
                "", f"{', '.join(public(BASES[path]))}, or a class of your own by its path; {name}.help CLASS lists its settings"
            )


def trainer_settings() -> list[Setting]:
    """Lightning's, as its own source has them, but for those of no use here."""
    spec = find_spec("lightning")
    assert spec is not None
    assert spec.origin is not None
    settings = of_lightning(Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py", "Trainer")
    return [setting for setting in settings if setting.name not in (*USELESS, "callbacks")]


def _of_trainer(defaults: dict[str, Any]) -> Iterator[str]:
    for setting in trainer_settings():
        text = re.sub(r":\w+:`~?", "`", setting.what).partition(" Default: ")[0]
        brief, default = re.split(r"(?<=[\w`)]\.)\s", text)[0], _default(setting, defaults.get(setting.name))
        yield from _entry(f"--trainer.{setting.name}", f"{brief} ({default.removeprefix('; ')})")


def _under(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        config = config.get(key) or {}
    return config


def _kind(kind: str) -> str:
    text = re.sub(r"Literal\[(.*?)\]", lambda found: "{" + found[1].replace(", ", ",") + "}", kind)
    return re.sub(r"\bstr\b", "text", text).replace("None", "null").replace(" | ", " or ").replace("'", "")


def _default(setting: Setting, of_config: Any) -> str:
    if isinstance(of_config, dict):
        of_config = of_config.get("class_path", of_config)
    text = setting.default if of_config is None else str(of_config)
    if text is None:
        return "; must be given"
    text = text.strip("'") if re.fullmatch(r"'[^' ]+'", text) else text
    return f"; default: {WORDS.get(text, text)}"


def _listed(sources: dict[str, Source]) -> Iterator[str]:
    for name, source in sources.items():
        yield from _entry(f"  {name}", source.summary)


def _entry(option: str, what: str) -> list[str]:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120) - COLUMN
    lines = textwrap.wrap(what.replace("``", "`"), width, break_on_hyphens=False)
    head = f"  {option}"
    if len(head) < COLUMN - 1:
        lines[0] = f"{head:{COLUMN}}{lines[0]}"
        return [lines[0], *(" " * COLUMN + line for line in lines[1:])]
    return [head, *(" " * COLUMN + line for line in lines)]
