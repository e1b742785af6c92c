import copy
import json
import math
import os
import re
import warnings
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import ROOT, SIZES, bits, same_bits, save_toy_checkpoint, toy_data, toy_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from casehard import Backbone, Defense, LoRA
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.row import Row
from casehard.engine import export
from casehard.engine.checkpoint import (
    checkpoint_files,
    load_model,
    load_tokenizer,
    require_rows_for_tokens,
    seed_by_the_cpu,
    stored_dtype,
)
from casehard.engine.comparison import distance, logits_of
from casehard.engine.export import save_model
from casehard.engine.generation import generate
from casehard.engine.sharding import Blueprint
from casehard.lightning_modules.other_models import undefended_at

IDS = torch.arange(5, 37).view(2, 16)


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- reading


def test_a_folder_is_read_as_transformers_reads_it(checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    for dtype in (torch.float32, torch.bfloat16):
        assert same_bits(bits(load_model(checkpoint, dtype)), bits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)))
    assert torch.equal(logits(load_model(checkpoint)), logits(reference))
    assert load_tokenizer(checkpoint).get_vocab() == AutoTokenizer.from_pretrained(checkpoint).get_vocab()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_take_the_sizes_alone_and_the_seed(checkpoint, tmp_path, dtype):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())  # no weights
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(load_model(str(tmp_path), dtype, random_weights=True))
    read = load_model(checkpoint, dtype)
    assert [(n, p.shape, p.dtype) for n, p in drawn[0].named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in read.named_parameters()
    ]
    assert same_bits(bits(drawn[0]), bits(drawn[1]))
    assert not torch.equal(drawn[0].lm_head.weight, drawn[2].lm_head.weight)
    assert not torch.equal(drawn[0].lm_head.weight, read.lm_head.weight)


def test_weights_are_read_and_drawn_on_their_device(checkpoint, monkeypatch):
    there, seeded = torch.device("meta"), []  # which stands in for an accelerator
    monkeypatch.setattr("casehard.engine.checkpoint.seed_by_the_cpu", seeded.append)
    model = load_model(checkpoint, random_weights=True, device=there)
    assert {p.device for p in model.parameters()} == {there}
    assert seeded == [there]
    monkeypatch.setattr("casehard.lightning_modules.defense.takes_prefix_trees", lambda *_: False)  # a pass, which needs values
    with there:
        module = Defense(checkpoint, backbone=Backbone(random_weights=True))
        module.configure_model()
    assert module.device == there
    assert {p.device for p in module.parameters()} == {there}
    asked = []
    monkeypatch.setattr(
        "casehard.lightning_modules.backbone.load_model", lambda *given: asked.append(given[-1]) or load_model(*given)
    )
    home = torch.device("cpu", 0)  # the CPU under another name
    for settings in ({}, {"random_weights": True}):
        trainer = toy_trainer(Path(), strategy=SingleDeviceStrategy(home), max_steps=0)
        trainer.fit(Defense(checkpoint, backbone=Backbone(**settings)), datamodule=toy_data())
    assert asked == [home, home]


