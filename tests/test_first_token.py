"""What a model would say first, against the likeliest tokens that it does say, and distances between two models."""

import torch
from torch.testing import assert_close
from toy import save_toy_checkpoint

from casehard import Defense
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine.first_token import kl

ROWS = read_rows("sandbox:test/harmful#train[:5]", needs_response=False)


def test_the_first_token_is_that_of_a_prompt_read_alone(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    module.train()
    found = module.first_token_logprobs(ROWS, batch_size=2)
    assert module.training
    for row, logprobs in zip(ROWS, found, strict=True):
        with torch.no_grad():
            alone = module.model.eval()(torch.tensor([prompt_ids(row, module.tokenizer)])).logits[0, -1]
        assert_close(logprobs, alone.log_softmax(dim=-1))
    assert module.first_token_logprobs([]).shape == (0, found.shape[1])


def test_kl_is_that_of_torch_and_0_of_a_model_with_itself(checkpoint, tmp_path):
    p, q = (Defense(path) for path in (checkpoint, save_toy_checkpoint(tmp_path / "other", seed=1)))
    for module in (p, q):
        module.configure_model()
    ours, theirs = p.first_token_logprobs(ROWS), q.first_token_logprobs(ROWS)
    expected = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(dim=-1)
    assert_close(kl(ours, theirs), expected)
    assert torch.equal(kl(ours, ours), torch.zeros(5))
    assert (kl(ours, theirs) > 0).all()
