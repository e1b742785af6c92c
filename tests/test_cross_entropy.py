import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM

from casehard import Defense
from casehard.engine import cross_entropy
from casehard.engine.cross_entropy import summed_cross_entropy

VOCAB = 40


def logits_of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (4 * torch.randn(9, VOCAB)).to(dtype).requires_grad_(), torch.randint(VOCAB, (9,))


def bytes_kept(loss) -> tuple[int, Tensor]:
    """Bytes that the backward pass of a loss has to keep, and the loss."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        value = loss()
    return sum(t.numel() * t.element_size() for t in kept.values() if t.is_floating_point()), value


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 8 * VOCAB], ids=["a_label", "three", "all_but_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_chunks_it_is_the_cross_entropy_and_its_gradient(monkeypatch, dtype, chunk):
    (logits, targets), (own, _) = logits_of(dtype), logits_of(dtype)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    (3 * expected).backward()
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    found = summed_cross_entropy(own, targets)
    (3 * found).backward()
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=1e-6, atol=0)
    assert own.grad.dtype == dtype
    assert_close(own.grad, logits.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_few_logits_are_not_cut_up():
    (logits, targets), (own, _) = logits_of(torch.float32), logits_of(torch.float32)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    found = summed_cross_entropy(own, targets)
    found.backward()
    assert torch.equal(found, expected)
    assert torch.equal(own.grad, logits.grad)


def test_the_backward_pass_keeps_the_logits_and_no_float32_copy_of_them(monkeypatch):
    logits, targets = logits_of(torch.bfloat16)
    assert bytes_kept(lambda: summed_cross_entropy(logits, targets))[0] > 4 * logits.numel()
    monkeypatch.setattr(cross_entropy, "CHUNK", 3 * VOCAB)
    assert bytes_kept(lambda: summed_cross_entropy(logits, targets))[0] == 2 * logits.numel()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_that_caps_its_logits_learns_the_same_in_chunks(checkpoint, monkeypatch, autocast):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    module = Defense(checkpoint)
    module.model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=2.0, **sizes))
    ids = torch.randint(VOCAB, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = []
    for chunk in (2**26, 2 * VOCAB):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.sft_loss(batch)
        module.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters())])
    assert_close(*found, rtol=1e-5, atol=1e-6)


def test_compiled_it_is_the_same(checkpoint):
    (logits, targets), (own, _) = logits_of(torch.bfloat16), logits_of(torch.bfloat16)
    expected = summed_cross_entropy(logits, targets)
    expected.backward()
    found = summed_cross_entropy(own, targets, "aot_eager")
    found.backward()
    assert_close(found, expected)
    assert_close(own.grad, logits.grad)
