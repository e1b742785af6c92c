"""Weight edits: what they do to matrices of every layout, their limits, and planted cases that they must find."""

from pathlib import Path

import pytest
import torch
from test_conformance import save_family
from torch.nn.functional import normalize
from toy import bits, same_bits

from casehard import Defense
from casehard.engine.anatomy import blocks, written_by
from casehard.engine.directions import Kernel, weaken
from casehard.engine.weights import borrowed

# dense, biased, fused, tied, experts in a stack, experts the other way round, experts beside a dense MLP
LAYOUTS = ("llama3", "phi", "phi3", "qwen2", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module", params=LAYOUTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Defense:
    module = Defense(save_family(request.param, tmp_path_factory.mktemp("edits") / request.param))
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "bias" in name:  # those of stacks begin at zero
                p.normal_()
    return module


def test_a_kernel_is_highest_at_its_position_falls_linearly_and_ends():
    kernel = Kernel(strength=1.5, position=0.5, floor=0.2, half_width=0.25)
    assert [kernel.at(depth) for depth in (0.0, 0.2, 0.25, 0.375, 0.5, 0.75, 0.76)] == pytest.approx(
        [0, 0, 0.3, 0.9, 1.5, 0.3, 0]
    )


def test_attention_and_mlp_lose_their_shares_of_a_direction_by_depth_and_nothing_else_changes(family):
    model, direction = family.model, normalize(torch.randn(64, dtype=torch.float64), dim=0)
    before, named = {n: p.detach().clone() for n, p in model.named_parameters()}, {id(p): n for n, p in model.named_parameters()}
    shares = {"attention": (1.2, 0.6), "mlp": (0.0, 0.5)}  # of the first layer and the last
    kernels = Kernel(1.2, position=0.0, floor=0.5, half_width=1.0), Kernel(0.5, position=1.0, half_width=0.5)
    edited = set()
    with borrowed(family):
        weaken(model, direction[None], *kernels)
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number, block in enumerate(blocks(model)):
            for writer in block.writers:
                share = shares["mlp" if writer in set(block.mlp.modules()) else "attention"][number]
                for parameter, axis in written_by(writer, 64):
                    name = named[id(parameter)]
                    old, new = (w[name].double().movedim(axis, -1) for w in (before, after))
                    torch.testing.assert_close(new @ direction, (1 - share) * (old @ direction), rtol=1e-4, atol=1e-5)
                    across = torch.eye(64, dtype=torch.float64) - torch.outer(direction, direction)
                    torch.testing.assert_close(new @ across, old @ across, rtol=1e-4, atol=1e-5)
                    edited |= {name} if share else set()
    assert len(edited) >= 3  # attention of two layers, MLP of the last
    assert {name for name in before if not torch.equal(before[name], after[name])} == edited


def test_a_strength_of_zero_is_the_identity_bit_for_bit(family):
    with borrowed(family):
        before = bits(family)
        weaken(family.model, normalize(torch.ones(1, 64)), Kernel(0.0), Kernel(0.0))
        assert same_bits(bits(family), before)


def test_norms_of_rows_are_kept_where_they_are_to_be(family):
    with borrowed(family):
        biases = {id(p) for name, p in family.named_parameters() if "bias" in name}
        writers = [pair for block in blocks(family.model) for writer in block.writers for pair in written_by(writer, 64)]
        old = [p.detach().movedim(axis, -1).clone() for p, axis in writers]
        weaken(family.model, normalize(torch.randn(1, 64)), Kernel(half_width=9.0), Kernel(half_width=9.0), keep_norms=True)
        for (parameter, axis), rows in zip(writers, old, strict=True):
            new = parameter.detach().movedim(axis, -1)
            assert not torch.allclose(new, rows)
            if id(parameter) not in biases:
                torch.testing.assert_close(new.norm(dim=-2), rows.norm(dim=-2))


def test_a_model_in_half_precision_is_edited_in_float32_and_cast_last(tmp_path: Path):
    module = Defense(save_family("llama3", tmp_path / "llama3"))
    module.configure_model()
    weight = module.model.model.layers[1].self_attn.o_proj.weight
    module.model.to(torch.bfloat16)
    before, direction = weight.detach().clone(), normalize(torch.randn(64), dim=0)
    weaken(module.model, direction[None], Kernel(1.0, position=1.0), Kernel(0.0))
    exact = before.float() - torch.outer(direction, direction @ before.float())
    assert torch.equal(weight.detach(), exact.to(torch.bfloat16))
