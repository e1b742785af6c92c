"""Casehard's front door: its public names, each imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casehard.callbacks import Evaluate, FullParameterAttack, LoRAAttack, Results
    from casehard.cli.main import main
    from casehard.datamodules import SandboxJudge, SFTDataModule
    from casehard.lightning_modules import Backbone, Defense, InnerAttacker, LoRA, Optimizer, PatcherModule, RolesStrategy, SBRModule
    from casehard.metrics import (
        AttackSuccessRate,
        FinetuneAccuracy,
        GuardJudge,
        HarmfulScore,
        Judge,
        ModerationJudge,
        RefusalPhraseJudge,
        RefusalRate,
        RubricJudge,
        StrongRejectJudge,
        Verdict,
    )

__all__ = [
    "AttackSuccessRate",
    "Backbone",
    "Defense",
    "Evaluate",
    "FinetuneAccuracy",
    "FullParameterAttack",
    "GuardJudge",
    "HarmfulScore",
    "InnerAttacker",
    "Judge",
    "LoRA",
    "LoRAAttack",
    "ModerationJudge",
    "Optimizer",
    "PatcherModule",
    "RefusalPhraseJudge",
    "RefusalRate",
    "Results",
    "RolesStrategy",
    "RubricJudge",
    "SBRModule",
    "SFTDataModule",
    "SandboxJudge",
    "StrongRejectJudge",
    "Verdict",
    "main",
]
ROOMS = ("metrics", "datamodules", "lightning_modules", "callbacks", "cli.main")  # where they are, what is soonest imported first


def __getattr__(name: str) -> Any:
    """The public name, from the room that has it."""
    if name in __all__:
        for room in ROOMS:
            module = import_module(f"casehard.{room}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'casehard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
