"""Weight edits: what they do to matrices of every layout, their limits, and planted cases that they must find."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_conformance import save_family
from torch import Tensor
from torch.nn.functional import normalize
from toy import bits, looking, same_bits, save_toy_checkpoint, toy_data, toy_trainer
from transformers import AutoModelForCausalLM

from casehard import Defense, DeltaStrip, LoRA, LoRAAttack, RoundTrip, SettingError
from casehard.callbacks.adapter_attack import AdapterAttack
from casehard.callbacks.attack import Target
from casehard.callbacks.quantised import QuantisedAttack
from casehard.callbacks.results import Results
from casehard.engine.adapters import matrices, merged
from casehard.engine.anatomy import blocks, written_by
from casehard.engine.compression import Way, pruned, send_through
from casehard.engine.directions import Kernel, weaken
from casehard.engine.optimizer import Optimizer
from casehard.engine.other_adapters import PromptTuning
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


# ---- what was added to a base


def stripped(folder: Path, checkpoint: str, base: str, **settings: Any) -> tuple[dict[str, Tensor], Target]:
    """The weights after a strip, by name in the model, and its target."""
    seen: list[tuple[dict[str, Tensor], Target]] = []

    def look(target: Target) -> None:
        if "cliffs" in target.state:
            seen.append(({name: p.detach().clone() for name, p in target.module.model.named_parameters()}, target))

    trainer = toy_trainer(folder, callbacks=[looking(DeltaStrip(base, **settings), look)])
    trainer.test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    return seen[0]


def weights(checkpoint: str) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).named_parameters())


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base, and that with a delta of rank 3 in every matrix."""
    folder = tmp_path_factory.mktemp("delta")
    base = save_toy_checkpoint(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p += 0.02 * torch.randn(p.shape[0], 3) @ torch.randn(3, p.shape[1])
    save_toy_checkpoint(folder / "model")
    model.save_pretrained(folder / "model")
    return str(folder / "model"), base


def test_a_planted_delta_is_found_at_its_rank(tmp_path, released):
    checkpoint, base = released
    _, target = stripped(tmp_path, checkpoint, base, keep=0.5)
    assert {rank for rank, _ in target.state["cliffs"]} == {3}
    note = DeltaStrip(base, keep=0.5).notes(target)[-1]
    assert "singular values fall most after rank 3, by a factor of" in note
    assert "medians of 15 matrices" in note  # seven in each of two layers, and the embeddings


def test_to_keep_all_is_the_identity_and_none_the_base_bit_for_bit(tmp_path, released):
    checkpoint, base = released
    other = save_toy_checkpoint(tmp_path / "other", seed=1)  # of which start + (weight - start) is not the weight
    norm = ["*.norm.weight"]  # the last one's, ones in all of them
    for keep, start, revert, expected in ((1.0, other, norm, checkpoint), (0.0, base, None, base)):
        found, _ = stripped(tmp_path, checkpoint, start, keep=keep, revert=revert)
        assert all(torch.equal(found[name], p) for name, p in weights(expected).items())
    half, _ = stripped(tmp_path, checkpoint, base, keep=0.5)
    ours, theirs = weights(checkpoint), weights(base)
    assert all(torch.allclose(half[name], (ours[name] + theirs[name]) / 2, atol=1e-6) for name in ours)


def test_cut_at_its_rank_the_delta_is_gone_and_cut_below_its_smaller_part_is_left(tmp_path, released):
    checkpoint, base = released
    ours, theirs = weights(checkpoint), weights(base)
    gone, _ = stripped(tmp_path, checkpoint, base, remove_rank=3)
    assert all(torch.allclose(gone[name], theirs[name], atol=1e-5) for name in ours)
    left, _ = stripped(tmp_path, checkpoint, base, remove_rank=2)
    name = "model.layers.0.mlp.up_proj.weight"
    outputs, values, inputs = torch.linalg.svd(ours[name] - theirs[name], full_matrices=False)
    torch.testing.assert_close(left[name] - theirs[name], values[2] * torch.outer(outputs[:, 2], inputs[2]), rtol=1e-3, atol=1e-5)
    every, _ = stripped(tmp_path, checkpoint, base, remove_rank=999)
    assert all(torch.equal(every[name], p) for name, p in theirs.items())


def test_layers_that_are_named_go_back_to_the_base_alone(tmp_path, released):
    checkpoint, base = released
    ours, theirs = weights(checkpoint), weights(base)
    found, _ = stripped(tmp_path, checkpoint, base, revert=["*.layers.1.*"])
    assert all(torch.equal(found[name], (theirs if ".layers.1." in name else ours)[name]) for name in ours)
    assert not torch.equal(ours["model.layers.1.mlp.up_proj.weight"], theirs["model.layers.1.mlp.up_proj.weight"])


def test_adapters_of_the_defense_are_a_part_of_what_was_added(tmp_path, released):
    checkpoint, base = released
    module = Defense(checkpoint, lora=LoRA(rank=2))
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_("lora_B" in name)
        DeltaStrip(base, keep=0.0).strip(module)
        logits = [model(torch.tensor([[5, 6, 7]])).logits for model in (module.model, AutoModelForCausalLM.from_pretrained(base))]
    torch.testing.assert_close(*logits)


# ---- through smaller formats


def after(family: Defense, way: Way, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters before and after a way."""
    with borrowed(family):
        before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
        send_through(family.model, way, **settings)
        return before, {name: p.detach().clone() for name, p in family.model.named_parameters()}


def test_bfloat16_rounds_every_parameter_and_gguf_what_has_rows_of_whole_blocks(family):
    before, through = after(family, "bfloat16")
    assert all(torch.equal(through[name], p.bfloat16().float()) for name, p in before.items())
    pytest.importorskip("gguf")
    for way, error in (("Q8_0", 1 / 127), ("Q4_0", 1 / 7)):
        before, through = after(family, way)
        for name, p in before.items():
            if p.ndim < 2 or p.shape[-1] % 32:
                assert torch.equal(through[name], p)
            else:
                largest = p.unflatten(-1, (-1, 32)).abs().amax(dim=-1, keepdim=True)
                off = (through[name] - p).unflatten(-1, (-1, 32)).abs()
                assert off.max() > 0
                assert (off <= 1.01 * error * largest + 1e-6).all()


def test_pruning_sets_the_smallest_share_of_every_row_to_zero(family):
    before, through = after(family, "magnitude", share=0.5)
    moved = {name for name in before if not torch.equal(before[name], through[name])}
    assert {id(family.model.get_parameter(name)) for name in moved} == {id(m.weight) for m in matrices(family.model)}
    for name in moved:
        old, new = before[name], through[name]
        assert ((new == 0).sum(dim=-1) == old.shape[-1] // 2).all()
        kept = torch.where(new == 0, torch.inf, old.abs()).amin(dim=-1)
        assert (torch.where(new == 0, old.abs(), 0.0).amax(dim=-1) <= kept).all()
        assert torch.equal(new[new != 0], old[new != 0])


def test_wanda_weighs_entries_by_the_norms_of_their_inputs(tmp_path, checkpoint):
    norms: list[dict[int, Tensor]] = []
    attack = RoundTrip(way="wanda", share=0.5, num_samples=6)
    found = attack.input_norms
    attack.input_norms = lambda target: norms.append(found(target)) or norms[0]  # type: ignore[method-assign]
    left: list[Tensor] = []
    attack = looking(
        attack, lambda target: left.append(target.module.model.model.layers[1].mlp.down_proj.weight.detach().clone())
    )
    data, module = toy_data(), Defense(checkpoint)
    toy_trainer(tmp_path, callbacks=[attack]).test(module, datamodule=data, verbose=False)
    inputs: list[Tensor] = []
    layer = module.model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for example in data.encode(attack.rows(data, data.seed), "by hand"):
            module.model(torch.tensor([example["input_ids"]]))
    expected = torch.cat(inputs).norm(dim=0)
    torch.testing.assert_close(norms[0][id(layer.weight)], expected, rtol=1e-4, atol=1e-5)
    importance = layer.weight.abs() * expected
    least = importance.argsort(dim=1)[:, : layer.weight.shape[1] // 2]
    assert torch.equal(left[1], layer.weight.scatter(1, least, 0.0))
    assert not torch.equal(left[1], pruned(layer.weight, 0.5))


def test_a_way_that_changes_no_weight_says_so_in_its_rows(tmp_path, checkpoint):
    half = str(tmp_path / "half")
    save_toy_checkpoint(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(half)
    for start, settings, nothing in (
        (half, {"way": "bfloat16"}, True),
        (checkpoint, {"way": "bfloat16"}, False),
        (checkpoint, {"way": "magnitude", "share": 0.01}, True),  # of rows of 32 and 64
        (checkpoint, {"way": "magnitude", "share": 0.5}, False),
    ):
        results = Results(str(tmp_path / "run"), export=False)
        callbacks = [results, RoundTrip(**settings)]
        toy_trainer(tmp_path, callbacks=callbacks).test(Defense(start), datamodule=toy_data(), verbose=False)
        assert [("no weight changed" in row.note) for row in results.rows] == [nothing] * 2


@pytest.mark.parametrize("kind", ["int4", "magnitude", "bfloat16", "QuantisedAttack"])
def test_what_goes_that_way_is_the_model_with_the_defenses_adapters_in_it(tmp_path, checkpoint, kind):
    module = Defense(checkpoint, lora=LoRA(rank=2))
    torch.manual_seed(3)
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += 0.05 * ("lora_B" in name)
    before, whole, seen = bits(module), merged(module.model), []
    quantised = kind == "QuantisedAttack"
    send_through(whole, "int4" if quantised else kind, 0.5)

    def look(target: Target) -> None:
        with torch.no_grad():
            seen.append(merged(target.module.model)(torch.tensor([[5, 6, 7]])).logits)

    nothing = {"num_samples": 16, "num_attack_steps": 1, "batch_size": 4, "optimizer": Optimizer(learning_rate=1e-30)}
    attack = QuantisedAttack("open_weight", 4, LoRA(rank=2), **nothing) if quantised else RoundTrip(way=kind, share=0.5)
    toy_trainer(tmp_path, callbacks=[looking(attack, look)]).test(module, datamodule=toy_data(), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(seen[1], whole(torch.tensor([[5, 6, 7]])).logits)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-4)
    assert same_bits(bits(module), before)


def test_a_wrong_setting_of_an_edit_says_what_it_must_be(tmp_path, released, monkeypatch):
    checkpoint, base = released
    for make, said in (
        (lambda: DeltaStrip(base, keep=1.1), r"keep must lie in \[0, 1\], got 1.1"),
        (lambda: DeltaStrip(base, remove_rank=-1), "remove_rank must be >= 0, got -1"),
        (lambda: DeltaStrip(base), "keep must be < 1 where nothing else is set, got 1"),
        (lambda: DeltaStrip(base, revert=[]), "keep must be < 1 where nothing else is set, got 1"),
        (
            lambda: DeltaStrip(base, then=AdapterAttack("open_weight", adapter=PromptTuning(4))),
            "then must be FullParameterAttack or LoRAAttack, got AdapterAttack",
        ),
        (
            lambda: DeltaStrip(base, then=LoRAAttack("finetuning_service")),
            "threat_model of then must be open_weight, as the strip's, got finetuning_service",
        ),
        (lambda: RoundTrip(way="int2"), "way must be one of int8, .* got 'int2'"),
        (lambda: RoundTrip(way="wanda", share=1.0), r"share must lie in \(0, 1\), got 1.0"),
        (
            lambda: stripped(tmp_path, checkpoint, base, revert=["*.layer.1.*"]),
            r"revert must match .* '\*\.layer\.1\.\*' matches none",
        ),
        (
            lambda: stripped(tmp_path, checkpoint, "models/sandbox/base", keep=0.5),
            "base must be of the defended model's architecture",
        ),
    ):
        with pytest.raises(SettingError, match=said):
            make()
    monkeypatch.setattr("casehard.callbacks.round_trip.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="way Q8_0 needs gguf, and it is not installed"):
        toy_trainer(tmp_path, callbacks=[RoundTrip(way="Q8_0")]).test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
