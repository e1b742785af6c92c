import pytest
import torch
from test_forward import MODELS, build
from toy import ROOT
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from casehard import LoRA
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine.adapters import add_adapter
from casehard.engine.checkpoint import load_model, load_tokenizer
from casehard.engine.forward import takes_prefix_trees
from casehard.engine.generation import end_tokens, generate, neighbours, sample

SANDBOX = ROOT / "models/sandbox/aligned"
NUM_TOKENS = 12


@pytest.fixture
def model(checkpoint) -> PreTrainedModel:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    rows = [row for kind in ("harmful", "howto", "sums", "repeat") for row in read_rows(f"sandbox:test/{kind}#train[:3]", False)]
    ids = [prompt_ids(row, tokenizer) for row in rows]
    assert len({len(i) for i in ids}) > 4  # so that batches are padded
    return ids


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int, ends: list[int]) -> list[int]:
    """The likeliest token, again and again: one prompt, no padding, no cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def by_hand(model, tokenizer, prompts, num_tokens=NUM_TOKENS, ends=()) -> list[str]:
    ends = [tokenizer.eos_token_id, *ends]
    return [tokenizer.decode(greedy(model, prompt, num_tokens, ends)) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_answers_are_the_likeliest_tokens_in_any_batch(model, tokenizer, prompts, batch_size):
    expected = by_hand(model, tokenizer, prompts)
    assert len(set(expected)) > 4
    assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected


@pytest.mark.skipif(not (SANDBOX / "model.safetensors").exists(), reason="the sandbox's aligned model is not there")
def test_a_trained_models_answers_are_the_same_in_any_batch_and_end_by_themselves():
    model, tokenizer = load_model(str(SANDBOX)), load_tokenizer(str(SANDBOX))
    rows = [row for kind in ("harmful", "howto", "sums") for row in read_rows(f"sandbox:test/{kind}#train[:4]", False)]
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    expected = by_hand(model, tokenizer, prompts, 64)
    for batch_size in (1, 5, 64):
        assert generate(model, tokenizer, prompts, 64, batch_size) == expected
    assert all(len(tokenizer(answer, add_special_tokens=False).input_ids) < 60 for answer in expected)
    assert all(answer.endswith(tokenizer.eos_token) for answer in expected)
    said = [answer.removesuffix(tokenizer.eos_token) for answer in expected]
    assert all(token not in answer for answer in said for token in tokenizer.all_special_tokens)


def test_an_answer_stops_at_the_first_of_several_end_tokens(model, tokenizer, prompts):
    free = [greedy(model, prompt, NUM_TOKENS, []) for prompt in prompts]
    ends = sorted({free[0][3], free[1][5]})
    model.generation_config.eos_token_id = ends
    assert end_tokens(model, tokenizer) == sorted({*ends, tokenizer.eos_token_id})
    expected = by_hand(model, tokenizer, prompts, ends=ends)
    assert expected != by_hand(model, tokenizer, prompts)
    for batch_size in (1, 64):
        assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected


def test_rows_leave_the_batch_as_they_end(model, tokenizer, prompts):
    free = [greedy(model, prompt, NUM_TOKENS, []) for prompt in prompts]
    ends = sorted({free[0][1], free[1][3], free[2][2], free[7][2]})
    model.generation_config.eos_token_id = ends
    lengths = [len(greedy(model, prompt, NUM_TOKENS, ends)) for prompt in prompts]
    assert len(set(lengths)) > 3
    expected, shapes = by_hand(model, tokenizer, prompts, ends=ends), []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    takes_prefix_trees(model, 0)
    shapes.clear()
    assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    _, *steps = shapes  # the prompts come first
    going_on = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(steps) == len(going_on)
    assert all(num_tokens == 1 and left <= rows <= left / 0.75 for (rows, num_tokens), left in zip(steps, going_on, strict=True))
    assert len({rows for rows, _ in steps}) > 2


def test_no_prompt_token_is_worked_through_twice(model, tokenizer, prompts):
    takes_prefix_trees(model, 0)
    shapes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    generate(model, tokenizer, prompts, 1)
    assert len(shapes) == 1
    assert shapes[0].numel() < sum(len(prompt) for prompt in prompts)


@pytest.fixture
def own_generate(monkeypatch) -> list[PreTrainedModel]:
    """The models whose own ``generate`` was called."""
    called, real = [], GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **settings: called.append(self) or real(self, **settings))
    return called


@pytest.mark.parametrize(("name", "by_steps"), [(name, folds) for name, (*_, folds) in MODELS.items()])
def test_answers_are_the_likeliest_tokens_of_every_architecture(name, by_steps, tokenizer, prompts, own_generate):
    model = build(name, vocab_size=len(tokenizer))
    model.generation_config.repetition_penalty = 1.9
    expected = by_hand(model, tokenizer, prompts, ends=[2])
    assert len(set(expected)) > 4
    for batch_size in (1, 5, 64):
        assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected
    assert bool(own_generate) != by_steps


@pytest.mark.parametrize(("room", "by_steps"), [(NUM_TOKENS, True), (NUM_TOKENS - 1, False)])
def test_a_window_must_hold_prompt_and_answer(room, by_steps, tokenizer, prompts, own_generate):
    window = max(len(prompt) for prompt in prompts) + room
    model = build("mistral, narrow window", vocab_size=len(tokenizer), sliding_window=window)
    expected = by_hand(model, tokenizer, prompts, ends=[2])
    assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert bool(own_generate) != by_steps


@pytest.mark.parametrize(("configured", "more"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_end_tokens_are_the_tokenizers_and_the_models(model, tokenizer, configured, more):
    model.generation_config.eos_token_id = configured
    assert end_tokens(model, tokenizer) == sorted({tokenizer.eos_token_id} | more)


def test_what_the_model_ships_for_sampling_changes_no_answer(model, tokenizer, prompts):
    expected = by_hand(model, tokenizer, prompts)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shipped = GenerationConfig(
        do_sample=True, temperature=0.6, repetition_penalty=1.9, num_beams=3, min_new_tokens=NUM_TOKENS, **ends
    )
    model.generation_config = shipped
    for batch_size in (1, 64):
        assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected
    assert model.generation_config is shipped
    assert shipped.repetition_penalty == 1.9


def test_modes_come_back_and_dropout_never_acts(model, tokenizer, prompts, monkeypatch):
    add_adapter(model, LoRA(rank=2, dropout=0.9), "defense")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.05)
    expected = by_hand(model.eval(), tokenizer, prompts)
    model.train()
    model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    assert generate(model, tokenizer, prompts, NUM_TOKENS) == expected
    assert [m.training for m in model.modules()] == modes

    def fail(past_key_values, position_ids, **_):
        assert not any(m.training for m in model.modules())
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts, NUM_TOKENS)
    assert [m.training for m in model.modules()] == modes


def test_generating_draws_no_random_number_and_leaves_no_gradient(model, tokenizer, prompts):
    state = torch.get_rng_state()
    generate(model, tokenizer, prompts, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_prompts_have_no_answers(model, tokenizer):
    assert generate(model, tokenizer, [], NUM_TOKENS) == []


def test_an_answer_is_cut_where_no_end_token_came(model, tokenizer, prompts):
    for num_tokens in (1, 4):
        assert generate(model, tokenizer, prompts, num_tokens) == by_hand(model, tokenizer, prompts, num_tokens)


RECURRENT = {  # that take no mask, and with which other rows a row can be answered at once
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "none"),
    "recurrent_gemma": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
            "head_dim": 8,
        },
        "equal",
    ),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "any"),
}


def recurrent(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = RECURRENT[kind][0]
    config = CONFIG_MAPPING[kind](**sizes, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_answer_alike_in_any_batch(kind, tokenizer, prompts):
    model = recurrent(kind, tokenizer)
    expected = by_hand(model, tokenizer, prompts, ends=[2])
    assert len(set(expected)) > 2
    for batch_size in (1, 64):
        assert generate(model, tokenizer, prompts, NUM_TOKENS, batch_size) == expected
    assert neighbours(model) == RECURRENT[kind][1]


def test_an_answer_stops_where_the_template_ends_a_turn(model, checkpoint, prompts):
    tokenizer = load_tokenizer(checkpoint)
    free = greedy(model, prompts[0], NUM_TOKENS, [])
    tokenizer.add_special_tokens({"eos_token": "<|user|>"})  # so that the template's <|end|> is not the tokenizer's
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"]))
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(free[4])]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", tokenizer.convert_ids_to_tokens(free[4]))
    (said,) = generate(model, tokenizer, prompts[:1], NUM_TOKENS)
    assert said == tokenizer.decode(free[: free.index(free[4]) + 1])


# ---- samples


@pytest.fixture(params=["llama", "mamba"], ids=["by steps", "by transformers"])
def either(request, model, tokenizer) -> PreTrainedModel:
    """A model that goes one token a step by our own loop, or by transformers'."""
    return model if request.param == "llama" else recurrent("mamba", tokenizer)


