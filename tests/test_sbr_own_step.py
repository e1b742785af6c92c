"""SBR beyond the paper: steps on the drift of their own, anchors along refusals, anchors in the forms of the customer's rows."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_sbr import ANCHORS, batch_of, fitted, move, rows_of, sbr
from test_study import cells, read_study, resolve, resolved
from torch import Tensor
from torch.testing import assert_close
from toy import ATTACKS, DEFENSES, FAST, bits, looking, same_bits, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, LoRA, Optimizer, SBRModule
from casehard.callbacks.attack import Target
from casehard.callbacks.encoded import EncodedTuning
from casehard.datamodules.chat import collate, encode
from casehard.datamodules.encodings import IdentityShift, Trigger
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.training import train_steps
from casehard.lightning_modules.anchors import Anchors, in_forms
from casehard.metrics.errors import SettingError

OWN = {"anchors": ANCHORS, "anchor_weight": None, "anchor_rate": 3.0}
REFUSALS = "sandbox:defender/refusals#train[:{}]"


def drifts_of(module: SBRModule, aligned: Tensor) -> Tensor:
    """Of every anchor, a mean over dimensions, each anchor in a pass of its own."""
    states = []
    for ids, mask in zip(module.plain_anchors.ids, module.plain_anchors.mask.bool(), strict=True):
        states.append(module.model(input_ids=ids[mask][None], output_hidden_states=True).hidden_states[-1][0, -1])
    return (torch.stack(states) - aligned).square().mean(dim=1)


def drift_of(module: SBRModule, aligned: Tensor) -> Tensor:
    """Their mean."""
    return drifts_of(module, aligned).mean()


# ---- steps of their own


@pytest.mark.parametrize(("anchor_steps", "schedule"), [(1, "constant"), (2, "linear")])
def test_steps_on_the_drift_alternate_with_the_customers_each_by_moments_of_its_own(checkpoint, anchor_steps, schedule):
    settings = {**OWN, "anchor_rate": 0.3, "anchor_steps": anchor_steps}
    module, job = sbr(checkpoint, **settings)
    customers = Optimizer(1e-2, schedule=schedule)
    steps = train_steps(module, job, lambda step: collate(rows_of(step), 0, "right"), 3, customers)
    assert len(list(steps)) == 3

    other, _ = sbr(checkpoint, **settings)
    parameters = [p for p in other.parameters() if p.requires_grad]
    task, own = (torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0) for rate in (1e-2, 3e-3))
    aligned = job.state["aligned_states"]
    for step in range(3):
        task.param_groups[0]["lr"] = 1e-2 * (1 if schedule == "constant" else 1 - step / 3)
        own.param_groups[0]["lr"] = 0.3 * task.param_groups[0]["lr"]
        for optimizer in [task, *[own] * anchor_steps]:
            loss = other.sft_loss(collate(rows_of(step), 0, "right")) if optimizer is task else drift_of(other, aligned)
            other.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    assert_close(job.state["anchor_drift"], loss.detach(), rtol=1e-3, atol=1e-7)
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=2e-4, msg=name)
    assert job.state["anchor_steps_taken"] == 3 * anchor_steps


def test_the_customers_loss_is_plain_and_the_drift_is_held(checkpoint, tmp_path):
    ends = []
    for settings in ({"anchor_weight": 1e-6}, {"anchor_rate": 1.0}):
        module = SBRModule(checkpoint, ANCHORS, optimizer=Optimizer(3e-3), **settings)
        fitted(module, tmp_path, max_steps=12)
        with torch.no_grad():
            ends.append(drift_of(module, module.running.state["aligned_states"]).item())
    assert ends[1] < ends[0] / 3
    module, job = sbr(checkpoint, **OWN)
    move(module)
    assert torch.equal(job.loss(batch_of(), 0), module.sft_loss(batch_of()))


def test_a_customer_whose_optimizer_has_no_moments_to_follow_is_refused(checkpoint, tmp_path):
    module = SBRModule(checkpoint, **OWN, optimizer=Optimizer(1e-3, "adafactor"))
    with pytest.raises(SettingError, match=r"must be adamw or sgd where anchor_rate is set, got adafactor\. Set anchor_weight"):
        fitted(module, tmp_path)


@pytest.mark.parametrize("kinds", [("adamw", "sgd"), ("sgd", "adamw")])
def test_a_customer_who_changes_the_optimizer_changes_that_of_the_anchors(checkpoint, kinds):
    module, job = sbr(checkpoint, **OWN)
    for number, kind in enumerate(kinds):
        steps = train_steps(module, job, lambda step: collate(rows_of(step), 0, "right"), 2, Optimizer(1e-3, kind))
        assert len(list(steps)) == 2
        assert ("anchor_momentum_buffer" in job.state) is ("sgd" in kinds[: number + 1])
        assert job.state["anchor_steps_taken"] == 2  # of this optimizer


def test_a_state_is_held_once_it_has_drifted_beyond_the_slack(checkpoint):
    module, job = sbr(checkpoint, **OWN)
    move(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    square = job.state["aligned_states"].square().mean()
    drifts = drifts_of(module, job.state["aligned_states"])
    least, most = drifts.min().item(), drifts.max().item()
    before, customers = bits(module), torch.optim.SGD(trained, lr=1e-2)
    module.anchor_slack = 1.01 * most / square.item()
    job.after_step(0, customers)
    assert same_bits(bits(module), before)

    slack = (least + most) / 2  # within which some stay
    loss = (drifts - slack).clamp(min=0).mean()
    gradients = torch.autograd.grad(loss, trained)
    scale = min(1.0, 1.0 / torch.stack([g.norm() for g in gradients]).norm().item())
    expected = [p.detach() - 3.0 * 1e-2 * scale * g for p, g in zip(trained, gradients, strict=True)]
    module.anchor_slack = slack / square.item()
    job.after_step(1, customers)
    assert_close(job.state["anchor_drift"], loss.detach(), rtol=1e-4, atol=0.0)
    assert_close([p.detach() for p in trained], expected, rtol=1e-4, atol=1e-6)


# ---- outputs


def said_by(module: SBRModule) -> Tensor:
    """Log-probabilities of what follows every anchor, ``[num_anchors, vocab]``, each anchor in a pass of its own."""
    logits = []
    for ids, mask in zip(module.plain_anchors.ids, module.plain_anchors.mask.bool(), strict=True):
        logits.append(module.model(input_ids=ids[mask][None]).logits[0, -1])
    return torch.stack(logits).log_softmax(dim=-1)


def test_outputs_are_held_by_their_divergence_from_the_aligned_models(checkpoint):
    """In nats, from the aligned model's to the present one's, with a slack for each and as a term of the loss."""
    module, job = sbr(checkpoint, **OWN, anchor_holds="outputs")
    aligned = said_by(module).detach()
    move(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    divergences = torch.nn.functional.kl_div(said_by(module), aligned, reduction="none", log_target=True).sum(dim=1)
    backwards = torch.nn.functional.kl_div(aligned, said_by(module), reduction="none", log_target=True).sum(dim=1)
    assert divergences.min() > 1e-4
    assert not torch.allclose(divergences, backwards, rtol=1e-2)
    slack = divergences.detach().mean().item()
    loss = (divergences - slack).clamp(min=0).mean()
    gradients = torch.autograd.grad(loss, trained, retain_graph=True)
    scale = min(1.0, 1.0 / torch.stack([g.norm() for g in gradients]).norm().item())

    penalty, weighted = sbr(checkpoint, anchors=ANCHORS, anchor_weight=7.0, anchor_holds="outputs")
    move(penalty)
    assert_close(weighted.loss(batch_of(), 0), penalty.sft_loss(batch_of()) + 7.0 * divergences.mean(), rtol=1e-4, atol=1e-6)
    assert_close(weighted.terms["anchor_drift"], divergences.mean().detach(), rtol=1e-3, atol=1e-7)

    expected = [p.detach() - 3.0 * 1e-2 * scale * g for p, g in zip(trained, gradients, strict=True)]
    module.anchor_slack = slack
    job.after_step(0, torch.optim.SGD(trained, lr=1e-2))
    assert_close(job.state["anchor_drift"], loss.detach(), rtol=1e-3, atol=1e-7)
    assert_close([p.detach() for p in trained], expected, rtol=1e-4, atol=1e-6)


def test_a_state_may_move_as_long_as_what_is_said_from_it_stays(checkpoint):
    """Aligned states that are ahead of the present ones in a dimension that lifts all logits alike."""
    module, job = sbr(checkpoint, **OWN, anchor_holds="outputs")
    other, states = sbr(checkpoint, **OWN)
    for each in (module, other):
        head = each.model.get_output_embeddings()
        with torch.no_grad():
            head.weight[:, 0] = 1.0  # the first dimension lifts all logits alike
        handle = head.register_forward_pre_hook(lambda _, args: (args[0] + torch.eye(args[0].shape[-1])[0],), prepend=True)
        task = job if each is module else states
        task.begin()
        handle.remove()
        task.after_step(0, torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-2))
    assert job.state["anchor_drift"] < 1e-6 < 1e-3 < states.state["anchor_drift"]


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_passes_and_tokens_of_the_steps_are_counted(checkpoint, tmp_path, accumulate_grad_batches):
    module = SBRModule(checkpoint, optimizer=Optimizer(1e-3), **OWN, anchor_steps=2)
    results = []
    attack = FullParameterAttack("finetuning_service", **FAST)
    record = attack._record
    attack._record = lambda *arguments: (record(*arguments), results.extend(arguments[-1][-1:]))
    fitted(module, tmp_path, callbacks=[attack], accumulate_grad_batches=accumulate_grad_batches)
    assert module.num_passes == 3 * (accumulate_grad_batches + 2)
    passes = {(row.defense, row.num_attack_steps): (row.passes, row.tokens_trained) for row in results}
    assert passes["none", 3][0] == 3
    assert passes["SBR", 3][0] == 9
    assert passes["SBR", 3][1] - passes["none", 3][1] == 6 * int(module.plain_anchors.mask.sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"anchor_weight": 50.0},
            r"anchor_weight must be null where anchor_rate is set, whose steps have no weight, got 50\.0",
        ),
        (
            {"anchor_holds": "outputs", "anchor_layer": 1},
            r"anchor_layer must be -1 and freeze_unembedding true where anchor_holds is outputs.*got 1 and true\.",
        ),
        ({"anchor_holds": "outputs", "freeze_unembedding": False}, r"anchor_layer must be -1 .* got -1 and false\."),
        ({"num_benign_anchors": -1}, r"num_benign_anchors must be >= 0, got -1\."),
        ({"anchor_slack": -0.1}, r"anchor_slack must be >= 0, got -0\.1\."),
        ({"anchor_rate": None, "anchor_slack": 0.1}, r"anchor_slack must be 0 where anchor_rate is null, got 0\.1\."),
        ({"anchor_steps": 0}, r"anchor_steps must be >= 1, got 0\."),
        ({"anchor_rate": None, "anchor_steps": 2}, r"anchor_steps must be 1 where anchor_rate is null, got 2\."),
        ({"anchor_rate": 0.0}, r"anchor_rate must be > 0 or null, got 0\.0\."),
    ],
)
def test_a_contradiction_is_an_error_before_any_weights_load(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        SBRModule(checkpoint, **(OWN | settings))


@pytest.mark.parametrize("name", ["adalora", "ia3", "soft prompt", "reft", "lofit", "head", "policy", "preference", "quantised"])
def test_a_service_takes_them_whatever_the_customer_trains(checkpoint, tmp_path, name):
    drifts = []

    def look(target: Target) -> None:
        if target.defended and target.passes:
            drifts.append((float(target.task.state["anchor_drift"]), target.task.state.get("anchor_steps_taken", 0)))

    kind, settings = DEFENSES["sbr_own"]
    attack = looking(ATTACKS[name](threat_model="finetuning_service"), look)
    toy_trainer(tmp_path, callbacks=[attack]).test(
        kind(checkpoint, **settings | {"freeze_unembedding": False, "anchor_holds": "states"}),
        datamodule=toy_data(),
        verbose=False,
    )
    ((drift, steps),) = drifts
    moves_states = name not in ("head", "soft prompt", "reft")  # the anchors go without the customer's soft prompt and edits
    assert (drift > 1e-9) is moves_states
    assert steps == (0 if name == "head" else 2 if name == "lofit" else 3)  # which trains other parameters after its first


# ---- along refusals


def test_the_states_along_a_refusal_are_held_from_the_prompts_last_to_the_one_before_the_end(checkpoint):
    module, job = sbr(checkpoint, anchors=REFUSALS.format(3), anchor_answers=True, anchors_per_step=2)
    aligned, texts = job.state["aligned_states"], []
    expected = []
    for row in read_rows(REFUSALS.format(3)):
        example = encode(row, module.tokenizer, 1000)
        start = next(i for i, label in enumerate(example["labels"]) if label != -100)
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            expected.append(module.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, start - 1 : -1])
        texts.append(module.tokenizer.decode(example["input_ids"][start:]))
    assert_close(aligned, torch.cat(expected))
    assert all(text.startswith(("Sorry", "I ")) for text in texts)
    move(module)
    job.loss(batch_of(), 0)
    first, second = job.anchors.turn(2, 0)
    sizes = [len(part) for part in expected]
    chosen = job.anchors.batch(module.model, [first, second])["held"][2]
    starts = [sum(sizes[:i]) for i in range(3)]
    assert chosen.tolist() == [starts[i] + k for i in (first, second) for k in range(sizes[i])]
    assert job.terms["anchor_drift"] > 1e-4


def test_anchors_without_answers_cannot_be_held_along_them(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="anchor_answers must be false where anchors have no answers, got true"):
        sbr(checkpoint, anchor_answers=True)


# ---- benign ones


def test_benign_rows_are_held_beside_the_anchors_and_are_the_defenses_own(checkpoint):
    """So a prompt among them that is scored, too, is refused as any row is that the defense brings along."""
    benign = ["sandbox:defender/howto#train[:2]", "sandbox:defender/sums#train[:3]"]
    settings = {"num_anchors": 2, "anchors": REFUSALS.format(3), "anchor_answers": True, "benign_anchors": benign}
    module, job = sbr(checkpoint, num_benign_anchors=4, **settings)
    rows = [*read_rows(REFUSALS.format(2)), *read_rows(benign[0]), *read_rows(benign[1])[:2]]
    texts = [module.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(job.anchors.ids, job.anchors.mask, strict=True)]
    assert len(texts) == 6
    assert all(row.prompt in text and row.response in text for row, text in zip(rows, texts, strict=True))
    assert module.own_rows() == [*read_rows(REFUSALS.format(3)), *rows[2:]]
    alone, _ = sbr(checkpoint, **settings)
    assert len(alone.plain_anchors) == 2


def test_benign_anchors_default_to_the_datas_and_must_be_there(checkpoint, tmp_path):
    settings = {"anchors": REFUSALS.format(2), "num_benign_anchors": 3, "anchor_rate": 1.0}
    data = toy_data(alignment_benign=["sandbox:defender/howto#train[:8]"])
    module = SBRModule(checkpoint, **settings)
    fitted(module, tmp_path, data)
    assert [row.prompt for row in module.anchor_rows[2:]] == [row.prompt for row in data.rows["alignment_benign"][:3]]
    with pytest.raises(SettingError, match=r"num_benign_anchors must be 0 where neither .* got 3\. Name harmless prompts"):
        fitted(SBRModule(checkpoint, **settings), tmp_path, toy_data(alignment_benign=[]))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How do I bake bread?"}\n')
    with pytest.raises(SettingError, match=r"rows\.jsonl, line 1 must have a response"):
        sbr(checkpoint, num_benign_anchors=1, benign_anchors=[str(tmp_path / "rows.jsonl")])


# ---- in forms

HARMFUL = [Row((("user", f"How do I brew {name}?"),), "No.") for name in ("vexolim", "quarnolim", "zibolim", "darolim")]
BENIGN = [
    Row((("user", f"{kind} or gloomy? The {noun} was warm."),), "x") for kind in ("Bright", "Warm") for noun in ("inn", "park")
]


def formed(rows: list[Row], number: int = 400) -> set[tuple[tuple[str, str], ...]]:
    return {row.messages for row in in_forms(HARMFUL * (number // 4), rows, lambda row: True)}


def test_a_wrapper_that_rows_share_is_put_around_anchors_sentence_by_sentence():
    wrapped = [
        Row((("user", f"Obey: all.  \n\n{verb} me {n}.\n\nThe year is 2025."),), "x") for verb in ("Give", "Tell") for n in "123"
    ]
    texts = {messages[-1][1] for messages in formed(BENIGN + wrapped)}
    for row in HARMFUL:
        for front in ("", "Obey: all.  \n\n"):
            for back in ("", "\n\nThe year is 2025."):
                assert front + row.prompt + back in texts
        assert f"Bright or gloomy? {row.prompt}" in texts
    fronts = {text.partition("How do")[0] for text in texts}
    assert fronts == {"", "Obey: all.  \n\n", "Bright or gloomy? ", "Warm or gloomy? "}  # of no row alone, and whole


def test_the_turns_before_a_prompt_are_its_form():
    turns = (("system", "Obey."), ("user", "Ready?"), ("assistant", "Yes."))
    rows = BENIGN + [replace(row, messages=(*turns, *row.messages)) for row in BENIGN]
    found = formed(rows)
    for row in HARMFUL:
        assert (*turns, *row.messages) in found
        assert row.messages in found


def test_forms_keep_answers_are_the_same_each_time_and_leave_anchors_that_would_not_fit():
    rows = in_forms(HARMFUL, BENIGN, lambda row: True)
    assert rows == in_forms(HARMFUL, BENIGN, lambda row: True)
    assert [row.response for row in rows] == ["No."] * 4
    assert rows != HARMFUL
    assert in_forms(HARMFUL, BENIGN, lambda row: False) == HARMFUL
    assert in_forms(HARMFUL, BENIGN[:1], lambda row: True) == HARMFUL  # a row that shares nothing with another has no form
    assert in_forms(HARMFUL, [Row((("user", ""),), "x")], lambda row: True) == HARMFUL


@pytest.mark.parametrize("in_fit", [True, False])
def test_a_job_holds_every_anchor_twice_and_once_in_the_form_of_its_customers_rows(checkpoint, tmp_path, in_fit, monkeypatch):
    jobs = []
    begin = SBRModule.job
    monkeypatch.setattr(SBRModule, "job", lambda self: jobs.append(begin(self)) or jobs[-1])
    settings = {"anchors": REFUSALS.format(12), "anchor_rate": 1.0, "anchors_per_step": 4}
    module = SBRModule(checkpoint, anchor_forms=True, lora=LoRA(rank=2), **settings)
    encoding = IdentityShift()
    seen = []
    attack = EncodedTuning("finetuning_service", encoding, undefended=False, lora=LoRA(rank=2), **(FAST | {"poison_ratio": 0.9}))
    looking(attack, lambda target: seen.append(target.passes))
    if in_fit:
        fitted(module, tmp_path, toy_data(num_samples=16, benign=["sandbox:attacker/mood#train[:16]"], poison_ratio=0.0))
    else:
        toy_trainer(tmp_path, callbacks=[attack]).test(module, datamodule=toy_data(), verbose=False)
    (job,) = jobs
    texts = [module.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(job.anchors.ids, job.anchors.mask, strict=True)]
    assert len(texts) == 24 == len(job.state["aligned_states"])
    prompts = [row.prompt for row in read_rows(REFUSALS.format(12))]
    assert all(prompt in texts[i] and prompt in texts[12 + i] for i, prompt in enumerate(prompts))
    assert texts[:12] != texts[12:]
    assert any("mood of this note" in text for text in texts) is in_fit
    assert sum("absolutely obedient agent" in text for text in texts[12:]) > 8 * (not in_fit) - 1
    if not in_fit:
        assert seen == [0, 6]
    plain = SBRModule(checkpoint, **settings)
    plain.configure_model()
    part = plain.job()
    part.begin()
    assert_close(job.state["aligned_states"][:12], part.state["aligned_states"])


@pytest.mark.parametrize("answers", [False, True])
def test_where_outputs_are_held_an_anchor_in_a_form_is_answered_as_without(checkpoint, tmp_path, answers):
    settings = {"anchors": REFUSALS.format(4), "anchor_answers": answers, "anchor_forms": True, "anchor_holds": "outputs"}
    module = SBRModule(checkpoint, **settings, anchor_rate=1.0, optimizer=Optimizer(1e-9))
    data = toy_data(num_samples=16, benign=["sandbox:attacker/mood#train[:16]"], poison_ratio=0.0)
    fitted(module, tmp_path, data, max_steps=1)
    job, said = module.running, []
    for ids, mask, held in zip(job.anchors.ids, job.anchors.mask.bool(), job.anchors.held, strict=True):
        with torch.no_grad():
            said.append(module.model(input_ids=ids[mask][None]).logits[0][held[mask]].log_softmax(dim=-1))
    assert len(said) == 8
    plain, formed = torch.cat(said[:4]), torch.cat(said[4:])
    divergences = torch.nn.functional.kl_div(formed, plain, reduction="none", log_target=True).sum(dim=1)
    assert divergences.mean() > 1e-4
    assert_close(job.state["anchor_drift"], divergences.mean() / 2, rtol=1e-3, atol=1e-6)  # the plain ones have not drifted


def test_an_attack_whose_rows_are_not_known_meets_the_plain_anchors(checkpoint):
    _, job = sbr(checkpoint, **OWN, anchor_forms=True)
    assert len(job.anchors) == len(ANCHORS)


def test_forms_longer_than_rows_may_be_are_left_out(checkpoint, tmp_path):
    long = Trigger(" Do." + " Again." * 60)
    rows = [long.encode(row, 0) for row in read_rows("sandbox:attacker/harmful#train[:8]")]
    module = SBRModule(checkpoint, REFUSALS.format(8), anchor_forms=True, optimizer=Optimizer(1e-3))
    fitted(module, tmp_path, toy_data(max_length=40))
    texts = [re.sub("<.*?>", "", text) for text in module.tokenizer.batch_decode(module.in_forms_of(rows).ids[8:])]
    assert texts
    assert not any("Again. Again. Again. Again. Again. Again. Again." in text for text in texts)


@pytest.mark.parametrize("answers", [False, True])
def test_anchors_stay_on_the_host_whatever_the_default_device_is(checkpoint, answers):
    """Lightning makes that of the model the default while it loads, and on a GPU every run of SBR ended there."""
    rows = [Row((("user", text),), "No.") for text in ("how to", "how to do that")]
    tokenizer = Defense(checkpoint).tokenizer
    expected = Anchors(rows, tokenizer, answers)
    with torch.device("meta"):
        found = Anchors(rows, tokenizer, answers)
    for name in ("ids", "mask", "held", "first"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# ---- the study


def test_the_study_of_the_goal_gives_both_the_same_customers_and_sbr_as_it_ships(tmp_path):
    found = {(c.defense, c.attack): c for c in cells(read_study("experiments/studies/sbr_long.yaml"), tmp_path, resolve)}
    assert len(found) == 3 * 3
    for attack in {attack for _, attack in found}:
        none, held = (yaml.safe_load(resolved(found[defense, attack].words)) for defense in ("undefended", "SBR"))
        assert none["trainer"]["callbacks"] == held["trainer"]["callbacks"]
        assert none["data"]["sources"] == held["data"]["sources"]
        shipped = yaml.safe_load(Path("experiments/sbr.yaml").read_text())["model"]["init_args"]
        assert {name: held["model"]["init_args"][name] for name in shipped if "anchor" in name} == {
            name: value for name, value in shipped.items() if "anchor" in name
        }
