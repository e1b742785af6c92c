from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toy import save_toy_checkpoint, toy_data, toy_trainer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from casehard import Defense, FullParameterAttack, LoRA, Optimizer, SafeLoRAModule, SettingError
from casehard.callbacks.results import Results
from casehard.engine.adapters import merged
from casehard.records.files import named_files

ADAMW = Optimizer(1e-2)
LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(checkpoint) -> str:
    return str(Path(checkpoint).with_name("base"))


def fitted(module: Defense, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The weights that ``fit`` releases, adapters merged."""
    L.seed_everything(0)
    toy_trainer(folder, **settings).fit(module, datamodule=toy_data())
    return weights(merged(module.model))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read(folder: str) -> dict[str, Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def by_hand(tuned: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, float]:
    """The repaired matrix, and its cosine, with the square matrix P written out in float64."""
    v, d = (aligned - base).double(), (tuned - aligned).double()
    p = v @ v.T / (v**2).sum().sqrt()
    cosine = torch.nn.functional.cosine_similarity((p @ d).flatten(), d.flatten(), dim=0)
    return (aligned.double() + p @ d).float(), float(cosine)


def expected(tuned: dict[str, Tensor], checkpoint: str, base: str) -> dict[str, tuple[Tensor, float]]:
    aligned, unaligned = read(checkpoint), read(base)
    linear = [name for name in tuned if any(f".{kind}." in name for kind in LINEAR)]
    assert len(linear) == 14
    return {name: by_hand(tuned[name], aligned[name], unaligned[name]) for name in linear}


@LORAS
def test_a_threshold_of_minus_one_leaves_every_bit_of_the_job(checkpoint, base, tmp_path, lora):
    plain = fitted(Defense(checkpoint, ADAMW, lora), tmp_path)
    module = SafeLoRAModule(checkpoint, base, -1.0, optimizer=ADAMW, lora=lora)
    repaired = fitted(module, tmp_path)
    assert module.recovered
    assert all(torch.equal(repaired[name], plain[name]) for name in plain)


@LORAS
def test_a_threshold_of_one_projects_every_layer_as_written_by_hand(checkpoint, base, tmp_path, lora):
    tuned = fitted(Defense(checkpoint, ADAMW, lora), tmp_path)
    repaired = fitted(SafeLoRAModule(checkpoint, base, 1.0, optimizer=ADAMW, lora=lora), tmp_path)
    repairs = expected(tuned, checkpoint, base)
    for name, weight in repaired.items():
        assert_close(weight, repairs[name][0] if name in repairs else tuned[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(weight, tuned[name]) == (name not in repairs)


@pytest.mark.parametrize("by", ["threshold", "num_layers"])
def test_the_layers_least_like_their_projection_are_projected_and_no_others(checkpoint, base, tmp_path, by):
    tuned = fitted(Defense(checkpoint, ADAMW), tmp_path)
    repairs = expected(tuned, checkpoint, base)
    cosines = sorted(cosine for _, cosine in repairs.values())
    between = (cosines[4] + cosines[5]) / 2
    chosen = {name for name, (_, cosine) in repairs.items() if cosine < between}
    setting = {"threshold": between} if by == "threshold" else {"threshold": -1.0, "num_layers": 5}
    repaired = fitted(SafeLoRAModule(checkpoint, base, **setting, optimizer=ADAMW), tmp_path)
    assert {name for name in tuned if not torch.equal(repaired[name], tuned[name])} == chosen
    assert len(chosen) == 5


def test_what_neither_job_nor_alignment_has_moved_stays(checkpoint, base, tmp_path):
    """A job that trains one layer; an alignment that left another alone."""
    module = SafeLoRAModule(checkpoint, base, num_layers=14)
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    still, moved = (f"model.model.layers.0.mlp.{name}.weight" for name in ("up_proj", "gate_proj"))
    own = dict(module.named_parameters())
    unaligned = {f"model.{name}": weight for name, weight in read(base).items()}
    start[still] = unaligned[still]
    with torch.no_grad():
        own[moved].add_(torch.randn_like(own[moved]))
        own[still].copy_(start[still] + 1)
    before = {name: p.detach().clone() for name, p in own.items()}
    module.recover(start)
    assert {name for name, p in own.items() if not torch.equal(p, before[name])} == {moved}


def test_layers_whose_weights_are_stored_transposed_are_projected_on_the_same_side(checkpoint, tmp_path):
    """GPT-2 stores ``[in, out]``."""
    folders = [tmp_path / "aligned", tmp_path / "base"]
    for seed, folder in enumerate(folders):
        save_toy_checkpoint(folder)
        (folder / "config.json").unlink()
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    aligned, base = map(str, folders)
    module = SafeLoRAModule(aligned, base, 1.0)
    module.configure_model()
    name = "transformer.h.0.mlp.c_fc.weight"
    start, tuned = read(aligned)[name], dict(module.model.named_parameters())[name]
    with torch.no_grad():
        tuned.add_(torch.randn_like(tuned))
    repaired, _ = by_hand(tuned.detach().T, start.T, read(base)[name].T)
    module.recover({n: w.clone() for n, w in module.named_parameters()} | {f"model.{name}": start})
    assert_close(tuned.detach(), repaired.T, rtol=1e-4, atol=1e-5)


def test_a_service_repairs_before_every_scoring_and_starts_from_the_aligned_model(checkpoint, base, tmp_path):
    job: dict[str, Any] = {"num_samples": 16, "num_attack_steps": 2, "batch_size": 4, "optimizer": ADAMW, "score_steps": [1, 2]}
    results = Results(str(tmp_path / "run"), export=False)
    module = SafeLoRAModule(checkpoint, base, 1.0)
    attack = FullParameterAttack("finetuning_service", **job)
    toy_trainer(tmp_path, callbacks=[results, attack]).test(module, datamodule=toy_data(), verbose=False)
    assert [(row.defense, row.stage, row.num_attack_steps) for row in results.rows] == [
        *(("none", "none", step) for step in (0, 1, 2)),
        *(("SafeLoRA", "post_finetuning", step) for step in (0, 1, 2)),
    ]
    assert results.rows[0].metrics == results.rows[3].metrics  # the job has moved nothing yet


def test_the_base_is_a_file_that_the_run_rests_on(base):
    assert named_files({"model": {"init_args": {"base": base}}}) == [base]


def test_a_base_that_is_the_aligned_model_is_an_error(checkpoint, base, tmp_path):
    copied = save_toy_checkpoint(tmp_path / "copy")
    for same in (checkpoint, copied):
        module = SafeLoRAModule(checkpoint, same)
        with pytest.raises(SettingError, match=r"base must be the model before alignment, .* Name the model that was aligned"):
            toy_trainer(tmp_path).fit(module, datamodule=toy_data())
        assert not hasattr(module, "model")  # before weights load
    module = SafeLoRAModule(checkpoint, base)
    module.configure_model()
    start = {f"model.{name}": weight for name, weight in read(base).items()}
    with pytest.raises(SettingError, match="base must be the model before alignment"):
        module.recover(start)


def test_a_base_of_another_architecture_is_an_error(checkpoint, tmp_path):
    untied = save_toy_checkpoint(tmp_path / "untied", tied=False)
    with pytest.raises(SettingError, match=r"base must be of the defended model's architecture, .* has lm_head\.weight of shape"):
        toy_trainer(tmp_path).fit(module := SafeLoRAModule(checkpoint, untied), datamodule=toy_data())
    assert not hasattr(module, "model")  # before weights load


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"threshold of SafeLoRA must lie in \[-1, 1\], got 1\.5"),
        ({"num_layers": 0}, "num_layers of SafeLoRA must be >= 1 or null, got 0"),
    ],
)
def test_settings_out_of_range_are_errors(checkpoint, base, settings, message):
    with pytest.raises(SettingError, match=message):
        SafeLoRAModule(checkpoint, base, **settings)
