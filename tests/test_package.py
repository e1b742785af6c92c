import ast
import subprocess
import sys

import pytest
from toy import ROOT

import casehard

LAYERS = ["metrics", "datamodules", "lightning_modules", "callbacks", "evidence", "casehard"]  # each imports only from the left


def test_imports_run_one_way():
    for number, layer in enumerate(LAYERS):
        for file in (ROOT / layer).glob("*.py") if (ROOT / layer).is_dir() else [ROOT / f"{layer}.py"]:
            tree = ast.parse(file.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
            used = {name.split(".")[0] for name in names} & set(LAYERS)
            assert used <= set(LAYERS[: number + 1]), f"{file} imports {used - set(LAYERS[: number + 1])}"


def test_what_only_some_commands_need_is_not_imported_at_start_up():
    some = {"wandb", "wandb_workspaces", "openai", "submitit", "evidence"}
    print_loaded = "import casehard, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", print_loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & some


def test_front_door_has_every_name_it_declares():
    assert all(hasattr(casehard, name) for name in casehard.__all__)


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join)
def test_linter_formatter_and_type_checker_find_nothing(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
