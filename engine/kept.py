"""Weight-shaped state of a method, such as attack vectors, in checkpoints of ``fit``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

from casehard.engine.sharding import shard_of
from casehard.engine.weights import Weights, like_parameter, local, reshard

IN_MEMORY = "kept."  # of a state_dict's names
IN_FOLDER = "state_dict.kept."  # Lightning's own prefix before it


def save_kept(module: nn.Module, kept: Mapping[str, Weights], checkpoint: dict[str, Any], in_folder: bool) -> None:
    """Put ``kept`` into a checkpoint that is about to be written.

    Args:
        module: has the parameters that the tensors belong to. Where it is sharded every rank must call this.
        kept: by a name without dots, then by parameter name; each rank its shard.
        checkpoint: Lightning's, with its ``state_dict``.
        in_folder: whether it goes into the folder of a sharded checkpoint, shard by shard; else whole, into a single file.
    """
    reshard(module)
    parameters = dict(module.named_parameters())
    tensors = {(key, name): like_parameter(parameters[name], w) for key, weights in kept.items() for name, w in weights.items()}
    if in_folder:
        checkpoint["state_dict"] |= {f"{IN_MEMORY}{key}.{name}": tensor for (key, name), tensor in tensors.items()}
        return
    checkpoint["kept"] = {key: {} for key in kept}
    for (key, name), tensor in tensors.items():
        checkpoint["kept"][key][name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_kept(module: nn.Module, checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Weights]:
    """What ``save_kept`` has put into a checkpoint, on any number of ranks: this rank's shards.

    Args:
        module: as for ``save_kept``; its ranks may be others.
        checkpoint: what Lightning has read of it.
        path: where it was read, a file or a folder.
    """
    reshard(module)
    parameters = dict(module.named_parameters())
    if not Path(path).is_dir():
        whole = checkpoint.get("kept", {})
        return {key: {name: shard_of(w, parameters[name]) for name, w in weights.items()} for key, weights in whole.items()}
    stored = [entry for entry in FileSystemReader(path).read_metadata().state_dict_metadata if entry.startswith(IN_FOLDER)]
    places = {entry: entry.removeprefix(IN_FOLDER).partition(".") for entry in stored}
    tensors = {entry: torch.empty_like(parameters[name]) for entry, (_, _, name) in places.items()}
    if tensors:
        dcp.load(tensors, checkpoint_id=path)
    kept: dict[str, Weights] = {}
    for entry, (key, _, name) in places.items():
        kept.setdefault(key, {})[name] = local(tensors[entry])
    return kept
