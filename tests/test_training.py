import copy
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from toy import bits, on_ranks, same_bits, toy_data, toy_trainer

from casehard import Defense, Optimizer
from casehard.cli import lightning_cli
from casehard.cli.lightning_cli import ProgressBar
from casehard.datamodules.batches import Batches
from casehard.engine import training
from casehard.engine.gradients import average_gradients
from casehard.engine.optimizer import offloaded
from casehard.engine.training import DivergedError, Plain, StepLoss, train_steps, with_progress_bar

NUM_STEPS = 6
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1, weight_decay=0.01),
}


def share_of_rate(schedule: str, num_warmup_steps: int, step: int) -> float:
    """Learning rate of a step (from 0) over the highest, by the formulas."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    done = (step - num_warmup_steps) / (NUM_STEPS - num_warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))


def batch_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(5, 4, generator=generator), "y": torch.randn(5, 1, generator=generator)}


def loss_of(net: nn.Module):
    return lambda batch: F.mse_loss(net(batch["x"]), batch["y"])


# ---- one process


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("num_warmup_steps", [0, 2])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_loop_that_one_would_write_by_hand(net, name, schedule, num_warmup_steps, clip_norm):
    settings = Optimizer(0.1, name, schedule, num_warmup_steps, weight_decay=0.01, clip_norm=clip_norm)
    ours, by_hand = net, copy.deepcopy(net)
    found = [(step, float(loss)) for step, loss in train_steps(ours, Plain(loss_of(ours)), batch_of, NUM_STEPS, settings)]

    optimizer, losses = OPTIMIZERS[name](by_hand.parameters()), []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = loss_of(by_hand)(batch_of(step))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(by_hand.parameters(), clip_norm)
        optimizer.param_groups[0]["lr"] = 0.1 * share_of_rate(schedule, num_warmup_steps, step)
        optimizer.step()
        losses.append(loss.item())

    assert found == list(enumerate(losses, start=1))
    assert same_bits(bits(ours), bits(by_hand))


def test_adamw_is_the_formula(net):
    settings = Optimizer(0.1, "adamw", weight_decay=0.01, clip_norm=None)
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in w.items()}
    v = {name: torch.zeros_like(p) for name, p in w.items()}
    reference = copy.deepcopy(net).double()
    for step in range(NUM_STEPS):
        reference.load_state_dict(w)
        batch = {key: value.double() for key, value in batch_of(step).items()}
        gradients = torch.autograd.grad(loss_of(reference)(batch), list(reference.parameters()))
        for name, g in zip(w, gradients, strict=True):
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            t = step + 1
            update = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            w[name] = w[name] - 0.1 * 0.01 * w[name] - 0.1 * update
    list(train_steps(net, Plain(loss_of(net)), batch_of, NUM_STEPS, settings))
    for name, p in net.named_parameters():
        assert_close(p.detach().double(), w[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("clip_norm", "moved"), [(0.01, 0.01), (None, None)])
def test_the_norm_is_clipped_over_all_that_trains(net, clip_norm, moved):
    before = [p.detach().clone() for p in net.parameters()]
    gradients = torch.autograd.grad(loss_of(net)(batch_of(0)), list(net.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norm > 0.1
    list(train_steps(net, Plain(loss_of(net)), batch_of, 1, Optimizer(1.0, "sgd", clip_norm=clip_norm)))
    change = torch.cat([(p.detach() - q).flatten() for p, q in zip(net.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(moved or norm, rel=1e-3)


def test_what_is_frozen_stays_and_gets_no_gradient(net):
    net[0].requires_grad_(False)
    before = bits(net[0])
    last = net[2].weight.detach().clone()
    list(train_steps(net, Plain(loss_of(net)), batch_of, 2, Optimizer(0.1)))
    assert same_bits(bits(net[0]), before)
    assert not torch.equal(net[2].weight, last)
    assert all(p.grad is None for p in net.parameters())


def test_every_step_trains_in_train_mode_under_the_precision_and_asks_for_its_own_batch(net):
    entered, seen = [], []

    @contextmanager
    def context():
        entered.append(True)
        yield

    def loss(batch):
        assert net.training
        assert len(entered) == len(seen) + 1
        seen.append(batch["step"])
        return net(torch.ones(1, 4)).sum()

    steps = train_steps(net.eval(), Plain(loss), lambda step: {"step": step}, 3, Optimizer(0.1), context)
    for step, _ in steps:
        net.eval()  # as scoring does
        assert seen == list(range(step))


def test_a_loss_that_is_no_number_stops_before_its_step(net):
    def loss(batch):
        return loss_of(net)(batch) * (math.nan if batch["step"] == 2 else 1)

    after_two = copy.deepcopy(net)
    list(train_steps(after_two, Plain(loss_of(after_two)), batch_of, 2, Optimizer(0.1)))
    message = r"the loss must be finite, and it was nan at step 3 of 6\. Lower learning_rate \(0\.1\) or check the rows\."
    with pytest.raises(DivergedError, match=message):
        list(train_steps(net, Plain(loss), lambda step: batch_of(step) | {"step": step}, NUM_STEPS, Optimizer(0.1)))
    assert same_bits(bits(net), bits(after_two))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_loss_stops_too(net, value):
    with pytest.raises(DivergedError, match=f"it was {value} at step 1 of 1"):
        list(train_steps(net, Plain(lambda _: net(torch.ones(1, 4)).sum() + value), batch_of, 1, Optimizer(0.1)))


class Watch(TorchDispatchMode):
    """Notes what reads a number from a device, and the optimizer's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._fused_adamw_.default:
            self.seen.append("step")
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.seen.append("read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("behind", "seen"), [(False, ["read", "step"] * 3), (True, ["step", *["step", "read"] * 2, "read"])])
def test_a_device_that_runs_behind_is_asked_for_a_loss_once_the_next_step_is_queued(net, monkeypatch, behind, seen):
    monkeypatch.setattr(training, "runs_behind", lambda device: behind)
    with Watch() as watch:
        for _ in train_steps(net, Plain(loss_of(net)), batch_of, 3, Optimizer(0.1)):
            pass
    assert watch.seen == seen


def test_a_loss_that_is_read_late_stops_the_training_with_its_own_step(net, monkeypatch):
    monkeypatch.setattr(training, "runs_behind", lambda device: True)

    def loss(batch):
        return loss_of(net)(batch) * (math.nan if batch["step"] == 1 else 1)

    for num_steps in (3, 2):  # another step is queued by then; it is the last
        steps, taken = train_steps(net, Plain(loss), lambda n: batch_of(n) | {"step": n}, num_steps, Optimizer(0.1)), []
        with pytest.raises(DivergedError, match=f"it was nan at step 2 of {num_steps}"):
            taken.extend(steps)
        assert [step for step, _ in taken] == [1, 2]
        with pytest.raises(DivergedError, match=f"it was nan at step 2 of {num_steps}"):  # who looks at the model asks first
            float(taken[1][1])
        net.load_state_dict({name: torch.ones_like(p) for name, p in net.state_dict().items()})


@pytest.mark.gpu
def test_on_a_gpu_a_step_waits_for_no_number(net):
    net = net.to("cuda")
    steps = train_steps(net, Plain(loss_of(net)), lambda n: {k: v.cuda() for k, v in batch_of(n).items()}, 4, Optimizer(0.1))
    next(steps)
    torch.cuda.set_sync_debug_mode("error")  # an event that is waited for is none of these
    try:
        later = [next(steps), next(steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(float(loss) > 0 for _, loss in later)


def test_nothing_to_train_is_an_error(net):
    with pytest.raises(ValueError, match="nothing to train: no parameter of the model requires a gradient"):
        list(train_steps(net.requires_grad_(False), Plain(loss_of(net)), batch_of, 1, Optimizer(0.1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be > 0, got 0\.0\."),
        ({"learning_rate": math.nan}, r"learning_rate must be > 0, got nan\."),
        ({"name": "adam"}, "optimizer name must be one of adamw, sgd, adafactor, got 'adam'"),
        ({"schedule": "step"}, "optimizer schedule must be one of constant, linear, cosine, got 'step'"),
        ({"weight_decay": -1.0}, r"weight_decay must be >= 0, got -1\.0\."),
        ({"num_warmup_steps": -1}, r"num_warmup_steps must be >= 0, got -1\."),
        ({"clip_norm": 0.0}, r"clip_norm must be > 0 or null, got 0\.0\. null does not clip\."),
    ],
)
def test_a_wrong_setting_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**settings)


# ---- several processes


def examples() -> list[dict[str, list[int]]]:
    """Rows of 6 to 16 tokens, 1 to 9 of them labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        ids = torch.randint(5, 600, (6 + 5 * i % 11,), generator=generator).tolist()
        answer = 1 + 4 * i % min(9, len(ids) - 1)
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def trained(checkpoint: str, rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    module = Defense(checkpoint)
    module.configure_model()
    draw = Batches(examples(), 3, 0, "attack", pad_token_id=0, rank=rank, world_size=world_size)
    optimizer = Optimizer(0.5, "sgd", "linear", 1, clip_norm=0.7)
    losses = [float(loss) for _, loss in train_steps(module, Plain(module.sft_loss), draw, 4, optimizer)]
    return losses, {name: p.detach() for name, p in module.named_parameters()}


def check_ranks(rank: int, checkpoint: str, losses: list[float], weights: dict[str, Tensor]) -> None:
    draw = Batches(examples(), 3, 0, "attack", pad_token_id=0, rank=rank, world_size=2)
    counts = torch.tensor([[int((draw(step)["labels"] != -100).sum())] for step in range(4)])
    everyone = [torch.zeros_like(counts) for _ in range(2)]
    dist.all_gather(everyone, counts)
    assert not torch.equal(*everyone)  # else a mean of means would do as well

    ours, found = trained(checkpoint, rank, 2)
    assert_close(torch.tensor(ours), torch.tensor(losses))
    for name, w in weights.items():
        assert_close(found[name], w, rtol=1e-4, atol=1e-6)
        other = [torch.zeros_like(w) for _ in range(2)]
        dist.all_gather(other, found[name])
        assert torch.equal(*other)

    # a parameter that only one rank's batch reaches
    p, q = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))
    ((p * p).sum() if rank == 0 else q * q).backward()
    average_gradients([p, q])
    assert torch.equal(p.grad, torch.tensor([1.0, 2.0]))
    assert torch.equal(q.grad, torch.tensor(3.0))

    # all ranks stop where one of them has no number
    net = nn.Linear(2, 1)
    with pytest.raises(DivergedError, match="at step 1 of 2"):
        list(
            train_steps(
                net, Plain(lambda _: net(torch.ones(1, 2)).sum() * (math.nan if rank else 1)), batch_of, 2, Optimizer(0.1)
            )
        )


def test_two_ranks_that_share_a_batch_train_as_one_process_does(checkpoint, tmp_path):
    on_ranks(check_ranks, tmp_path, checkpoint, *trained(checkpoint, 0, 1))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("device", [None, "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_offloaded_optimizer_goes_on_as_if_it_had_not_been(net, name, device):
    ends = []
    for parks in (False, True):
        model = copy.deepcopy(net)
        optimizer, _ = Optimizer(1e-2, name).build(model.parameters(), 4)
        for step in range(4):
            if parks and step == 2:
                with offloaded(optimizer, device):
                    moved = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
                    assert moved
                    assert device is None or all(v.device.type == device for v in moved)
            for p in model.parameters():
                p.grad = torch.ones_like(p) * (step + 1)
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_training_without_an_end_is_an_error_that_names_both_settings(checkpoint, tmp_path):
    said = r"trainer.max_steps or trainer.max_epochs must say when training ends, got -1 for both\. Set one of them to >= 1"
    with pytest.raises(ValueError, match=said):
        toy_trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(Defense(checkpoint), toy_data())
    toy_trainer(tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=1).fit(Defense(checkpoint), toy_data())


def steps_of(*losses: float) -> Iterator[tuple[int, StepLoss]]:
    for step, loss in enumerate(losses, start=1):
        yield step, StepLoss(torch.tensor(loss), step, len(losses), 0.1)


@pytest.mark.parametrize("shows", [True, False])
def test_a_bar_is_seen_where_the_trainer_shows_one(tmp_path, capsys, shows):
    trainer = toy_trainer(tmp_path, enable_progress_bar=shows)
    losses = [float(loss) for _, loss in with_progress_bar(steps_of(0.5, 0.25), 2, "Attack", trainer)]
    assert losses == [0.5, 0.25]
    assert ("Attack: 100%" in capsys.readouterr().err) == shows


@pytest.mark.parametrize(
    ("columns", "shown"), [(80, "finetuning_service, undefended): 2/2, loss=1.500, harmful=94.0"), (160, "100%|")]
)
def test_a_bar_shows_what_is_attacked_its_loss_and_its_score_at_any_width(tmp_path, columns, shown):
    trainer, beside = toy_trainer(tmp_path, enable_progress_bar=True), {}
    out, name = io.StringIO(), "LoRAAttack (finetuning_service, undefended)"
    for _ in with_progress_bar(steps_of(2.0, 1.5), 2, name, trainer, beside, file=out, ncols=columns, mininterval=0):
        beside["harmful"] = "94.0"
    last = out.getvalue().split("\r")[-1].strip()
    assert shown in last
    assert last.startswith("LoRAAttack (finetuning_service, undefended): ")
    assert "loss=1.500, harmful=94.0" in last


@pytest.mark.parametrize("behind", [False, True])
def test_the_bar_of_fit_asks_a_device_that_runs_behind_for_losses_once_a_second(checkpoint, tmp_path, monkeypatch, behind):
    looks = []

    class Bar(ProgressBar):
        def get_metrics(self, trainer, pl_module):
            looks.append(trainer.global_step)
            return super().get_metrics(trainer, pl_module)

    monkeypatch.setattr(lightning_cli, "runs_behind", lambda device: behind)
    monkeypatch.setattr(lightning_cli, "monotonic", iter([0.4, 0.4, 0.9, 1.5, 1.5, 1.6, 1.6]).__next__)
    toy_trainer(tmp_path, max_steps=5, enable_progress_bar=True, callbacks=[Bar()]).fit(Defense(checkpoint), toy_data())
    assert sorted({*looks}) == ([1, 3, 5] if behind else [1, 2, 3, 4, 5])
