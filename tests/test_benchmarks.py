"""`benchmarks/scale.py` runs on any sizes, here and on a GPU, and counts what is to be computed as torch does.

`benchmarks/patcher_parallel.py` says what this machine allows.
"""

import json
import statistics
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import strategy
from test_sbr import rows_of
from torch.utils.flop_counter import FlopCounterMode
from toy import ROOT

from casehard import Backbone, Defense
from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import collate, encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import run

SHORT = {"batch_size": 2, "length": 24, "num_steps": 2, "num_inner_steps": 1, "num_blocks": 1, "num_warmup": 0}


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scale

    return scale


def figures(printed: str) -> dict[str, list[float]]:
    """Seconds a step, its ratio to SFT's, the least that this could be, tokens a second, share of the peak, GiB and copies."""
    lines = [line.replace("(", " ").replace(")", " ").replace("%", " ").split() for line in printed.splitlines()[3:6]]
    return {line[0]: [float(line[i]) for i in (1, 5, 9, 10, 11, 12, 13)] for line in lines}


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16"])
def test_any_sizes_are_run_and_measured(scale, checkpoint, capsys, precision):
    scale.main(checkpoint, layers=3, device="cpu", precision=precision, **SHORT)
    printed = capsys.readouterr().out
    assert f"3 layers, 0 million parameters; {precision} on" in printed
    found = figures(printed)
    assert list(found) == ["SFT", "SBR", "Patcher"]
    assert [values[2] for values in found.values()] == [1, pytest.approx(1 + 17 / 48, abs=0.01), 2.5]
    for step, ratio, limit, tokens, share, *_ in found.values():
        assert (
            0.99 / (step + 0.0005) < tokens / (2 * 24 * limit) < 1.01 / (step - 0.0005)
        )  # seconds are printed to the third place
        assert min(ratio, share) > 0


def test_between_two_fits_nothing_is_copied_to_the_cpu(scale, checkpoint, monkeypatch):
    moved = []

    def away(optimizers, device):
        moved.extend(optimizer for optimizer in optimizers if optimizer.state)

    monkeypatch.setattr(strategy, "_optimizers_to_device", away)
    monkeypatch.setattr(scale.Defense, "cpu", moved.append)
    scale.main(checkpoint, device="cpu", profile=True, **SHORT)
    assert moved == []


