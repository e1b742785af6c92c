"""The settings ``run`` of the commands that train."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunSettings:
    """Where a run goes, and what it leaves.

    Args:
        experiment: name of the run; by default the first --config's.
        version: name of the run's folder; by default the next number.
        root: where run folders are made.
        wandb: W&B logging.
        project: W&B project.
        group: W&B group of the run; by default its experiment's name.
        tags: W&B tags of the run.
        score: score the model before ``fit`` trains it, and the one that it delivers.
        export: write the trained model in Hugging Face format.
        checkpoint_steps: optimizer steps between checkpoints, from which --ckpt_path goes on; by default one an epoch.
        generations: write generated answers to generations.jsonl.
        wandb_generations: also send generated answers to W&B, a table an evaluation; with real data they are harmful texts.
    """

    experiment: str | None = None
    version: str | None = None
    root: str = "runs"
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "casehard"
    group: str = ""
    tags: list[str] = field(default_factory=list)
    score: bool = True
    export: bool = True
    checkpoint_steps: int | None = None
    generations: bool = True
    wandb_generations: bool = False
