import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import bits, same_bits, save_toy_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from casehard import Defense, LoRA
from lightning_modules import export
from lightning_modules.checkpoint import load_model, load_tokenizer
from lightning_modules.export import save_model
from lightning_modules.generation import generate

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


def test_sizes_replace_those_of_the_checkpoint_where_weights_are_random(checkpoint):
    model = load_model(checkpoint, random_weights=True, sizes={"num_hidden_layers": 1, "hidden_size": 16})
    assert (len(model.model.layers), model.lm_head.in_features, model.lm_head.out_features) == (1, 16, 700)
    with pytest.raises(ValueError, match=r"sizes must name numbers .* and it has no 'num_layers'\. It has .*num_hidden_layers"):
        load_model(checkpoint, random_weights=True, sizes={"num_layers": 1})
    with pytest.raises(ValueError, match=r"sizes must be left out unless random_weights is set, got {'hidden_size': 16}"):
        Defense(checkpoint, sizes={"hidden_size": 16})


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
            patch.setattr(export, "safe_open", full)
        else:
            patch.setattr(os, "replace", cannot_move)
        with pytest.raises(OSError, match="No space left on device"):
            save_model(model, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out").exists() is there
    save_model(model, tokenizer, tmp_path / "out")  # and nothing stands in the way of the next
    assert same_bits(bits(load_model(str(tmp_path / "out"))), bits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
