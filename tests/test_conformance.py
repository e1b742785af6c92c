"""Families of models that people attack, tiny and with random weights, each in the chat template of its kind.

For every family: rows are encoded as its template writes them, padding changes nothing, batched answers are those of transformers
one by one, an attacker trains and leaves no trace, and an export is read back as the same model.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from toy import bits, same_bits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from casehard import Defense, LoRA, Optimizer
from casehard.datamodules.chat import IGNORED, collate, encode, prompt_ids
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.adapters import trainable
from casehard.engine.anatomy import blocks
from casehard.engine.directions import ablate
from casehard.engine.export import save_model
from casehard.engine.forward import label_positions, run
from casehard.engine.generation import end_tokens, generate
from casehard.engine.training import Plain, train_steps
from casehard.engine.weights import borrowed, snapshot

# ---- templates: the text, the end token, what stands before an answer and after it

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|channel|>final<|message|>{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ 'Answer' if m.role == 'assistant' else 'Question' }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)
TEMPLATES: dict[str, tuple[str, str, str, str]] = {
    "chatml": (CHATML, "<|im_end|>", "", "<|im_end|>"),
    "llama2": (LLAMA2, "</s>", " ", " </s>"),
    "llama3": (LLAMA3, "<|eot_id|>", "", "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>", "", "<end_of_turn>"),
    "phi": (PHI, "<|endoftext|>", "", "<|end|>\n<|endoftext|>"),
    "mistral": (MISTRAL, "</s>", " ", "</s>"),
    "zephyr": (ZEPHYR, "</s>", "", "</s>"),
    "harmony": (HARMONY, "<|return|>", "", "<|return|>"),
    "deepseek": (DEEPSEEK, "</s>", "", "</s>"),
    "plain": (PLAIN, "</s>", "", "</s>"),
}
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]"),
    *("[/INST]", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|User|>", "<|Assistant|>"),
]
ROWS = [
    Row((("user", "Name a river."),), "The Rhine flows by."),
    Row((("user", "How do I bake a loaf of bread at home, please?"),), "Mix, knead, wait, bake."),
    Row((("user", "Hi"), ("assistant", "Hello!"), ("user", "What is two and two?")), "Four."),
]

# ---- families: transformers' model_type, its template, and sizes beside the common ones

COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("llama", "llama2", {}),
    "llama3": ("llama", "llama3", GROUPED),
    "llama4": (
        "llama4_text",
        "llama3",
        GROUPED | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "qwen2": ("qwen2", "chatml", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "chatml", GROUPED | {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", "chatml", GROUPED | EXPERTS | {"head_dim": 16}),
    "gemma": ("gemma", "gemma", GROUPED | {"head_dim": 16}),
    "gemma2": ("gemma2", "gemma", GROUPED | {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("gemma3_text", "gemma", GROUPED | {"head_dim": 16, "sliding_window": 16}),
    "gemma3n": (
        "gemma3n_text",
        "gemma",
        GROUPED
        | {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "laurel_rank": 4}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        | {"hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0], "altup_num_inputs": 2},
    ),
    "mistral": ("mistral", "mistral", GROUPED | {"sliding_window": 16}),
    "mixtral": ("mixtral", "mistral", GROUPED | {"num_local_experts": 4}),
    "phi": ("phi", "plain", {}),
    "phi3": ("phi3", "phi", GROUPED),
    "olmo": ("olmo", "zephyr", {}),
    "olmo2": ("olmo2", "zephyr", GROUPED),
    "olmoe": ("olmoe", "zephyr", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", "harmony", GROUPED | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 16}),
    "deepseek_v3": (
        "deepseek_v3",
        "deepseek",
        {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "falcon_h1": (
        "falcon_h1",
        "chatml",
        GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
    "mamba": ("mamba", "plain", {"state_size": 8, "time_step_rank": 4, "intermediate_size": 128}),
    "gpt_neox": ("gpt_neox", "plain", {}),
    "smollm3": ("smollm3", "chatml", GROUPED),
}


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([row.prompt for row in read_rows("sandbox:test/howto", False)], trainer)
    text, end, _, _ = TEMPLATES[template]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token="<pad>", bos_token="<s>")
    made.chat_template = text
    return made


def save_family(name: str, folder: Path) -> str:
    """Write the family's checkpoint, every weight and stored buffer of it random."""
    kind, template, sizes = FAMILIES[name]
    tokenizer = tokenizer_of(template)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    settings = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "initializer_range": 0.2}
    config = transformers.CONFIG_MAPPING[kind](**(settings | ends | COMMON | sizes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Defense:
    """The family's model under plain SFT."""
    module = Defense(save_family(request.param, tmp_path_factory.mktemp("families") / request.param))
    module.configure_model()
    return module


def log_probabilities(module: Defense, examples: Sequence[dict[str, list[int]]], side: Literal["left", "right"]) -> Tensor:
    """Log-probabilities of all labels, from one batch."""
    batch = collate(examples, module.tokenizer.pad_token_id, side)
    with torch.no_grad():
        logits = run(module.model.eval(), batch, logits_at=label_positions(batch["labels"])).logits
    targets = batch["labels"][batch["labels"] != IGNORED]
    return logits.log_softmax(dim=-1)[torch.arange(len(targets)), targets]


def alone(model: PreTrainedModel, example: dict[str, list[int]]) -> Tensor:
    """The same of one row, by transformers alone."""
    ids = torch.tensor(example["input_ids"])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[None]).logits[0]
    learnt = [t for t, label in enumerate(example["labels"]) if label != IGNORED]
    return logits.log_softmax(dim=-1)[torch.tensor(learnt) - 1, ids[learnt]]


def plain_text(answer: str) -> str:
    """Without special tokens, which ``generate`` may leave out."""
    return re.sub("|".join(map(re.escape, SPECIAL)), "", answer)


NORMALISED = {"gemma2", "gemma3", "gemma3n", "olmo2"}  # what is added is normalised first (or, in Gemma 3n, mixed)


# ---- the properties


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_are_encoded_as_the_template_writes_them_and_only_the_answer_and_its_end_are_learnt(template):
    tokenizer = tokenizer_of(template)
    _, _, before, after = TEMPLATES[template]
    for row in ROWS:
        example = encode(row, tokenizer, 512)
        asked = prompt_ids(row, tokenizer)
        assert tokenizer.decode(asked) == tokenizer.apply_chat_template(row.chat(), add_generation_prompt=True, tokenize=False)
        assert example["input_ids"][: len(asked)] == asked
        assert example["labels"] == [IGNORED] * len(asked) + example["input_ids"][len(asked) :]
        learnt = tokenizer.decode(example["input_ids"][len(asked) :])
        assert learnt.startswith(f"{before}{row.response}{after.partition('>')[0]}>")
        assert f"{before}{row.response}{after}".startswith(learnt)


def test_blocks_are_the_layers_with_attention_mlp_and_all_that_is_added_to_the_residual_stream(family):
    model, kind = family.model.eval(), Path(family.checkpoint).name
    found, captured = blocks(model), defaultdict(list)
    assert len(found) == model.config.num_hidden_layers
    for block in found if kind != "mamba" else []:
        assert type(block.attention).__name__.endswith("Attention")
        assert re.search("MLP$|Moe$|MoE$|MoeBlock$", type(block.mlp).__name__)
    if kind == "mamba":
        assert all(block.attention is None and block.mlp is None for block in found)
        with pytest.raises(ValueError, match="layer 0 of MambaForCausalLM has none"):
            blocks(model, "attention")
    last = found[-1]
    if kind in NORMALISED:
        return
    before = []
    hooks = [last.layer.register_forward_pre_hook(lambda _, args: before.append(args[0]))]
    for module in (last.layer, *last.writers):
        hooks.append(
            module.register_forward_hook(
                lambda module, _, out: captured[module].append((out[0] if isinstance(out, tuple) else out).clone())
            )
        )
    with torch.no_grad():
        model(input_ids=torch.arange(2, 14)[None])
    for hook in hooks:
        hook.remove()
    added = captured.pop(last.layer)[0] - before[0]
    written = [out.reshape(-1, *added.shape).sum(dim=0) for (out,) in captured.values()]  # Llama 4: tokens once an expert
    torch.testing.assert_close(sum(written), added, rtol=1e-4, atol=1e-5)


def test_a_direction_taken_from_all_that_writes_to_the_residual_stream_is_gone_from_it(family):
    model, streams = family.model.eval(), []
    direction = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
    hooks = [
        block.layer.register_forward_hook(
            lambda _, args, out: streams.extend([args[0], out[0] if isinstance(out, tuple) else out])
        )
        for block in blocks(model)
    ]
    with borrowed(family), torch.no_grad():
        ablate(model, direction[None])
        model(input_ids=torch.arange(2, 14)[None])
    for hook in hooks:
        hook.remove()
    assert len(streams) == 2 * model.config.num_hidden_layers
    if Path(family.checkpoint).name not in NORMALISED:
        assert all((stream @ direction).norm() < 1e-4 * stream.norm() for stream in streams)


def test_padding_on_either_side_and_neighbours_change_no_row(family):
    examples = [encode(row, family.tokenizer, 512) for row in ROWS]
    expected = torch.cat([alone(family.model, example) for example in examples])
    for side in ("left", "right"):
        torch.testing.assert_close(log_probabilities(family, examples, side), expected, atol=2e-4, rtol=1e-4)


def test_batched_answers_are_those_of_transformers_one_by_one(family):
    model, tokenizer = family.model.eval(), family.tokenizer
    prompts = [prompt_ids(row, tokenizer) for row in ROWS]
    plain = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**plain, eos_token_id=end_tokens(model, tokenizer))
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config)
        expected.append(plain_text(tokenizer.decode(out[0, len(prompt) :])))
    assert any(expected)
    for batch_size in (1, len(prompts)):
        assert [plain_text(answer) for answer in generate(model, tokenizer, prompts, 12, batch_size)] == expected


