"""Two processes with gloo do what one does at the same global batch: DDP, and FSDP2, where each holds half of every weight."""

from pathlib import Path

import lightning as L
import pytest
from ranks import check_same, run_all, trainer, weights
from test_patcher import data
from torch.testing import assert_close
from toy import DEFENSES, ROOT, on_ranks

from casehard import InnerAttacker, Optimizer, PatcherModule
from casehard.callbacks.results import Results


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> Path:
    return run_all(checkpoint, tmp_path_factory.mktemp("runs"), DEFENSES)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", DEFENSES)
def test_two_processes_give_the_model_and_the_rows_of_one(runs, strategy, case):
    check_same(runs, strategy, DEFENSES, case)


# ---- at length


def twenty_steps(rank: int, strategy: str, checkpoint: str, folder: Path) -> None:
    gentle = Optimizer(1e-3, "sgd")  # at 1e-2 rounding errors grow a hundredfold in 20 steps
    attacker = InnerAttacker(3, gentle, batch_size=4)
    rounds = (PatcherModule, {"attacker": attacker, "num_outer_steps": 8, "num_sft_steps": 4})
    for case, (kind, settings) in (DEFENSES | {"patcher": rounds}).items():
        L.seed_everything(0)
        module = kind(checkpoint, optimizer=gentle, **settings)
        fit = trainer(folder, strategy, rank, max_steps=20, callbacks=[Results(str(folder / strategy / case))])
        fit.fit(module, datamodule=data())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "sandbox"])
def test_twenty_steps_of_two_processes_are_those_of_one(checkpoint, tmp_path, model):
    start = checkpoint if model == "toy" else str(ROOT / "models/sandbox/aligned")
    twenty_steps(0, "one", start, tmp_path)
    for strategy in ("ddp", "fsdp2"):
        on_ranks(twenty_steps, tmp_path, strategy, start, tmp_path)
        for case in DEFENSES:
            one, two = (weights(tmp_path / name / case) for name in ("one", strategy))
            assert (one["model.norm.weight"] - 1).abs().max() > 1e-4
            for name, tensor in two.items():
                assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)
