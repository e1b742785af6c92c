"""RepNoise: pairs, the discrepancy to noise, the ascent, and the step that is taken."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from test_gradients import SGD, autograd, far, loaded
from test_patcher import data
from toy import bits, on_ranks, same_bits, toy_trainer

from casehard import Defense, RepNoiseModule
from casehard.datamodules.order import counter_seed
from casehard.engine.gradients import rows_of_all_ranks
from casehard.lightning_modules.repnoise import mmd

REFUSED = "sandbox:defender/refused"


def fitted(module: Defense, folder, steps: int = 1, **settings) -> Defense:
    L.seed_everything(0)
    toy_trainer(folder, max_steps=steps).fit(module, datamodule=data(**settings))
    return module


def test_repnoise_of_weights_zero_is_sft_bit_for_bit(checkpoint, tmp_path):
    kinds = (Defense(checkpoint), RepNoiseModule(checkpoint, REFUSED, 0.0, 0.0), RepNoiseModule(checkpoint, REFUSED))
    plain, zero, module = (fitted(kind, tmp_path, 4) for kind in kinds)
    assert same_bits(bits(plain), bits(zero))
    assert not same_bits(bits(plain), bits(module))
    assert (zero.num_passes, module.num_passes) == (4, 2 * 4)


def by_pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``mmd`` by its definition, pair by pair."""
    every = [*first, *second]
    squares = [(a - b).square().sum() for a in every for b in every]
    width = sum(s.item() for s in squares) / (len(every) * (len(every) - 1))

    def mean(xs, ys) -> torch.Tensor:
        kernel = [
            sum(torch.exp(-(x - y).square().sum() / width / scale) for scale in (0.25, 0.5, 1, 2, 4)) for x in xs for y in ys
        ]
        return torch.stack(kernel).mean()

    return mean(first, first) - 2 * mean(first, second) + mean(second, second)


def test_the_discrepancy_is_that_of_its_definition_and_zero_for_equal_samples():
    torch.manual_seed(0)
    x, y = torch.randn(3, 5), torch.randn(4, 5) + 1
    assert mmd(x, y) == pytest.approx(by_pairs(x, y).item(), rel=1e-5)
    assert abs(mmd(x, x.clone())) < 1e-6
    assert mmd(x, x + 3) > mmd(x, x + 0.3) > 0


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_repnoises_step_is_the_one_written_by_hand(checkpoint, tmp_path, padding_side):
    """Row by row without padding; the same on either side."""
    loader = data(padding_side=padding_side)
    module, start = RepNoiseModule(checkpoint, REFUSED, 3.0, 2.0, 4, optimizer=SGD), loaded(checkpoint)
    L.seed_everything(0)
    toy_trainer(tmp_path, max_steps=1).fit(module, datamodule=loader)
    harmful, refusal = module.pair(0)
    layers, base, total, kept = start.model.model.layers, start.model.model, torch.zeros(2), ([], [])
    tokens = [
        [ids[mask.bool()].tolist() for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
        for b in (harmful, refusal)
    ]
    for row, (ids, other) in enumerate(zip(*tokens, strict=True)):
        labels = harmful["labels"][row][harmful["attention_mask"][row].bool()]
        outputs = ([], [])
        hooks = [
            layer.mlp.register_forward_hook(lambda _, __, out, outputs=outputs: outputs[0].append(out[0])) for layer in layers
        ]
        hooks += [layers[0].register_forward_hook(lambda _, __, out, outputs=outputs: outputs[1].append(out[0]))]
        logits = start.model(input_ids=torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        early = start.model.lm_head(base.norm(outputs[1][0]))
        losses = [F.cross_entropy(part[:-1], labels[1:], reduction="sum") for part in (logits, early)]
        total = total + torch.stack(losses)
        differs = [i for i, token in enumerate(ids) if i >= len(other) or other[i] != token]
        assert 0 < len(differs) < len(ids) - 5  # the prompt is the same
        for layer, out in enumerate(outputs[0]):
            seed = counter_seed(loader.seed, f"repnoise layer {layer} row {row}", 0)
            noise = torch.randn(len(differs), 32, generator=torch.Generator().manual_seed(seed))
            kept[0].append((layer, out[differs]))
            kept[1].append((layer, noise))
    longest = max(len(out) for _, out in kept[0])

    def sample(side: int, layer: int) -> torch.Tensor:
        return torch.stack([F.pad(out, (0, 0, 0, longest - len(out))).flatten() for which, out in kept[side] if which == layer])

    noise = torch.stack([by_pairs(sample(0, layer), sample(1, layer)) for layer in (0, 1)]).mean()
    ascent = 1 + (total / int((harmful["labels"][:, 1:] != -100).sum())).mean()
    own = dict(start.named_parameters())
    gradient = torch.autograd.grad(3.0 * noise - 2.0 * ascent.log(), list(own.values()))
    safe = autograd(start, next(iter(loader.train_dataloader())))
    update = {n: (p - own[n]).detach() for n, p in module.named_parameters()}
    assert far(update, {n: -0.05 * (safe[n] + g) for n, g in zip(own, gradient, strict=True)}) < 1e-4
    assert module.terms["noise"] == pytest.approx(noise.item(), rel=1e-4)
    assert module.terms["ascent"] == pytest.approx(ascent.item(), rel=1e-5)


@pytest.mark.parametrize(("refused", "found"), [("sandbox:defender/harmful", "some answers are the harmful ones"), ("sandbox:attacker/harmful", "no prompt stands in both")])  # fmt: skip
def test_rows_that_make_no_pairs_are_an_error_before_the_first_step(checkpoint, tmp_path, refused, found):
    with pytest.raises(ValueError, match=f"refused must answer prompts of data.sources.alignment_harmful .* and {found}"):
        fitted(RepNoiseModule(checkpoint, refused), tmp_path)


@pytest.mark.parametrize("setting", [{"noise_weight": -1}, {"ascent_weight": float("nan")}, {"pair_batch_size": 0}])
def test_a_setting_out_of_its_range_is_an_error(checkpoint, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} of RepNoise must be >= "):
        RepNoiseModule(checkpoint, **setting)


def gather(rank: int) -> None:
    """Rank 0 has three rows of two, rank 1 one row of four."""
    torch.manual_seed(0)
    every = torch.randn(4, 4, 5)
    every[:3, 2:] = 0
    own = (every[:3, :2] if rank == 0 else every[3:]).clone().requires_grad_()
    rows = rows_of_all_ranks(own, None)
    assert torch.equal(rows, every)
    loss = lambda rows: rows.sum(dim=1).prod(dim=0).sin().sum()  # noqa: E731
    loss(rows).backward()
    whole = every.clone().requires_grad_()
    loss(whole).backward()
    assert torch.equal(own.grad, 2 * (whole.grad[:3, :2] if rank == 0 else whole.grad[3:]))


def test_rows_of_all_ranks_are_gathered_and_each_rank_gets_the_gradient_of_its_own(tmp_path):
    on_ranks(gather, tmp_path)
