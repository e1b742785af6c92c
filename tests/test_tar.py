import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_sbr import reference_sft
from torch.testing import assert_close
from toy import bits, same_bits, toy_data, toy_trainer

from casehard import Defense, InnerAttacker, LoRA, Optimizer, SettingError, SFTDataModule, TARModule

SGD = Optimizer(0.05, "sgd", clip_norm=None)
ATTACKER = InnerAttacker(num_inner_steps=4, optimizer=Optimizer(1e-2), batch_size=4)
SHAPE = {"attacker": ATTACKER, "loss_every": 2, "tamper_batch_size": 4}


def data() -> SFTDataModule:
    return toy_data(train_on="alignment", alignment_benign=["sandbox:defender/howto#train[:8]"])


def fitted(module, folder, ckpt_path=None, **settings) -> SFTDataModule:
    L.seed_everything(0)
    loader = data()
    toy_trainer(folder, **settings).fit(module, datamodule=loader, ckpt_path=ckpt_path)
    return loader


def ready(checkpoint, folder) -> TARModule:
    """As ``fit`` has it after one step."""
    module = TARModule(checkpoint, optimizer=SGD, **SHAPE)
    module.log = lambda *_, **__: None  # Lightning's, which wants to be in a hook
    fitted(module, folder, max_steps=1)
    return module


def test_without_inner_steps_or_weight_it_is_sft_bit_for_bit(checkpoint, tmp_path):
    ends = []
    for module in (
        Defense(checkpoint),
        TARModule(checkpoint, InnerAttacker(num_inner_steps=0)),
        TARModule(checkpoint, tamper_weight=0.0, **SHAPE),
        TARModule(checkpoint, **SHAPE),
    ):
        module.optimizer = Optimizer(1e-2)
        fitted(module, tmp_path, max_steps=3)
        ends.append(bits(module))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])
    assert not same_bits(ends[0], ends[3])
    assert module.num_passes == 3 * (1 + 4 + 2)


def entropy_loss(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][batch["labels"][:, 1:] != -100]
    return -torch.distributions.Categorical(logits=logits).entropy().mean()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_steps_are_those_written_by_hand(checkpoint, tmp_path, accumulated, entropy):
    """Two attackers in turn, and a step's attack is made once, however many batches are accumulated into it."""
    second = InnerAttacker(num_inner_steps=2, optimizer=Optimizer(5e-3), batch_size=4)
    settings = SHAPE | {"more_attackers": [second], "tamper_weight": 0.7, "decay": 0.3, "entropy": entropy}
    ours = TARModule(checkpoint, optimizer=SGD, **settings)
    loader = fitted(ours, tmp_path, max_steps=2, accumulate_grad_batches=accumulated, limit_train_batches=4)

    by_hand = Defense(checkpoint)
    by_hand.configure_model()
    model, loss_of = by_hand.model, entropy_loss if entropy else reference_sft
    held_out = loader.batches(loader.rows["alignment_harmful" if entropy else "refusals"], 4, loader.seed, "tar")
    outer, batches = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), iter(loader.train_dataloader())
    batches = [next(batches) for _ in range(2 * accumulated)]
    for step, attacker in enumerate((ATTACKER, second)):
        last = attacker.num_inner_steps
        draw = loader.batches(loader.rows["alignment_harmful"], 4, loader.seed, f"tar attacker {step}")
        attacked, number = copy.deepcopy(model), step * (last // 2)
        inner = torch.optim.AdamW(attacked.parameters(), lr=attacker.optimizer.learning_rate, weight_decay=0.0)
        outer.zero_grad()
        for i in range(1, last + 1):
            inner.zero_grad()
            reference_sft(attacked, draw(i - 1)).backward()
            torch.nn.utils.clip_grad_norm_(attacked.parameters(), 1.0)
            inner.step()
            if i % 2 == 0:
                gradients = torch.autograd.grad(loss_of(attacked, held_out(number)), list(attacked.parameters()))
                for p, g in zip(model.parameters(), gradients, strict=True):
                    weighted = 0.7 * math.exp(0.3 * (i - last)) * g
                    p.grad = weighted if p.grad is None else p.grad + weighted
                number += 1
        for batch in batches[step * accumulated : (step + 1) * accumulated]:
            (loader_loss(model, batch) / accumulated).backward()
        outer.step()
    for p, q in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=1e-5)


