"""Rows to batches: the reader, chat masks, poisoned mixtures, the counter-based order, and the sandbox's world."""

from casehard.datamodules.rows import Row, read_rows
from casehard.datamodules.sandbox import SandboxJudge
from casehard.datamodules.sft import Evaluation, SFTDataModule

__all__ = ["Evaluation", "Row", "SFTDataModule", "SandboxJudge", "read_rows"]