def test_the_generator_of_an_accelerator_follows_from_the_cpus(monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    ends = []
    for start in (3, 3, 4):
        seed(start)
        seed_by_the_cpu(torch.device("cuda"))
        ends.append(float(torch.rand(())))
    assert seeds[0] == seeds[1] != seeds[2]
    assert ends[0] == ends[1] != ends[2]
    seed(3)
    expected = int(torch.randint(2**62, ()))
    assert (seeds[0], ends[0]) == (expected, float(torch.rand(())))  # the CPU's goes on after its draw
    seed(3)
    seed_by_the_cpu(torch.device("cpu"))
    assert int(torch.randint(2**62, ())) == expected


def test_half_precision_waits_to_be_widened_until_a_weight_is_shared_out(checkpoint, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    load_model(checkpoint, torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for settings, lora, stays in (
        ({}, None, True),
        ({}, LoRA(rank=2), False),  # whose first factor would be drawn in half precision
        ({"random_weights": True}, None, False),
        ({"weights_dtype": "bfloat16"}, None, True),
    ):
        backbone = Backbone(**settings)
        model = backbone.load_prepared(str(tmp_path), lora, tokenizer, to_shard=True)
        assert (model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16) == stays, settings
        assert set(Blueprint.of(model).dtypes.values()) == {backbone.dtype}
        model = backbone.load_prepared(str(tmp_path), lora, tokenizer)
        assert model.dtype == backbone.dtype
    assert stored_dtype(checkpoint) is None
    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name].float()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert stored_dtype(str(tmp_path)) is None  # of two


def test_sizes_replace_those_of_the_checkpoint_where_weights_are_random(checkpoint):
    model = load_model(checkpoint, random_weights=True, sizes={"num_hidden_layers": 1, "hidden_size": 16})
    assert (len(model.model.layers), model.lm_head.in_features, model.lm_head.out_features) == (1, 16, 700)
    with pytest.raises(ValueError, match=r"sizes must name numbers .* and it has no 'num_layers'\. It has .*num_hidden_layers"):
        load_model(checkpoint, random_weights=True, sizes={"num_layers": 1})
    with pytest.raises(ValueError, match=r"sizes must be left out unless random_weights is set, got {'hidden_size': 16}"):
        Backbone(sizes={"hidden_size": 16})


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(checkpoint, tmp_path):
    save_toy_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert load_tokenizer(str(tmp_path)).pad_token_id == load_tokenizer(str(tmp_path)).eos_token_id is not None
    assert load_tokenizer(checkpoint).pad_token == AutoTokenizer.from_pretrained(checkpoint).pad_token


@pytest.mark.parametrize("read", [load_model, load_tokenizer, Defense])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "{}/none",
            r"checkpoint must be a hub id, a folder or a GGUF file, and there is no folder '.*/none'\. Relative folders are",
        ),
        ("./none", r"there is no folder '\./none'\. Relative folders are looked up from where the command runs"),
        ("models/sandbox/none", r"there is no folder 'models/sandbox/none'"),
        ("{}/none.gguf", r"checkpoint must be a hub id, a folder or a GGUF file, and there is no file '.*/none\.gguf'"),
        ("none.gguf", r"there is no file 'none\.gguf'"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_says_so(tmp_path, read, where, message):
    with pytest.raises(FileNotFoundError, match=message):
        read(where.format(tmp_path))


def test_a_folder_without_weights_is_an_error_that_lists_what_it_holds(checkpoint, tmp_path):
    message = r"checkpoint folder '.*' must hold weights \(one of \*\.safetensors, .*\), and it holds {}\. Export a model there"
    with pytest.raises(FileNotFoundError, match=message.format("nothing")):
        load_model(str(tmp_path))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((Path(checkpoint) / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=message.format(r"config\.json, tokenizer\.json")):
        load_model(str(tmp_path))


def test_a_gguf_file_is_read_into_the_same_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = load_model(save_toy_checkpoint(tmp_path / "toy", tied=False))
    sizes = {"context_length": 2048, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "head_count": 2}
    more = {"head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "vocab_size": 700, "rope_dimension_count": 16, "rope_freq_base": 1e4}
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    for name, value in (sizes | more).items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # GGUF keeps the two halves of a rotary pair side by side
            weight = weight.view(2, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    assert same_bits(bits(load_model(str(tmp_path / "model.gguf"))), bits(model))


# ---- what does not fit


def edited(folder: Path, weights=None, **config: Any) -> str:
    """Change a checkpoint: its weights, as one dict, and values in its config.json."""
    if weights is not None:
        changed = weights(load_file(folder / "model.safetensors"))
        save_file({name: w.contiguous() for name, w in changed.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def renamed(pattern: str, by: str):
    return lambda weights: {re.sub(pattern, by, name): w for name, w in weights.items()}


def without(part: str):
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def with_value(name: str, value: float):
    return lambda weights: weights | {name: weights[name].index_fill(0, torch.tensor([3]), value)}


NOT_THE_MODELS = {
    "a layer more in the config": (None, {"num_hidden_layers": 3}, r"9 are missing \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)\. Correct config"),
    "a layer fewer in the config": (None, {"num_hidden_layers": 1}, r"9 have no place in it \(model\.layers\.1\..*, \.\.\.\)\. Correct config"),
    "a layer lost": (without("layers.0"), {}, r"9 are missing \(model\.layers\.0"),
    "no head": (without("lm_head"), {}, r"1 are missing \(lm_head\.weight\)\. Correct config\.json, or save the model anew"),
    "another width": (None, {"intermediate_size": 48}, r"6 are of another shape \(model\.layers\.0\.mlp\.down_proj\.weight of \[32, 64\] for \[32, 48\]"),
    "another vocabulary": (None, {"vocab_size": 800}, r"2 are of another shape \(lm_head\.weight of \[700, 32\] for \[800, 32\]"),
    "a head for rewards": (lambda w: w | {"score.weight": torch.ones(1, 32)}, {}, r"1 have no place in it \(score\.weight\)"),
    "adapters that were not merged": (lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)}, {}, r"have no place in it \(.*lora_A"),
    "of peft": (renamed("^", "base_model.model."), {}, r"21 are missing .*21 have no place in it .*saved from within a wrapper.*'base_model\.model\.' off their names"),
    "of DDP": (renamed("^", "module."), {}, r"take 'module\.' off their names"),
    "of torch.compile": (renamed("^", "_orig_mod."), {}, r"take '_orig_mod\.' off their names"),
    "compiled layers": (renamed(r"(layers\.\d)", r"\1._orig_mod"), {}, r"18 are missing .*18 have no place in it \(model\.layers\.0\._orig_mod"),
    "nan": (with_value("lm_head.weight", math.nan), {}, r"finite weights, and lm_head\.weight has nan or infinite ones in torch\.float32"),
    "infinite": (with_value("model.norm.weight", math.inf), {}, r"finite weights, and model\.norm\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_THE_MODELS)
def test_weights_that_are_not_the_models_are_an_error_that_names_some(tmp_path, case):
    weights, config, message = NOT_THE_MODELS[case]
    save_toy_checkpoint(tmp_path, tied=False)
    with pytest.raises(ValueError, match=rf"^checkpoint '.*' must hold .*{message}"):
        load_model(edited(tmp_path, weights, **config))


def test_a_checkpoint_that_lost_an_expert_is_an_error(tmp_path):
    config = MixtralConfig(**SIZES, num_key_value_heads=1, vocab_size=64, num_local_experts=3)
    for part, message in (
        ("experts.2", r"4 are of another shape .*of \[2, 128, 32\]"),
        ("experts.1.w1", "that transformers can read"),
    ):
        MixtralForCausalLM(config).save_pretrained(tmp_path)
        load_model(str(tmp_path))
        with pytest.raises(ValueError, match=message):
            load_model(edited(tmp_path, without(part)))


def test_a_weight_too_large_for_the_dtype_is_an_error(tmp_path):
    edited(Path(save_toy_checkpoint(tmp_path, tied=False)), with_value("lm_head.weight", 1e6))
    load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"lm_head\.weight has nan or infinite ones in torch\.float16"):
        load_model(str(tmp_path), torch.float16)


def test_what_an_architecture_can_do_without_is_not_missed(tmp_path, checkpoint):
    """A tied head is not written; rotary buffers were, once; names with a prefix of the architecture's own are the same."""
    reference = bits(load_model(save_toy_checkpoint(tmp_path / "untied", tied=False)))
    assert "lm_head.weight" not in load_file(Path(checkpoint) / "model.safetensors")
    tied = load_model(checkpoint)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for number, change in enumerate((lambda w: w | old, renamed("^model[.]", ""), renamed("^", "model."))):
        folder = Path(save_toy_checkpoint(tmp_path / str(number), tied=False))
        assert same_bits(bits(load_model(edited(folder, change))), reference)


def test_a_head_of_its_own_is_kept_where_the_config_calls_it_tied(tmp_path):
    folder = Path(save_toy_checkpoint(tmp_path / "start", tied=False))
    reference, tokenizer = bits(load_model(str(folder))), load_tokenizer(str(folder))
    model = load_model(edited(folder, tie_word_embeddings=True))
    save_model(model, tokenizer, tmp_path / "out")
    for found in (model, load_model(str(tmp_path / "out"))):
        assert same_bits(bits(found), reference)


def test_a_model_of_several_senses_is_read_as_its_language_model_with_a_warning(tmp_path):
    text = SIZES | {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "vocab_size": 64,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sight = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28}
    projector = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "patch_size": 14}
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text | ends, vision_config=sight | projector))
    whole.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"is read without the \d+ weights of its other senses \(multi_modal_projector.*vision_model"
    ):
        model = load_model(str(tmp_path))
    expected = {name.removeprefix("language_model."): w for name, w in whole.state_dict().items() if "language_model." in name}
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(w, expected[name]) for name, w in model.state_dict().items())
    with pytest.raises(ValueError, match=r"\d+ are missing \(model\.layers\.0"):
        load_model(edited(tmp_path, without("language_model.model.layers.0")))


def shards(folder: Path) -> str:
    """Split the weights of a checkpoint over three files; the name of the second."""
    model = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert same_bits(bits(load_model(str(folder))), bits(model))
    return "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("written", "what"),
    [
        (lambda whole: whole[: len(whole) // 2], "incomplete metadata"),
        (lambda whole: b"", "header too small"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header too large"),
        (lambda whole: b"\xff" * 64, "header too large"),
    ],
    ids=["cut", "empty", "pointer", "garbage"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_of_weights_is_an_error_that_names_it(tmp_path, written, what, sharded):
    save_toy_checkpoint(tmp_path)
    name = "model.safetensors"
    if sharded:
        name = shards(tmp_path)
    (tmp_path / name).write_bytes(written((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"and {name} is cut, damaged or but a pointer of Git LFS: .*{what}"):
        load_model(str(tmp_path))


def test_a_shard_that_is_not_there_is_an_error_that_names_it(tmp_path):
    save_toy_checkpoint(tmp_path)
    name = shards(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match=name):
        load_model(str(tmp_path))
    (tmp_path / name).write_bytes(whole)
    save_toy_checkpoint(tmp_path, seed=1)  # in one file, which would be read
    with pytest.raises(
        ValueError, match=r"must hold one set of weights, .* both model\.safetensors and model\.safetensors\.index\.json"
    ):
        load_model(str(tmp_path))


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_of_a_pickle_tensors_alone_are_read(tmp_path):
    save_toy_checkpoint(tmp_path, tied=False)
    reference, weights = bits(load_model(str(tmp_path))), load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert same_bits(bits(load_model(str(tmp_path))), reference)
    torch.save(weights | {"more": Payload(tmp_path / "it ran")}, tmp_path / "pytorch_model.bin")
    message = r"pytorch_model\.bin is damaged, or a pickle of more than tensors, which is not read"
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))
    assert not (tmp_path / "it ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"model_type": "unheard of"}, "unheard of"),
    ],
)
@pytest.mark.parametrize("random_weights", [False, True])
def test_a_config_that_makes_no_model_is_an_error_of_one_line(tmp_path, config, says, random_weights):
    with pytest.raises(ValueError, match=rf"^checkpoint '.*' must be one that transformers can read, and .*{says}") as caught:
        load_model(edited(Path(save_toy_checkpoint(tmp_path)), **config), random_weights=random_weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', ""])
def test_a_damaged_tokenizer_is_an_error_of_one_line(tmp_path, text):
    save_toy_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"^checkpoint '.*' must be one that transformers can read, and .*\. Copy or download"
    ) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


QUANTISED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "one of tomorrow"},
]


@pytest.mark.parametrize("settings", QUANTISED, ids=lambda s: s.get("quant_method", "8 bits"))
def test_quantised_weights_are_refused_before_any_is_read(tmp_path, settings):
    folder = Path(edited(Path(save_toy_checkpoint(tmp_path)), quantization_config=settings))
    (folder / "model.safetensors").write_bytes(b"never read")
    kind = settings.get("quant_method", "load_in_8bit")
    for read in (load_model, Defense):
        with pytest.raises(
            ValueError, match=rf"must hold plain weights .*says quantization_config: {kind}\. Name the model that"
        ):
            read(str(folder))
    edited(folder, quantization_config=None, text_config={"quantization_config": settings})  # of one part
    with pytest.raises(ValueError, match=rf"says quantization_config: {kind}"):
        load_model(str(folder))


def test_random_weights_of_a_quantised_models_sizes_are_plain(tmp_path):
    folder = edited(Path(save_toy_checkpoint(tmp_path / "start")), quantization_config=QUANTISED[0])
    module = Defense(folder, backbone=Backbone(random_weights=True))
    module.configure_model()
    save_model(module.exported(), module.tokenizer, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(checkpoint, tmp_path):
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # of another sense, which no text has
    require_rows_for_tokens(model, tokenizer)
    tokenizer.add_tokens(["zugzwang"])
    message = r"has tokens up to number 701, 'zugzwang', while the model's embedding ends at 699\. Name the checkpoint's own"
    with pytest.raises(ValueError, match=message):
        require_rows_for_tokens(model, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Defense(checkpoint, backbone=Backbone(tokenizer=str(tmp_path))).configure_model()


@pytest.mark.parametrize("how", ["pads with it", "its template writes it"])
def test_a_special_token_beyond_the_embedding_is_an_error_where_it_is_used(checkpoint, how):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if how == "pads with it":
        tokenizer.pad_token = "<|new|>"
    else:
        tokenizer.chat_template = "<|new|>" + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"has tokens up to number 700, '<\|new\|>'"):
        require_rows_for_tokens(load_model(checkpoint), tokenizer)


# ---- adapters by peft

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "rslora with another rank here and there": LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules="all-linear"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["up_proj"]),
    "a head trained whole": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "k_proj"]),
    "some tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
}  # fmt: skip


