"""Defenses, the engine that attackers share, and the exact weight operations."""

from lightning_modules.adapters import LoRA
from lightning_modules.defense import Defense
from lightning_modules.engine import DivergedError, train_steps
from lightning_modules.optimizer import Optimizer
from lightning_modules.patcher import InnerAttacker, PatcherModule
from lightning_modules.roles import RolesStrategy
from lightning_modules.sbr import SBRModule

__all__ = [
    "Defense",
    "DivergedError",
    "InnerAttacker",
    "LoRA",
    "Optimizer",
    "PatcherModule",
    "RolesStrategy",
    "SBRModule",
    "train_steps",
]
