"""Every command and snippet of the README and docs/ is run, made small, and what they name is there.

Blocks of a page run from top to bottom in one empty folder. Python shares a namespace; ``fit``, ``test`` and ``validate`` take a step or two
on a few rows; a study's cells are forked. A block with a file's name in its first line (``# mine.py``), or in a comment in front of it
(``<!-- file: rows.jsonl -->``), is that file; several of one name are one file. What cannot run here says why in such a comment
(``<!-- not run: needs 8 GPUs -->``); its settings are still checked where the files that it names are there.
"""

import gc
import glob
import hashlib
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import yaml
from jsonargparse import Namespace
from toy import ROOT, start_fork_server

import casehard
from casehard.cli import run_folder
from casehard.cli.lightning_cli import resolved
from casehard.cli.main import OTHERS, TRAINING
from casehard.datamodules.sandbox import sandbox_rows
from casehard.evidence.study_plan import read_study
from casehard.metrics.errors import SettingError
from casehard.records.files import RUN_FOLDER

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "experiments/cluster/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TOOLS = {"pytest", "ruff", "mypy", "mkdocs"}  # the tests' own, and what `.ci/run` runs
SHELL = {"cat", "cd", "cp", "echo", "export", "head", "ls", "mkdir", "mv", "printf", "sed"}  # run as they stand
OUTPUT = {"", "text", "csv"}  # languages of blocks that show something
TOY = "toy"  # where the toy model stands, in every page's folder
SMALL: dict[str, Any] = {  # whatever setting has such a name
    **{"num_samples": 20, "num_evaluated": 1, "max_new_tokens": 1, "batch_size": 2, "num_attack_steps": 1, "max_steps": 1},
    **{"num_inner_steps": 1, "num_outer_steps": 5, "num_sft_steps": 0, "num_trials": 1, "num_answers": 2, "checkpoint_steps": 1},
    **{"score_steps": [1], "phases": None, "attack_every": None, "accelerator": "cpu", "devices": 1},
    **{"wandb": "disabled", "score": False, "enable_progress_bar": False, "log_every_n_steps": 1},
}


def small(settings: Any) -> Any:
    """Settings of a run of a second, on rows of the sandbox the first ones and a toy for its models; what is null stays null."""
    if isinstance(settings, str):
        settings = re.sub(r"^(sandbox:[^#]*).*", r"\1#train[:24]", settings)
        return TOY if re.fullmatch(r"models/sandbox/\w+", settings) else settings
    if isinstance(settings, list):
        return [small(value) for value in settings]
    if isinstance(settings, dict | Namespace):
        for key, value in list(settings.items(branches=True) if isinstance(settings, Namespace) else settings.items()):
            name = key.rpartition(".")[2]
            if value is not None and name in SMALL:
                settings[key] = SMALL[name]
            elif name != "choices" and isinstance(value, str | list | dict):
                settings[key] = small(few(value) if name == "callbacks" and isinstance(value, list) else value)
    return settings


GIVEN = {  # runs that a page may take as done, and how they are made
    "runs/sbr/version_0": ["fit", "--config", "experiments/sbr.yaml"],
    "runs/sandbox": ["study", "experiments/studies/sandbox.yaml"],
}


ROWS = {  # what stands in for a reader's own files, by the setting that names them
    **{"benign": ("attacker", "mood"), "harmful": ("attacker", "harmful"), "refusals": ("defender", "refusals")},
    **{
        "alignment_harmful": ("defender", "harmful"),
        "alignment_benign": ("defender", "howto"),
        "anchors": ("defender", "refusals"),
    },
    **{"harmful_prompts": ("test", "harmful"), "benign_prompts": ("test", "howto"), "task": ("test", "mood")},
    **{"rows": ("attacker", "mood"), "harmful_rows": ("attacker", "harmful")},  # of `casehard init`
}


def few(callbacks: list[Any]) -> list[Any]:
    """A page's own callbacks, and the first of casehard's."""
    own = [callback for callback in callbacks if not callback["class_path"].startswith("casehard.")]
    return own + [callback for callback in callbacks if callback not in own][:1]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: where, in which language, what, and the comment in front of it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def why_not(self) -> str | None:
        return self.comment.removeprefix("not run:").strip() if self.comment.startswith("not run") else None

    @property
    def file(self) -> str | None:
        """The file that the block is, by its comment or its first line."""
        if self.comment.startswith("file:"):
            return self.comment.removeprefix("file:").strip()
        named = re.search(r"(?:^|\s)# ([\w./-]+\.(?:py|yaml|toml))\b", self.text.partition("\n")[0])
        return named[1] if named else None

    def commands(self) -> Iterator[tuple[int, str]]:
        """Each command with its line; in a console those behind a ``$``."""
        lines, number = self.text.replace("\\\n", "\\\0").split("\n"), self.line
        for line in lines:
            command = line.replace("\\\0", " ").strip()
            if self.language == "console":
                command = command[2:] if command.startswith("$ ") else ""
            if command and not command.startswith("#"):
                yield number, command
            number += 1 + line.count("\0")


