import ast
import subprocess
import sys

from toy import ROOT

import casehard

ROOMS = [  # each imports only from those before it
    "metrics", "datamodules", "engine", "lightning_modules", "records", "callbacks", "evidence", "cli",
]  # fmt: skip


def test_imports_run_one_way():
    for number, room in enumerate(ROOMS):
        assert (ROOT / "casehard" / room).resolve() == ROOT / room
        for file in (ROOT / room).glob("*.py"):
            tree = ast.parse(file.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
            used = {name.split(".")[1] for name in names if name.startswith("casehard.")}
            assert not names & {"casehard", *ROOMS}, f"{file} must import from casehard.ROOM"
            assert used <= set(ROOMS[: number + 1]), f"{file} imports {used - set(ROOMS[: number + 1])}"


def test_what_only_some_commands_need_is_not_imported_at_start_up():
    some = {"wandb", "wandb_workspaces", "openai", "submitit", "lightning", "torch"}
    print_loaded = "import casehard, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", print_loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & some


def test_front_door_has_every_name_it_declares():
    assert all(hasattr(casehard, name) for name in casehard.__all__)
