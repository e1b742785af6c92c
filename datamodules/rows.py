"""Rows of chat, read from any file, folder or hub id into one form."""

import csv
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from metrics.conversation import prompt_of

CONVERSATIONS = ("messages", "conversations")
PAIRS = (("prompt", "response"), ("instruction", "output"), ("question", "answer"))
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
FORMS = "prompt and response, instruction (with input) and output, question and answer, messages, or conversations"
EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One conversation: everything before the answer, and the answer.

    Args:
        messages: turns before the answer, each a role (system, user, assistant) and its content; the last is the user's.
        response: the answer, or None where a row only asks.
    """

    messages: tuple[tuple[str, str], ...]
    response: str | None = None

    @property
    def prompt(self) -> str:
        """What is asked, for judges and records: the user's turn where it is the only one, else the whole ``Conversation``."""
        return prompt_of(self.messages)

    def chat(self, answered: bool = False) -> list[dict[str, str]]:
        """The turns as chat templates take them, with the response as the last one if ``answered``."""
        turns = [*self.messages, ("assistant", self.response or "")] if answered else self.messages
        return [{"role": role, "content": content} for role, content in turns]


class Table(NamedTuple):
    """The records of one split, and the number that an error gives each of them."""

    records: Collection[Any]
    numbers: Sequence[int]
    unit: str  # what the numbers count: line or row


def read_rows(source: str, needs_response: bool = True) -> list[Row]:
    """Rows of ``source``, in its order.

    JSON and CSV are read as they stand: every value keeps its type and every error has its line. All else, and the slicing, is
    left to ``datasets``, which writes to its own cache for hub ids only: a changed file or folder never gives stale rows.

    Args:
        source: a .json (one list), .jsonl, .csv or .parquet file, a folder (of such files, or from ``Dataset.save_to_disk``), a
            hub id (``ID:CONFIG`` where it has several configurations) or ``sandbox:SPLIT/KIND[/CATEGORY]``. ``#SPLIT`` at the end
            takes a split or a slice, as in ``rows.json#train[:900]``; a file, or the sandbox, is one split, train.
        needs_response: whether a row without a response is an error. If not, its response is None.
    """
    name, spec = _split(source)
    tables = _tables(name)
    try:
        parts = ReadInstruction.from_spec(spec or "train").to_absolute({split: len(t.records) for split, t in tables.items()})
    except ValueError as error:
        raise ValueError(
            f"{source} must end in a split of its own or a slice of one, but its splits are {', '.join(tables)} ({error}). "
            f"Write, for example, {name}#{next(iter(tables))}[:100]."
        ) from error
    rows = []
    for part in parts:
        table, place = tables[part.splitname], name if len(tables) == 1 else f"{name}#{part.splitname}"
        numbered = zip(table.records, table.numbers, strict=True)
        for record, number in islice(numbered, part.from_, part.to):
            rows.append(_row(record, f"{place}, {table.unit} {number}", needs_response))
    if not rows:
        raise ValueError(f"{source} must hold at least one row, got none. Check the file, and the slice if you wrote one.")
    return rows


def _split(source: str) -> tuple[str, str | None]:
    """A source without its ``#SPLIT``, and that split."""
    matched = re.fullmatch(r"(.+?)(?:#([^#/]*))?", source, re.DOTALL)
    return (matched[1], matched[2]) if matched else ("", None)


def looks_like_source(text: str) -> bool:
    """Whether ``text`` is surely a source of rows: the sandbox's, or a file that is there. A hub id is not told from a text."""
    return text.startswith("sandbox:") or os.path.isfile(_split(text)[0])  # Path.is_file raises where a text is too long


class Origin(NamedTuple):
    """What rows came from, as a run found it.

    Args:
        role: what the run used them for, such as harmful.
        source: as the run's settings name it.
        num_rows: read from it.
        sha256: of the whole file where the source is one, else of the rows (``digest``).
    """

    role: str
    source: str
    num_rows: int
    sha256: str


