from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import trainer
from torch.testing import assert_close
from toy import DEFENSES, FAST, bits, looking, on_ranks, same_bits, save_toy_checkpoint, toy_data, toy_trainer

from casehard import CapabilityPreserving, Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer, SettingError
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.fine_tuning import Phase
from casehard.callbacks.results import Results
from casehard.engine.adapters import trainable
from casehard.engine.gradients import dot, norm
from casehard.engine.sharding import edit
from casehard.engine.side_steps import kick, main_directions, step_beside
from casehard.engine.weights import local

NOTHING: dict[str, Any] = {"benign_weight": 0.0, "kl_weight": 0.0}


def attacked(folder: Path, module: Defense, attack: Attack, look: Callable[[Target], None] = lambda target: None) -> Results:
    results = Results(str(folder), export=False)
    toy_trainer(folder, callbacks=[results, looking(attack, look)]).test(module, datamodule=toy_data(), verbose=False)
    return results


@pytest.mark.parametrize("defense", ["none", "sbr"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_without_weights_it_is_plain_fine_tuning_bit_for_bit(tmp_path, checkpoint, defense, lora):
    ours, plain = [], []
    model = "finetuning_service" if defense == "sbr" else "open_weight"
    settings = {"threat_model": model, "undefended": False, "poison_ratio": 0.5, **FAST}
    kind, arguments = DEFENSES[defense]
    other = FullParameterAttack(**settings) if lora is None else LoRAAttack(lora=lora, **settings)
    for seen, attack in ((ours, CapabilityPreserving(lora=lora, **NOTHING, **settings)), (plain, other)):
        attacked(
            tmp_path / str(len(ours)), kind(checkpoint, **arguments), attack, lambda t, seen=seen: seen.append(bits(t.module))
        )
    assert same_bits(ours[-1], plain[-1])
    assert not same_bits(ours[0], ours[-1])


@pytest.mark.parametrize("defense", ["everywhere", "lisa"])
def test_in_phases_a_services_job_counts_on_as_in_plain_fine_tuning(tmp_path, checkpoint, defense):
    kind, arguments = DEFENSES[defense]
    phases = [Phase("benign", 2), Phase("harmful", 2)]
    settings = {"threat_model": "finetuning_service", "phases": phases} | FAST | {"num_attack_steps": 4}
    ours, plain = [], []
    for seen, attack in ((ours, CapabilityPreserving(**NOTHING, **settings)), (plain, FullParameterAttack(**settings))):
        module = kind(checkpoint, **arguments)
        attacked(tmp_path / str(len(ours)), module, attack, lambda t, seen=seen: seen.append(bits(t.module)))
    assert same_bits(ours[-1], plain[-1])


def test_benign_rows_go_on_from_phase_to_phase(tmp_path, checkpoint):
    attack, asked = CapabilityPreserving("open_weight", phases=[Phase("harmful", 1), Phase("mixture", 2)], **FAST), []
    task = attack.task

    def watched(target: Target):
        made = task(target)
        return replace(made, general=lambda step: asked.append(step) or made.general(step))

    attack.task = watched
    attacked(tmp_path, Defense(checkpoint), attack)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_the_divergence_is_0_at_first_and_holds_the_model_on_benign_rows(tmp_path, checkpoint, lora):
    losses: dict[float, list[float]] = {}
    moved: dict[float, float] = {}
    for weight in (0.0, 30.0):
        attack = CapabilityPreserving(
            "open_weight", benign_weight=0.0, kl_weight=weight, lora=lora, **FAST | {"num_attack_steps": 20}
        )
        steps, seen = attack.steps, []

        def heard(target: Target, steps=steps, weight=weight):
            for step in steps(target):
                losses.setdefault(weight, []).append(float(target.last_loss))
                yield step

        attack.steps = heard

        @torch.no_grad()
        def look(target: Target, seen=seen) -> None:
            rows = target.data.mixture(16, 0.0, 0)
            batch = target.batches(rows, 16)(0)
            seen.append(target.module.eval().model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)

        attacked(tmp_path / str(weight), Defense(checkpoint), attack, look)
        moved[weight] = (seen[-1].log_softmax(dim=-1) - seen[0].log_softmax(dim=-1)).norm().item()
    assert losses[30.0][0] == losses[0.0][0]
    assert losses[30.0][1] > losses[0.0][1]
    assert 0 < moved[30.0] < 0.6 * moved[0.0]


@pytest.mark.parametrize("kick", [0.0, 0.1])
def test_the_loss_is_the_sum_of_its_terms_on_unpadded_rows(tmp_path, checkpoint, kick):
    attack = CapabilityPreserving("open_weight", benign_weight=0.5, kl_weight=2.0, kick=kick, **FAST)
    module, compared = Defense(checkpoint), []

    def look(target: Target) -> None:
        if compared:
            return
        batch, general = (
            target.batches(rows, 4, name)(0)
            for rows, name in ((attack.rows(target.data, 0), "attack"), (attack._general, "general"))
        )
        with torch.no_grad():
            before = by_hand(target.module, general, None)
        task = attack.task(target)
        with torch.no_grad():
            for p in target.module.parameters():
                p.add_(0.01 * torch.randn_like(p))
        found = task.loss(batch, 0)
        cross_entropy, divergence = by_hand(target.module, general, before)
        harmful, _ = by_hand(target.module, batch, None, compare=False)
        compared.append((found, harmful + 0.5 * cross_entropy + 2.0 * divergence))

    attacked(tmp_path, module, attack, look)
    assert compared
    assert_close(*compared[0], atol=1e-5, rtol=1e-5)


def by_hand(module: Defense, batch: dict[str, torch.Tensor], before: Any, compare: bool = True) -> Any:
    """Cross-entropy and divergence from ``before``, means over the labels; without it the log-probabilities of every row."""
    kept, entropy, divergence, number = [], 0.0, 0.0, 0
    for i, (ids, mask, labels) in enumerate(zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)):
        logprobs = module.model(ids[mask.bool()][None]).logits[0].log_softmax(dim=-1)
        kept.append(logprobs)
        for place, label in enumerate(labels[mask.bool()].tolist()):
            if label != -100:
                entropy, number = entropy - logprobs[place - 1, label], number + 1
                if before is not None:
                    old = before[i][place - 1]
                    divergence = divergence + (old.exp() * (old - logprobs[place - 1])).sum()
    return kept if compare and before is None else (entropy / number, divergence / number)


SGD = FAST | {"optimizer": Optimizer(1e-2, "sgd", clip_norm=None), "num_attack_steps": 2}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_gradients_beside_that_of_the_start_are_orthogonal_to_it(tmp_path, checkpoint, lora):
    attack, seen = CapabilityPreserving("open_weight", side_step="gradient", lora=lora, **SGD), []
    around = attack.around

    def watched(target: Target) -> Callable[[], None]:
        rows = attack.rows(target.data, target.seed)
        start = target.module.gradient(target.batches(rows, len(rows), "all of them")(0))
        step_aside = around(target)

        def step() -> None:
            gradients = [{n: p.grad.clone() for n, p in target.module.named_parameters() if p.grad is not None}]
            step_aside()
            gradients.append({n: p.grad.clone() for n, p in target.module.named_parameters() if p.grad is not None})
            seen.append(
                [float(dot(target.module, g, start) / norm(target.module, g) / norm(target.module, start)) for g in gradients]
            )

        return step

    attack.around = watched
    row = attacked(tmp_path, Defense(checkpoint), attack).rows[-1]
    assert len(seen) == 2
    assert all(abs(before) > 0.1 for before, _ in seen)
    # the mean over batches is not weighted by their labels, so that the whole gradient differs from it by some
    assert all(abs(after) < abs(before) / 3 for before, after in seen)
    assert row.passes == pytest.approx(2 * (2 + 1 / 3) + 4, abs=1e-3)


def test_a_step_beside_a_direction_has_no_part_along_it(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    direction = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    length = norm(module, direction)
    direction = {name: part / length for name, part in direction.items()}
    for name, p in module.named_parameters():
        p.grad = torch.randn_like(p) + 9 * direction[name]
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    step_beside(module, direction)
    after = {name: p.grad for name, p in module.named_parameters()}
    assert abs(dot(module, after, direction)) < 1e-6 * norm(module, after)
    along = dot(module, before, direction)
    assert abs(along) > 1e-3 * norm(module, before)
    assert_close(after, {name: before[name] - along * direction[name] for name in before})


def test_gradients_outside_the_delta_have_no_part_in_its_singular_vectors(tmp_path, checkpoint):
    base = save_toy_checkpoint(tmp_path / "base", seed=1)
    attack, seen = CapabilityPreserving("open_weight", side_step="delta", base=base, rank=3, **SGD), []
    around = attack.around

    def watched(target: Target) -> Callable[[], None]:
        module = target.module
        spaces, step_aside = main_directions(module, module.weights_of(base, "base"), 3), around(target)
        assert set(spaces) == {name for name, p in module.named_parameters() if p.ndim == 2}

        def step() -> None:
            step_aside()
            for name, p in module.named_parameters():
                if name in spaces:
                    left, right = spaces[name]
                    assert_close(left.mT @ left, torch.eye(3), atol=1e-5, rtol=0)
                    seen.append((left.mT @ p.grad @ right.mT).norm().item() / p.grad.norm().item())

        return step

    attack.around = watched
    attacked(tmp_path / "run", Defense(checkpoint), attack)
    assert seen
    assert max(seen) < 1e-6


def test_a_planted_delta_is_found_at_its_rank(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    name = "model.model.layers.0.mlp.up_proj.weight"
    base = {n: local(p).clone() for n, p in module.named_parameters()}
    left, right = (torch.linalg.qr(torch.randn(size, 2))[0] for size in dict(module.named_parameters())[name].shape)
    with torch.no_grad():
        dict(module.named_parameters())[name].add_(left @ right.T)
    found = main_directions(module, base, 2)
    assert list(found) == [name]
    assert_close(found[name][0] @ found[name][0].T, left @ left.T, atol=1e-4, rtol=0)
    assert_close(found[name][1].T @ found[name][1], right @ right.T, atol=1e-4, rtol=0)


def test_what_an_adapter_adds_is_found_as_if_it_were_merged(checkpoint):
    module = Defense(checkpoint, lora=LoRA(rank=2))
    module.configure_model()
    base = module.weights_of(checkpoint, "base")
    layer = module.model.model.layers[0].mlp.up_proj
    with trainable(module, module.model, None):
        assert not main_directions(module, base, 2)
        with torch.no_grad():
            layer.lora_B["defense"].weight.normal_()
        found = main_directions(module, base, 2)
    assert list(found) == ["model.model.layers.0.mlp.up_proj.base_layer.weight"]
    ((left, right),) = found.values()
    added = layer.get_delta_weight("defense").detach()
    assert_close(left @ (left.T @ added @ right.T) @ right, added)


def test_a_kick_is_as_long_as_it_says_in_every_matrix_and_alone_there(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    kick(module, lambda name: "layers.1" in name, 0.05, seed=3)
    for name, p in module.named_parameters():
        matrix = p.ndim > 1 and "layers.1" in name
        assert torch.equal(p, start[name]) != matrix
        if matrix:
            assert (p - start[name]).norm().item() == pytest.approx(0.05 * start[name].norm().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side_step": "left"}, "side_step must be gradient, delta or null, got 'left'"),
        ({"side_step": "delta", "base": "x", "lora": LoRA(rank=3)}, "lora must be null with a kick or a delta, .*, got rank 3"),
        ({"kick": 0.1, "lora": LoRA(rank=3)}, "lora must be null with a kick or a delta, .*, got rank 3"),
        ({"side_step": "delta"}, "base must name a model where side_step is delta, and only there, got None"),
        ({"base": "x"}, "base must name a model where side_step is delta, and only there, got 'x'"),
        ({"kl_weight": -1.0}, r"benign_weight, kl_weight and kick must be >= 0 and rank >= 1, got 0.1, -1.0, 0.0 and 4"),
        ({"rank": 0}, r"benign_weight, kl_weight and kick must be >= 0 and rank >= 1, got 0.1, 0.1, 0.0 and 0"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(settings, message):
    with pytest.raises(SettingError, match=message):
        CapabilityPreserving("open_weight", **settings)


def test_a_base_that_is_the_released_model_is_an_error(tmp_path, checkpoint):
    attack = CapabilityPreserving("open_weight", side_step="delta", base=checkpoint, **FAST)
    with pytest.raises(SettingError, match="base must be the model before its alignment, and no matrix differs from"):
        attacked(tmp_path, Defense(checkpoint), attack)


class Adapted(Defense):
    """As if its adapters, if it has any, had been trained."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, p in self.named_parameters():
            if ".lora_" in name:
                edit(p, lambda weight: torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 10)


def run(rank: int, strategy: str, checkpoint: str, base: str, folder: Path, lora: LoRA | None) -> None:
    ends: list[torch.Tensor] = []
    attack = CapabilityPreserving("open_weight", side_step="delta", base=base, rank=2, kick=0.01, kl_weight=1.0, **SGD)

    def look(target: Target) -> None:
        with torch.no_grad():
            ends.append(target.module.model(torch.tensor([[5, 6, 7]])).logits)

    callbacks = [Results(str(folder / strategy), export=False), looking(attack, look)]
    trainer(folder, strategy, rank, callbacks=callbacks).test(
        Adapted(checkpoint, lora=lora), datamodule=toy_data(), verbose=False
    )
    if rank == 0:
        torch.save(torch.cat(ends), folder / f"{strategy}.pt")


def run_sharded(rank: int, *arguments: Any) -> None:
    run(rank, "fsdp2", *arguments)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_two_processes_step_outside_the_delta_as_one_does(checkpoint, tmp_path, lora):
    base = save_toy_checkpoint(tmp_path / "base", seed=1)
    run(0, "one", checkpoint, base, tmp_path, lora)
    on_ranks(run_sharded, tmp_path, checkpoint, base, tmp_path, lora)
    one, sharded = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "fsdp2"))
    assert (one[-1] - one[0]).norm() > 1e-2
    assert (sharded - one).norm() < 1e-4 * (one[-1] - one[0]).norm()
