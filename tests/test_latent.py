import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import bits, looking, same_bits, toy_data, toy_trainer

from casehard import Defense, LatentAttack, SettingError
from casehard.callbacks.attack import Target
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids, text_ids
from casehard.engine.latent import ball_descent, perturbed, projected
from casehard.engine.soft_tokens import table_shape

FEW: dict[str, Any] = {"num_attack_steps": 4, "radius": 5.0, "step_ratio": 0.5, "target_text": "Here is"}
NORMS = ["l2", "linf"]


def attacked(folder: Path, checkpoint: str, look=lambda target: None, **settings: Any) -> Results:
    results = Results(str(folder), export=False)
    attack = looking(LatentAttack(**(FEW | settings)), look)
    toy_trainer(folder, callbacks=[results, attack]).test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    return results


def answers(folder: Path, step: int) -> list[str]:
    """Of a step that was scored."""
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [line["response"] for line in lines if line["num_attack_steps"] == step]


@pytest.fixture
def module(checkpoint) -> Defense:
    module = Defense(checkpoint)
    module.configure_model()
    module.eval()
    return module


def test_a_marked_token_is_moved_after_the_layer_and_no_other(module):
    size, dim = table_shape(module.model)
    ids, marked = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([[5, size, 7, 8], [size + 1, 10, 11, 12]])
    deltas = torch.randn(1, 2, dim)
    entered: list[torch.Tensor] = []
    layers = module.model.model.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone())) for layer in layers]
    with torch.no_grad():
        plain = module.model(ids).logits
        with perturbed(module.model, [0], torch.tensor([6, 9]), deltas):
            moved = module.model(marked).logits
    for handle in handles:
        handle.remove()
    first, second, moved_first, moved_second = entered
    assert torch.equal(first, moved_first)
    second[0, 1] += deltas[0, 0]
    second[1, 0] += deltas[0, 1]
    assert torch.equal(moved_second, second)
    assert torch.equal(moved[0, 0], plain[0, 0])  # what stands before it sees nothing
    assert not torch.allclose(moved[0, 3], plain[0, 3])


def test_deltas_of_0_are_the_plain_model_and_hooks_are_gone_afterwards(module):
    size, dim = table_shape(module.model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = module.model(ids).logits
        with perturbed(module.model, [0, 1], ids[0], torch.zeros(2, 3, dim)):
            assert torch.equal(module.model(ids + 0).logits, plain)
            assert torch.equal(module.model(torch.arange(size, size + 3)[None]).logits, plain)
        assert torch.equal(module.model(ids).logits, plain)
        with pytest.raises(RuntimeError, match="boom"), perturbed(module.model, [0], ids[0], torch.ones(1, 3, dim)):
            raise RuntimeError("boom")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.model.modules())


def test_a_radius_of_0_answers_as_the_plain_model(tmp_path, checkpoint):
    results = attacked(tmp_path, checkpoint, radius=0.0)
    assert answers(tmp_path, 0) == answers(tmp_path, 4)
    assert results.rows[0].metrics == results.rows[-1].metrics


@pytest.mark.parametrize("norm", NORMS)
def test_the_text_gets_likelier_inside_the_ball_and_answers_change(tmp_path, checkpoint, norm):
    targets: list[Target] = []
    radius = {"l2": 3.0, "linf": 0.3}[norm]
    results = attacked(
        tmp_path, checkpoint, targets.append, norm=norm, radius=radius, layers=[0, 1], score_steps=[2, 4], batch_size=4
    )
    target = targets[-1]
    module, deltas = target.module, target.state["deltas"]
    module.eval()
    text = text_ids("Here is", module.tokenizer)
    harmful = target.data.evaluation.harmful
    assert set(deltas) == set(harmful)

    def loss(row, moved: torch.Tensor) -> float:
        prompt = prompt_ids(row, module.tokenizer)
        size = table_shape(module.model)[0]
        ids = torch.tensor([[*range(size, size + len(prompt)), *text]])
        with torch.no_grad(), perturbed(module.model, [0, 1], torch.tensor(prompt), moved):
            logprobs = module.model(ids).logits[0].log_softmax(dim=-1)
        return -sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(text))

    for row in harmful:
        assert loss(row, deltas[row]) < loss(row, torch.zeros_like(deltas[row])) - 0.1
        size = deltas[row].abs().max() if norm == "linf" else deltas[row].norm(dim=-1).max()
        assert size <= radius
        assert size > 0.9 * radius
    before, after = (answers(tmp_path, step) for step in (0, 4))
    assert before[:6] != after[:6]
    assert before[6:] == after[6:]  # benign prompts and tasks
    tokens = sum(len(prompt_ids(row, module.tokenizer)) + len(text) for row in harmful)
    assert [(row.passes, row.tokens_trained) for row in results.rows] == [(0, 0), (2, 2 * tokens), (4, 4 * tokens)]


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_exact_and_leaves_what_is_inside(norm):
    deltas = torch.randn(3, 200, 64) * torch.logspace(-3, 6, 200)[:, None]
    inside = projected(deltas, 0.7, norm)
    sizes = inside.norm(dim=-1) if norm == "l2" else inside.abs().amax(dim=-1)
    assert sizes.max() <= 0.7
    within = (deltas.norm(dim=-1) if norm == "l2" else deltas.abs().amax(dim=-1)) < 0.69
    assert within.any()
    assert torch.equal(inside[within], deltas[within])
    if norm == "l2":  # the nearest one lies in the same direction
        assert torch.allclose(torch.cosine_similarity(inside, deltas, dim=-1), torch.ones(3, 200), atol=1e-5)
    assert torch.equal(projected(torch.zeros(1, 1, 4), 0.0, norm), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_descent_finds_the_point_of_the_ball_nearest_to_an_optimum_outside(norm):
    optimum = torch.tensor([[[3.0, 4.0]]])
    found = ball_descent(lambda x: x - optimum, torch.zeros(1, 1, 2), 100, 1.0, 0.05, norm)
    expected = {"l2": [0.6, 0.8], "linf": [1.0, 1.0]}[norm]
    assert torch.allclose(found[0, 0], torch.tensor(expected), atol=0.02)


def test_no_weight_changes(tmp_path, checkpoint):
    seen = []
    attacked(tmp_path, checkpoint, lambda target: seen.append(bits(target.module)))
    assert same_bits(seen[0], seen[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": -1.0}, r"num_attack_steps must be >= 1, radius >= 0 and step_ratio in \(0, 1\], got 4, -1.0 and 0.5"),
        ({"step_ratio": 0.0}, "step_ratio in .*, got 4, 5.0 and 0.0"),
        ({"norm": "l1"}, "norm must be l2 or linf, got 'l1'"),
        ({"layers": [0, 2]}, r"layers must lie in 0 to 1, the model's last, got \[0, 2\]"),
    ],
)
def test_settings_that_move_nothing_are_errors(tmp_path, checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        attacked(tmp_path, checkpoint, **settings)