def origin(role: str, source: str, rows: Sequence[Row]) -> Origin:
    """Of the ``rows`` that were read from ``source``."""
    path = Path(_split(source)[0])
    return Origin(role, source, len(rows), file_sha256(path) if path.is_file() else digest(rows))


def present_sha256(source: str) -> str | None:
    """What ``origin`` would say of ``source`` now; None where that cannot be seen here: a hub id, or nothing of this name."""
    name = _split(source)[0]
    if name and Path(name).is_file():
        return file_sha256(Path(name))
    return _present_digest(source) if name.startswith("sandbox:") or (name and Path(name).is_dir()) else None


@cache
def _present_digest(source: str) -> str:
    return digest(read_rows(source, needs_response=False))


def file_sha256(path: Path) -> str:
    """Of a file's bytes, which are read once for as long as its size and time of change stay."""
    return _file_sha256(path.absolute(), path.stat().st_size, path.stat().st_mtime_ns)


@cache
def _file_sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, each a line of JSON: the list of its turns, the answer last (empty where there is none)."""
    lines = (json.dumps(row.chat(answered=True), ensure_ascii=False) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tables(name: str) -> dict[str, Table]:
    """Every split that ``name`` (a source without its ``#SPLIT``) holds."""
    path = Path(name)
    if name.startswith("sandbox:"):
        from datamodules.sandbox import sandbox_rows  # it imports Row from here

        split, kind, category = [*name.removeprefix("sandbox:").split("/", 2), "", ""][:3]
        return {"train": _numbered(sandbox_rows(split, kind, category))}
    if name and path.is_dir():
        return {split: _numbered(dataset) for split, dataset in _load_folder(path).items()}
    if name and path.is_file():
        return {"train": _load_file(path)}
    return {split: _numbered(dataset) for split, dataset in _load_from_hub(name).items()}


def _numbered(records: Collection[Any]) -> Table:
    return Table(records, range(1, len(records) + 1), "row")


def _load_file(path: Path) -> Table:
    if path.suffix not in EXTENSIONS:
        raise ValueError(
            f"{path} must end in {', '.join(EXTENSIONS)}, got {path.suffix or 'no extension'}. Convert or rename it."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must hold at least one row, but the file is empty. Check what wrote it.")
    match path.suffix:
        case ".json":
            return _numbered(_read_json(path))
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return _numbered(_read_csv(path))
        case _:
            return _numbered(_load_uncached("parquet", data_files=str(path))["train"])


def _read_json(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno} must be JSON: {error.msg} (column {error.colno}). "
            "A file with one JSON object a line is named .jsonl."
        ) from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold one JSON list of rows, got {_kind(records)}. Wrap the rows in [ and ].")
    return records


def _read_jsonl(path: Path) -> Table:
    records, numbers = [], []
    # not splitlines(): JSON strings may hold the other characters that it breaks at, such as U+2028
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} must be one JSON object: {error.msg} (column {error.colno}). "
                    "Mend the line; a file that is one JSON list is named .json."
                ) from error
            numbers.append(number)
    return Table(records, numbers, "line")


