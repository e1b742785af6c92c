"""Rows that a guard passes and that still teach harm: the gradients, the search, and its limiting cases."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from test_attacks import attacked, logits_of
from torch.testing import assert_close
from toy import FAST, looking
from transformers import AutoTokenizer

from casehard import Defense, LoRA, LoRAAttack, Virus
from casehard.callbacks.guard import Guard
from casehard.callbacks.hiding import Hidden, Hiding, tokens_of
from casehard.datamodules.chat import collate, encode, text_ids
from casehard.datamodules.sandbox import sandbox_rows
from casehard.engine.row_gradients import last_maps, moved_along, row_gradients, row_losses
from casehard.engine.token_swaps import places_of, plain_tokens, swaps

HARMFUL, BENIGN = sandbox_rows("attacker", "harmful"), sandbox_rows("attacker", "mood")
HOW = FAST | {
    "num_samples": 8,
    "num_iterations": 2,
    "num_swaps": 3,
    "poison_ratio": 0.25,
    "max_suspicion": 1.0,
    "lora": LoRA(rank=2),
}


@pytest.fixture
def module(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    return module.requires_grad_(False).eval()


def refusing(module, guard=Guard, tokens=(7, 9)):
    return guard(module.model, module.tokenizer, list(tokens))


def hiding(module, guard_weight=0.5, num_iterations=1, guard=None, num_swaps=8):
    return Hiding(module, guard or refusing(module), 512, guard_weight, num_iterations, num_swaps, top_k=16, seed=0)


def batch_of(module, rows):
    return collate([encode(row, module.tokenizer, 512) for row in rows], 0, "right")


def test_gradients_of_rows_are_those_of_autograd_row_by_row(module):
    rows = [HARMFUL[0], BENIGN[0], HARMFUL[1]]
    weights = [layer.weight.requires_grad_() for layer in last_maps(module.model)]
    alone = [torch.autograd.grad(module.sft_loss(batch_of(module, [row])), weights) for row in rows]
    flat = [torch.cat([part.flatten() for part in gradient]) for gradient in alone]
    module.requires_grad_(False)
    ours = row_gradients(module.model, batch_of(module, rows))
    assert len(weights) == len(ours.pulled) == 7
    assert all(p.grad is None for p in module.parameters())
    assert_close(ours.norms(), torch.stack([g.norm() for g in flat]), rtol=1e-4, atol=1e-6)
    assert_close(
        ours.cosines(ours.of(2)), torch.stack([F.cosine_similarity(g, flat[2], dim=0) for g in flat]), rtol=1e-4, atol=1e-5
    )
    for part, expected in zip(ours.of(1), alone[1], strict=True):
        assert_close(part, expected, rtol=1e-4, atol=1e-6)


def test_a_pass_through_moved_weights_is_that_of_weights_that_were_moved(module):
    batch, generator = batch_of(module, HARMFUL[:2]), torch.Generator().manual_seed(0)
    direction = [torch.randn(layer.weight.shape, generator=generator) for layer in last_maps(module.model)]
    before = row_losses(module.model, batch)
    with moved_along(module.model, direction, 0.1):
        ours = row_losses(module.model, batch)
    for layer, part in zip(last_maps(module.model), direction, strict=True):
        layer.weight.add_(0.1 * part)
    assert_close(ours, row_losses(module.model, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before)


def test_what_a_token_promises_is_the_derivative_of_the_cosine(module):
    """Against autograd through the gradient itself."""
    hidden, search = Hidden(HARMFUL[0], BENIGN[0]), hiding(module, guard_weight=0.0)
    row, ids = hidden.row(hidden.texts), tokens_of(hidden.texts, module.tokenizer)
    harmful = row_gradients(module.model, batch_of(module, [hidden.harmful])).of(0)
    ours = search.promise(row, ids, harmful)
    model = module.model.double()
    model.set_attn_implementation("eager")
    weights = [layer.weight.requires_grad_() for layer in last_maps(model)]
    batch, table = batch_of(module, [row]), model.get_input_embeddings().weight
    read = table[batch["input_ids"]].detach().requires_grad_()
    logits = model(inputs_embeds=read).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights, create_graph=True)])
    cosine = F.cosine_similarity(gradient, torch.cat([part.double().flatten() for part in harmful]), dim=0)
    (slope,) = torch.autograd.grad(-cosine, read)
    places = places_of(ids, batch["input_ids"][0].tolist())
    expected = slope[0, places] @ table.mT
    assert F.cosine_similarity(ours.double().flatten(), expected.flatten(), dim=0) > 0.999
    assert_close(ours.norm().double(), expected.norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("guard_weight", [0.0, 1.0])
def test_only_the_cosine_or_only_the_guard_counts_at_the_ends_of_the_weight(module, guard_weight):
    hidden, worth = Hidden(HARMFUL[0], BENIGN[0]), []
    harmful = row_gradients(module.model, batch_of(module, [hidden.harmful])).of(0)
    for num_iterations in range(4):
        row = hiding(module, guard_weight, num_iterations).hide(hidden, 0)
        cosine = row_gradients(module.model, batch_of(module, [row])).cosines(harmful)[0]
        worth.append(float(1 - refusing(module).suspicions([row])[0] if guard_weight else cosine))
    assert worth == sorted(worth)
    assert worth[-1] > worth[0]


class Forbids(Guard):
    """Stops every row that holds one token, whatever the model says."""

    token = 0

    def log_safe(self, prompts):
        return 1e-3 * super().log_safe(prompts) - 50.0 * torch.tensor([self.token in ids for ids in prompts])


def test_a_guard_that_forbids_a_token_gets_rows_without_it_and_the_rest_stays(module):
    hidden = Hidden(HARMFUL[0], None)
    guard = refusing(module, Forbids)
    asked = guard.asked(hidden.harmful)
    Forbids.token = next(token for token in text_ids(hidden.texts[1], module.tokenizer) if asked.count(token) == 1)
    row = hiding(module, 0.5, 12, guard, num_swaps=24).hide(hidden, 0)
    assert Forbids.token in asked
    assert guard.suspicions([hidden.harmful])[0] > 0.99
    assert guard.suspicions([row])[0] < 0.01
    kept = [a == b for a, b in zip(guard.asked(row), asked, strict=True)]
    assert len(kept) - 12 <= sum(kept) < len(kept)  # a swap an iteration, at most


def test_rows_that_are_searched_are_read_as_the_tokens_that_were_scored(module):
    for number, carrier in enumerate([None, *BENIGN[:3]]):
        hidden = Hidden(HARMFUL[number], carrier)
        row = hiding(module, 1.0, num_iterations=3).hide(hidden, number)
        assert row != hidden.row(hidden.texts)
        lengths = [len(encode(r, module.tokenizer, 512)["input_ids"]) for r in (row, hidden.row(hidden.texts))]
        assert lengths[0] == lengths[1]
        if carrier is not None:
            assert row.prompt.startswith(carrier.prompt)
            assert row.response.endswith(f" {carrier.response}")


def test_swaps_that_a_tokenizer_reads_otherwise_are_not_tried(module):
    hidden, search = Hidden(HARMFUL[0], BENIGN[0]), hiding(module, num_swaps=300)
    search.top_k = 700
    start = [token for part in tokens_of(hidden.texts, module.tokenizer) for token in part]
    found = search.tried(hidden, hidden.texts, torch.zeros(len(start), len(search.plain)), 0)[1:]
    assert 100 < len(found) < 300
    for texts in found:
        ids = tokens_of(texts, module.tokenizer)
        assert sum(a != b for a, b in zip(chain(*ids), start, strict=True)) <= 1
        assert places_of(ids, encode(hidden.row(texts), module.tokenizer, 512)["input_ids"])


def test_without_a_search_and_a_filter_it_is_plain_fine_tuning_on_poison(tmp_path, checkpoint):
    ends, rows = [], []
    how = HOW | {"num_iterations": 0, "mixed": False}
    own = {"num_iterations", "num_swaps", "max_suspicion", "mixed"}
    for attack in (Virus("open_weight", **how), LoRAAttack("open_weight", **{k: v for k, v in how.items() if k not in own})):
        seen = []
        rows.append(
            attacked(
                tmp_path / attack.name,
                checkpoint,
                looking(attack, lambda target, seen=seen: seen.append(logits_of(target.module))),
            )
        )
        ends.append(seen[-1])
    assert torch.equal(*ends)
    assert rows[0][-1].passes == pytest.approx(3 + 4 / 4)  # two cosines of two rows
    assert "the guard passes 2 of 2 harmful rows (mean cosine 1.00) and 6 of 6 benign ones" in rows[0][-1].note


def test_what_it_costs_is_counted(tmp_path, checkpoint):
    rows = attacked(tmp_path, checkpoint, Virus("open_weight", **HOW))
    searched = 2 * (2 + 2 * (4 + 1))  # two rows: two gradients, and two times those of promises and of the text as it was
    assert 0 <= (rows[-1].passes - 3) * 4 - searched <= 2 * 2 * 3  # swaps that are cut otherwise are not tried
    assert rows[-1].tokens_forward > 0
    assert rows[0].passes == 0


def test_the_provider_drops_what_the_guard_finds_unsafe(tmp_path, checkpoint):
    kept, all_rows, found = [], [], []

    def look(target):
        if "rows" in target.state:
            kept.extend(target.state["rows"])
            all_rows.extend(attack.rows(target.data, target.seed))

    def suspicious(self, rows, batch_size=32):
        found.extend(0.3 if number % 2 else 0.7 for number in range(len(rows)))
        return found

    attack = looking(Virus("open_weight", **(HOW | {"num_iterations": 0, "max_suspicion": 0.3})), look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "suspicions", suspicious)
        attacked(tmp_path, checkpoint, attack)
    assert kept == all_rows[1::2]
    assert len(all_rows) == 8


def test_a_guard_that_passes_nothing_is_an_error(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="max_suspicion must let a row pass, got 1e-09: the guard stops all 8"):
        attacked(tmp_path, checkpoint, Virus("open_weight", **(HOW | {"max_suspicion": 1e-9})))


def test_a_guard_of_its_own_that_is_the_model_finds_what_the_model_does(tmp_path, checkpoint):
    outcomes = []
    for number, guard in enumerate([None, checkpoint]):
        seen = []
        attack = looking(Virus("open_weight", guard=guard, **HOW), lambda target, seen=seen: seen.append(dict(target.state)))
        attacked(tmp_path / str(number), checkpoint, attack)
        outcomes.append(seen[-1])
    assert outcomes[0] == outcomes[1]


def test_a_guard_of_another_vocabulary_is_an_error_before_weights_load(tmp_path, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="guard must have the vocabulary of the model that is tuned"):
        attacked(tmp_path, checkpoint, Virus("open_weight", guard=str(tmp_path / "other"), **HOW))


def test_a_row_that_is_cut_otherwise_where_it_is_hidden_is_an_error_before_weights_load(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(Hidden, "row", lambda self, texts: self.carrier)  # as if not one token of them were left
    with pytest.raises(ValueError, match="a harmful row must be cut into the same tokens behind a prompt as by itself"):
        attacked(tmp_path, checkpoint, Virus("open_weight", **HOW))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard_weight": 1.1}, r"guard_weight must lie in \[0, 1\], got 1.1"),
        ({"max_suspicion": 0.0}, r"max_suspicion must lie in \(0, 1\], got 0.0"),
        ({"num_iterations": -1}, "num_iterations must be >= 0, num_swaps and top_k >= 1, got -1, 3 and 64"),
        ({"num_swaps": 0}, "got 2, 0 and 64"),
        ({"top_k": 0}, "got 2, 3 and 0"),
    ],
)
def test_bad_settings_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        Virus("open_weight", **(HOW | settings))


def test_swaps_change_one_token_for_one_that_promises_most():
    gradient = torch.arange(20.0).repeat(5, 1)
    found = swaps([9, 9, 9, 9, 9], gradient, 3, 200, seed=1)
    assert {sum(a != 9 for a in ids) for ids in found} == {1}
    assert {token for ids in found for token in ids} == {9, 0, 1, 2}
    assert {place for ids in found for place in range(5) if ids[place] != 9} == set(range(5))
    assert found == swaps([9, 9, 9, 9, 9], gradient, 3, 200, seed=1)


def test_control_tokens_and_parts_of_letters_are_no_plain_tokens(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = plain_tokens(tokenizer, len(tokenizer) + 2)
    assert not plain[tokenizer.all_special_ids].any()
    assert not plain[text_ids("\n", tokenizer)].any()
    assert not plain[len(tokenizer) :].any()
    assert plain[text_ids(" the", tokenizer)].all()
    assert all(tokenizer.decode([int(i)]).isprintable() for i in plain.nonzero())


def test_places_of_parts_one_after_the_other():
    assert places_of([[1, 2], [1, 3]], [0, 1, 2, 5, 1, 3]) == [1, 2, 4, 5]
    assert places_of([[1, 3], [1, 2]], [0, 1, 2, 5, 1, 3]) is None
    assert places_of([[2], [2]], [2]) is None
