"""``done.json``, which a run leaves at its end: what it rested on and what it left, so that a change of either shows."""

import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.datamodules.file_hash import file_sha256
from casehard.records.answers import ANSWERS
from casehard.records.delivered import DELIVERED, DELIVERED_ANSWERS
from casehard.records.files import DONE, named_files
from casehard.records.rows import OWN_COLUMNS, ROWS
from casehard.records.trials import TRIALS
from casehard.shipped import shipped

if TYPE_CHECKING:
    from casehard.datamodules.fingerprint import Origin

Marker = dict[str, Any]
SHAPE: Marker = {  # every key that a marker must have, and what stands there; more may stand in it
    "config": str,  # hash
    "command": str,
    "finished": str,  # date and time
    "steps": int,
    "passes": float,
    "seconds": float,
    "defense": str,
    "stage": str,
    "seed": int,
    "base": str,  # the checkpoint that the model began as, before any run of casehard
    "made_by": {str: str},  # of every checkpoint that the config names: `identity`
    "recipe": str,
    "data": [dict.fromkeys(("role", "source", "sha256"), str) | {"num_rows": int}],
    "files": {str: {str: str}},  # SHA-256 of the files that the config names
    "versions": {str: str},
    "code": {str: str},  # SHA-256 of the source of every module
    "edited": [str],  # what changed while the run went on
    "model": {str: str},  # SHA-256 of the files of its export
    "results": {str: str},  # of attacks.csv, generations.jsonl and columns.json, and what says of the model that it delivered
}
ROOT = Path(__file__).parents[2]  # of the package
OWN, LOOKS = "casehard", "casehard.evidence"  # what a run is made of, and what only looks at it
SITES = {"site-packages", "dist-packages"}  # a user's own, and Debian's
MODEL = "model"  # folder of a run's export
SCORED = ("harmful_prompts", "benign_prompts", "task")  # roles of rows that nothing is trained on
TRAINER = ("max_steps", "max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")  # what shapes a training
PACKAGES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def read_marker(folder: Path) -> Marker | None:
    """The marker in a run's folder; None where there is none that says all of ``SHAPE``: that run is not done."""
    try:
        marker = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return marker if _fits(marker, SHAPE) else None


def _fits(value: Any, shape: Any) -> bool:
    match shape:
        case list():
            return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
        case dict() if str in shape:
            return isinstance(value, dict) and all(_fits(part, shape[str]) for part in value.values())
        case dict():
            return isinstance(value, dict) and all(key in value and _fits(value[key], part) for key, part in shape.items())
    return isinstance(value, (int, float) if shape is float else shape) and not isinstance(value, bool)


# ---- what a run rests on and leaves


def rests_on(config: dict[str, Any], origins: "Sequence[Origin]", installed: Collection[str], started: float) -> Marker:
    """What a run rests on, as its marker has it.

    Args:
        config: of the run, resolved.
        origins: of its rows.
        installed: packages that are known by their versions, not by their files.
        started: when the process began; what changed since may not be what the run read.
    """
    files = named_files(config)
    code = _loaded(_named_packages(config) - set(installed))
    edited = [str(path) for path in [*code.values(), *_parts(files)] if path.stat().st_mtime > started]
    return {
        "base": _base(config["model"]["init_args"].get("checkpoint") or ""),
        "made_by": {name: identity(name) for name in _checkpoints(config)},
        "recipe": _recipe(config, origins),
        "data": [origin._asdict() for origin in origins],
        "files": {name: _checkpoint_files(name) for name in files},
        "code": {name: file_sha256(path) for name, path in code.items()},
        "edited": edited,
    }


def _parts(names: list[str]) -> list[Path]:
    return [
        path if path.is_file() else path / part
        for name in names
        for path in [Path(shipped(name))]
        for part in _checkpoint_files(name)
    ]


def _checkpoint_files(name: str) -> dict[str, str]:
    from casehard.engine.checkpoint import checkpoint_files  # with torch, which a report does without

    return checkpoint_files(name)


def _present_sha256(source: str) -> str | None:
    from casehard.datamodules.fingerprint import present_sha256  # with the reader of rows, which a report does without

    return present_sha256(source)


def leaves(folder: Path) -> Marker:
    """What a run left in its folder, as its marker has it."""
    results = (folder / name for name in (ROWS, ANSWERS, OWN_COLUMNS, TRIALS, DELIVERED, DELIVERED_ANSWERS))
    return {"model": export_files(folder), "results": {path.name: file_sha256(path) for path in results if path.exists()}}


