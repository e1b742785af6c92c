"""Rows to batches: the reader, chat masks, poisoned mixtures, the counter-based order, and the sandbox's world."""

from datamodules.rows import Row, read_rows
from datamodules.sandbox import SandboxJudge
from datamodules.sft import Evaluation, SFTDataModule

__all__ = ["Evaluation", "Row", "SFTDataModule", "SandboxJudge", "read_rows"]
