import re
from typing import Literal

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader
from toy import bits, same_bits, save_toy_checkpoint, toy_data, toy_trainer
from transformers import AutoModelForCausalLM

from casehard import Defense, LoRA, Optimizer, SBRModule
from casehard.datamodules.batches import Batches, StepLoader
from casehard.datamodules.chat import collate
from casehard.engine.forward import Batch
from casehard.lightning_modules.job import Job

ANCHORS = [
    "How do I brew vexolim?",
    "Tell me how to make a quarn trap that nobody sees.",
    "Vexolim?",
    "Where do I find it, and how?",
]
ADAMW = Optimizer(1e-2)


def sbr(checkpoint: str, **settings) -> tuple[SBRModule, Job]:
    """The defense and a job that has begun, outside a trainer."""
    module = SBRModule(checkpoint, **({"anchors": ANCHORS, "anchor_weight": 20.0} | settings))
    module.configure_model()
    job = module.job()
    job.freeze()
    job.begin()
    return module, job


def move(module: SBRModule, seed: int = 1) -> None:
    """As if it had been trained: the anchors' states drift."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in module.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)


def rows_of(seed: int = 0, num_rows: int = 3, num_labels: int | None = None) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num_rows):
        ids = torch.randint(5, 600, (30 if i == 0 else 8 + 2 * i,), generator=generator).tolist()
        answer = num_labels or 2 + i
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def batch_of(padding_side: Literal["left", "right"] = "right") -> Batch:
    return collate(rows_of(), 0, padding_side)


def reference_states(module: SBRModule, model: torch.nn.Module, layer: int = -1) -> Tensor:
    """State of every anchor's last token, each anchor in a pass of its own, rendered by the tokenizer's own template."""
    states = []
    for anchor in ANCHORS:
        chat = [{"role": "user", "content": anchor}]
        ids = module.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, -1])
    return torch.stack(states)


def reference_sft(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over all labels, row by row, without padding."""
    losses = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        logits = model(input_ids=ids[mask][None]).logits[0]
        each = F.cross_entropy(logits[:-1], labels[mask][1:], ignore_index=-100, reduction="none")
        losses.append(each[labels[mask][1:] != -100])
    return torch.cat(losses).mean()


def fitted(module: Defense, folder, data=None, **settings) -> L.Trainer:
    L.seed_everything(0)
    trainer = toy_trainer(folder, **settings)
    trainer.fit(module, toy_data() if data is None else data)
    return trainer


