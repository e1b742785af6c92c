"""What a checkpoint of ``fit`` holds beside weights and optimizer, and whose it is."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from casehard.engine.kept import load_kept, save_kept
from casehard.metrics.errors import SettingError

if TYPE_CHECKING:
    from casehard.lightning_modules.defense import Defense

OF_JOB = "job_"  # before the names of what a job keeps in the shape of the weights


def made_by(defense: Defense) -> dict[str, Any]:
    """What decides what the weights of a checkpoint mean: the class, the model it started from, the adapters' shape."""
    kind = type(defense)
    lora = {} if defense.lora is None else asdict(defense.lora) | {"dropout": None}  # which scales nothing that is trained
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "checkpoint": defense.checkpoint, "lora": lora}


def check_made_by(defense: Defense, checkpoint: dict[str, Any]) -> None:
    """Make sure that a checkpoint of ``fit`` is one of this defense; another's weights would bear this one's name.

    Raises:
        SettingError: it is of another class, or of adapters of another shape.
    """
    ours, theirs = made_by(defense), checkpoint.get("made_by")
    if theirs is None:  # of an earlier version
        rank_zero_warn(f"ckpt_path says not which defense made it: its weights are taken for those of {ours['class']}.")
        return
    if theirs["class"] != ours["class"]:
        raise SettingError(
            f"ckpt_path must be a checkpoint of the model's class, {ours['class']}, and it is one of {theirs['class']}. "
            "Name that class as the model, as the config.yaml of its run does."
        )
    unlike = [name for name, value in ours["lora"].items() if theirs["lora"].get(name, value) != value]
    if bool(ours["lora"]) != bool(theirs["lora"]) or unlike:
        raise SettingError(
            f"lora must be as in ckpt_path, {theirs['lora'] or None}, got {ours['lora'] or None}. "
            "Take the settings from the config.yaml of its run."
        )
    if theirs["checkpoint"] != ours["checkpoint"]:
        rank_zero_warn(
            f"ckpt_path started from checkpoint {theirs['checkpoint']!r}, and checkpoint is {ours['checkpoint']!r} now: "
            "the tokenizer, and where a service's jobs start, are the latter's."
        )


def _check_shapes(defense: Defense, checkpoint: dict[str, Any]) -> None:
    """Refuse the weights of another model, before torch lists every one of them; those of a folder are compared there."""
    ours = {name: tensor.shape for name, tensor in defense.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in checkpoint.get("state_dict", {}).items()}
    unlike = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if theirs and unlike:
        name = unlike[0]
        here, there = (list(found[name]) if name in found else "none" for found in (ours, theirs))
        raise SettingError(
            f"ckpt_path must hold weights of the model of checkpoint {defense.checkpoint!r}, and {len(unlike)} of them differ in "
            f"name or shape, such as {name} ({there} for {here}). Name the checkpoint from which its run started."
        )


def save_state(defense: Defense, checkpoint: dict[str, Any]) -> None:
    """Put into Lightning's ``checkpoint`` what ``load_state`` takes from it."""
    checkpoint["num_passes"] = defense.num_passes
    checkpoint["made_by"] = made_by(defense)
    state = {} if defense.running is None else defense.running.state
    of_job = {f"{OF_JOB}{key}": value for key, value in state.items() if isinstance(value, dict)}
    save_kept(defense, defense.kept | of_job, checkpoint, defense.saves_folders(checkpoint))
    checkpoint["job"] = {key: value for key, value in state.items() if not isinstance(value, dict)}
    if defense.backbone.random_weights:
        checkpoint["drawn_from"], checkpoint["drawn_on"] = defense.drawn_from, defense.drawn_on
    checkpoint["trained"], checkpoint["recovered"] = defense.trained, defense.recovered
    checkpoint["hardened_by"] = list(getattr(defense.model.config, "hardened_by", []))


def load_state(defense: Defense, checkpoint: dict[str, Any]) -> None:
    """Take from a checkpoint what ``save_state`` put there, and check whose it is.

    Raises:
        SettingError: it is of another defense.
    """
    check_made_by(defense, checkpoint)
    _check_shapes(defense, checkpoint)
    kept = load_kept(defense, checkpoint, str(defense.trainer.ckpt_path))
    defense.kept = {key: weights for key, weights in kept.items() if not key.startswith(OF_JOB)}
    defense.num_passes = checkpoint.get("num_passes", math.nan)  # of an earlier version
    if "drawn_from" in checkpoint:
        defense.drawn_from, defense.drawn_on = checkpoint["drawn_from"], checkpoint.get("drawn_on", "cpu")
    defense.recovered = checkpoint.get("recovered", False)
    defense.mark_hardened(checkpoint.get("hardened_by", []))
    if defense.running is None:
        of_earlier_version = "alignment" if "alignment" in defense.stages or not defense.stages else "job"
        defense.trained = checkpoint.get("trained", of_earlier_version)
    elif "job" in checkpoint:
        of_job = {key.removeprefix(OF_JOB): weights for key, weights in kept.items() if key.startswith(OF_JOB)}
        defense.saved_job = checkpoint["job"] | of_job
