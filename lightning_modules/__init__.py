"""Defenses, the engine that attackers share, and the exact weight operations."""

from casehard.engine.adapters import LoRA
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import DivergedError, Plain, Task, train_steps
from casehard.lightning_modules.attacker import InnerAttacker
from casehard.lightning_modules.booster import BoosterModule
from casehard.lightning_modules.defense import Defense, Stage
from casehard.lightning_modules.job import Job
from casehard.lightning_modules.patcher import PatcherModule
from casehard.lightning_modules.roles import RolesStrategy
from casehard.lightning_modules.sbr import SBRModule

__all__ = [
    "BoosterModule",
    "Defense",
    "DivergedError",
    "InnerAttacker",
    "Job",
    "LoRA",
    "Optimizer",
    "PatcherModule",
    "Plain",
    "RolesStrategy",
    "SBRModule",
    "Stage",
    "Task",
    "train_steps",
]
