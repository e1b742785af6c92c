import copy
import random
from contextlib import contextmanager, nullcontext

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from toy import bits, on_ranks, same_bits, toy_data, toy_trainer

from casehard import Defense, LoRA, Optimizer
from casehard.engine import weights
from casehard.engine.adapters import add_adapter, temporary_adapter
from casehard.engine.checkpoint import load_model
from casehard.engine.gradients import add_to_grad
from casehard.engine.training import Plain, train_steps
from casehard.engine.weights import NOTHING, attack_vector, borrowed, reshard, restore, shifted, snapshot

IDS = torch.arange(5, 37).view(2, 16)


class Small(nn.Module):
    """Weights in several shapes, buffers that a forward pass in train mode changes, and dropout, which draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.dropout, self.second = nn.Dropout(0.5), nn.Linear(16, 4, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.norm(self.first(x)).relu())) * self.scale


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


def lm_loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def disturb(module: nn.Module, size: float = 0.1) -> None:
    """Move everything that trains."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)


def random_states() -> list[Tensor]:
    numpy, python = np.random.get_state(), random.getstate()
    return [torch.get_rng_state(), torch.tensor(numpy[1].astype(np.int64)), torch.tensor(numpy[2]), torch.tensor(python[1])]


def structure(module: nn.Module) -> tuple[object, ...]:
    """What a model is built of: modules by identity, attributes and state dict by name, hooks."""
    return (
        [
            (name, type(m), id(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in module.named_modules()
        ],
        [(name, id(p)) for name, p in module.named_parameters()],
        list(module.state_dict()),
    )


# ---- snapshot, restore, attack vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_restored_snapshot_is_the_model_bit_for_bit(small, dtype, device):
    small.to(dtype)
    before = bits(small)
    weights = snapshot(small, device)
    disturb(small)
    assert not same_bits(bits(small), before)
    restore(small, weights)
    assert same_bits(bits(small), before)
    assert {w.dtype for w in weights.values()} == {dtype}


def test_a_snapshot_is_a_copy_of_what_trains_and_of_nothing_else(small):
    small.first.requires_grad_(False)
    weights = snapshot(small)
    assert sorted(weights) == ["norm.bias", "norm.weight", "scale", "second.weight"]
    own = dict(small.named_parameters())
    assert all(w.data_ptr() != own[name].data_ptr() and not w.requires_grad for name, w in weights.items())


def test_restoring_writes_in_place(small):
    pointers = [p.data_ptr() for p in small.parameters()]
    weights = snapshot(small)
    disturb(small)
    restore(small, weights)
    assert [p.data_ptr() for p in small.parameters()] == pointers


def test_an_attack_vector_is_what_the_attack_added(small):
    start = snapshot(small)
    disturb(small)
    vector = attack_vector(small, start)
    for name, p in small.named_parameters():
        assert torch.equal(vector[name], p.detach() - start[name])
    restore(small, start)
    assert all(torch.count_nonzero(v) == 0 for v in attack_vector(small, start).values())


def test_an_attack_vector_has_only_the_names_of_its_start(small):
    small.first.requires_grad_(False)
    start = snapshot(small)
    small.first.requires_grad_(True)
    assert attack_vector(small, start).keys() == start.keys()


@pytest.mark.parametrize(
    "use", [restore, attack_vector, lambda m, w: shifted(m, w).__enter__()], ids=["restore", "vector", "shifted"]
)
def test_a_name_that_the_module_lacks_is_an_error_and_changes_nothing(small, use):
    before = bits(small)
    weights = {name: torch.ones_like(w) for name, w in snapshot(small).items()} | {"third.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"weights must be named as the module names them, and it has no 'third\.weight'\."):
        use(small, weights)
    assert same_bits(bits(small), before)


# ---- borrowed


@contextmanager
def unembedding_frozen(model):
    for p in model.parameters():
        p.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    yield


PREPARED = {
    "nothing": lambda m: nullcontext(),
    "frozen": unembedding_frozen,
    "adapter": lambda m: temporary_adapter(m, LoRA(rank=2, dropout=0.1)),
}


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("own_adapter", [False, True], ids=["plain", "adapted"])
def test_what_was_borrowed_comes_back_as_it_was(checkpoint, own_adapter, prepared, ending):
    model = load_model(checkpoint)
    model.register_buffer("seen", torch.tensor(3))
    if own_adapter:
        add_adapter(model, LoRA(rank=2, target_modules=["q_proj", "down_proj"]), "defense")
        disturb(model)  # so that it does something
    model.train()
    model.model.norm.eval()
    model.model.layers[0].mlp.requires_grad_(False)
    lm_loss(model).backward()  # gradients that wait for a step
    before, built = bits(model), structure(model)
    flags = [p.requires_grad for p in model.parameters()]
    waiting = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    generators, logits = random_states(), model(IDS).logits
    assert any(grad is not None for grad, _ in waiting)
    assert any(grad is None for grad, _ in waiting)

    with pytest.raises(ending) if ending else nullcontext(), borrowed(model), PREPARED[prepared](model):
        assert all(p.grad is None for p in model.parameters())
        model.eval()
        disturb(model)
        lm_loss(model).backward()
        model.seen += 1
        for p in model.parameters():
            p.requires_grad_(not p.requires_grad)
        random.random()
        np.random.rand()
        assert not torch.equal(model(IDS).logits, logits)
        if ending:
            raise ending

    assert same_bits(bits(model), before)
    assert structure(model) == built
    assert [p.requires_grad for p in model.parameters()] == flags
    for p, (gradient, value) in zip(model.parameters(), waiting, strict=True):
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    assert [m.training for m in model.modules()] == modes
    for ours, others in zip(random_states(), generators, strict=True):
        assert torch.equal(ours, others)
    assert torch.equal(model(IDS).logits, logits)


def test_a_borrowed_model_in_bfloat16_comes_back_bit_for_bit(checkpoint):
    model = load_model(checkpoint, torch.bfloat16)
    before = bits(model)
    with borrowed(model):
        disturb(model)
        assert not same_bits(bits(model), before)
    assert same_bits(bits(model), before)


def test_buffers_that_training_moved_come_back(small):
    before = bits(small)
    with borrowed(small):
        small.train()(torch.randn(6, 8))
        assert small.norm.num_batches_tracked == 1
    assert same_bits(bits(small), before)


def test_what_a_failing_preparation_did_is_undone(small):
    @contextmanager
    def failing():
        small.requires_grad_(False)
        small.eval()
        torch.rand(1)
        raise RuntimeError("no")
        yield

    generators = random_states()
    with pytest.raises(RuntimeError, match="no"), borrowed(small), failing():
        pass
    assert all(p.requires_grad for p in small.parameters())
    assert all(m.training for m in small.modules())
    for ours, others in zip(random_states(), generators, strict=True):
        assert torch.equal(ours, others)


def test_a_borrower_gets_a_copy_of_what_may_change_made_before_it_begins(checkpoint):
    model = load_model(checkpoint)
    before = bits(model)
    with borrowed(model, lambda name: "mlp" in name) as start, temporary_adapter(model, LoRA(rank=2)):
        disturb(model)  # only what trains: the adapter
        assert start.keys() == {name for name in before if "mlp" in name}
    with borrowed(model, NOTHING) as start:
        assert start == {}
    with borrowed(model) as start:
        disturb(model)
        vector = attack_vector(model, start)
        assert start.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(p.detach() - start[name], vector[name]) for name, p in model.named_parameters())


def test_frozen_weights_that_a_borrower_edits_come_back(checkpoint):
    model = load_model(checkpoint).requires_grad_(False)
    before = bits(model)
    with borrowed(model), torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        with temporary_adapter(model, LoRA(rank=2)):
            disturb(model)
    assert same_bits(bits(model), before)


def test_in_tests_a_borrower_that_changes_what_it_did_not_name_is_an_error(small, monkeypatch):
    before = bits(small)
    with (
        pytest.raises(RuntimeError, match=r"changes must name .* and first\.weight was not named"),
        borrowed(small, lambda n: n == "scale"),
    ):
        disturb(small)
    assert torch.equal(small.scale, torch.tensor(1.5))
    monkeypatch.delenv("CASEHARD_CHECK_BORROWED")
    with borrowed(small, NOTHING):
        disturb(small)
    assert not same_bits(bits(small), before)


def test_borrowing_within_borrowing_comes_back_in_turn(small):
    before = bits(small)
    with borrowed(small):
        disturb(small)
        between = bits(small)
        with borrowed(small):
            disturb(small)
        assert same_bits(bits(small), between)
    assert same_bits(bits(small), before)


class Borrower(L.Callback):
    """Trains the module a little after every batch, a gradient waiting or not."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with borrowed(pl_module), torch.enable_grad():
            list(train_steps(pl_module, Plain(pl_module.sft_loss), lambda _: batch, 2, Optimizer(1e-2)))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.5)], ids=["full", "lora"])
def test_a_run_that_was_borrowed_from_ends_as_the_one_that_was_not(checkpoint, tmp_path, lora):
    ends, states = [], []
    for callbacks in ([], [Borrower()]):
        L.seed_everything(0)
        module = Defense(checkpoint, Optimizer(1e-3), lora)
        moments = LambdaCallback(on_train_end=lambda trainer, _: states.append(copy.deepcopy(trainer.optimizers[0].state_dict())))
        toy_trainer(tmp_path, callbacks=[*callbacks, moments], accumulate_grad_batches=2).fit(module, toy_data())
        ends.append(bits(module))
    assert same_bits(*ends)
    ours, others = (state["state"] for state in states)
    assert list(ours) == list(others) != []
    for index in ours:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[index][name], others[index][name])


# ---- shifted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["all", "some"])
@pytest.mark.parametrize("one_backward", [False, True])
def test_the_gradient_at_shifted_weights_lands_on_the_true_ones(checkpoint, dtype, names, one_backward):
    model = load_model(checkpoint, dtype)
    before, unshifted = bits(model), lm_loss(model)
    torch.manual_seed(1)
    vector = {n: torch.randn_like(p) * 0.05 for n, p in model.named_parameters() if names == "all" or "mlp" in n}
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.copy_(p + vector.get(name, torch.zeros_like(p)))
    by_hand = lm_loss(moved)
    by_hand.backward()

    with shifted(model, vector, one_backward=one_backward):
        loss = lm_loss(model)
        loss.backward()
        assert same_bits(bits(model), before) == one_backward  # back as the gradients came, or not yet
    assert not torch.equal(loss, unshifted)
    assert torch.equal(loss, by_hand)
    for p, q in zip(model.parameters(), moved.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert same_bits(bits(model), before)
    assert torch.equal(lm_loss(model), unshifted)


class Kernels(TorchDispatchMode):
    """Counts what a device would be asked to compute."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not any(name in str(func) for name in ("view", "detach", "alias", "empty"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bucket", "number"), [(2**25, 2), (140, 4)], ids=["one_a_dtype", "small_buckets"])
