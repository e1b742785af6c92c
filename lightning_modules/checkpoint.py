"""Checkpoints: a hub id, a folder or a GGUF file, read into a model and its tokenizer, and written as a Hugging Face folder."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from datamodules.rows import file_sha256

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")


def _source(checkpoint: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes: the folder or hub id, and the GGUF file's name where it is one."""
    path = Path(checkpoint)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint must be a hub id, a folder or a GGUF file, and there is no file {checkpoint!r}.")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir() and (path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1):
        raise FileNotFoundError(
            f"checkpoint must be a hub id, a folder or a GGUF file, and there is no folder {checkpoint!r}. "
            "Relative folders are looked up from where the command runs: start it at the root of the repository."
        )
    return checkpoint, {}


def checkpoint_files(checkpoint: str) -> dict[str, str]:
    """SHA-256 of what a local checkpoint is read from (weights, config and tokenizer), by file name; of a file that one alone;
    empty for a hub id.
    """
    path = Path(checkpoint)
    parts = {part for pattern in (*WEIGHT_FILES, "*.json", "*.jinja") for part in path.glob(pattern)}
    return {part.name: file_sha256(part) for part in ([path] if path.is_file() else sorted(parts))}


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of ``checkpoint``, with a padding token: the end token where it has none of its own."""
    source, gguf = _source(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resized(source: str, sizes: Mapping[str, int], **gguf: Any) -> PreTrainedConfig:
    """The sizes of a checkpoint, some of them replaced."""
    settings, _ = PreTrainedConfig.get_config_dict(source, **gguf)
    if unknown := sorted(set(sizes) - set(settings)):
        raise ValueError(
            f"sizes must name numbers of the checkpoint's config.json, and it has no {', '.join(map(repr, unknown))}. "
            f"It has {', '.join(name for name, value in settings.items() if type(value) is int)}."
        )
    return AutoConfig.for_model(**(settings | dict(sizes)))


def num_positions(checkpoint: str, sizes: Mapping[str, int] | None = None) -> int | None:
    """How many positions the model of ``checkpoint`` can tell apart, or was made for; None where its config says nothing."""
    source, gguf = _source(checkpoint)
    config = _resized(source, sizes, **gguf) if sizes else AutoConfig.from_pretrained(source, **gguf)
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(
    checkpoint: str,
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """The causal language model of ``checkpoint``, in ``dtype``.

    Args:
        checkpoint: hub id, folder or GGUF file.
        dtype: of every weight.
        random_weights: read only the sizes (``config.json``) and draw fresh weights from torch's global generator.
        sizes: other values for some of those sizes, where the weights are random.

    Raises:
        ValueError: a size that ``config.json`` does not have.
        FileNotFoundError: no such folder or file, or a folder without weights.
    """
    source, gguf = _source(checkpoint)
    if random_weights:
        config = _resized(source, sizes, **gguf) if sizes else AutoConfig.from_pretrained(source, **gguf)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    folder = Path(source)
    if not gguf and folder.is_dir() and not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise FileNotFoundError(
            f"checkpoint folder {checkpoint!r} must hold weights (one of {', '.join(WEIGHT_FILES)}), and it holds "
            f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}. "
            "Export a model there, or set random_weights to start from its sizes."
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **gguf)
    if gguf:  # transformers refuses to save a model that still says that it is quantised; its weights are not any more
        for mark in ("quantization_method", "is_quantized", "hf_quantizer"):
            model.__dict__.pop(mark, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``state`` in ``dtype``; tied tensors stay one, so that they are written once."""
    cast = {(v.data_ptr(), v.shape): v.to(dtype) if v.is_floating_point() else v for v in state.values()}
    return {name: cast[v.data_ptr(), v.shape] for name, v in state.items()}


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``folder`` in Hugging Face format; it appears whole or not at all.

    Args:
        model: without adapters (``adapters.merged``).
        tokenizer: saved beside it, with its chat template.
        folder: replaced if it is there.
        dtype: of the written weights; the model's own by default. The model in memory stays as it is.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = None if dtype is None else _cast(model.state_dict(), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(partial, state_dict=state)
    if dtype is not None:  # save_pretrained notes the dtype in memory, which loading would go back to
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    tokenizer.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):  # a full disk shows here, before the old folder goes
        with safe_open(file, "pt") as tensors:
            assert len(list(tensors.keys())) > 0
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
