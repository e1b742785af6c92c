"""An attack by somebody else's program."""

import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import first_rank, from_first
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.checkpoint import checkpoint_files, load_model
from casehard.engine.command import CommandError, Ended, changed_model, run_command, variables
from casehard.engine.export import save_model
from casehard.lightning_modules.other_models import hold, read_other
from casehard.metrics.errors import SettingError
from casehard.metrics.names import visible
from casehard.records.files import append_whole

MANIFEST = "external.jsonl"  # in the run's folder, a line a run of the command
UNANSWERED = "EOF when reading a line"  # how Python's input() fails
GOES_ON = "goes on"  # what the first rank tells the others while the command runs


class ExternalAttack(Attack):
    """Save the model, run a command on it in an environment of its own, and score what it leaves (heretic, TRL, a quantiser).

    The command gets the model as anybody would, in Hugging Face format with adapters merged, and leaves a whole model, an adapter
    (peft) or a GGUF file of the same architecture. A non-zero exit, a time-out, no model, unchanged weights, another shape or
    vocabulary are errors. It runs without a shell, in a temporary folder that is removed, with all that it started. Of our
    variables it gets those of ``engine.command.PASSED``: no keys, no ``PYTHONPATH``. ``external.jsonl`` in the run's folder has
    command, version, hashes of the weights, seconds, device and exit status of every run of it.

    In ``command``, ``input``, ``files`` and ``environment`` stand for paths: ``{model}``, the model's folder; ``{out}``, an empty
    one for what the tool makes; ``{rows}``, a JSONL file of rows to train on. ``{seed}`` stands for the attack's seed.

    Cost: passes and tokens are the command's own and unknown. Memory: two models on the CPU more than the command's. Several
    processes: the first one runs it; on several machines TMPDIR must be a folder that all of them see.

    Args:
        command: its words; paths in it must be absolute.
        threat_model: open_weight, or a service that trains by the command, in which no defense of its own acts.
        environment: variables for it, such as PATH.
        input: what it reads on standard input, such as a line for each question that it asks.
        files: texts written into the folder where it runs, by name, such as a config of its own.
        prompts: files there of one prompt a line, the last turn of each row, by name: sources of rows that are not scored.
        timeout_s: seconds that it may take, > 0.
        version_command: prints the tool's version, for the manifest; null leaves it out.
        result: where within ``{out}`` the model is, such as model.gguf; "" is ``{out}`` itself.
        poison_ratio: harmful share of ``{rows}``, in [0, 1].
        num_samples: number of ``{rows}``.
        row_format: of ``{rows}``: prompt_completion, as TRL takes it to train on answers alone, or messages.
        keep: folder to which the attacked model is copied; null leaves none behind.
        settings: the rest of ``Attack``'s.
    """

    def __init__(
        self,
        command: list[str],
        threat_model: ThreatModel = "open_weight",
        environment: dict[str, str] | None = None,
        input: str = "",
        files: dict[str, str] | None = None,
        prompts: dict[str, list[str]] | None = None,
        timeout_s: float = 3600.0,
        version_command: list[str] | None = None,
        result: str = "",
        poison_ratio: float = 1.0,
        num_samples: int = 100,
        row_format: Literal["prompt_completion", "messages"] = "prompt_completion",
        keep: str | None = None,
        **settings: Any,
    ) -> None:
        self.command, self.environment, self.input = command, environment or {}, input
        self.files, self.prompts = files or {}, prompts or {}
        self.timeout_s, self.version_command, self.result = timeout_s, version_command, result
        self.poison_ratio, self.num_samples, self.row_format, self.keep = poison_ratio, num_samples, row_format, keep
        if not all(map(self._names, ("{model}", "{out}"))):
            raise SettingError(f"command must name {{model}} and {{out}}, or a file of it must, got {shlex.join(command)!r}.")
        if not timeout_s > 0:
            raise SettingError(f"timeout_s must be > 0, got {timeout_s}.")
        if not 0 <= poison_ratio <= 1 or num_samples < 1:
            raise SettingError(f"poison_ratio must lie in [0, 1] and num_samples be >= 1, got {poison_ratio} and {num_samples}.")
        if row_format not in ("prompt_completion", "messages"):
            raise SettingError(f"row_format must be prompt_completion or messages, got {row_format!r}.")
        names = map(Path, (*self.files, *self.prompts, result))
        if unlike := next((str(name) for name in names if name.is_absolute() or ".." in name.parts), None):
            raise SettingError(f"files, prompts and result must be names within the command's own folders, got {unlike!r}.")
        super().__init__(threat_model, **settings)

    def _names(self, placeholder: str) -> bool:
        return any(placeholder in t for t in (*self.command, self.input, *self.files.values(), *self.environment.values()))

    @property
    def harmful(self) -> bool:  # type: ignore[override]
        """Unless it trains on benign rows."""
        return self.poison_ratio > 0 or not self._names("{rows}")

    def settings(self) -> dict[str, Any]:
        """What is run, and on which rows."""
        texts = self.files | ({"standard input": self.input} if self.input else {})
        hashes = {name: sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}
        prompts = {"prompts": self.prompts} if self.prompts else {}
        rows = {"poison_ratio": self.poison_ratio, "num_samples": self.num_samples} if self._names("{rows}") else {}
        return rows | prompts | {"command": shlex.join(self.command)} | ({"files": hashes} if hashes else {})

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """What stands in ``{rows}``."""
        return data.mixture(self.num_samples, self.poison_ratio, seed) if self._names("{rows}") else []

    def read(self, data: SFTDataModule, seed: int) -> dict[str, str]:
        """The files that are made of rows, by name."""
        asked = {name: data.further(sources, f"prompts.{name}", answered=False) for name, sources in self.prompts.items()}
        lines = {name: [" ".join(row.messages[-1][1].split()) for row in rows] for name, rows in asked.items()}
        if rows := self.rows(data, seed):
            lines["rows.jsonl"] = [json.dumps(self.as_json(row)) for row in rows]
        return {name: "".join(f"{line}\n" for line in text) for name, text in lines.items()}

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Also make sure that the program is there, and the prompts.

        Raises:
            SettingError: one is not; or a prompt is scored.
        """
        super().prepare(data, seed)
        self.read(data, seed)
        for words in filter(None, (self.command, self.version_command)):
            if shutil.which(words[0], path=variables(self.environment).get("PATH")) is None:
                raise SettingError(
                    f"command must begin with a program that is there, got {words[0]!r}. Install it, or name its path."
                )

    def steps(self, target: Target) -> Iterator[int]:
        """Save, run, read."""
        module = target.module
        whole = module.exported()  # all ranks take part
        with tempfile.TemporaryDirectory(prefix="casehard-") as own:
            folder = Path(from_first(own))
            left, path = self._awaited(target, whole, folder), str(folder / "out" / self.result)
            load = partial(load_model, path, module.backbone.dtype) if left is None else lambda: left
            try:
                hold(module, read_other(load, module.shard_mesh(), with_logits=True), path, "what the command leaves")
            except SettingError as error:
                raise CommandError(f"{self.name}: {error}") from error
            from_first("")  # all have read it
        target.spend(passes=math.nan)
        yield 1

    def _awaited(self, target: Target, model: PreTrainedModel | None, folder: Path) -> PreTrainedModel | None:
        """The attacked model, on the first rank; the others wait until it is there."""
        if first_rank():
            assert model is not None
            try:
                left = self._left(target, model, folder)
            except Exception as error:
                from_first(str(error) or repr(error))  # "" would say that the model is there
                raise
            from_first("")
            return left
        while (said := from_first("")) == GOES_ON:
            pass
        if said:
            raise CommandError(said)
        return None

    def _left(self, target: Target, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """The attacked model; what it takes to get it is in the manifest."""
        tokenizer, variable = target.module.tokenizer, {"{seed}": str(target.seed)}
        places = {"model": "model", "out": "out", "rows": "rows.jsonl"}
        variable |= {f"{{{name}}}": str(folder / place) for name, place in places.items()}

        def filled(text: str) -> str:
            for name, value in variable.items():
                text = text.replace(name, value)
            return text

        save_model(model, tokenizer, folder / "model")
        (folder / "out").mkdir()
        own = {name: filled(text) for name, text in self.files.items()}
        for name, text in (self.read(target.data, target.seed) | own).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        environment = variables({name: filled(text) for name, text in self.environment.items()})
        ended, version = Ended(0, 0.0, ""), ""
        if self.version_command is not None:
            ended = run_command(self.version_command, folder, environment, self.timeout_s)
            version = ended.said
        if ended.status == 0:
            words, waits = [*map(filled, self.command)], lambda: from_first(GOES_ON)
            ended = run_command(words, folder, environment, self.timeout_s, waits, filled(self.input))
        out = folder / "out" / self.result
        left_there = checkpoint_files(str(out)) if out.exists() else {}
        hashes = {name: digest for name, digest in left_there.items() if not name.endswith((".json", ".jinja"))}
        self._note(target, {"version": version, "exit_status": ended.status, "seconds": round(ended.seconds, 3)}, hashes)
        if ended.status != 0:
            was = f"{self.timeout_s:g} s were over" if ended.status is None else f"it was {ended.status}"
            was += " (it asked more than input answers: add the lines that it waits for)" if UNANSWERED in ended.said else ""
            raise self._wrong(f"end with status 0, and {was}", ended)
        try:
            left = changed_model(out, model, tokenizer)
        except CommandError as error:
            raise self._wrong(error, ended) from error
        if self.keep is not None:
            who = "undefended" if target.undefended else target.module.label
            shutil.copytree(folder / "out", Path(self.keep, f"{self.name}-{who}-seed{target.seed}"), dirs_exist_ok=True)
        return left

    def as_json(self, row: Row) -> dict[str, Any]:
        """A line of ``{rows}``."""
        turns = row.chat(answered=True)
        return {"messages": turns} if self.row_format == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]}

    def _wrong(self, what: object, ended: Ended) -> CommandError:
        command = visible(shlex.join(self.command))
        return CommandError(f"{command[:200]} must {what}. Its log ends: {visible(ended.said)[-500:]}")

    def _note(self, target: Target, ended: dict[str, Any], hashes: dict[str, str]) -> None:
        """Add a line to the manifest of the run, if it has a folder."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        line: dict[str, Any] = {"attack": self.name, "defense": "none" if target.undefended else target.module.label}
        line |= {"threat_model": self.threat_model, "seed": target.seed, "epoch": target.epoch}
        line |= {"command": self.command, "variables": sorted(self.environment), "device": device} | ended | {"sha256": hashes}
        for results in (callback for callback in target.trainer.callbacks if isinstance(callback, Results)):  # type: ignore[attr-defined]
            results.folder.mkdir(parents=True, exist_ok=True)
            append_whole(results.folder / MANIFEST, json.dumps(line) + "\n")

    def what_trains(self, target: Target) -> str:
        """The command's own business."""
        return f"by {Path(self.command[0]).name}"

    def notes(self, target: Target) -> list[str]:
        """Also what nobody here can see."""
        unseen = f"whether {Path(self.command[0]).name} chose by prompts that are scored here cannot be seen"
        service = ["the service trains by the command, in which its defense does not act"] if target.defended else []
        return [*super().notes(target), *service, unseen]
