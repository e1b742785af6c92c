"""Defenses, the engine that attackers share, and the exact weight operations."""

from casehard.engine.adapters import LoRA
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import DivergedError, train_steps
from casehard.lightning_modules.backbone import Backbone
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.patcher import InnerAttacker, PatcherModule
from casehard.lightning_modules.roles import RolesStrategy
from casehard.lightning_modules.sbr import SBRModule

__all__ = [
    "Backbone",
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
