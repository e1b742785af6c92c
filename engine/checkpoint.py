"""Checkpoints: a hub id, a folder or a GGUF file, read into a model and its tokenizer.

A checkpoint is read whole or refused in one sentence: all weights of the model come from it, and all of its weights go in.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.file_hash import file_sha256
from casehard.datamodules.row import Row
from casehard.engine.comparison import distance, logits_of, num_embedded, rounding, some_ids
from casehard.engine.private import forget_adapters, forget_quantisation
from casehard.metrics.errors import SettingError
from casehard.shipped import shipped

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
_ONE_OR_MANY = ("model.safetensors", "model.safetensors.index.json")  # transformers would read the first
_NO_TEXT = re.compile(r"(^|\.)(vision|visual|audio|image|multi_?modal|mm|embed_vision|embed_audio)(_\w+)?\.")  # weights' names
_WRAPPER = re.compile(r"((base_model|module|_orig_mod|_fsdp_wrapped_module|_forward_module|model|policy|actor)\.)+")


def _source(checkpoint: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes: the folder or hub id, and the GGUF file's name where it is one."""
    path = Path(checkpoint := shipped(checkpoint))
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
    empty for a hub id. Those of an adapter's base are among them, as ``base/NAME``.
    """
    path = Path(checkpoint := shipped(checkpoint))
    parts = {part for pattern in (*WEIGHT_FILES, "*.json", "*.jinja") for part in path.glob(pattern)}
    files = {part.name: file_sha256(part) for part in ([path] if path.is_file() else sorted(parts))}
    base = base_of(checkpoint) if (path / "adapter_config.json").is_file() else None
    return files | {f"base/{name}": digest for name, digest in (checkpoint_files(base) if base else {}).items()}


@contextmanager
def _reading(checkpoint: str) -> Iterator[None]:
    """For a block of calls of libraries, which raise anything at a file that is damaged or foreign: say it in one sentence."""
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):  # say what is missing
        raise
    except Exception as error:
        says = str(error).strip().partition("\n")[0][:300] or "no reason"
        raise SettingError(
            f"checkpoint {checkpoint!r} must be one that transformers can read, and {_damage(Path(checkpoint)) or says} "
            f"({type(error).__name__}). Copy or download it anew, or install what it needs."
        ) from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """For a block, silence transformers' tables of weights, which are said in one sentence here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _damage(folder: Path) -> str | None:
    """Which file of a folder is not whole, if it is one of weights."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is cut, damaged or but a pointer of Git LFS: {error}"
    for file in sorted(folder.glob("*.bin")):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception:
            return f"{file.name} is damaged, or a pickle of more than tensors, which is not read since it could run code"
    return None


def base_of(checkpoint: str) -> str | None:
    """The model that ``checkpoint`` is an adapter of, such as LoRA by peft; None if it is a model itself.

    Raises:
        SettingError: a folder of a model and an adapter at once, or an adapter that names no model to go with.
    """
    source, gguf = _source(checkpoint)
    file = None if gguf else find_adapter_config_file(source)
    if file is None:
        return None
    if (Path(source) / "config.json").is_file() and any(Path(source).glob("model*.safetensors")):
        raise SettingError(
            f"checkpoint {checkpoint!r} must hold a model or an adapter, and it holds both (config.json, adapter_config.json). "
            "Move the adapter into a folder of its own."
        )
    with _reading(checkpoint):
        base: str | None = PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base or base == checkpoint:
        raise SettingError(
            f"checkpoint {checkpoint!r} must name the model that it is an adapter of, and base_model_name_or_path in its "
            f"adapter_config.json is {base!r}. Write the model's hub id or folder there."
        )
    return base


def require_plain_weights(checkpoint: str) -> None:
    """Refuse quantised weights by their config, before any weights are read.

    Raises:
        SettingError: a checkpoint, or the base of an adapter, in fewer bits (GPTQ, AWQ, bitsandbytes, fp8, ...).
    """
    base = base_of(checkpoint)
    try:
        source, gguf = _source(base or checkpoint)
    except FileNotFoundError as error:
        raise (error if base is None else _base_unread(checkpoint, base, error)) from None
    if gguf:  # read into plain weights
        return
    with _reading(checkpoint):
        settings = _settings(source)
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    quantised = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if quantised is not None:
        method = quantised.get("quant_method") or next((name for name in quantised if name.startswith("load_in_")), "quantised")
        raise SettingError(
            f"checkpoint {checkpoint!r} must hold plain weights (float32, bfloat16 or float16), and config.json of "
            f"{source!r} says quantization_config: {method}. Name the model that it was quantised from, or a GGUF file of it, "
            "which is read into plain weights."
        )


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of ``checkpoint``, with a padding token: the end token where it has none of its own.

    An adapter that brings no tokenizer takes its base's.
    """
    source, gguf = _source(checkpoint)
    base = base_of(checkpoint)
    if base is not None and not any(Path(source).glob("tokenizer*")):
        return load_tokenizer(base)
    with _reading(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_rows_for_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model's embedding has no row for.

    Special tokens beyond it pass if no chat template or padding writes them, such as the images' of a model of text.

    Raises:
        SettingError: naming the largest token and the number of rows.
    """
    num_rows = num_embedded(model)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = {number for number in tokenizer.get_vocab().values() if number not in special}
    written |= {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    with suppress(ValueError):  # a template that takes no such row
        if tokenizer.chat_template:
            written |= set(prompt_ids(Row((("user", "Hello"),)), tokenizer))
    if (largest := max(written)) >= num_rows:
        raise SettingError(
            f"the tokenizer must be the model's, and {tokenizer.name_or_path!r} has tokens up to number {largest}, "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, while the model's embedding ends at {num_rows - 1}. "
            "Name the checkpoint's own tokenizer, or resize the embedding and save the model anew."
        )


def _settings(source: str, **gguf: Any) -> dict[str, Any]:
    """``config.json`` as it stands."""
    settings, _ = PreTrainedConfig.get_config_dict(source, **gguf)
    return settings


def _resized(source: str, sizes: Mapping[str, int], **gguf: Any) -> PreTrainedConfig:
    """The sizes of a checkpoint, some of them replaced."""
    settings = _settings(source, **gguf)
    if unknown := sorted(set(sizes) - set(settings)):
        raise SettingError(
            f"sizes must name numbers of the checkpoint's config.json, and it has no {', '.join(map(repr, unknown))}. "
            f"It has {', '.join(name for name, value in settings.items() if type(value) is int)}."
        )
    return AutoConfig.for_model(**(settings | dict(sizes)))


def num_positions(checkpoint: str, sizes: Mapping[str, int] | None = None) -> int | None:
    """How many positions the model of ``checkpoint`` can tell apart, or was made for; None where its config says nothing."""
    source, gguf = _source(checkpoint)
    with _reading(checkpoint):
        config = _resized(source, sizes, **gguf) if sizes else AutoConfig.from_pretrained(source, **gguf)
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def load_model(
    checkpoint: str,
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    sizes: Mapping[str, int] | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model of ``checkpoint``, in ``dtype``, one weight after the other on its device.

    Args:
        checkpoint: hub id, folder or GGUF file; of an adapter the model that it makes of its base, merged.
        dtype: of every weight.
        random_weights: read only the sizes (``config.json``) and draw fresh weights, from torch's CPU generator alone: on the
            CPU its numbers, on another device those that follow from a seed that it draws.
        sizes: other values for some of those sizes, where the weights are random.
        device: of the weights; None for torch's default device.

    Raises:
        SettingError: weights that are not those of the model that ``config.json`` describes: missing, too many, of another shape,
            quantised, damaged or not finite; or a size that ``config.json`` does not have.
        FileNotFoundError: no such folder or file, or a folder without weights.
    """
    if device is not None:
        with device:
            return load_model(checkpoint, dtype, random_weights, sizes)
    source, gguf = _source(checkpoint)
    if random_weights:
        with _reading(checkpoint):
            config = AutoConfig.from_pretrained(source, **gguf)
        if sizes:
            config = _resized(source, sizes, **gguf)
        seed_by_the_cpu(torch.get_default_device())
        with _reading(checkpoint):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _unmark(model)
        return model
    require_plain_weights(checkpoint)
    if (base := base_of(checkpoint)) is not None:
        return _with_adapter(checkpoint, source, base, dtype)
    folder = Path(source)
    if not gguf and folder.is_dir() and not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise FileNotFoundError(
            f"checkpoint folder {checkpoint!r} must hold weights (one of {', '.join(WEIGHT_FILES)}), and it holds "
            f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}. "
            "Export a model there, or set random_weights to start from its sizes."
        )
    if not gguf and all((folder / name).is_file() for name in _ONE_OR_MANY):
        raise SettingError(
            f"checkpoint folder {checkpoint!r} must hold one set of weights, and it holds both {' and '.join(_ONE_OR_MANY)}. "
            "Take out the one that is not the model's."
        )
    everything: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the report, not an error
    with _reading(checkpoint), _without_reports():
        read: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **everything, **gguf)
    model, report = read
    _require_whole(checkpoint, report, in_part=not gguf and _settings(source).get("model_type") != model.config.model_type)
    _require_finite(checkpoint, model)
    _unmark(model)
    return model