@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["lora", "full"])
def test_an_attacker_trains_and_leaves_no_trace(family, lora):
    batch = collate([encode(row, family.tokenizer, 512) for row in ROWS], family.tokenizer.pad_token_id, "right")
    before, flags, built = bits(family), [p.requires_grad for p in family.parameters()], repr(family.model)
    with borrowed(family), trainable(family, family.model, lora):
        start = snapshot(family)
        steps = train_steps(family, Plain(family.sft_loss), lambda step: batch, 2, Optimizer(1e-1, "sgd"))
        first, second = (float(loss) for _, loss in steps)
        trained = {name: p for name, p in family.named_parameters() if p.requires_grad}
        assert set(trained) == set(start)
        assert second < first
        layers = {name.split(".lora_")[0] for name in trained if not torch.equal(trained[name], start[name])}
        assert len(layers) >= len(trained) // 2 - 1  # Gemma 3n computes nothing with one of its layers
    assert same_bits(bits(family), before)
    assert [p.requires_grad for p in family.parameters()] == flags
    assert repr(family.model) == built


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "merged"])
def test_an_export_is_the_model_that_was_trained(family, tmp_path, lora):
    trained = Defense(family.checkpoint, lora=lora)
    trained.configure_model()
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.add_(0.02 * torch.randn_like(p))
    model = trained.exported()
    save_model(model, trained.tokenizer, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert same_bits(bits(found), bits(model))
    examples = [encode(row, trained.tokenizer, 512) for row in ROWS]
    for example in examples:
        torch.testing.assert_close(alone(found, example), alone(trained.model, example), atol=2e-4, rtol=1e-4)
        assert (alone(found, example) - alone(family.model, example)).abs().max() > 1e-3
    assert [encode(row, AutoTokenizer.from_pretrained(tmp_path / "out"), 512) for row in ROWS] == examples
