"""What is left of a run on several processes when one of them is killed: nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toy import ROOT, on_ranks

from casehard.cli import lightning_cli
from casehard.metrics.errors import SettingError

# a run's first process and one that it started; training is to sleep, so that nothing heavy is imported
CHILD = """
import sys, time, types
from pathlib import Path
sys.platform = {platform!r}
def train(args):
    Path({began!r}).touch()
    time.sleep(60)
sys.modules["casehard.cli.lightning_cli"] = types.SimpleNamespace(train=train)
from casehard.cli.main import main
main(["fit"])
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], env=os.environ | {{"LOCAL_RANK": {rank!r}}})
print(child.pid, flush=True)
time.sleep(60)
"""


def _ended(pid: int, within: float) -> bool:
    for _ in range(int(within / 0.05)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("platform", "rank", "ends"), [("linux", "1", True), ("another", "1", True), ("linux", "0", False)])
def test_a_process_of_a_run_ends_with_the_one_that_started_it(tmp_path, platform, rank, ends):
    began = tmp_path / "began"
    child = CHILD.format(platform=platform, began=str(began))
    command = [sys.executable, "-c", PARENT.format(child=child, rank=rank)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        pid = int(first.stdout.readline())
        while not began.exists():
            time.sleep(0.02)
        first.kill()
    ended = _ended(pid, within=5 if ends else 0.7)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended == ends


def _meet_one_that_is_gone(rank: int, said: Path) -> None:
    dist.barrier()
    if rank == 1:
        os._exit(0)
    try:
        for _ in range(3):  # a send may still go through
            dist.all_reduce(torch.ones(1000))
    except RuntimeError as error:
        said.write_text(str(error))


def test_a_process_whose_other_is_gone_says_so_in_a_sentence(tmp_path, monkeypatch):
    said = tmp_path / "said"
    on_ranks(_meet_one_that_is_gone, tmp_path, said)

    class Broken:
        def __init__(self, args: list[str]) -> None:
            raise RuntimeError(said.read_text())

    monkeypatch.setattr(lightning_cli, "Cli", Broken)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    with pytest.raises(SettingError, match="all processes of a run must live to its end, and another one has ended"):
        lightning_cli.train(["fit"])
    said.write_text("a bug of another kind")
    with pytest.raises(RuntimeError, match="another kind"):
        lightning_cli.train(["fit"])