def blocks(page: Path) -> Iterator[Block]:
    lines, comment, number = page.read_text().splitlines(), "", 0
    while number < len(lines):
        line = lines[number].strip()
        if fence := re.match(r"(`{3,})\s*(\w*)", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == fence[1])
            indent = len(lines[number]) - len(lines[number].lstrip())
            yield Block(page, number + 2, fence[2], "\n".join(row[indent:] for row in lines[number + 1 : end]), comment)
            number, comment = end, ""
        elif line:
            found = re.fullmatch(r"<!-- (.*) -->", line)
            comment = found[1] if found else ""
        number += 1


def prose(page: Path) -> str:
    """A page without its blocks, with as many lines."""
    return re.sub(r"^ *(`{3,}).*?^ *\1$", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.S | re.M)


# ---- running a page


@dataclass
class Reader:
    """Somebody who does what a page says, in the working directory.

    Args:
        kept: folder of runs that pages share.
        namespace: of the page's Python.
        files: how often each was written.
    """

    kept: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    files: dict[str, int] = field(default_factory=dict)

    def block(self, block: Block) -> None:
        if block.file:
            self.write(block, Path(block.file))
        if block.why_not is not None:
            self.check(block)
        elif block.language == "python" and not block.file:
            exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), self.namespace)
        elif block.language == "yaml":
            self.yaml(block)
        elif block.language in ("bash", "sh", "console"):
            for line, command in block.commands():
                try:
                    self.command(command)
                except BaseException as error:
                    raise AssertionError(
                        f"{block.page.relative_to(ROOT)}:{line}: {command}\n{type(error).__name__}: {error}"
                    ) from error
        else:
            assert block.file or block.language in OUTPUT, (
                f"{block.where} is {block.language} that no test runs: say why in front of it"
            )

    def write(self, block: Block, file: Path) -> None:
        """Add a block to its file; a module's lines have the numbers that they have on the page."""
        before = file.read_text() if str(file) in self.files else ""
        self.files[str(file)] = self.files.get(str(file), 0) + 1
        file.parent.mkdir(parents=True, exist_ok=True)
        blank = max(0, block.line - 1 - before.count("\n")) if file.suffix == ".py" else 0
        file.write_text(before + "\n" * blank + block.text + "\n")

    def yaml(self, block: Block) -> None:
        """A study is read, all else is a config that the command line resolves."""
        text = yaml.safe_load(block.text)
        file = Path(block.file or "block.yaml")
        if not block.file:
            file.write_text(block.text)
        if "defenses" in text:
            read_study(str(file))
        elif "model" in text or "data" in text or "trainer" in text or "run" in text:
            forget_modules()
            resolved(["fit", "--config", str(file)])
        else:
            pytest.fail(f"{block.where} is YAML of nothing that casehard reads: say why in front of it")

    def check(self, block: Block) -> None:
        """The settings of what is not run, where the files that it names are there."""
        for line, command in block.commands() if block.language in ("bash", "sh", "console") else ():
            words = shlex.split(command, comments=True)
            named = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--config"]
            trains = words[0] in ("casehard", "lightning") and words[1] in TRAINING
            if trains and all(Path(name).exists() or (ROOT / name).exists() for name in named):
                try:
                    resolved(words[1:])
                except SettingError as error:
                    raise AssertionError(f"{block.page.relative_to(ROOT)}:{line}: {command}\n{error}") from error

    def command(self, text: str) -> None:
        for part in re.split(r"\s&&\s", text):
            words = shlex.split(part, comments=True)
            if words[0] in SHELL:
                subprocess.run(["bash", "-ec", part], check=True, capture_output=True, timeout=20)
                continue
            words = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
            if words[:3] == ["python", "-m", "casehard"]:
                words = words[2:]
            if words[0] == "pip":
                require_extras(part)
            elif words[0] == "python" and words[1].startswith("benchmarks/"):
                require_arguments(ROOT / words[1], words[2:])
            elif words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
            elif words[0] in ("casehard", "lightning"):
                self.casehard(words[1:])
            else:
                assert words[0] in TOOLS, f"nobody runs {words[0]}: say why in a comment in front of the block"

    def casehard(self, words: list[str]) -> None:
        """Run ``casehard``, or take what it left for another page. A page may read runs that it has not made."""
        if not words:
            words = ["--help"]
        for run, made_by in GIVEN.items():
            if any(word.startswith(run) for word in words) and not Path(run).exists():
                self.casehard(made_by)
        for file in (Path(word) for word in words if word.endswith(".yaml") and Path(word).exists()):
            provide(yaml.safe_load(file.read_text()))
        for flag, word in pairwise(words) if words[0] == "init" else ():
            provide(word, flag.removeprefix("--"))
        own = any(Path(word).exists() for word in words)  # something of this page is in it
        kept, before = self.kept / hashlib.sha256(repr(words).encode()).hexdigest(), set(Path().glob("runs/*/*"))
        if kept.exists() and not own:
            for part in kept.glob("*/*"):
                number = len(list(Path("runs", part.parent.name).glob("version_*")))
                copied(part, Path("runs", part.parent.name, re.sub(r"^version_\d+$", f"version_{number}", part.name)))
            return
        stop = run_main(["study", small_study(words[1]), *words[2:]] if words[0] == "study" else words)
        assert stop in (None, 0), stop
        if not own:
            kept.mkdir()
            for part in set(Path().glob("runs/*/*")) - before:
                copied(part, kept / part.parent.name / part.name)

    def finish(self) -> None:
        """Take a step with every defense of the page that no command has run."""
        for module in [Path(file).stem for file in self.files if Path(file).suffix == ".py" and "/" not in file]:
            used = "".join(path.read_text() for path in Path("runs").rglob("config.yaml"))
            for name, kind in vars(importlib.import_module(module)).items():
                if isinstance(kind, type) and issubclass(kind, casehard.Defense) and kind.__module__ == module:
                    where = f"class_path: {module}.{name}\n"
                    if where not in used:
                        aligns = kind.overrides("rows") or kind.overrides("alignment_loss")
                        base = (
                            ["--model.init_args.checkpoint", "models/sandbox/base", "--data.train_on", "alignment"]
                            if aligns
                            else []
                        )
                        none = ["--config", "experiments/attack/none.yaml"]
                        assert run_main(["fit", "--model", f"{module}.{name}", *none, *base]) in (None, 0), name


