"""``casehard init``: a file to begin from, filled with what is there: rows of one's own, or a class of one's own."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, StrictUndefined

from casehard.metrics.errors import SettingError

if TYPE_CHECKING:
    from casehard.datamodules.row import Row

TEMPLATES = Path(__file__).parent / "templates"
OUT = {"service": "my_job.yaml", "harden": "my_model.yaml", "study": "my_study.yaml"}
HELD_OUT = 10  # percent of the customer's rows
BATCH, EPOCHS = 8, 3  # of a service's job
NO_USE = {"harden": ("anchors",)}


class Given(NamedTuple):
    """What the user has. What is missing is a name to be replaced, or is left out and said not to be measured."""

    model: str | None = None
    rows: tuple[str, ...] = ()
    harmful_prompts: str | None = None
    anchors: str | None = None
    harmful_rows: str | None = None
    benign_prompts: str | None = None


def templates() -> dict[str, Path]:
    """All templates, by the name that ``casehard init`` has for them."""
    return {path.stem: path for path in sorted(TEMPLATES.iterdir()) if path.suffix in (".yaml", ".py")}


def write(kind: str, out: str | None, given: Given) -> Path:
    """Write the template ``kind``, filled, to ``out``.

    Raises:
        SettingError: that file is there already; files of rows that cannot be read, or hold too few.
    """
    template = templates()[kind]
    path = Path(out or OUT.get(kind, f"my_{kind}{template.suffix}"))
    if path.exists():
        raise SettingError(f"--out must be a new file, and {path} exists. Name another, or remove it.")
    if template.suffix != ".yaml" and given != Given():
        raise SettingError(f"init {kind} takes no rows and no model: it writes a class. Leave out all but --out.")
    text = _filled(kind, path, given) if template.suffix == ".yaml" else template.read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path


def _filled(kind: str, path: Path, given: Given) -> str:
    """The template with what the user has."""
    if idle := [name for name in NO_USE.get(kind, ()) if getattr(given, name)]:
        raise SettingError(f"init {kind} has no use for --{idle[0]}. Leave it out, or see `casehard init --help`.")
    if sliced := [name for name in (*given.rows, given.harmful_prompts, given.harmful_rows) if name and "#" in name]:
        raise SettingError(
            f"a file that is used in parts must be whole, got the slice {sliced[0]}. Leave out the # and what follows."
        )
    if kind == "service" and given.harmful_rows and not given.harmful_prompts:
        raise SettingError(
            "init service --harmful_rows must have --harmful_prompts beside it, got none: the attacked model is scored on them. "
            "Name some."
        )
    train, held_out = _parts(given.rows or ("customer.jsonl",), 100 - HELD_OUT)
    trained, scored = (_rows(train), _rows(held_out)) if given.rows else ([], [])
    anchors, harmful_prompts = _prompts(given, kind)
    inner, outer = _parts([given.harmful_rows or "harmful_rows.jsonl"], 50)
    poison = outer if kind == "harden" else [given.harmful_rows or "harmful_rows.jsonl"]
    num_harmful = min(1000, len(_rows(poison))) if given.harmful_rows else 100
    num_samples = min(1000, 10 * num_harmful, int(len(trained) / 0.9)) if trained else 1000  # a tenth is poison
    num_steps = -(-EPOCHS * num_samples // BATCH)
    shared = _shared(trained, scored)
    values = {  # written as JSON, which YAML reads
        "model": given.model or "MODEL_FOLDER",
        "benign": train,
        "task": held_out,
        "anchors": anchors,
        "refusals": anchors and [anchors],
        "harmful_prompts": harmful_prompts,
        "harmful_rows": poison if given.harmful_rows or kind == "study" else None,
        "inner_harmful": inner,
        "outer_harmful": outer,
        "benign_prompts": [given.benign_prompts] if given.benign_prompts else None,
    }
    texts = {
        "file": shlex.quote(str(path)),
        "name": path.stem,
        "num_harmful": num_harmful,
        "num_samples": num_samples,
        "num_steps": num_steps,
        "score_steps": sorted({-(-num_steps // 5), -(-num_steps // 2), num_steps}),
        "then_attacks": ", and attacks it" if given.harmful_rows else "",
        "benign_note": f": {len(trained)} rows" if trained else "",
        "task_note": f" {len(scored)} rows" if scored else "",
        "overlap": f"{len(shared)} held-out prompts are trained on, too: the task's scores show memory as well" if shared else "",
    }
    shown = {name: value and json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    template = templates()[kind].read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template).render(shown | texts)


def _prompts(given: Given, kind: str) -> tuple[str | None, list[str] | None]:
    """Where the defense's harmful prompts come from, and the scored ones: of one file a half each."""
    prompts = given.harmful_prompts or (None if kind == "service" else "harmful_prompts.jsonl")
    if given.anchors or prompts is None:
        return given.anchors, [prompts] if prompts else None
    (first,), second = _parts([prompts], 50)
    return first, second


def _shared(trained: "list[Row]", scored: "list[Row]") -> list[str]:
    from casehard.datamodules.mixing import overlap

    return overlap(trained, scored)


def _parts(files: Iterable[str], percent: int) -> tuple[list[str], list[str]]:
    """The first so many percent of every file, and the rest."""
    first, second = ([f"{name}#train[{part}]" for name in files] for part in (f":{percent}%", f"{percent}%:"))
    return first, second


def _rows(sources: Iterable[str]) -> "list[Row]":
    """All rows of some sources; a file that holds too few for all its parts is refused by ``read_rows``."""
    from casehard.datamodules.sources import read_rows  # with what --help does without

    return [row for source in sources for row in read_rows(source, needs_response=False)]