def export_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run's exported model; a model's card and its pictures are not what is loaded."""
    files = sorted(path for path in (folder / MODEL).rglob("*") if path.is_file() and path.suffix not in (".md", ".png"))
    return {path.relative_to(folder / MODEL).as_posix(): file_sha256(path) for path in files}


def _loaded(named: Collection[str]) -> dict[str, Path]:
    """Sources of the modules that are loaded and make up a run: casehard's, those of the packages ``named``, and of all that is
    not installed, such as a user's own.
    """
    tops = {name.partition(".")[0] for name in sys.modules} - ({"__main__", "__mp_main__"} - set(named))
    kept = {top for top in tops if top in (OWN, *named) or not _is_installed(top)}
    loaded = [name for name in list(sys.modules) if not f"{name}.".startswith(f"{LOOKS}.")]
    files = {name: _file(name) for name in loaded if name.partition(".")[0] in kept}
    return {name: path for name, path in sorted(files.items()) if path is not None}


def _file(module: str) -> Path | None:
    name = getattr(sys.modules.get(module), "__file__", None)
    path = Path(name).absolute() if isinstance(name, str) else None
    return path if path is not None and path.is_file() else None


def _is_installed(package: str) -> bool:
    """Whether a package is Python's or was installed into it; one that is built in, too."""
    folders = getattr(sys.modules.get(package), "__path__", None)
    path = _file(package) or next((Path(folder) for folder in folders or ()), None)
    return path is None or any(path.resolve().is_relative_to(folder) for folder in PACKAGES) or bool(SITES & set(path.parts))


def source_of(module: str) -> Path | None:
    """The file that holds a module now, as far as that can be seen here."""
    if module.partition(".")[0] == OWN:
        path = ROOT.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    if module not in sys.modules:
        with suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(module)
            return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
    return _file(module)


def _named_packages(config: Any) -> set[str]:
    """Those of the class paths of a config."""
    return {path.partition(".")[0] for path in _values(config, "class_path")}


def _checkpoints(config: Any) -> list[str]:
    return list(dict.fromkeys(_values(config, "checkpoint")))


def _values(config: Any, ending: str) -> Iterator[str]:
    """Texts of the settings whose names end so, wherever they stand."""
    for part in config if isinstance(config, list) else config.values() if isinstance(config, dict) else ():
        yield from _values(part, ending)
    if isinstance(config, dict):
        yield from (value for name, value in config.items() if str(name).endswith(ending) and isinstance(value, str))


def _maker(checkpoint: str) -> Marker | None:
    """The marker of the run that exported a checkpoint."""
    path = Path(checkpoint)
    return read_marker(path.parent) if path.name == MODEL else None


def _base(checkpoint: str) -> str:
    made = _maker(checkpoint)
    return made["base"] if made else checkpoint


def identity(checkpoint: str) -> str:
    """What a checkpoint is, whatever its name: of a run's export how it was made, but for its seed; else a hash of its files.

    A hub id stands for itself.
    """
    if made := _maker(checkpoint):
        return str(made["recipe"])
    files = _checkpoint_files(checkpoint) if checkpoint else {}
    return _sha256(files) if files else checkpoint


def _recipe(config: dict[str, Any], origins: "Sequence[Origin]") -> str:
    """Hash of all that makes a trained model what it is, but for its seed."""
    model, data = config["model"], config["data"]
    init = model["init_args"] | {"checkpoint": identity(model["init_args"].get("checkpoint") or "")}
    rows = sorted((origin.role, origin.sha256) for origin in origins if origin.role not in SCORED)
    read = {origin.role for origin in origins} | set(SCORED)  # their rows count, and not their names
    settings = {name: value for name, value in data.items() if name not in ("seed", "judge", "evaluation")}
    settings["sources"] = {name: value for name, value in data.get("sources", {}).items() if name not in read}
    trainer = {name: config["trainer"].get(name) for name in TRAINER}
    return _sha256([model["class_path"], init, settings, rows, trainer])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- what is not the same any more


def changes(marker: Marker, folder: Path) -> Iterator[str]:
    """What a run rested on or left and is not the same any more: code, rows, other files; its results, its model.

    What is only on a hub or is gone says nothing, but for what the run left.
    """
    yield from (f"{name} changed while it ran" for name in marker["edited"])
    yield from (f"{_shown(path)} changed" for name in marker["code"] if (path := _changed_source(marker, name)))
    yield from (f"{o['source']} changed" for o in marker["data"] if _present_sha256(o["source"]) not in (None, o["sha256"]))
    yield from (f"{name} changed" for name, files in marker["files"].items() if _checkpoint_files(name) not in ({}, files))
    yield from changed_outcome(marker, folder)


def changed_outcome(marker: Marker, folder: Path) -> Iterator[str]:
    """A model or results that are not as the run left them."""
    if export_files(folder) != marker["model"]:
        yield f"{folder / MODEL} is not what its run left"
    yield from changed_results(marker, folder)


def changed_results(marker: Marker, folder: Path) -> Iterator[str]:
    """Results that are not as the run left them. Answers may be deleted: some of them nobody should keep."""
    for name, sha256 in marker["results"].items():
        path = folder / name
        if not path.exists() and name not in (ANSWERS, DELIVERED_ANSWERS):
            yield f"{path} is gone"
        elif path.exists() and file_sha256(path) != sha256:
            yield f"{path} is not what its run left"


def _changed_source(marker: Marker, module: str) -> Path | None:
    path = source_of(module)
    return path if path is not None and file_sha256(path) != marker["code"][module] else None


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
