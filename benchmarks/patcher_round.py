"""A round of Patcher beside the straightforward way of doing it: two processes that hand each other checkpoints on disk."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from clock import Clock
from jsonargparse import CLI
from paired import seconds, spread
from tqdm import tqdm

from casehard import InnerAttacker, Optimizer, PatcherModule, SandboxJudge, SFTDataModule
from casehard.datamodules.chat import collate, encode_rows
from casehard.datamodules.order import batch_indices
from casehard.datamodules.row import Row
from casehard.datamodules.settings import REFUSAL, Batching, Sources
from casehard.datamodules.sources import read_rows
from casehard.lightning_modules.defense import Defense

SANDBOX = Path(__file__).parent.parent / "models/sandbox/aligned"


# ---- ours


def ours(
    checkpoint: str,
    refusals: str,
    harmful: str,
    num_inner_steps: int,
    num_outer_steps: int,
    batch_size: int,
    max_length: int,
    precision: str,
    rounds: int,
    one_pass_per_row: bool,
) -> list[float]:
    """Seconds of every round."""
    clock = Clock(every=num_outer_steps)
    data = SFTDataModule(
        Sources(benign=[], refusals=[refusals], alignment_harmful=[harmful]),
        SandboxJudge(),
        batching=Batching(batch_size, max_length),
        train_on="alignment",
    )
    attacker = InnerAttacker(num_inner_steps, Optimizer(1e-4), batch_size)
    settings = {"fresh_optimizer": True, "one_pass_per_row": one_pass_per_row, "optimizer": Optimizer(3e-4)}
    module = PatcherModule(checkpoint, attacker, None, num_outer_steps, 0, **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        limit_val_batches=0,
        max_epochs=-1,
        max_steps=rounds * num_outer_steps,
        callbacks=[clock],
        **quiet,
    ).fit(module, datamodule=data)
    return clock.seconds


# ---- the straightforward way


def straightforward(
    role: str, start: Path, attacked: Path, end: Path, num_steps: int, batch_size: int, precision: str, max_length: int, rows: str
) -> None:
    """One process: load, train by ``model(**batch).loss`` on padded rows in random order, save. Prints the steps' seconds."""
    module = Defense(str(start))
    module.configure_model()
    model = module.model.train()
    answered = [row if row.response else Row(row.messages, REFUSAL) for row in read_rows(rows, needs_response=False)]
    examples, _ = encode_rows(answered, module.tokenizer, max_length)
    vector = {}
    if role == "defend":
        theirs = Defense(str(attacked))
        theirs.configure_model()
        own = dict(model.named_parameters())
        vector = {n: p.detach() - own[n].detach() for n, p in theirs.model.named_parameters()}
        del theirs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if role == "attack" else 3e-4, weight_decay=0.0)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None

    def passed(batch: dict[str, torch.Tensor], weight: float) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        (weight * loss).backward()

    begin = time.perf_counter()
    for step in range(num_steps):
        chosen = batch_indices(len(examples), batch_size, 0, role, step)
        batch = collate([examples[i] for i in chosen], module.tokenizer.pad_token_id, "right")
        if role == "defend":
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(vector[name])
            passed(batch, 0.5)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.sub_(vector[name])
        passed(batch, 0.5 if role == "defend" else 1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print("steps took", time.perf_counter() - begin)
    model.save_pretrained(end)
    module.tokenizer.save_pretrained(end)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(
    checkpoint: str = str(SANDBOX),
    refusals: str = "sandbox:defender/refusals",
    harmful: str = "sandbox:defender/harmful",
    num_inner_steps: int = 40,
    num_outer_steps: int = 20,
    batch_size: int = 16,
    max_length: int = 512,
    rounds: int = 3,
    precision: str = "32-true",
    role: str | None = None,
    folders: list[str] | None = None,
) -> None:
    """Time rounds both ways, ours and theirs in turn, each in processes of its own.

    Args:
        checkpoint: folder of a chat model.
        refusals: source of the defender's rows.
        harmful: source of the inner attacker's rows.
        num_inner_steps: of an attack.
        num_outer_steps: of a round.
        batch_size: rows of a step of either.
        max_length: tokens of a row.
        rounds: how many.
        precision: 32-true or bf16-mixed.
        role: for the processes that this one starts: ours, one_pass (ours, with one_pass_per_row), attack or defend.
        folders: for those processes: where to start, the attacked weights, where to write.
    """
    if role in ("ours", "one_pass"):
        sizes = (num_inner_steps, num_outer_steps, batch_size, max_length)
        times = ours(checkpoint, refusals, harmful, *sizes, precision, 1 + rounds, role == "one_pass")[1:]
        print("steps took", *times)
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    if role is not None:
        steps, rows = (num_inner_steps, harmful) if role == "attack" else (num_outer_steps, refusals)
        straightforward(role, *map(Path, folders or []), steps, batch_size, precision, max_length, rows)
        return

    def process(role: str, *folders: str) -> tuple[list[float], int]:
        given = {"checkpoint": checkpoint, "refusals": refusals, "harmful": harmful, "precision": precision, "role": role}
        sizes = {"num_inner_steps": num_inner_steps, "num_outer_steps": num_outer_steps, "batch_size": batch_size}
        sizes |= {"max_length": max_length, "rounds": rounds}
        args = [f"--{key}={value}" for key, value in (given | sizes).items()] + (
            [f"--folders={list(folders)}"] if folders else []
        )
        done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr)
        said = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("steps", "peak"))}
        return [float(t) for t in said["steps"][2:]], int(said["peak"][1])

    steps_only, with_disk, peaks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        our_steps, our_peak = process("ours")
        one_pass, _ = process("one_pass")
        start = checkpoint
        for number in tqdm(range(rounds), "rounds"):
            attacked, end = f"{folder}/attacked", f"{folder}/round{number}"
            found: list[tuple[list[float], int]] = []
            took = seconds(
                lambda found=found, a=(start, attacked, end): found.extend(  # type: ignore[misc]
                    [process("attack", a[0], a[1], a[1]), process("defend", *a)]
                )
            )
            with_disk.append(took)
            steps_only.append(sum(times[0] for times, _ in found))
            peaks.append(max(peak for _, peak in found))
            start = end
        more_steps, more_peak = process("ours")
        one_pass += process("one_pass")[0]
    own = our_steps + more_steps
    print(f"ours, a round                    {spread(own)} s")
    print(f"theirs, a round                  {spread(with_disk)} s, steps alone {spread(steps_only)} s")
    median = statistics.median(own)
    print(f"ours over theirs                 {spread(median / t for t in with_disk)}")
    print(f"ours over theirs, steps alone    {spread(median / t for t in steps_only)}")
    print(f"peak memory, ours over theirs    {max(our_peak, more_peak) / max(peaks):.2f}")
    print(f"one pass a row over two          {spread(t / median for t in one_pass)}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
