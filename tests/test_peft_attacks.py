"""Attacks that differ in what trains: their limiting cases. The crossed tests have them in toy.ATTACKS."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from toy import bits

from casehard import Defense, LoRA
from casehard.engine.adapters import temporary_adapter

IDS = torch.arange(5, 37).view(2, 16)


@pytest.fixture
def llama(checkpoint) -> Defense:
    module = Defense(checkpoint)
    module.configure_model()
    module.model.eval()
    return module


# ---- random subspace


@pytest.mark.parametrize("rank", [1, 2])
def test_a_frozen_factor_stays_and_every_matrix_moves_within_its_rows(llama, rank):
    model = llama.model
    torch.manual_seed(3)
    with temporary_adapter(model, LoRA(rank, alpha=rank, rslora=False, frozen_a=True)):
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        start = [layer.lora_A["attack"].weight.detach().clone() for layer in layers]
        trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_B"}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for layer, a in zip(layers, start, strict=True):
            assert torch.equal(layer.lora_A["attack"].weight, a)
            moved = layer.get_delta_weight("attack").detach()
            assert torch.linalg.matrix_rank(moved) == rank  # B has moved
            within = moved @ torch.linalg.pinv(a) @ a
            torch.testing.assert_close(within, moved)
            torch.testing.assert_close(moved, layer.lora_B["attack"].weight.detach() @ a)  # scale 1
        entries = torch.cat([(a * a.shape[1] ** 0.5).flatten() for a in start])
        assert abs(entries.mean()) < 0.1
        assert abs(entries.std() - 1) < 0.1


def test_freezing_the_first_factor_changes_it_and_nothing_else(llama):
    starts = []
    for frozen in (False, True):
        torch.manual_seed(5)
        with temporary_adapter(llama.model, LoRA(2, frozen_a=frozen)):
            starts.append(bits(llama.model))
            still = {name for name, p in llama.model.named_parameters() if ".attack." in name and not p.requires_grad}
            assert still == ({name for name in starts[0] if ".lora_A." in name} if frozen else set())
    plain, other = starts
    assert list(plain) == list(other)
    assert {name for name in plain if not torch.equal(plain[name], other[name])} == still