def test_without_a_gpu_it_says_so_and_skips(scale, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scale.main(checkpoint, device="cuda")
    assert capsys.readouterr().out == "Skipped: --device cuda needs a CUDA device, and none is here.\n"


def test_what_takes_longest_is_listed_with_its_calls(scale):
    matrix = torch.ones(500, 500)

    def action() -> None:
        for _ in range(3):
            matrix @ matrix
        matrix.sum()

    worked, longest = scale.top_kernels(action, "cpu", most=2)
    assert [(kernel["name"], kernel["calls"]) for kernel in longest] == [("aten::mm", 3), ("aten::sum", 1)]
    assert longest[0]["ms"] > longest[1]["ms"] > 0
    assert [kernel["share"] for kernel in longest] == [pytest.approx(kernel["ms"] / 1e3 / worked) for kernel in longest]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_a_gpu_is_measured(scale, capsys, precision):
    scale.main(str(ROOT / "models/sizes/qwen2_5_1_5b"), 2, "cuda", precision, profile=True, **(SHORT | {"length": 512}))
    printed = capsys.readouterr().out
    assert torch.cuda.get_device_name() in printed
    for *_, share, memory, copies in figures(printed).values():
        assert 0 < share < 100
        assert 0 < memory < torch.cuda.get_device_properties(0).total_memory / 2**30
        assert copies > 4  # weights, gradients, two moments


def test_a_block_of_patcher_is_a_round_with_its_attack(scale, checkpoint, capsys, monkeypatch):
    passes = []
    loss = scale.Defense.sft_loss
    monkeypatch.setattr(scale.Defense, "sft_loss", lambda module, batch: passes.append(type(module)) or loss(module, batch))
    scale.main(checkpoint, device="cpu", **SHORT)
    assert [passes.count(kind) for kind in (Defense, scale.PatcherModule)] == [1 + 2, 1 + 1 + 2 * 2]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_to_be_computed_is_what_torch_counts(scale, checkpoint, tied):
    module = Defense(checkpoint, backbone=Backbone(random_weights=True, sizes={"tie_word_embeddings": tied}))
    module.configure_model()
    module.model.set_attn_implementation("eager")  # torch counts its products
    batch = collate(rows_of(num_rows=4), 0, "right")
    rows, length = batch["input_ids"].shape
    batch = {
        "input_ids": batch["input_ids"] * 0 + torch.arange(rows)[:, None] + 5,
        "attention_mask": torch.ones(rows, length).long(),
    }
    scored = torch.zeros(rows, length, dtype=torch.bool)
    scored[:, -3:] = True
    with FlopCounterMode(display=False) as counter:
        run(module.model, batch, logits_at=scored, states_at=~scored).logits.sum().backward()
    tokens, config = rows * length, module.model.config
    skipped = 6 * tokens * config.num_hidden_layers * config.hidden_size * length  # eager attention computes both halves
    assert scale.model_flops(module.model, tokens, 3 * rows, length) + skipped == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_a_training_step_says_how_many_sizes_there_were_and_which_steps_had_a_new_one(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import training_step

    kept, rows = tmp_path / "f.json", "sandbox:attacker/harmful#train[:40]"
    training_step.main(checkpoint, rows, batch_size=2, num_pairs=6, num_warmup=2, precisions=["float32"], figures=str(kept))
    found = json.loads(kept.read_text())["precisions"]["float32"]

    tokenizer = Defense(checkpoint).tokenizer
    draw = Batches(encode_rows(read_rows(rows), tokenizer, 512)[0], 2, 0, "benchmark", tokenizer.pad_token_id)
    shapes = [draw(step)["input_ids"].shape for step in range(8)]
    new = [shape not in shapes[:step] for step, shape in enumerate(shapes)]
    assert 1 < sum(new) < 8
    assert (found["sizes"]["plain"], found["new_size"]["plain"]) == (sum(new), new[2:])
    assert found["sizes"]["casehard"] == sum(new)  # two such rows do not fold
    assert len(found["plain"]) == len(found["casehard"]) == len(found["new_size"]["casehard"]) == 6
    assert found["ratios"] == [b / a for a, b in zip(found["plain"], found["casehard"], strict=True)]
    line = capsys.readouterr().out.splitlines()[-2].split()
    assert line[0] == "casehard"
    assert [float(value.strip("()")) for value in (line[1], line[4])] == [
        pytest.approx(value, abs=1e-4) for value in (statistics.median(found["casehard"]), max(found["casehard"]))
    ]
    assert line[-2:] == [str(found["sizes"]["casehard"]), str(sum(found["new_size"]["casehard"]))]


def test_the_parallel_form_is_compared_with_what_the_threads_allow(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import patcher_parallel

    took = {("parallel", "1"): 50.0, ("sequential", "2"): 45.0, ("one_thread", "1"): 72.0}

    def fit(*words: str, threads: str) -> None:
        said = dict(word.split("=", 1) for word in words if "=" in word)
        assert said["--data.batching.batch_size"] == said["--model.init_args.attacker.batch_size"] == "4"
        assert said["--trainer.max_steps"] == "9"
        form = said["--run.experiment"]
        run = Path(said["--run.root"], form, said["--run.version"])
        run.mkdir(parents=True)
        (run / "done.json").write_text(json.dumps({"seconds": took[form, threads]}))
        attackers = {"attacker": {"num_inner_steps": 40}, "more_attackers": [{"num_inner_steps": 10}]}
        settings = attackers | {"attack_every": None, "num_outer_steps": 24, "one_pass_per_row": False}
        (run / "config.yaml").write_text(json.dumps({"model": {"init_args": settings}}))

    monkeypatch.setattr(patcher_parallel, "fit", fit)
    patcher_parallel.main(seeds=[0, 1], settings=["--trainer.max_steps=9"], batch_size=4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("25 inner steps beside 24 passes of the defender")
    assert printed[-2:] == [
        "sequential over parallel       0.90 (0.90 to 0.90)",
        "two threads over one           1.60 (1.60 to 1.60), so at most 1.25",
    ]
