import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger
from toy import ROOT

import casehard
from casehard.shipped import shipped
from casehard.version import revision

ROOMS = [  # each imports only from those before it
    "metrics", "datamodules", "engine", "lightning_modules", "records", "callbacks", "evidence", "cli",
]  # fmt: skip
FILES = [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]


def imports(file: Path, for_types: bool = True) -> Iterator[str]:
    """Every module that a file imports, wherever in it, and every name that it takes from one; for its types alone, or not."""
    tree = ast.parse(file.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {node for block in blocks for node in ast.walk(block)} if not for_types else set()
    for node in (node for node in ast.walk(tree) if node not in left_out):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def test_imports_run_one_way():
    for file in FILES:
        assert (ROOT / "casehard" / file.parent.name).resolve() == file.parent
        below = [*ROOMS[: ROOMS.index(file.parent.name) + 1], "shipped", "version"]
        tops = {name.partition(".")[0] for name in imports(file)}
        used = {name.split(".")[1] for name in imports(file) if name.startswith("casehard.")}
        assert not tops & set(ROOMS), f"{name_of(file)} must import from casehard.ROOM"
        assert used <= set(below), f"{name_of(file)} imports {used - set(below)}"


HOST_NUMBERS = {"metrics/statistics.py", "metrics/columns.py", "callbacks/policy_gradient.py"}  # of Python's numbers; numpy
ON_THE_DEVICE = {"engine/generation.py"}  # the sampler's draws: in float32 on MPS


def test_float64_is_of_the_cpu_alone_since_some_accelerators_have_none():
    found = set()
    for file in FILES:
        for line in file.read_text().splitlines():
            if re.search(r"torch\.float64|\.double\(\)", line) and name_of(file) not in HOST_NUMBERS | ON_THE_DEVICE:
                found.add(name_of(file))
                assert "add_state" in line or "in states" in line or ".cpu()" in line, f"{name_of(file)}: {line.strip()}"
    in_metrics = {"metrics/harmful_score.py", "metrics/local_judges.py", "metrics/private.py"}
    assert found == in_metrics | {
        "engine/comparison.py",
        "engine/directions.py",
        "callbacks/direction_edit.py",
        "callbacks/refusal_ablation.py",
    }


def test_no_two_files_need_each_other():
    modules = {f"casehard.{file.parent.name}.{file.stem}": file for file in FILES}
    graph = {
        module: {
            needed for name in imports(file, for_types=False) for needed in (name, name.rpartition(".")[0]) if needed in modules
        }
        - {module}
        for module, file in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' > '.join(error.args[1])}")


# ---- private names of dependencies

OPEN = {"_asdict", "_replace", "_fields", "_make"}  # of named tuples, and documented


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OPEN


def ours() -> set[str]:
    """Names that casehard's own files define: functions, classes, and what is assigned, also as an attribute of self."""
    found: set[str] = set()
    for node in (node for file in FILES if file.name != "private.py" for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def borrowed_underscores(file: Path, known: set[str]) -> list[str]:
    """Private names that a file takes from elsewhere: imported, an attribute of anything but itself, or asked for by a text."""
    taken = [name for name in imports(file) if any(is_private(part) for part in name.split("."))]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or node.attr == "__dict__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in known
            taken += [] if own else [f"{ast.unparse(node)}, line {node.lineno}"]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr", "delattr"):
            texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            taken += [f"{ast.unparse(node)}, line {node.lineno}" for text in texts if is_private(text)]
    return taken


def test_private_names_of_dependencies_stand_in_private_py_alone():
    known = ours()
    taken = {name_of(file): borrowed_underscores(file, known) for file in FILES if file.name != "private.py"}
    assert {name: found for name, found in taken.items() if found} == {}


@pytest.mark.parametrize("name", ["_get", "_instantiate_trainer", "_parser", "_parse_ckpt_path", "_run_subcommand"])
def test_lightning_has_the_private_names_that_the_command_line_uses(name):
    assert callable(getattr(LightningCLI, name, None)), f"lightning has no LightningCLI.{name} any more: see cli/private.py"


def test_wandbs_logger_has_the_private_settings_that_the_command_line_drops_one_of(tmp_path):
    assert isinstance(getattr(WandbLogger(offline=True, save_dir=tmp_path), "_wandb_init", None), dict), "lightning: _wandb_init"


# ---- what is imported

EXTRA = ("wandb", "wandb_workspaces", "openai", "submitit")  # imported where a run uses them
HEAVY = {"torch", "lightning", "transformers", "datasets", "numpy", "matplotlib", "wandb"}


@pytest.mark.parametrize(
    ("args", "unneeded"),
    [
        ([], HEAVY | {"jsonargparse", "yaml"}),
        (["--help"], HEAVY | {"jsonargparse", "yaml"}),
        *(
            (["study", "--help"], HEAVY),
            (["report", "--help"], HEAVY),
            (["card", "--help"], HEAVY),
            (["dashboard", "--help"], HEAVY),
            (["preview", "--help"], HEAVY),
        ),
        (["sandbox", "--num_rows", "1"], HEAVY - {"numpy"}),
        (["report", "nowhere"], HEAVY - {"numpy", "matplotlib"}),
        (["card", "nowhere"], HEAVY - {"numpy", "matplotlib"}),
    ],
    ids=lambda value: " ".join(value) or "import casehard" if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs_alone(args, unneeded):
    run = f"from casehard.cli.main import main\ntry: main({args})\nexcept SystemExit: pass" if args else "import casehard"
    loaded = f"{run}\nimport sys\nprint()\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.splitlines()[-1].split()) & unneeded


# ---- public names


def test_public_names_are_those_of_the_stub_and_each_is_there():
    assert len(casehard.__all__) > 20
    assert set(casehard.__all__) <= set(dir(casehard))
    assert all(getattr(casehard, name).__name__ == name for name in casehard.__all__)
    with pytest.raises(AttributeError, match="module 'casehard' has no attribute 'Nothing'"):
        casehard.Nothing  # noqa: B018


def test_what_is_not_listed_goes_by_its_module():
    assert import_module("casehard.lightning_modules.sbr").SBRModule is casehard.SBRModule
    assert "Batches" not in casehard.__all__
    assert import_module("casehard.datamodules.batches").Batches


# ---- the wheel


def test_names_of_experiments_and_models_are_the_shipped_ones_where_the_working_directory_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shipped("models/sandbox/aligned")).resolve() == ROOT / "models/sandbox/aligned"
    assert [shipped(name) for name in ("models/none", "./models/sandbox", "x" * 5000)] == [
        "models/none",
        "./models/sandbox",
        "x" * 5000,
    ]
    (tmp_path / "models/sandbox/aligned").mkdir(parents=True)
    assert shipped("models/sandbox/aligned") == "models/sandbox/aligned"


def test_what_is_installed_works_in_any_folder_beside_any_packages(tmp_path):
    lib, elsewhere = tmp_path / "lib", tmp_path / "elsewhere"
    build = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(lib)]
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, capture_output=True, check=True)
    assert (lib / "casehard/REVISION").read_text() == f"{revision()}\n"
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS, "experiments", "models"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in tracked.stdout.splitlines() if not (lib / "casehard" / name).is_file()] == []
    for name in ROOMS:  # of the user's own
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise RuntimeError('imported by mistake')")
    fit = ["fit", "--config", "sbr", "--config", "attack/none", "--run.wandb", "disabled"]
    fit += ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    run = f"import casehard, sys\ncasehard.main({fit})\nprint(casehard.__file__, *(name for name in {EXTRA} if name in sys.modules))"
    env = os.environ | {"PYTHONPATH": str(lib)}
    done = subprocess.run([sys.executable, "-c", run], cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(lib / "casehard/__init__.py")  # and nothing of EXTRA
