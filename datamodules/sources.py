"""Rows of chat, read from any file, folder or hub id into one form."""

import importlib.util
import os
import re
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetsError

from casehard.datamodules.columns import FORMS, empty, flaw, kind, turns_of
from casehard.datamodules.facts import fact_rows
from casehard.datamodules.files import EXTENSIONS, Table, load_file, load_folder, numbered
from casehard.datamodules.row import Row
from casehard.datamodules.sandbox import sandbox_rows
from casehard.metrics.errors import SettingError
from casehard.shipped import shipped


def read_rows(source: str, needs_response: bool = True, uses_response: bool | None = None) -> list[Row]:
    """Rows of ``source``, in its order.

    Values are read as they stand in the file, alone or in a folder, and every error names file and line. ``datasets`` finds the
    files and splits of a folder, loads hub ids and folders that it saved, and slices. Only hub ids are cached, so a changed file
    or folder never gives stale rows.

    A column that carries text of the conversation is used or refused; ``columns`` says which columns those are, and
    all others are left alone. Objects that name a key twice are refused where a row is made of them.

    Args:
        source: a .json (one list), .jsonl, .csv or .parquet file in UTF-8, a folder (of such files, or from
            ``Dataset.save_to_disk``), a hub id (``ID:CONFIG`` where it has several configurations) or
            ``sandbox:SPLIT/KIND[/CATEGORY]`` or ``sandbox:facts/HALF``. ``#SPLIT`` at the end takes a split or a slice, as in
            ``rows.json#train[:900]``; a file, or the sandbox, is one split, train.
        needs_response: whether a row without a response is an error. If not, its response is None.
        uses_response: whether a row of several answers, none of them named as its response, is an error; None is needs_response.
    """
    name, spec = split_source(source)
    tables = _tables(name)
    sizes = {split: sum(len(table.records) for table in parts) for split, parts in tables.items()}
    try:
        slices = ReadInstruction.from_spec(spec or "train").to_absolute(sizes)
    except ValueError as error:
        raise SettingError(
            f"{source} must end in a split of its own or a slice of one, but its splits are {', '.join(tables)} ({error}). "
            f"Write, for example, {name}#{next(iter(tables))}[:100]."
        ) from error
    used = needs_response if uses_response is None else uses_response
    rows = []
    for part in slices:
        records = chain.from_iterable(table.named() for table in tables[part.splitname])
        rows += [_row(record, where, needs_response, used) for where, record in islice(records, part.from_, part.to)]
    if not rows:
        raise SettingError(f"{source} must hold at least one row, got none. Check the file, and the slice if you wrote one.")
    return rows


def fetch(source: str) -> None:
    """Put a hub id into the cache, from which ``read_rows`` reads it; nothing of any other source is read."""
    name, _ = split_source(source)
    if not name.startswith("sandbox:") and not (name and Path(name).exists()):
        _load_from_hub(name)


def split_source(source: str) -> tuple[str, str | None]:
    """A source without its ``#SPLIT``, and that split; a # may be in a file's own name."""
    if os.path.isfile(shipped(source)):
        return shipped(source), None
    matched = re.fullmatch(r"(.+?)(?:#([^#/]*))?", source, re.DOTALL)
    return (shipped(matched[1]), matched[2]) if matched else ("", None)


def looks_like_source(text: str) -> bool:
    """Whether ``text`` is surely a source of rows: the sandbox's, or a file that is there. A hub id is not told from a text."""
    return text.startswith("sandbox:") or os.path.isfile(split_source(text)[0])  # Path.is_file raises where a text is too long


def _tables(name: str) -> dict[str, list[Table]]:
    """Every split that ``name`` (a source without its ``#SPLIT``) holds."""
    path = Path(name)
    if name.startswith("sandbox:"):
        split, what, category = [*name.removeprefix("sandbox:").split("/", 2), "", ""][:3]
        rows = fact_rows(what) if split == "facts" else sandbox_rows(split, what, category)
        return {"train": [numbered(name, rows)]}
    if name and path.is_dir():
        return load_folder(path)
    if name and path.is_file():
        return {"train": [load_file(path)]}
    loaded = _load_from_hub(name)
    return {split: [numbered(name if len(loaded) == 1 else f"{name}#{split}", data)] for split, data in loaded.items()}


def _load_from_hub(name: str) -> Mapping[str, Dataset]:
    hub_id, _, config = name.partition(":")
    try:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.endswith(EXTENSIONS) or _is_format(hub_id):
            raise FileNotFoundError(f"{name} is a path or a format, not a hub id.")
        data = load_dataset(hub_id, config or None)
        if not any(split.builder_name == "csv" for split in data.values()):
            return data
        # once more, as text: pandas guesses numbers and gaps
        text = Features({column: Value("string") for split in data.values() for column in split.column_names})
        return load_dataset(hub_id, config or None, features=text, keep_default_na=False)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} must name rows, but neither a file, a folder nor a reachable hub id has this name. "
            "Check the spelling and the working directory; for the hub, the network and `hf auth login`."
        ) from error
    except (DatasetsError, ValueError) as error:
        raise SettingError(
            f"{name} could not be loaded: {error} Here a configuration is named after a colon, {hub_id}:CONFIG."
        ) from error


def _is_format(name: str) -> bool:
    """Whether ``datasets`` takes ``name`` for a format, such as csv, and would read whatever files the working directory has."""
    return name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None


def _row(record: Any, where: str, needs_response: bool, uses_response: bool) -> Row:
    """``record`` as a row. ``where`` names it in errors, which show types and never the text: rows may be harmful."""
    if isinstance(record, Row):  # the sandbox's
        turns = [*record.messages, *([("assistant", record.response)] if record.response else [])]
    elif not isinstance(record, dict):
        raise SettingError(f"{where} must be an object with columns, got {kind(record)}. Give it {FORMS}.")
    else:
        turns = turns_of(record, where, uses_response)

    response = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if empty(response):
        response = None
    elif got := flaw(response):
        raise SettingError(f"{where} must have text as its response, got {got}. Write it as a string, or take the row out.")
    if response is None and needs_response:
        raise SettingError(f"{where} must have a response, but it has none. Add the answer, or take the row out.")
    if not turns or turns[-1][0] != "user":
        got = f"one of the {turns[-1][0]}" if turns else "none"
        raise SettingError(
            f"{where} must have a prompt: the turn to answer is the user's, got {got}. Add it, or take the row out."
        )
    for role, content in turns:
        if got := flaw(content):
            raise SettingError(f"{where} must have text in every turn, got {got} from the {role}. Mend the turn, or take it out.")
    return Row(tuple(turns), response, where)