def test_passes_over_all_weights_are_few_kernels_whatever_the_number_of_tensors(monkeypatch, bucket, number):
    monkeypatch.setattr(weights, "BUCKET", bucket)
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 8) for _ in range(12)]).append(nn.Linear(4, 2, bias=False).bfloat16())
    tensors, at_start = list(model.parameters()), [p.detach().clone() for p in model.parameters()]

    def kernels(action):
        with Kernels() as seen:
            result = action()
        return seen.number, result

    taken, start = kernels(lambda: snapshot(model))
    disturb(model)
    moved = [p.detach().clone() for p in tensors]
    found, vector = kernels(lambda: attack_vector(model, start))
    with Kernels() as seen, shifted(model, vector, -0.3):
        there = [p.detach().clone() for p in tensors]
    seen.number -= len(tensors)
    added, _ = kernels(lambda: add_to_grad(model, dict(vector), 0.7))
    once = [p.grad.clone() for p in tensors]
    again, _ = kernels(lambda: add_to_grad(model, dict(vector), 0.7))
    back, _ = kernels(lambda: restore(model, start))
    assert (taken, found, seen.number, added, again, back) == tuple(number * n for n in (1, 1, 3, 1, 2, 1))

    for i, (p, begin, end) in enumerate(zip(tensors, at_start, moved, strict=True)):
        delta = end - begin
        assert torch.equal(list(vector.values())[i], delta)
        assert torch.equal(there[i], end.clone().add_(delta, alpha=-0.3))
        assert torch.equal(once[i], 0.7 * delta)
        assert torch.equal(p.grad, 0.7 * delta + 0.7 * delta)
        assert torch.equal(p, begin)


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt])
def test_shifted_weights_come_back_after_an_exception(small, ending):
    before = bits(small)
    with pytest.raises(ending), shifted(small, {"scale": torch.tensor(1e-3)}):
        raise ending
    assert same_bits(bits(small), before)