def _read_csv(path: Path) -> list[dict[str, str]]:
    """Every value as text. pandas, behind ``datasets``, would turn an answer "7" into a number and "None" into a gap."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} must be CSV: {error}. Mend it, or convert it to .jsonl.") from error
    for number, record in enumerate(records, start=1):
        if None in record:  # where csv puts what stands beyond the last column
            raise ValueError(f"{path}, row {number} must have a value a column, got more. Quote values that hold a comma.")
    return records


def _load_folder(path: Path) -> Mapping[str, Dataset]:
    if (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))
    if (path / "state.json").exists():
        return {"train": load_from_disk(str(path))}
    try:
        return _load_uncached(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} must hold data files ({', '.join(EXTENSIONS)}) or a data set from Dataset.save_to_disk, got neither. "
            "Check the folder."
        ) from error


def _load_uncached(path: str, **settings: Any) -> DatasetDict:
    """Local data through ``datasets``, in memory: its cache would know a changed file by its time stamp alone."""
    try:
        with tempfile.TemporaryDirectory() as cache:
            return load_dataset(path, cache_dir=cache, keep_in_memory=True, **settings)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"{settings.get('data_files', path)} must hold rows that datasets can read ({error.__cause__ or error}). "
            "Mend it, or convert it to .jsonl."
        ) from error


def _load_from_hub(name: str) -> DatasetDict:
    hub_id, _, config = name.partition(":")
    try:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.endswith(EXTENSIONS):
            raise FileNotFoundError(f"{name} is a path, not a hub id.")
        return load_dataset(hub_id, config or None)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} must name rows, but neither a file, a folder nor a reachable hub id has this name. "
            "Check the spelling and the working directory; for the hub, the network and `hf auth login`."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name} could not be loaded: {error} Here a configuration is named after a colon, {hub_id}:CONFIG."
        ) from error


def _row(record: Any, where: str, needs_response: bool) -> Row:
    """``record`` as a row. ``where`` names it in errors, which show types and never the text: rows may be harmful."""
    if isinstance(record, Row):  # the sandbox's
        turns = [*record.messages, *([("assistant", record.response)] if record.response else [])]
    elif not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with columns, got {_kind(record)}. Give it {FORMS}.")
    else:
        turns = list(_turns(record, where))

    response = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if response is not None and not isinstance(response, str):
        raise ValueError(f"{where} must have text as its response, got {_kind(response)}. Write it as a string.")
    if not (response and response.strip()):
        response = None
    if response is None and needs_response:
        raise ValueError(f"{where} must have a response, but it has none. Add the answer, or take the row out.")
    if not turns or turns[-1][0] != "user":
        got = f"one of the {turns[-1][0]}" if turns else "none"
        raise ValueError(f"{where} must have a prompt: the turn to answer is the user's, got {got}. Add it, or take the row out.")
    for role, content in turns:
        if not (isinstance(content, str) and content.strip()):
            got = "empty text" if isinstance(content, str) else _kind(content)
            raise ValueError(f"{where} must have text in every turn, got {got} from the {role}. Fill the turn, or take it out.")
    return Row(tuple(turns), response)


def _turns(record: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Role and content of each turn of ``record``, in whichever of the accepted forms it comes; contents are not checked."""
    held = {column for column, value in record.items() if value is not None}  # datasets fills absent columns with None
    if column := next((c for c in CONVERSATIONS if c in held), None):
        if not isinstance(record[column], list):
            raise ValueError(
                f"{where} must have a list of turns under {column}, got {_kind(record[column])}. Write them as a list."
            )
        for turn in record[column]:
            yield _turn(turn, where)
        return
    pairs = [pair for pair in PAIRS if held.issuperset(pair)] or [pair for pair in PAIRS if held & set(pair)]
    if not pairs and not any(column in record for column in (*CONVERSATIONS, *sum(PAIRS, ()))):
        found = ", ".join(map(str, record)) or "no columns"
        raise ValueError(f"{where} must have columns that are known, got {found}. Accepted are {FORMS}: rename the columns.")
    if pairs:
        asked, answered = pairs[0]
        prompt, extra = record.get(asked), record.get("input") if asked == "instruction" else None
        if prompt is not None and prompt != "":
            yield "user", f"{prompt}\n\n{extra}" if isinstance(prompt, str) and extra else prompt  # as Alpaca's template has it
        if answered in held:
            yield "assistant", record[answered]


def _turn(turn: Any, where: str) -> tuple[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must have turns with role and content, got {_kind(turn)}. Write each as an object.")
    role, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None) for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{where} must have turns of the roles {', '.join(ROLES)}, got {role!r}. Rename the role, or drop the turn."
        )
    return ROLES[role], content


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
