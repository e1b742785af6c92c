"""From rows to batches: reading, chat templates, poisoned mixtures, the counter-based order, and the sandbox."""

from casehard.datamodules.row import Row
from casehard.datamodules.sandbox_judge import SandboxJudge
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.datamodules.sources import read_rows

__all__ = ["Evaluation", "Row", "SFTDataModule", "SandboxJudge", "read_rows"]
