"""Files and folders of rows, every value as it stands there, and the place of each row for errors."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError

from casehard.datamodules.columns import Doubled, kind, names_in_error
from casehard.metrics.errors import SettingError

EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet")
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json")  # .json files of a folder that hold no rows


class Table(NamedTuple):
    """The records of one file or data set, and how an error names each of them."""

    place: str
    records: Collection[Any]
    numbers: Sequence[int]
    unit: str = "row"  # what the numbers count: line or row

    def named(self) -> Iterator[tuple[str, Any]]:
        """Each record behind its name."""
        records = iter(self.records)
        for number in self.numbers:
            name = f"{self.place}, {self.unit} {number}"
            try:
                yield name, next(records)
            except UnicodeDecodeError as error:  # of a text in a .parquet file
                raise SettingError(f"{name} must be UTF-8 text, got other bytes. Write the file anew.") from error


def numbered(place: str, records: Collection[Any]) -> Table:
    """Records that are counted from 1."""
    return Table(place, records, range(1, len(records) + 1))


def load_file(path: Path) -> Table:
    """The rows of a file, read as its extension says."""
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise SettingError(
            f"{path} must end in {', '.join(EXTENSIONS)}, got {path.suffix or 'no extension'}. Convert, unpack or rename it."
        )
    if path.stat().st_size == 0:
        raise SettingError(f"{path} must hold at least one row, but the file is empty. Check what wrote it.")
    match suffix:
        case ".json":
            return numbered(str(path), _read_json(path))
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return numbered(str(path), _read_csv(path))
        case _:
            return numbered(str(path), _read_parquet(path))


def load_folder(path: Path) -> dict[str, list[Table]]:
    """The splits of a folder, as ``datasets`` finds them, each file read as it is by itself."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        return {
            split: [numbered(str(path) if len(splits) == 1 else f"{path}#{split}", dataset)] for split, dataset in splits.items()
        }
    try:
        with tempfile.TemporaryDirectory() as cache:
            # by its whole path: "csv" alone names a format, and the working directory would be read
            data_files = load_dataset_builder(str(path.absolute()), cache_dir=cache).config.data_files or {}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} must hold data files ({', '.join(EXTENSIONS)}) or a data set from Dataset.save_to_disk, got neither. "
            "Check the folder; in one, names must end so in small letters."
        ) from error
    except (DatasetsError, ValueError) as error:
        raise SettingError(f"{path} must hold files that datasets can put in splits ({error}). Name a file of it.") from error
    files = {str(split): [path / os.path.relpath(name, path.resolve()) for name in names] for split, names in data_files.items()}
    _refuse_left_out(path, files)
    return {split: [load_file(file) for file in names] for split, names in files.items()}


def _refuse_left_out(path: Path, files: dict[str, list[Path]]) -> None:
    """``datasets`` takes the files of one format, and only those with a split in their name if one has it."""
    card = path / "README.md"
    if card.exists() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return  # the folder says itself which files are its
    taken = {file for names in files.values() for file in names}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        if file.suffix.lower() in EXTENSIONS and file.name not in DESCRIPTIONS and not hidden and file not in taken:
            raise SettingError(
                f"{path} must have every data file in a split, but {file} would be left out of {', '.join(files)}. "
                "Give all files one format and the names of their splits, move it away, or name files as sources."
            )


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if (place := raw.find(b"\0")) >= 0:
        got = "a NUL, as UTF-16 has them"
    else:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place, got = error.start, f"the byte 0x{error.object[error.start]:02x}"
    line = raw.count(b"\n", 0, place) + 1
    raise SettingError(f"{path}, line {line} must be UTF-8 text, got {got}. Save the file as UTF-8.")


def _parse(text: str, path: Path, line: int | None, wanted: str, hint: str) -> Any:
    """The value of JSON text: a line of a file, or all of it where ``line`` is None."""
    place = f"{path}, line {line}" if line else str(path)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{path}, line {line or error.lineno} must be {wanted}: {error.msg} (column {error.colno}). {hint}"
        ) from error
    except RecursionError as error:
        raise SettingError(f"{place} must be {wanted}: nested too deep to be read. {hint}") from error
    except ValueError as error:  # of int()
        raise SettingError(f"{place} must be {wanted}: a number is too long to be read. {hint}") from error


def _object(pairs: list[tuple[str, Any]]) -> Any:
    keys = dict(pairs)
    return keys if len(keys) == len(pairs) else Doubled(next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))


def _lines(text: str) -> list[str]:
    # not splitlines(): JSON strings may hold the other characters that it breaks at, such as U+2028
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_json(path: Path) -> list[Any]:
    records = _parse(_read_text(path), path, None, "JSON", "A file with one JSON object a line is named .jsonl.")
    if not isinstance(records, list):
        raise SettingError(f"{path} must hold one JSON list of rows, got {kind(records)}. Wrap the rows in [ and ].")
    return records


def _read_jsonl(path: Path) -> Table:
    records, numbers = [], []
    for number, line in enumerate(_lines(_read_text(path)), start=1):
        if line.strip():
            hint = "Mend the line; a file that is one JSON list is named .json."
            records.append(_parse(line, path, number, "one JSON object", hint))
            numbers.append(number)
    return Table(str(path), records, numbers, "line")


def _read_csv(path: Path) -> list[dict[str, str]]:
    """Every value as text. pandas, behind ``datasets``, would turn an answer "7" into a number and "None" into a gap."""
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        columns, *records = [line for line in lines if line] or [[]]
    except csv.Error as error:
        raise SettingError(f"{path}, line {lines.line_num} must be CSV: {error}. Mend it, or convert it to .jsonl.") from error
    if doubled := [column for i, column in enumerate(columns) if column and column in columns[:i]]:
        raise SettingError(f"{path} must name each column once, got {names_in_error(doubled[:1])} twice. Rename one.")
    for number, record in enumerate(records, start=1):
        if len(record) != len(columns):
            got = "more" if len(record) > len(columns) else "fewer"
            raise SettingError(f"{path}, row {number} must have a value a column, got {got}. Quote values that hold a comma.")
    return [dict(zip(columns, record, strict=True)) for record in records]


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path, partitioning=None))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} must be a parquet file ({error}). Mend it, or convert it to .jsonl.") from error