def loader_loss(model, batch):
    """Summed, and divided by what the loader says: the mean over all labels of a step."""
    targets = batch["labels"][:, 1:]
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][targets != -100]
    return torch.nn.functional.cross_entropy(logits, targets[targets != -100], reduction="sum") / batch["num_labels"]


def test_later_gradients_of_an_attack_weigh_more_and_the_last_one_once(checkpoint, tmp_path):
    """Of two gradients ``a + b`` is left without decay, ``exp(-2 * decay) * a + b`` with it, and ``b`` where it is large."""
    module, total = ready(checkpoint, tmp_path), {}
    for module.decay in (0.0, 0.5, 1.0, 100.0):
        total[module.decay] = module.tamper_gradient(0)
    name = next(iter(total[0.0]))
    first = total[0.0][name] - total[100.0][name]
    assert first.norm() > 0
    weights = [float((total[decay][name] - total[100.0][name]).norm() / first.norm()) for decay in (1.0, 0.5, 0.0)]
    assert weights == sorted(weights)
    assert_close(weights, [math.exp(-2.0), math.exp(-1.0), 1.0], rtol=1e-3, atol=1e-4)


def test_an_attack_leaves_the_weights_the_gradient_and_no_optimizer_state(checkpoint, tmp_path):
    module = ready(checkpoint, tmp_path)
    for number, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, float(number))
    before, drawn = bits(module), torch.get_rng_state()
    first, other, again = (module.tamper_gradient(step) for step in (0, 1, 0))
    assert same_bits(bits(module), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(p.grad, torch.full_like(p, float(number))) for number, p in enumerate(module.parameters()))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert list(first) == [name for name, _ in module.named_parameters()]


def test_a_resume_ends_with_the_same_bits(checkpoint, tmp_path):
    def run(ckpt_path=None) -> TARModule:
        module = TARModule(checkpoint, optimizer=Optimizer(1e-2), **SHAPE)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        fitted(module, tmp_path, ckpt_path, max_steps=4, callbacks=[saver], enable_checkpointing=True)
        return module

    whole, resumed = run(), run(tmp_path / "saved/step=2.ckpt")
    assert same_bits(bits(resumed), bits(whole))
    assert resumed.num_passes == whole.num_passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tamper_weight": -1.0}, r"tamper_weight of TAR must be >= 0, got -1\.0"),
        ({"loss_every": 0}, "loss_every of TAR must be >= 1, got 0"),
        ({"decay": -0.1}, r"decay of TAR must be >= 0, got -0\.1"),
        ({"loss_every": 5}, "loss_every must be at most num_inner_steps of every attacker, got 5"),
        ({"lora": LoRA()}, "lora must be null for TAR and its attackers"),
        ({"more_attackers": [InnerAttacker(4, lora=LoRA())]}, "lora must be null for TAR and its attackers"),
    ],
)
def test_bad_settings_fail_at_construction(checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        TARModule(checkpoint, **(SHAPE | settings))


@pytest.mark.parametrize("entropy", [False, True])
def test_missing_rows_are_an_error_before_the_first_step(checkpoint, tmp_path, entropy):
    source = "alignment_harmful" if entropy else "refusals"
    own = InnerAttacker(2, harmful=["sandbox:defender/harmful#train[:8]"])
    module = TARModule(checkpoint, own, loss_every=1, entropy=entropy)
    lacking = toy_data(train_on="alignment", alignment_benign=["sandbox:defender/howto#train[:8]"], **{source: []})
    with pytest.raises(SettingError, match=rf"data\.sources\.{source} must name rows for TAR's tamper_loss, got none"):
        toy_trainer(tmp_path).fit(module, datamodule=lacking)