def provide(settings: Any, name: str = "") -> None:
    """Put the rows and models there that a reader's config names and that are not: the sandbox's, and a toy."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            provide(value, key)
    elif isinstance(settings, list):
        for value in settings:
            provide(value, name)
    elif isinstance(settings, str):
        file = Path(settings.partition("#")[0])
        if file.exists() or file.is_absolute() or (ROOT / file).exists() or settings.startswith("sandbox:"):
            return
        if name in ("checkpoint", "model"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(Path(TOY).resolve())
        elif name in ROWS and file.suffix in (".json", ".jsonl"):
            rows = [{"messages": row.chat(answered=True)} for row in sandbox_rows(*ROWS[name])[:40]]
            text = json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def small_study(name: str) -> str:
    """A study's file in the working directory, with two defenses, one attack and one seed of what ``name`` has."""
    study = yaml.safe_load((Path(name) if Path(name).exists() else ROOT / name).read_text())
    few = {"defenses": dict(list(study["defenses"].items())[:2]), "attacks": dict(list(study["attacks"].items())[:1])}
    Path(Path(name).name).write_text(yaml.safe_dump(study | few | {"seeds": study["seeds"][:1]}))
    return Path(name).name


def copied(part: Path, to: Path) -> None:
    """A run's folder, or a file beside it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if part.is_dir() else shutil.copy)(part, to)


def forget_modules() -> None:
    """Forget modules of the working directory, which a page may have added to and another page has others of."""
    here = os.getcwd()
    for name, module in list(sys.modules.items()):
        if here in str(vars(module).get("__file__")):
            del sys.modules[name]
    importlib.invalidate_caches()


def run_main(words: list[str]) -> Any:
    """What ``casehard`` ends with, run in this process as if it were one of its own."""
    run_folder.STARTED = time.time()
    forget_modules()
    try:
        casehard.main(words)
    except SystemExit as stop:
        return stop.code
    return None


def require_extras(pip: str) -> None:
    """``pip install`` names constraints that are there, and extras that pyproject.toml has."""
    assert "install -c constraints.txt -e " in pip, "pip install must be pinned"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for group in re.findall(r"\.\[([\w,]+)\]", pip) for extra in group.split(",")} <= set(extras)


def require_arguments(script: Path, args: list[str]) -> None:
    """A script takes these arguments."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(module.main)
    parser.parse_args(args)


