"""Two processes with gloo train as one does at the same global batch."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close
from toy import DEFENSES, ROOT

PROGRAM = textwrap.dedent(
    f"""
    import sys
    sys.path.insert(0, {str(ROOT / "tests")!r})
    import torch
    torch.set_num_threads(1)
    from casehard import LoRA, Optimizer
    from test_patcher import data
    from toy import DEFENSES, toy_trainer

    defense, devices, checkpoint, folder = sys.argv[1:]
    kind, settings = DEFENSES[defense]
    module = kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), **settings)
    strategy = "auto" if devices == "1" else "ddp"
    trainer = toy_trainer(folder, max_steps=4, devices=int(devices), strategy=strategy)
    trainer.fit(module, datamodule=data())
    if trainer.is_global_zero:
        torch.save(module.model.state_dict(), f"{{folder}}/{{devices}}.pt")
    """
)


@pytest.mark.parametrize("defense", DEFENSES)
def test_two_processes_train_as_one(checkpoint, tmp_path, defense):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    for devices in ("1", "2"):
        command = [sys.executable, str(script), defense, devices, checkpoint, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    start = torch.load(tmp_path / "1.pt")
    for name, tensor in torch.load(tmp_path / "2.pt").items():
        assert_close(tensor, start[name], rtol=1e-4, atol=1e-5)