def save_adapter(base: str, folder: Path, config: PeftConfig) -> PeftModel:
    """An adapter that changes much, in a folder without a tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapters_folder_is_read_as_the_model_that_it_makes_of_its_base(tmp_path, kind):
    base = save_toy_checkpoint(tmp_path / "base", tied=False)
    expected = logits(save_adapter(base, tmp_path / "adapter", ADAPTERS[kind]))
    module = Defense(str(tmp_path / "adapter"), lora=LoRA(rank=2))
    module.configure_model()
    torch.testing.assert_close(logits(module.model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(load_model(base)), atol=0.1)
    assert module.tokenizer.get_vocab() == load_tokenizer(base).get_vocab()
    plain = load_model(str(tmp_path / "adapter"))
    assert list(plain.state_dict()) == list(load_model(base).state_dict())
    assert all(p.requires_grad for p in plain.parameters())
    save_model(module.exported(), module.tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_in_the_dtype_of_the_weights(tmp_path, kind):
    base = save_toy_checkpoint(tmp_path / "base", tied=False)
    save_adapter(base, tmp_path / "adapter", ADAPTERS[kind])
    merged, exact = load_model(str(tmp_path / "adapter"), torch.bfloat16), load_model(str(tmp_path / "adapter"))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for p, q in zip(merged.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, atol=2e-2, rtol=2e-2)


def test_an_adapter_of_its_own_head_unties_it(tmp_path):
    base = save_toy_checkpoint(tmp_path / "base", tied=True)
    expected = logits(save_adapter(base, tmp_path / "adapter", ADAPTERS["a head trained whole"]))
    model = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    save_model(model, load_tokenizer(base), tmp_path / "out")
    assert torch.equal(logits(load_model(str(tmp_path / "out"))), logits(model))


def test_an_adapter_that_cannot_be_merged_is_an_error(tmp_path):
    base = save_toy_checkpoint(tmp_path / "base", tied=True)
    save_adapter(base, tmp_path / "tied", ADAPTERS["embeddings"])  # merged, it would change the head as well
    with pytest.raises(
        ValueError, match=r"must be an adapter that can be merged, and merged in torch\.float32 its logits are .*% off"
    ):
        load_model(str(tmp_path / "tied"))
    save_adapter(base, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="an adapter of kind PROMPT_TUNING cannot be merged into weights"):
        load_model(str(tmp_path / "prompt"))


def edit_adapter(folder: Path, weights=None, **config: Any) -> str:
    path, stored = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        save_file(weights(load_file(stored)), stored)
    return str(folder)


BROKEN_ADAPTERS = {
    "factors lost": (without("layers.1"), {}, r"4 weights of the adapter are missing or have no place in '.*base'"),
    "factors left over": (lambda w: w | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, {}, r"1 weights of the adapter are missing or have no place .*layers\.7"),
    "another rank": (None, {"r": 8}, r"must be one that transformers can read, and .*\(RuntimeError\)"),
    "no base": (None, {"base_model_name_or_path": None}, r"must name the model that it is an adapter of, and base_model_name_or_path in its adapter_config\.json is None"),
    "a base that is gone": (None, {"base_model_name_or_path": "./gone"}, r"is an adapter of './gone' .*, which cannot be read: .*there is no folder './gone'"),
    "of another model": (None, {"target_modules": ["c_attn"]}, r"must be one that transformers can read, and .*c_attn"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_an_adapter_that_does_not_fit_its_base_is_an_error(tmp_path, case):
    base = save_toy_checkpoint(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", ADAPTERS["lora"])
    weights, config, message = BROKEN_ADAPTERS[case]
    with pytest.raises((ValueError, OSError), match=message):
        load_model(edit_adapter(tmp_path / "adapter", weights, **config))


def test_an_adapter_of_a_quantised_base_or_beside_a_model_is_an_error(tmp_path):
    base = Path(save_toy_checkpoint(tmp_path / "base"))
    save_adapter(str(base), tmp_path / "adapter", ADAPTERS["lora"])
    files = checkpoint_files(str(tmp_path / "adapter"))
    assert {"adapter_model.safetensors", "adapter_config.json", "base/model.safetensors", "base/config.json"} <= set(files)
    edited(base, quantization_config=QUANTISED[0])
    assert checkpoint_files(str(tmp_path / "adapter")) != files
    with pytest.raises(ValueError, match=r"must hold plain weights .*config\.json of '.*base' says quantization_config: gptq"):
        Defense(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((tmp_path / "adapter" / name).read_bytes())
    with pytest.raises(ValueError, match=r"must hold a model or an adapter, and it holds both"):
        Defense(str(base))


# ---- writing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_what_was_saved_is_what_is_loaded(tmp_path, tied, dtype):
    save_toy_checkpoint(tmp_path / "start", tied)
    model, tokenizer = load_model(str(tmp_path / "start")), load_tokenizer(str(tmp_path / "start"))
    before = bits(model)
    save_model(model, tokenizer, tmp_path / "out", dtype)
    assert same_bits(bits(model), before)

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {dtype or torch.float32}
    for (name, p), (other, q) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p.to(dtype or torch.float32), q)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(stored) == len(list(model.parameters()))  # a tied weight once
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype or torch.float32).removeprefix(
        "torch."
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template is not None
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_model_in_bfloat16_is_saved_as_it_is(checkpoint, tmp_path):
    model = load_model(checkpoint, torch.bfloat16)
    save_model(model, load_tokenizer(checkpoint), tmp_path / "out")
    assert same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")), bits(model))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapted_defense_is_exported_with_its_adapters_merged(checkpoint, tmp_path, dtype):
    module = Defense(checkpoint, lora=LoRA(rank=2))
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save_model(module.exported(), module.tokenizer, tmp_path / "out", dtype)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert list(found.state_dict()) == list(plain.state_dict())
    assert not torch.allclose(logits(found), logits(plain), atol=0.1)
    if dtype is None:
        torch.testing.assert_close(logits(found), logits(module.model), atol=1e-4, rtol=1e-4)
    for (name, p), q in zip(module.exported().named_parameters(), found.parameters(), strict=True):
        assert torch.equal(p if dtype is None else p.to(dtype).float(), q), name


def test_a_saved_folder_replaces_the_old_one_whole(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left over.txt").write_text("old")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half.txt").write_text("from a run that died")
    save_model(load_model(checkpoint), load_tokenizer(checkpoint), tmp_path / "out")
    assert "left over.txt" not in contents(tmp_path / "out")
    assert "half.txt" not in contents(tmp_path / "out")
    assert "model.safetensors" in contents(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_ships_an_inconsistent_generation_config_is_saved_all_the_same(tmp_path):
    save_toy_checkpoint(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 7]}')  # and no do_sample
    model, tokenizer = load_model(str(tmp_path / "start")), load_tokenizer(str(tmp_path / "start"))
    generate(model, tokenizer, [[5, 6]], 1)
    save_model(model, tokenizer, tmp_path / "out")
    assert load_model(str(tmp_path / "out")).generation_config.eos_token_id == [1, 7]


@pytest.mark.parametrize("where", ["weights", "tokenizer", "check", "move"])
@pytest.mark.parametrize("there", [True, False], ids=["over an old folder", "new"])
def test_a_failure_half_way_leaves_what_was_there_whole(checkpoint, tmp_path, monkeypatch, where, there):
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    if there:
        save_model(model, tokenizer, tmp_path / "out")
    before = contents(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1)

    real_replace = os.replace

    def full(*args, **_):
        raise OSError(28, "No space left on device")

    def cannot_move(source, target):
        if str(source).endswith(".partial"):
            full()
        real_replace(source, target)

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(type(model), "save_pretrained", lambda self, folder, **_: (Path(folder).mkdir(), full()))
        elif where == "tokenizer":
            patch.setattr(type(tokenizer), "save_pretrained", full)
        elif where == "check":
            patch.setattr(export, "load_model", full)
        else:
            patch.setattr(os, "replace", cannot_move)
        with pytest.raises(OSError, match="No space left on device"):
            save_model(model, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out").exists() is there
    save_model(model, tokenizer, tmp_path / "out")  # and nothing stands in the way of the next
    assert same_bits(bits(load_model(str(tmp_path / "out"))), bits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- an export is read back and compared


def config_changed(**settings: Any):
    return lambda folder: edited(folder, **settings)


def forget(name: str):
    def change(folder: Path) -> None:
        for path in folder.glob(name):
            path.unlink()

    return change


def weights_changed(change):
    return lambda folder: edited(folder, change)


SPOILT = {
    "names of a wrapper": (weights_changed(renamed("^", "base_model.model.")), r"it cannot be read back: .* 21 are missing .*wrapper"),
    "a weight of other values": (weights_changed(with_value("model.norm.weight", 2.0)), r"model\.norm\.weight has other values"),
    "a head of its own": (weights_changed(lambda w: w | {"lm_head.weight": -w["model.embed_tokens.weight"]}), r"lm_head\.weight has other values"),
    "nan": (weights_changed(with_value("model.norm.weight", math.nan)), r"it cannot be read back: .*finite weights"),
    "a layer lost": (config_changed(num_hidden_layers=1), r"it cannot be read back: .*have no place in it"),
    "another theta": (config_changed(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), r"with the same weights its logits are .*% off"),
    "another epsilon": (config_changed(rms_norm_eps=1.1e-6), r"with the same weights its logits are .*% off"),
    "another activation": (config_changed(hidden_act="gelu"), r"with the same weights its logits are .*% off"),
    "no end tokens": (forget("generation_config.json"), r"the tokens that end an answer were \[1, 7\] and are "),
    "no template": (forget("chat_template.jinja"), r"its tokenizer or chat template makes other tokens of a prompt"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"header too small"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_that_is_not_the_model_is_an_error_and_the_old_one_stays(tmp_path, monkeypatch, case, dtype):
    spoil, message = SPOILT[case]
    save_toy_checkpoint(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    model, tokenizer = load_model(str(tmp_path / "start")), load_tokenizer(str(tmp_path / "start"))
    save_model(model, tokenizer, tmp_path / "out", dtype)
    before = contents(tmp_path / "out")
    save = type(tokenizer).save_pretrained

    def save_and_spoil(self, folder):
        save(self, folder)
        spoil(folder)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", save_and_spoil)
    with pytest.raises(
        ValueError, match=rf"^the exported model must be the one in memory, and .*{message}.* It is left in .*partial"
    ):
        save_model(model, tokenizer, tmp_path / "out", dtype)
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out.partial" / "config.json").exists()


def test_a_part_that_is_not_written_is_an_error(checkpoint, tmp_path):
    model = load_model(checkpoint)
    model.register_parameter("probe", torch.nn.Parameter(torch.ones(2)))
    model._keys_to_ignore_on_save = ["probe"]
    with pytest.raises(ValueError, match=r"must be the one in memory, and memory alone has probe\. It is left in"):
        save_model(model, load_tokenizer(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_of_many_files_is_compared_like_one(tmp_path, monkeypatch, dtype):
    save_toy_checkpoint(tmp_path / "start", tied=False)
    model, tokenizer = load_model(str(tmp_path / "start")), load_tokenizer(str(tmp_path / "start"))
    monkeypatch.setattr(type(model), "save_pretrained", partialmethod(type(model).save_pretrained, max_shard_size="60KB"))
    off = save_model(model, tokenizer, tmp_path / "out", dtype)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    expected = {name: p if dtype is None else p.to(dtype).float() for name, p in model.named_parameters()}
    found = load_model(str(tmp_path / "out"))
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())
    assert off == 0 if dtype is None else 1e-4 < off < 5e-2
    rows = [prompt_ids(Row((("user", question),)), tokenizer) for question in export.QUESTIONS]
    lower = load_model(str(tmp_path / "out"), dtype or torch.float32)
    assert off == pytest.approx(distance(logits_of(lower, rows), logits_of(model, rows)))


def deepseek(folder: Path, seed: int) -> str:
    """A checkpoint whose routers have biases that are no parameters, and are kept in float32."""
    tokenizer = load_tokenizer(str(ROOT / "models/sandbox/base"))
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = SIZES | latent | experts | {"moe_intermediate_size": 16, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, initializer_range=0.2))
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, 4).roll(2 * seed))  # other experts
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_parts_that_an_architecture_keeps_in_float32_are_exported_as_they_are(tmp_path):
    model, tokenizer = load_model(deepseek(tmp_path / "start", 0), torch.bfloat16), load_tokenizer(str(tmp_path / "start"))
    kept = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert kept.dtype == torch.float32
    save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(load_model(str(tmp_path / "out"), torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias, kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_are_lost_in_merging_are_an_error(checkpoint, monkeypatch, dtype):
    module = Defense(checkpoint, lora=LoRA(rank=2), backbone=Backbone(weights_dtype=dtype))
    module.configure_model()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    module.exported()
    monkeypatch.setattr(Linear, "merge", lambda self: None)
    with pytest.raises(
        ValueError, match=rf"with its adapters merged in torch\.{dtype} its logits are \d.*% off\. Set weights_dtype"
    ):
        module.exported()


# ---- another model's weights, in this one


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_an_undefended_model_lends_its_buffers_too(tmp_path, lora):
    module = Defense(deepseek(tmp_path / "own", 0), lora=lora)
    module.configure_model()
    before, other = bits(module), load_model(deepseek(tmp_path / "other", 1))
    with undefended_at(module, str(tmp_path / "other")):
        torch.testing.assert_close(logits(module.model), logits(other))
    assert same_bits(bits(module), before)


@pytest.mark.parametrize("settings", [{"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, {"hidden_act": "relu"}])
def test_an_undefended_model_that_computes_otherwise_is_an_error(checkpoint, tmp_path, settings):
    other = edited(Path(save_toy_checkpoint(tmp_path, seed=1)), **settings)
    module = Defense(checkpoint)
    module.configure_model()
    before = bits(module)
    message = r"undefended_checkpoint must be .*architecture, and the weights of '.*' give other logits in it \(.*% off\), since its config"
    with pytest.raises(ValueError, match=message), undefended_at(module, other):
        pass
    assert same_bits(bits(module), before)


@pytest.mark.parametrize("random_weights", [True, False])
def test_a_device_that_is_too_small_is_not_blamed_on_the_checkpoint(checkpoint, monkeypatch, random_weights):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(AutoModelForCausalLM, name, full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2"):
        load_model(checkpoint, random_weights=random_weights)