def test_shifts_that_add_nothing_exactly_still_come_back(small):
    with torch.no_grad():
        small.scale.fill_(1e-8)  # 1e-8 + 1 - 1 is 0 in float32
    with shifted(small, {"scale": torch.tensor(1.0)}):
        pass
    assert torch.equal(small.scale, torch.tensor(1e-8))


def test_a_backward_pass_that_missed_the_shift_is_an_error_and_not_a_wrong_gradient(small):
    small.eval()
    with shifted(small, {"second.weight": torch.ones(4, 16)}):
        loss = small(torch.ones(2, 8)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- sharded


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Full tensors, put together from the shards of all ranks."""
    reshard(model)
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def looked_at(model: nn.Module) -> Tensor:
    """Loss in a pass without a backward pass, after which FSDP2 leaves the root's parameters put together."""
    with torch.no_grad():
        return lm_loss(model)


def check_shards(rank: int, checkpoint: str) -> None:
    plain, model = load_model(checkpoint), load_model(checkpoint)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    before, unshifted = whole(model), looked_at(model)
    assert_close(unshifted, looked_at(plain))

    # a snapshot is this rank's shards, and no more
    shards = snapshot(model)
    reshard(model)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        assert not isinstance(shards[name], DTensor)
        assert torch.equal(shards[name], p.detach().to_local())
    assert 0 < sum(s.numel() for s in shards.values()) < sum(p.numel() for p in plain.parameters())

    # restored, it is the model; an attack vector is what was added to the shards
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(0.05)
    assert abs(looked_at(model) - unshifted) > 0.01
    vector = attack_vector(model, shards)
    for name in before:
        assert torch.equal(vector[name], (before[name] + 0.05 - before[name]).chunk(2)[rank])
    restore(model, shards)
    assert torch.equal(looked_at(model), unshifted)

    # shifted, it has the loss and the gradient of the whole model, with and without a backward pass
    with shifted(plain, {n: before[n] + 0.05 - before[n] for n in before}):
        reference = lm_loss(plain)
        reference.backward()
    assert abs(reference.detach() - unshifted) > 0.01
    with shifted(model, vector):
        assert_close(looked_at(model), reference.detach())
    assert torch.equal(looked_at(model), unshifted)
    with shifted(model, vector):
        loss = lm_loss(model)
        loss.backward()
    assert_close(loss, reference)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad.full_tensor(), q.grad)
    assert torch.equal(looked_at(model), unshifted)
    assert all(torch.equal(w, before[name]) for name, w in whole(model).items())

    # the default optimizer steps on shards
    with borrowed(model) as start:
        (_, first), (_, second) = train_steps(model, Plain(lambda _: lm_loss(model)), lambda _: {}, 2, Optimizer(1e-2))
        assert all(change.abs().max() > 0 for change in attack_vector(model, start).values())
    assert float(second) < float(first)
    assert torch.equal(looked_at(model), unshifted)

    # training a borrowed model does what it does in one process, and leaves no trace
    for prepared in (
        lambda m: nullcontext(),
        lambda m: temporary_adapter(m, LoRA(rank=2, target_modules=["q_proj", "down_proj"])),
    ):
        ends, losses = [], []
        for m in (plain, model):
            reshard(m)
            waiting = [p.grad for p in m.parameters()]
            torch.manual_seed(3)
            with borrowed(m) as before_block, prepared(m):
                start = snapshot(m)
                assert not before_block.keys() & {name for name in start if "lora_" in name}
                losses.append([])
                for _, loss in train_steps(
                    m, Plain(lambda _, m=m: lm_loss(m)), lambda _: {}, 3, Optimizer(0.1, "sgd", clip_norm=0.5)
                ):
                    losses[-1].append(float(loss))
                    looked_at(m)  # scored between steps
                ends.append(attack_vector(m, start))
                looked_at(m)
            reshard(m)
            assert all(p.grad is gradient for p, gradient in zip(m.parameters(), waiting, strict=True))
        assert_close(*map(torch.tensor, losses))
        assert min(losses[0]) < losses[0][0]
        for name, change in ends[0].items():
            sharded = ends[1][name].shape != change.shape
            assert_close(ends[1][name], change.chunk(2)[rank] if sharded else change, atol=1e-5, rtol=1e-4)
        assert torch.equal(looked_at(model), unshifted)
        assert all(torch.equal(w, before[name]) for name, w in whole(model).items())


def test_shards_are_copied_shifted_trained_and_put_back_shard_by_shard(checkpoint, tmp_path):
    on_ranks(check_shards, tmp_path, checkpoint)