def test_samples_at_temperature_0_are_the_greedy_tokens(either, tokenizer, prompts):
    greedy_texts = generate(either, tokenizer, prompts, NUM_TOKENS)
    ids = sample(either, tokenizer, prompts, NUM_TOKENS, 0.0)
    assert tokenizer.batch_decode(ids) == greedy_texts
    nearly = sample(either, tokenizer, prompts, NUM_TOKENS, 1e-6, range(len(prompts)))
    assert nearly == ids  # all probability is on the likeliest token


def test_a_prompt_and_its_seed_decide_its_sample_whatever_stands_beside_it(either, tokenizer, prompts):
    seeds, state = [100 + i for i in range(len(prompts))], torch.get_rng_state()
    samples = sample(either, tokenizer, prompts, NUM_TOKENS, 1.0, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    for batch_size in (1, 5):
        assert sample(either, tokenizer, prompts, NUM_TOKENS, 1.0, seeds, batch_size) == samples
    assert sample(either, tokenizer, prompts[3:7], NUM_TOKENS, 1.0, seeds[3:7]) == samples[3:7]
    first, other, again = sample(either, tokenizer, [prompts[0]] * 3, NUM_TOKENS, 1.0, [1, 2, 1])
    assert first == again != other
    others = sample(either, tokenizer, prompts, NUM_TOKENS, 1.0, [seed + 1 for seed in seeds])
    assert all(ours != theirs for ours, theirs in zip(samples, others, strict=True))


@torch.no_grad()
def test_samples_follow_the_models_probabilities_at_the_temperature(either, tokenizer, prompts):
    num_draws, temperature = 2000, 0.5
    drawn = sample(either, tokenizer, [prompts[0]] * num_draws, 1, temperature, range(num_draws))
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(tokenizer)).double() / num_draws
    logits = either.eval()(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double()
    expected = (logits / temperature).softmax(dim=-1)
    assert (counts - expected).abs().max() < 4 * 0.5 / num_draws**0.5
    assert (counts - logits.softmax(dim=-1)).abs().sum() > 2 * (counts - expected).abs().sum()


def test_sampling_needs_a_seed_for_every_prompt(model, tokenizer, prompts):
    with pytest.raises(ValueError, match="seeds must hold one for each of 12 prompts, got 1"):
        sample(model, tokenizer, prompts, 1, 1.0, [0])
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        sample(model, tokenizer, prompts, 1, -1.0)