@contextmanager
def runs_small() -> Iterator[None]:
    """As long as it lasts, runs that this process starts are small."""
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_args(parser: Any, *args: Any, **settings: Any) -> Any:
        config = parse(parser, *args, **settings)
        name = config.get("subcommand")
        if name in TRAINING and isinstance(config.get(name), Namespace):
            small(config[name])
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(run_folder, "STARTED", run_folder.STARTED)  # which every command sets anew
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


def run_cell(words: list[str], log: str, env: dict[str, str]) -> None:
    """A study's cell, in a process of its own."""
    os.environ.clear()
    os.environ.update(env)
    with open(log, "a", buffering=1) as said, redirect_stdout(said), redirect_stderr(said), runs_small():
        ended = run_main(words)
        print(ended or "")
    sys.exit(bool(ended))


def forked(command: list[str], stdout: Any, env: dict[str, str], **_: Any) -> SimpleNamespace:
    """Run a cell, forked from the server: a fork of this process, which has threads, can wait for a lock for ever."""
    process = get_context("forkserver").Process(target=run_cell, args=(command[3:], stdout.name, env))
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where pages share runs; as long as it is there, runs are small."""
    kept = tmp_path_factory.mktemp("kept")
    start_fork_server()
    gc.freeze()  # torch and transformers, which the collector would look through again and again
    with runs_small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("casehard.evidence.study.subprocess", SimpleNamespace(run=forked, STDOUT=None, DEVNULL=None))
        yield kept
    gc.unfreeze()
    gc.collect()  # classes of the pages' own


WITH_CODE = [page for page in PAGES if any(blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(kept, checkpoint, page, tmp_path, monkeypatch):
    (tmp_path / TOY).symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (RUN_FOLDER, "CASEHARD_CHECK_BORROWED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    reader = Reader(kept)
    try:
        for block in blocks(page):
            reader.block(block)
        reader.finish()
    finally:
        forget_modules()
        reader.namespace.clear()


def test_what_is_not_run_says_why():
    marked = [block for page in PAGES for block in blocks(page) if block.why_not is not None]
    print(f"{len(marked)} blocks are not run:", *(f"{block.where}: {block.why_not}" for block in marked), sep="\n")
    assert [block.where for block in marked if len(str(block.why_not).split()) < 2] == []
    assert len(marked) < 20


# ---- what pages name

PLACEHOLDERS = {r"RUN\b": "runs/x/version_0", r"\.\.\.": "models/sandbox/base", r"\b[SN]\b": "2", r"/X\.yaml": "/quantised.yaml"}


def code(page: Path) -> Iterator[str]:
    """What stands in code marks, on one line each."""
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page)):
        yield " ".join(found.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    tops = {child.name for child in ROOT.iterdir() if child.is_dir()} - {"runs", "report", "data"}
    for name in re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]+\.(?:yaml|py|md|png|sh|json)\b", "\n".join(code(page))):
        if name.partition("/")[0] in tops and not name.endswith("/X.yaml") and not (ROOT / name).exists():
            missing.append(name)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_a_pages_text_resolve(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in code(page):
        words = (
            shlex.split(text)
            if re.match(r"(casehard|lightning|python -m casehard) \w", text) and "'" * (text.count("'") % 2) == ""
            else []
        )
        words = words[2:] if words[:2] == ["python", "-m"] else words
        if not words:
            continue
        assert words[1] in TRAINING | OTHERS or words[1].isupper(), text
        for placeholder, stands_for in PLACEHOLDERS.items():
            words = [re.sub(placeholder, stands_for, word) for word in words]
        named = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--config"]
        if words[1] in TRAINING and named and all((ROOT / name).exists() for name in named):
            resolved(words[1:])


def test_readme_is_one_page_and_has_the_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 130
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []
    assert "pip install -c constraints.txt -e . && lightning fit --config experiments/sbr.yaml" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines


def test_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["authors"], citation["license"]) == (project["authors"], project["license"])


def test_every_page_is_in_the_sites_navigation():
    class Loader(yaml.SafeLoader):
        """Of a file that has tags of Python's."""

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    named = set(re.findall(r"[\w/.-]+\.md", yaml.safe_dump(nav)))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_public_names_stand_in_the_reference():
    reference = (ROOT / "docs/reference.md").read_text()
    assert [name for name in casehard.__all__ if not re.search(rf"^::: casehard\.{name}$", reference, re.M)] == []
