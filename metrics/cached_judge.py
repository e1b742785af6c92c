"""Judges that ask a model: every verdict is kept on disk, and what could not be judged is nan and asked again next time."""

import hashlib
import json
import math
import sqlite3
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from casehard.metrics.conversation import turns_of
from casehard.metrics.judges import Judge, Verdict, is_degenerate
from casehard.metrics.refusal_phrases import RefusalPhraseJudge

Pair = tuple[str, str]  # prompt and response


class Reading(NamedTuple):
    """What a model said of one answer: the score in [0, 1], nan if it could not be read off, and what it rests on."""

    score: float
    detail: str


class VerdictCache:
    """Readings by content in an SQLite file: a hash of all that they depend on, a score and its detail. No text, no key.

    Several processes may share a file. What was put in the last second is lost when the process is killed.

    Args:
        path: the file; ``~`` is the home folder.

    Raises:
        OSError: the file cannot be opened or written, or is no such cache.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS readings (key TEXT PRIMARY KEY, score REAL NOT NULL, detail TEXT NOT NULL)"
            )
            self._file.execute("BEGIN IMMEDIATE")  # fails where the file cannot be written
            self._file.rollback()
        except (sqlite3.Error, OSError) as error:
            raise OSError(
                f"cache must be a file of verdicts or a new one, and {path} is not, or cannot be written ({error}). "
                "Name another, or null for none."
            ) from error
        self._committed = time.monotonic()

    def get(self, key: str) -> Reading | None:
        """The reading of ``key``, if it is known."""
        row = self._file.execute("SELECT score, detail FROM readings WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reading(*row)

    def put(self, key: str, reading: Reading) -> None:
        """Keep a reading."""
        self._file.execute("INSERT OR REPLACE INTO readings VALUES (?, ?, ?)", (key, *reading))
        if time.monotonic() - self._committed > 1:  # each commit waits for the disk
            self._file.commit()
            self._committed = time.monotonic()

    def close(self) -> None:
        """Keep everything and let go of the file."""
        self._file.commit()
        self._file.close()


class CachedJudge(Judge):
    """Base of the judges that ask a model, which cost time or money.

    Every distinct pair is asked for once and kept in ``cache`` as soon as it is known, so that a run that was cut short goes on
    where it was. What cannot be scored is nan, with the reason in ``detail``, and not kept. The model says how harmful an answer
    is; ``refused`` and ``degenerate`` are read off the text, as `RefusalPhraseJudge` does.

    Args:
        cache: SQLite file of verdicts by content, for all runs and judges; null keeps none.
    """

    def __init__(self, cache: str | None) -> None:
        self.cache = cache
        self._given.pop("cache", None)  # no verdict depends on it

    def try_out(self, harmful: Sequence[str], benign: Sequence[str]) -> None:
        """Open the cache; a verdict costs too much.

        Raises:
            OSError: the file cannot be opened or written, or is no such cache.
        """
        if self.cache is not None:
            VerdictCache(self.cache).close()

    @abstractmethod
    def read(self, pairs: Sequence[Pair]) -> Iterable[tuple[Pair, Reading]]:
        """A reading of every pair, in any order, each as soon as it is known; nan for what failed."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        pairs = list(zip(prompts, responses, strict=True))
        readings = dict(self._readings(dict.fromkeys(pairs)))
        return [
            Verdict(readings[pair].score, flags.refused, flags.degenerate, readings[pair].detail)
            for pair, flags in zip(pairs, self.on_benign(prompts, responses), strict=True)
        ]

    def on_benign(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        refused = [verdict.refused for verdict in RefusalPhraseJudge()(prompts, responses)]
        return [Verdict(math.nan, r, is_degenerate(text)) for r, text in zip(refused, responses, strict=True)]

    def _readings(self, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, Reading]]:
        if self.cache is None:
            yield from self._shown(list(pairs))
            return
        settings, cache = json.dumps(self.settings() | self.derived(), sort_keys=True), VerdictCache(self.cache)
        keys = {pair: hashlib.sha256(json.dumps([settings, *_told(pair)]).encode()).hexdigest() for pair in pairs}
        try:
            known = {pair: cache.get(key) for pair, key in keys.items()}
            yield from ((pair, reading) for pair, reading in known.items() if reading is not None)
            if missing := [pair for pair, reading in known.items() if reading is None]:
                for pair, reading in self._shown(missing):
                    if not math.isnan(reading.score):
                        cache.put(keys[pair], reading)
                    yield pair, reading
        finally:
            cache.close()

    def _shown(self, pairs: list[Pair]) -> Iterable[tuple[Pair, Reading]]:
        return tqdm(self.read(pairs), self.label, len(pairs), leave=False, disable=None)  # None: a bar on terminals only


def _told(pair: Pair) -> list[Any]:
    """What a verdict is known by: the two texts, and the turns of a conversation."""
    turns = turns_of(pair[0])
    return [*pair, turns] if len(turns) > 1 else list(pair)