def seed_by_the_cpu(device: torch.device) -> None:
    """Seed the generator of an accelerator with a draw of the CPU's, whose state then says all; nothing for the CPU itself."""
    if device.type not in ("cpu", "meta"):
        seed = int(torch.randint(2**62, (), device="cpu"))
        state = torch.get_rng_state()
        torch.manual_seed(seed)  # of every device
        torch.set_rng_state(state)


def stored_dtype(checkpoint: str) -> torch.dtype | None:
    """The half precision in which a local folder holds all weights of a model; None if that is not so.

    Read in it and widened later, weights are those that are widened as they are read, bit for bit.
    """
    kinds, folder = set(), Path(shipped(checkpoint))
    if (folder / "adapter_config.json").is_file():  # its base has a precision of its own
        return None
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            kinds |= {reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118  no dict
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kinds.pop()) if len(kinds) == 1 else None


def _unmark(model: PreTrainedModel) -> None:
    """Its weights are plain, whatever it was read from: transformers would refuse to save it, or call it quantised."""
    forget_quantisation(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _require_whole(checkpoint: str, report: Mapping[str, Iterable[Any]], in_part: bool) -> None:
    """Refuse a checkpoint by transformers' report on its weights: any that were missing, left over or of another shape.

    The report leaves out what an architecture declares as dispensable, such as tied heads and rotary buffers. Where only the text
    part of a model of several senses is read (``in_part``), the weights of the others are left over, with a warning.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"])
    if in_part and not missing and (others := [name for name in unexpected if _NO_TEXT.search(name)]):
        unexpected = [name for name in unexpected if name not in others]
        warnings.warn(
            f"checkpoint {checkpoint!r} is read without the {len(others)} weights of its other senses ({_few(others)}): the "
            "language model alone is trained, attacked and exported.",
            stacklevel=2,
        )
    flaws = [
        f"{len(names)} {what} ({_few(names)})"
        for names, what in (
            (missing, "are missing"),
            (unexpected, "have no place in it"),
            ([f"{name} of {list(theirs)} for {list(ours)}" for name, theirs, ours in mismatched], "are of another shape"),
        )
        if names
    ]
    if not flaws:
        return
    out = "Correct config.json, or save the model anew with save_pretrained."
    for name in unexpected:
        if (prefix := _WRAPPER.match(name)) and missing:
            out = f"They were saved from within a wrapper: save the model itself, or take {prefix[0]!r} off their names."
            break
    raise SettingError(
        f"checkpoint {checkpoint!r} must hold exactly the weights of the model that its config.json describes, and "
        f"{', '.join(flaws)}. {out}"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _require_finite(checkpoint: str, model: PreTrainedModel) -> None:
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise SettingError(
                f"checkpoint {checkpoint!r} must hold finite weights, and {name} has nan or infinite ones in {weight.dtype}. "
                "Take one from before its training diverged, or another weights_dtype or export_dtype if this one is too narrow."
            )


def _base_unread(checkpoint: str, base: str, error: Exception) -> SettingError:
    return SettingError(
        f"checkpoint {checkpoint!r} is an adapter of {base!r} (base_model_name_or_path in its adapter_config.json), which cannot "
        f"be read: {error}"
    )


@torch.no_grad()
def _with_adapter(checkpoint: str, source: str, base: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model that an adapter makes of its base, merged by peft.

    Raises:
        SettingError: a base that cannot be read, an adapter that does not fit it, or of a kind that no weights can take up.
    """
    try:
        model = load_model(base, dtype)
    except (OSError, ValueError) as error:
        raise _base_unread(checkpoint, base, error) from error
    with _reading(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(source)
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise SettingError(f"an adapter of kind {kind} cannot be merged into weights")
        adapted = PeftModel(model, config)
        report = adapted.load_adapter(source, "default", torch_device=str(model.device))
        if wrong := [*report.missing_keys, *report.unexpected_keys]:
            raise SettingError(f"{len(wrong)} weights of the adapter are missing or have no place in {base!r} ({_few(wrong)})")
        apart = logits_of(model, some_ids(model))  # peft has put the adapter into it
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    forget_adapters(merged)
    merged.requires_grad_(True)  # peft froze it
    off = distance(logits_of(merged, some_ids(merged)), apart)
    if not off <= rounding(dtype):
        raise SettingError(
            f"checkpoint {checkpoint!r} must be an adapter that can be merged, and merged in {dtype} its logits are "
            f"{100 * off:.1f}% off. Merge it yourself (merge_and_unload, in float32), and name the folder of the whole model."
        )
    return merged