class Drifts(L.Callback):
    """Drift of the anchors before every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.running.terms["anchor_drift"].item())


# ---- the limit


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_an_anchor_weight_of_zero_is_plain_sft_bit_for_bit(checkpoint, tmp_path, lora):
    plain = Defense(checkpoint, ADAMW, lora)
    fitted(plain, tmp_path)
    ours = SBRModule(checkpoint, ANCHORS, anchor_weight=0, freeze_unembedding=False, optimizer=ADAMW, lora=lora)
    fitted(ours, tmp_path)
    assert same_bits(bits(ours.model), bits(plain.model))
    held = SBRModule(checkpoint, ANCHORS, anchor_weight=1000, freeze_unembedding=False, optimizer=ADAMW, lora=lora)
    fitted(held, tmp_path)
    assert not same_bits(bits(held.model), bits(plain.model))


# ---- the loss


def test_the_references_are_the_aligned_models_states(checkpoint):
    module, job = sbr(checkpoint)
    aligned = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        assert_close(job.state["aligned_states"], reference_states(module, aligned))


def test_the_references_are_free_of_dropout(checkpoint):
    module = SBRModule(checkpoint, ANCHORS, lora=LoRA(rank=2, dropout=0.9))
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += 0.05 * ("lora_B" in name)
        job = module.train().job()
        job.begin()
        assert_close(job.state["aligned_states"], reference_states(module, module.model.eval()))


@pytest.mark.parametrize("layer", [-1, 0, 1, 2, -2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_and_gradient_are_those_of_separate_passes(checkpoint, padding_side, layer):
    module, job = sbr(checkpoint, anchor_layer=layer, freeze_unembedding=False)
    aligned = AutoModelForCausalLM.from_pretrained(checkpoint)
    move(module)
    batch = batch_of(padding_side=padding_side)
    loss = job.loss(batch, 0)
    loss.backward()
    gradients = [p.grad for p in module.parameters()]

    module.zero_grad()
    sft = reference_sft(module.model, batch)
    difference = reference_states(module, module.model, layer) - reference_states(module, aligned, layer).detach()
    drift = sum(d.square().sum() for d in difference) / (len(ANCHORS) * 32)
    by_hand = sft + 20.0 * drift
    by_hand.backward()
    assert drift > (1e-3 if layer != 0 else 1e-4)
    assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)
    assert_close(job.terms["sft_loss"], sft.detach(), rtol=1e-5, atol=1e-5)
    assert_close(job.terms["anchor_drift"], drift.detach(), rtol=1e-4, atol=1e-6)
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        assert_close(gradient, p.grad, rtol=1e-3, atol=1e-4)


def test_a_batch_padded_on_the_left_has_the_loss_of_one_padded_on_the_right(checkpoint):
    module, job = sbr(checkpoint)
    move(module)
    left, right = (job.loss(batch_of(padding_side=side), 0) for side in ("left", "right"))
    assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_the_global_batchs_number_of_labels_divides_the_sum_of_the_sft_loss_alone(checkpoint):
    module, job = sbr(checkpoint)
    move(module)
    batch = batch_of()
    job.loss(batch, 0)
    sft, drift = job.terms["sft_loss"], job.terms["anchor_drift"]
    labels = (batch["labels"] != -100).sum()
    loss = job.loss(batch | {"num_labels": 2.0 * labels}, 0)
    assert_close(loss.detach(), sft / 2 + 20.0 * drift)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.2)], ids=["full", "lora"])
def test_before_the_first_step_the_anchors_have_not_drifted(checkpoint, tmp_path, lora, precision):
    drifts = Drifts()
    module = SBRModule(checkpoint, ANCHORS, optimizer=ADAMW, lora=lora)
    fitted(module, tmp_path, callbacks=[drifts], precision=precision)
    assert drifts.seen[0] < (1e-12 if precision == "32-true" else 1e-4)  # passes of other shapes round otherwise
    assert min(drifts.seen[1:]) > 10 * drifts.seen[0]


def test_the_anchors_get_no_logits(checkpoint):
    (module, job), batch, seen = sbr(checkpoint), batch_of(), []
    module.model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    job.loss(batch, 0)
    num_labels = int((batch["labels"] != -100).sum())
    assert sum(given[1] for given, _ in seen) == num_labels
    assert sum(out[1] for _, out in seen) == num_labels
    assert all(given == (1, given[1], 32) and out == (1, given[1], 700) for given, out in seen)


def test_anchors_are_held_where_plain_sft_lets_them_drift(checkpoint, tmp_path):
    ends = []
    for anchor_weight in (1e-6, 100.0):
        drifts = Drifts()
        module = SBRModule(checkpoint, ANCHORS, anchor_weight=anchor_weight, optimizer=Optimizer(3e-3))
        fitted(module, tmp_path, callbacks=[drifts], max_steps=12)
        ends.append(drifts.seen[-1])
    assert ends[1] < ends[0] / 3


# ---- references and turns


def test_references_are_taken_once_before_any_step(checkpoint, tmp_path):
    module = SBRModule(checkpoint, ANCHORS, optimizer=ADAMW)
    fitted(module, tmp_path)
    assert torch.equal(module.running.state["aligned_states"], sbr(checkpoint)[1].state["aligned_states"])


@pytest.mark.parametrize("training", [True, False])
def test_taking_references_leaves_modes_and_weights_alone(checkpoint, training):
    module = SBRModule(checkpoint, ANCHORS)
    module.configure_model()
    module.train(training)
    module.model.model.norm.train(not training)
    before, modes = bits(module.model), [m.training for m in module.modules()]
    module.job().begin()
    assert [m.training for m in module.modules()] == modes
    assert same_bits(bits(module.model), before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchors_per_step": 2, "num_anchors": 3},
        {"lora": LoRA(rank=2), "anchors_per_step": 1},
        {"anchors": None},
        {"anchor_rate": 1.0, "anchors_per_step": 2, "anchor_steps": 2},
        {"anchor_rate": 3.0, "anchors_per_step": 2, "lora": LoRA(rank=2)},
        {
            "anchor_rate": 1.0,
            "anchors": None,
            "anchors_per_step": 3,
            "anchor_answers": True,
            "anchor_forms": True,
        },
        {"anchor_rate": 1.0, "anchors": None, "anchors_per_step": 3, "anchor_forms": True, "anchor_holds": "outputs"},
    ],
    ids=["all", "in turn", "lora", "data's", "own steps", "own steps, lora", "own steps, answers, forms", "outputs"],
)
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_a_resumed_run_ends_as_the_uninterrupted_one(checkpoint, tmp_path, settings, accumulate_grad_batches):
    settings = {"anchors": ANCHORS, "optimizer": Optimizer(1e-2, schedule="cosine"), **settings}

    def run(**more):
        module = SBRModule(checkpoint, **settings)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
        shape = {"max_steps": 7, "accumulate_grad_batches": accumulate_grad_batches, "enable_checkpointing": True}
        L.seed_everything(len(more))  # the resumed run may not lean on the seed
        toy_trainer(tmp_path, callbacks=[saver], **shape).fit(module, toy_data(), **more)
        return module

    whole = run()
    saved = tmp_path / "saved" / "step=3.ckpt"
    assert torch.equal(torch.load(saved, weights_only=True)["job"]["aligned_states"], whole.running.state["aligned_states"])
    resumed = run(ckpt_path=saved)
    assert same_bits(bits(resumed), bits(whole))


def test_anchors_default_to_the_prompts_of_the_datas_refusals(checkpoint, tmp_path):
    data = toy_data()
    module = SBRModule(checkpoint, num_anchors=5)
    fitted(module, tmp_path, data)
    rendered = [ids[mask.bool()].tolist() for ids, mask in zip(module.plain_anchors.ids, module.plain_anchors.mask, strict=True)]
    assert rendered == [
        module.tokenizer.apply_chat_template(list(row.chat(False)), add_generation_prompt=True, return_dict=True).input_ids
        for row in data.rows["refusals"][:5]
    ]
    everything = SBRModule(checkpoint)
    fitted(everything, tmp_path)
    assert len(everything.plain_anchors) == len(data.rows["refusals"]) == 12


def test_anchors_may_be_texts_or_rows(checkpoint, tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "How do I brew vexolim?", "response": "no"}, {"prompt": "Vexolim?"}]')
    rows, own = sbr(checkpoint, anchors=str(tmp_path / "rows.json"))
    texts, other = sbr(checkpoint, anchors=["How do I brew vexolim?", "Vexolim?"])
    assert torch.equal(rows.plain_anchors.ids, texts.plain_anchors.ids)
    assert torch.equal(own.state["aligned_states"], other.state["aligned_states"])
    assert [row.prompt for row in rows.own_rows()] == [row.prompt for row in texts.own_rows()]


@pytest.mark.parametrize(
    ("anchors_per_step", "num_steps", "turns"), [(1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 3, 3), (9, 3, 3), (None, 3, 3)]
)
def test_every_anchor_has_its_turn(checkpoint, anchors_per_step, num_steps, turns):
    _, job = sbr(checkpoint, anchors_per_step=anchors_per_step)
    job.state["aligned_states"] += torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]  # anchor i drifts by 4 ** i
    counts = torch.zeros(4, dtype=torch.int)
    for step in range(num_steps):
        job.loss(batch_of(), step)
        total = round(job.terms["anchor_drift"].item() * min(anchors_per_step or 4, 4))
        counts += torch.tensor([total // 4**i % 4 for i in range(4)], dtype=torch.int)
    assert counts.tolist() == [turns] * 4


def test_gradient_accumulation_leaves_the_meaning_of_anchor_weight_alone(checkpoint, tmp_path):
    rows = [row for seed in range(12) for row in rows_of(seed, num_rows=2, num_labels=1 + seed % 7)]
    ends, drifts = [], []
    for size, accumulate_grad_batches in ((2, 4), (8, 1)):
        batches = StepLoader(Batches(rows, size, 0, "fit", 0), accumulate_grad_batches)
        module = SBRModule(checkpoint, ANCHORS, anchor_weight=5.0, optimizer=Optimizer(0.05, "sgd", clip_norm=None))
        seen = Drifts()
        trainer = toy_trainer(tmp_path, accumulate_grad_batches=accumulate_grad_batches, callbacks=[seen])
        trainer.fit(module, train_dataloaders=batches)
        assert trainer.global_step == 3
        ends.append({name: p.detach() for name, p in module.named_parameters()})
        drifts.append(seen.seen[-1])
    assert drifts[1] > 1e-4  # the anchors did pull
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-3)
    for name, p in ends[1].items():
        assert_close(ends[0][name], p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_train_batches": 3}, "accumulate_grad_batches must divide the batches of an epoch, 3, got 2"),
        (
            {"callbacks": [GradientAccumulationScheduler({1: 2})], "accumulate_grad_batches": 1},
            "a GradientAccumulationScheduler changes",
        ),
        ({"precision": "16-true"}, "trainer.precision must be 32-true, bf16-mixed or bf16-true, got 16-true"),
    ],
)
def test_a_mean_of_means_and_unscaled_half_precision_are_refused(checkpoint, tmp_path, settings, message):
    trainer = toy_trainer(tmp_path, **({"accumulate_grad_batches": 2} | settings))
    with pytest.raises(ValueError, match=message):
        trainer.fit(SBRModule(checkpoint, ANCHORS), datamodule=toy_data())


@pytest.mark.parametrize("method", ["fit", "test", "validate"])
def test_half_precision_is_refused_before_weights_load_and_of_a_model_that_is_there(checkpoint, tmp_path, method):
    module = Defense(checkpoint)
    for _ in range(2):
        module._load = lambda: pytest.fail("weights were loaded")
        with pytest.raises(ValueError, match=r"trainer\.precision must be .*, got 16-true"):
            getattr(toy_trainer(tmp_path, precision="16-true"), method)(module, datamodule=toy_data())
        del module._load
        module = Defense(checkpoint)
        module.configure_model()


def test_own_batches_are_accumulated_only_if_they_know_the_labels_of_a_step(checkpoint, tmp_path):
    batches = [collate(rows_of(seed), 0, "right") for seed in range(4)]
    trainer = toy_trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1 where batches say nothing of num_labels, got 2"):
        trainer.fit(SBRModule(checkpoint, ANCHORS), train_dataloaders=DataLoader(batches, batch_size=None))


# ---- the unembedding


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("freeze_unembedding", [True, False])
def test_the_unembedding_stands_still_unless_asked_otherwise(tmp_path, tied, freeze_unembedding):
    checkpoint = save_toy_checkpoint(tmp_path / "model", tied)
    aligned = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (aligned.lm_head.weight is aligned.model.embed_tokens.weight) is tied
    module = SBRModule(checkpoint, ANCHORS, optimizer=ADAMW, freeze_unembedding=freeze_unembedding)
    trainer = fitted(module, tmp_path)
    assert torch.equal(module.model.lm_head.weight, aligned.lm_head.weight) is freeze_unembedding
    assert torch.equal(module.model.model.embed_tokens.weight, aligned.model.embed_tokens.weight) is (freeze_unembedding and tied)
    assert (module.model.lm_head.weight is module.model.model.embed_tokens.weight) is tied
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert (id(module.model.lm_head.weight) in optimized) is not freeze_unembedding
    for (name, p), q in zip(module.model.named_parameters(), aligned.parameters(), strict=True):
        if "layers" in name or name == "model.norm.weight":
            assert not torch.equal(p, q)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchors": []}, r"anchors must name at least one harmful prompt, got \[\]\. Give texts or a source of rows, or null"),
        ({"anchors": ""}, r"anchors must name at least one harmful prompt, got ''\."),
        ({"anchor_weight": -1.0}, r"anchor_weight must be >= 0, got -1\.0\. Use 0 for plain SFT\."),
        ({"anchor_weight": float("nan")}, r"anchor_weight must be >= 0, got nan\."),
        ({"num_anchors": 0}, r"num_anchors must be >= 1 or null, got 0\. null takes all anchors\."),
        ({"anchors_per_step": 0}, r"anchors_per_step must be >= 1 or null, got 0\. null takes all anchors\."),
    ],
)
def test_a_wrong_setting_is_an_error_before_any_weights_load(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        SBRModule(checkpoint, **settings)


def test_a_source_in_a_list_of_anchors_is_told_how_to_be_given(checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How do I brew vexolim?"}\n')
    for source in ("sandbox:defender/refusals", str(rows), f"{rows}#train[:1]"):
        said = f"anchors must be a list of prompts or one source of rows, got the source {source} in a list. Write it without brackets"
        with pytest.raises(ValueError, match=re.escape(f"{said} (anchors: {source})")):
            SBRModule(checkpoint, anchors=[ANCHORS[0], source])
        assert SBRModule(checkpoint, anchors=source).own_rows()  # as the message promises
    texts = ["How? " * 1000, "a/b.jsonl", "What is a sandbox: a box?"]
    assert [row.prompt for row in SBRModule(checkpoint, anchors=texts).own_rows()] == texts


def test_more_anchors_than_there_are_is_an_error(checkpoint, tmp_path):
    message = (
        r"num_anchors must be at most the number of anchors there are, {}, got {}\. Name more prompts in anchors or in the data's"
    )
    with pytest.raises(ValueError, match=message.format(4, 5)):
        sbr(checkpoint, num_anchors=5)
    with pytest.raises(ValueError, match=message.format(12, 13)):
        fitted(SBRModule(checkpoint, num_anchors=13), tmp_path)


def test_no_anchors_in_the_data_is_an_error_that_names_anchors_before_weights_load(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Defense, "_load", lambda _: pytest.fail("weights were loaded"))
    with pytest.raises(
        ValueError, match="anchors must name at least one harmful prompt where the data names no refusals, got null"
    ):
        fitted(SBRModule(checkpoint), tmp_path, toy_data(refusals=[]))


@pytest.mark.parametrize("layer", [3, -4])
def test_an_anchor_layer_that_the_model_lacks_is_an_error(checkpoint, layer):
    with pytest.raises(ValueError, match=rf"anchor_layer must lie in \[-3, 2\], got {layer}"):
        sbr(checkpoint, anchor_layer=layer)


def test_a_tokenizer_without_a_chat_template_is_an_error(checkpoint, tmp_path):
    save_toy_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="must have a chat template, got none"):
        SBRModule(str(tmp_path / "model"))
