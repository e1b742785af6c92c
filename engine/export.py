"""Writing a model as a Hugging Face folder, which is read back and compared before it counts."""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.checkpoint import load_model, load_tokenizer
from casehard.engine.comparison import distance, logits_of, rounding
from casehard.metrics.errors import SettingError

QUESTIONS = ("How do I bake bread?", "What is the capital of France?", "Write four lines about the sea, please.")


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``state`` in ``dtype``; tied tensors stay one, so that they are written once."""
    cast = {(v.data_ptr(), v.shape): v.to(dtype) if v.is_floating_point() else v for v in state.values()}
    return {name: cast[v.data_ptr(), v.shape] for name, v in state.items()}


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> float:
    """Write ``folder`` in Hugging Face format; it appears whole, and read back as the same model, or not at all.

    Args:
        model: without adapters (``adapters.merged``).
        tokenizer: saved beside it, with its chat template.
        folder: replaced if it is there.
        dtype: of the written weights; the model's own by default. The model in memory stays as it is.

    Returns:
        How far the logits of the written model are off, relative to their size, for its ``dtype``; 0 where that is the model's.

    Raises:
        SettingError: what was written is not the model in memory; it stays beside ``folder``, which is as it was.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = None if dtype is None else _cast(model.state_dict(), dtype)
    config = dict(vars(model.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(partial, state_dict=state)
    vars(model.config).update(config)  # which save_pretrained writes the dtype and the class into
    del state
    if dtype is not None:  # save_pretrained notes the dtype in memory, which loading would go back to
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    tokenizer.save_pretrained(partial)
    off = require_same(partial, model, tokenizer, dtype)  # a full disk shows here, before the old folder goes
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
    return off


def _asked(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A few prompts as ids."""
    if not tokenizer.chat_template:
        return [tokenizer(question)["input_ids"] for question in QUESTIONS]
    return [prompt_ids(Row((("user", question),)), tokenizer) for question in QUESTIONS]


def require_same(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> float:
    """Read ``folder`` as anybody would, and compare it with the model in memory: names, weights, end tokens, prompts, logits.

    Memory: one copy of the model in ``dtype``, on the CPU.

    Args:
        folder: what was written.
        model: what it must be.
        tokenizer: the same.
        dtype: of the written weights; the model's own by default.

    Returns:
        How far its logits are off for its ``dtype``; 0 where that is the model's.

    Raises:
        SettingError: naming the first difference.
    """
    try:
        written_model, their_tokenizer = load_model(str(folder), dtype or model.dtype), load_tokenizer(str(folder))
    except ValueError as error:
        raise _unlike(folder, f"it cannot be read back: {error}") from error
    ours, theirs = model.state_dict(), written_model.state_dict()
    if names := sorted(ours.keys() ^ theirs.keys()):
        raise _unlike(folder, f"{'memory' if names[0] in ours else 'the folder'} alone has {names[0]}")
    for name, weight in ours.items():
        written = (weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight).cpu()
        exact = torch.promote_types(written.dtype, theirs[name].dtype)  # some architectures keep parts in float32
        if not torch.equal(written.to(exact), theirs[name].to(exact)):
            raise _unlike(folder, f"{name} has other values")
    del theirs
    ends = [m.generation_config.eos_token_id if m.generation_config else None for m in (model, written_model)]
    if ends[0] != ends[1]:
        raise _unlike(folder, f"the tokens that end an answer were {ends[0]} and are {ends[1]}")
    rows = _asked(tokenizer)
    if rows != _asked(their_tokenizer) or tokenizer.get_vocab() != their_tokenizer.get_vocab():
        raise _unlike(folder, "its tokenizer or chat template makes other tokens of a prompt")
    expected = logits_of(model, rows)
    off = 0.0 if dtype in (None, model.dtype) else distance(logits_of(written_model, rows), expected)
    tensors = dict(written_model.named_parameters(remove_duplicate=False)) | dict(written_model.named_buffers())
    for name, weight in ours.items():  # with the same weights, to the bit, the same logits
        tensors[name].data = weight.detach().cpu()
    again = logits_of(written_model, rows)
    same = torch.equal(again, expected) if model.device.type == "cpu" else distance(again, expected) <= 10 * rounding(model.dtype)
    if not same:
        raise _unlike(folder, f"with the same weights its logits are {100 * distance(again, expected):.2g}% off")
    return off


def _unlike(folder: Path, what: str) -> SettingError:
    return SettingError(
        f"the exported model must be the one in memory, and {what}. It is left in {folder}; an older export stays. "
        "Set run.export to false to go on without one."
    )


def merge_error(model: PreTrainedModel, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """How far the logits of ``merged`` are off those of ``model``, whose adapters act beside its weights.

    Raises:
        SettingError: further than rounding takes them.
    """
    rows = _asked(tokenizer)
    off = distance(logits_of(merged, rows), logits_of(model, rows))
    if not off <= rounding(model.dtype):
        raise SettingError(
            f"the exported model must answer as the trained one, and with its adapters merged in {model.dtype} its logits are "
            f"{100 * off:.2g}% off. Set weights_dtype to float32."
        )
    return off
