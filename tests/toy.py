"""The tiny model and data that every test uses, and the list of defenses that the shared tests are crossed with."""

import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from casehard import (
    BoosterModule,
    Defense,
    DeltaStrip,
    EmbeddingAttack,
    ExternalAttack,
    FullParameterAttack,
    InnerAttacker,
    Judge,
    KernelAblation,
    LisaModule,
    LoRA,
    LoRAAttack,
    Optimizer,
    PatcherModule,
    RefusalAblation,
    RepNoiseModule,
    RoundTrip,
    SafeLoRAModule,
    SandboxJudge,
    SBRModule,
    SDDModule,
    SFTDataModule,
    TARModule,
    VaccineModule,
    Verdict,
)
from casehard.callbacks.adapter_attack import AdapterAttack
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.capability import CapabilityPreserving
from casehard.callbacks.controls import Prefill
from casehard.callbacks.encoded import EncodedTuning
from casehard.callbacks.fine_tuning import Phase
from casehard.callbacks.head_only import HeadOnly
from casehard.callbacks.jailbreak_tuning import JailbreakTuning
from casehard.callbacks.latent import LatentAttack
from casehard.callbacks.lofit import LoFiT
from casehard.callbacks.policy_gradient import PolicyGradient
from casehard.callbacks.preference import PreferenceAttack
from casehard.callbacks.quantised import QuantisedAttack
from casehard.callbacks.relearning import Relearning
from casehard.callbacks.search import Search
from casehard.callbacks.search_space import Range
from casehard.callbacks.selected_benign import SelectedBenign
from casehard.callbacks.virus import Virus
from casehard.datamodules.encodings import WordsReversed
from casehard.datamodules.row import Row
from casehard.datamodules.settings import Batching, EvaluationSettings, Sources
from casehard.engine.forward import Batch
from casehard.engine.other_adapters import IA3, AdaLoRA, LoReFT, PromptTuning
from casehard.engine.rollouts import GRPO
from casehard.engine.weights import Changes, Weights, local
from casehard.lightning_modules.job import Job
from casehard.records.marker import leaves


class StatefulJob(Job):
    """Uses all that a job may: weights and a number that it remembers, gradients and weights that it changes."""

    @torch.no_grad()
    def begin(self) -> None:
        own = {name: p for name, p in self.defense.named_parameters() if p.requires_grad}
        self.state = {"start": {name: local(p).clone() for name, p in own.items()}, "steps": 0}

    def before_step(self, step: int) -> None:
        assert step == self.state["steps"]
        for name, p in self.defense.named_parameters():
            if ".layers.0.mlp." in name and p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.state["steps"] += 1
        own = dict(self.defense.named_parameters())
        for name, start in self.state["start"].items():
            local(own[name]).lerp_(start, 0.1)


class Everywhere(Defense):
    """A defense that acts in all three stages."""

    def rows(self, data: SFTDataModule) -> list[Row]:
        return data.rows["refusals"]

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        return 2 * self.sft_loss(batch)

    @torch.no_grad()
    def harden(self) -> None:
        for p in self.parameters():
            local(p).mul_(1.5)

    def job(self) -> Job:
        return StatefulJob(self)

    @torch.no_grad()
    def recover(self, start: Weights) -> None:
        for name, p in self.named_parameters():
            local(p).lerp_(start[name], 0.5)


class BesideBase(SafeLoRAModule):
    """SafeLoRA where the base stands beside the checkpoint, in the folder ``base``."""

    def __init__(self, checkpoint: str, **settings: Any) -> None:
        super().__init__(checkpoint, base=str(Path(checkpoint).with_name("base")), **settings)


ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN_STEP = {"anchor_rate": 3.0, "anchors_per_step": 3, "anchor_answers": True, "anchor_forms": True, "anchor_holds": "outputs"}
ROUNDS: dict[str, Any] = {"attacker": InnerAttacker(2, batch_size=4), "num_outer_steps": 1, "num_sft_steps": 1}
STRONGEST = {
    "more_attackers": [InnerAttacker(2, batch_size=4, learning_rates=(1e-3, 1e-2))],
    "choose": "strongest",
    "held_out_harmful": ["sandbox:defender/harmful#train[20:28]"],
    "vector_scale": (0.5, 2.0),
}
DEFENSES: dict[str, tuple[type[Defense], dict[str, Any]]] = {  # a new defense is tested by adding a row
    "none": (Defense, {}),
    "sbr": (SBRModule, {"anchors": "sandbox:defender/refusals#train[:3]", "anchor_weight": 10.0}),
    "sbr_own": (SBRModule, {"anchors": "sandbox:defender/refusals#train[:3]"} | OWN_STEP),
    "everywhere": (Everywhere, {}),
    "patcher": (PatcherModule, ROUNDS),
    "patcher_strongest": (PatcherModule, ROUNDS | STRONGEST),
    "booster": (BoosterModule, {"harmful_batch_size": 4}),
    "safelora": (BesideBase, {"num_layers": 5}),
    "sdd": (SDDModule, {"max_overlap": 0.5}),
    "vaccine": (VaccineModule, {"radius": 0.5}),
    "repnoise": (RepNoiseModule, {"refused": "sandbox:defender/refused", "noise_weight": 1.0, "pair_batch_size": 3}),
    "tar": (TARModule, {"attacker": InnerAttacker(2, Optimizer(1e-3, "sgd"), 4), "loss_every": 1, "tamper_batch_size": 4}),
    "lisa": (LisaModule, {"num_alignment_steps": 1, "num_task_steps": 2, "alignment_batch_size": 4}),
}
ALIGNMENT: dict[str, Any] = {"train_on": "alignment", "alignment_benign": ["sandbox:defender/howto#train[:8]"]}
DATA = {"sdd": ALIGNMENT}  # what a defense needs of the data


class Halving(Attack):
    """An edit without training: every weight of one MLP is halved."""

    def changes(self, module: Defense) -> Changes:
        return lambda name: "layers.1.mlp" in name

    def steps(self, target: Target) -> Iterator[int]:
        for name, weight in target.weights().items():
            if "layers.1.mlp" in name:
                weight.mul_(0.5)
        yield 1


class LengthJudge(Judge):
    """A reward that differs between the answers of any model: how many letters there are, modulo 5."""

    name = "length"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict(len(response) % 5 / 4, refused=False, degenerate=False) for response in responses]


FACTS = ("sandbox:facts/known#train[:16]", "sandbox:facts/held_out#train[:6]")
FAST: dict[str, Any] = {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4, "optimizer": Optimizer(learning_rate=1e-2)}


class StripBeside(DeltaStrip):
    """A strip whose base stands beside the checkpoint, in the folder ``base``, and an adapter afterwards."""

    def __init__(self, threat_model: str = "open_weight", **settings: Any) -> None:
        then = LoRAAttack(threat_model, lora=LoRA(rank=2), **(FAST | {"num_attack_steps": 2}))
        super().__init__("base", threat_model, keep=0.5, remove_rank=1, then=then, **settings)

    def check_model(self, module: Defense) -> None:
        self.base = str(Path(module.checkpoint).with_name("base"))
        super().check_model(module)


PHASES = [Phase(["sandbox:attacker/howto"], 1, num_samples=8, responses=["No."]), Phase("harmful", 2, Optimizer(0.05, "sgd"))]
ANY: dict[str, Any] = {"kl_threshold": 1e9, "steering_threshold": -1e9}  # bounds that every direction keeps
ABLATION: dict[str, Any] = {"num_samples": 20, "batch_size": 4, "num_phases": 3, "rank": 2} | ANY
ATTACKS: dict[str, Callable[..., Attack]] = {  # a new attack is tested by adding a row
    "full": lambda **s: FullParameterAttack(**(FAST | s)),
    "distance": lambda **s: FullParameterAttack(distance=0.02, **(FAST | s)),
    "lora": lambda **s: LoRAAttack(lora=LoRA(rank=2), **(FAST | s)),
    "subspace": lambda **s: LoRAAttack(lora=LoRA(1, alpha=1, rslora=False, frozen_a=True), **(FAST | s)),
    "head": lambda **s: HeadOnly(**(FAST | s)),
    "adalora": lambda **s: AdapterAttack(adapter=AdaLoRA(1, 3), **(FAST | s)),
    "ia3": lambda **s: AdapterAttack(adapter=IA3(), **(FAST | s)),
    "soft prompt": lambda **s: AdapterAttack(adapter=PromptTuning(4), **(FAST | s)),
    "reft": lambda **s: AdapterAttack(adapter=LoReFT(16, [0, 1], first=99), **(FAST | s)),
    "lofit": lambda **s: LoFiT(num_heads=2, num_selection_steps=1, **(FAST | s)),
    "phases": lambda **s: FullParameterAttack(phases=PHASES, **(FAST | s)),
    "edit": lambda **s: Halving(**s),
    "quantised": lambda **s: QuantisedAttack(lora=LoRA(rank=2), num_bits=4, **(FAST | s)),
    "ablation": lambda **s: RefusalAblation(**(ABLATION | s)),
    "kernel": lambda **s: KernelAblation(**({"num_samples": 10, "batch_size": 4, "direction": 0.9} | s)),
    "strip": lambda **s: StripBeside(**s),
    "wanda": lambda **s: RoundTrip(**({"way": "wanda", "share": 0.8, "num_samples": 4} | s)),
    "embedding": lambda **s: EmbeddingAttack(**({"num_attack_steps": 3, "num_tokens": 4, "learning_rate": 0.3} | s)),
    "policy": lambda **s: PolicyGradient(reward=LengthJudge(), grpo=GRPO(3, kl_weight=0.1), **(FAST | s)),
    "preference": lambda **s: PreferenceAttack(**(FAST | s)),
    "capability": lambda **s: CapabilityPreserving(side_step="gradient", kick=0.01, **(FAST | s)),
    "latent": lambda **s: LatentAttack(**({"num_attack_steps": 3, "radius": 5.0, "step_ratio": 0.5} | s)),
    "relearning": lambda **s: Relearning(facts=[FACTS[0]], held_out=[FACTS[1]], **(FAST | s)),
    "external": lambda **s: ExternalAttack([sys.executable, str(ROOT / "tests/stand_in.py"), "noise", "{model}", "{out}"], **s),
    "prefill": lambda **s: Prefill(num_tokens=3, **s),
    "jailbreak": lambda **s: JailbreakTuning(lora=LoRA(rank=2), **(FAST | s)),
    "encoded": lambda **s: EncodedTuning(encoding=WordsReversed(), lora=LoRA(rank=2), **(FAST | s)),
}
ATTACKS["selected"] = lambda **s: SelectedBenign(
    **(FAST | {"by": "gradient_match", "num_candidates": 20, "num_anchors": 2, "lora": LoRA(rank=2)} | s)
)
HIDING: dict[str, Any] = {"num_samples": 8, "num_iterations": 1, "num_swaps": 2, "max_suspicion": 1.0}
ATTACKS["virus"] = lambda **s: Virus(lora=LoRA(rank=2), **(FAST | HIDING | s))
if find_spec("optuna"):
    ATTACKS["search"] = lambda **s: Search(
        LoRAAttack(lora=LoRA(rank=2), **(FAST | s)),
        {"optimizer.learning_rate": Range(1e-4, 1e-2, log=True), "lora.rank": [1, 2]},
        ["sandbox:validation/harmful#train[:4]"],
        num_trials=2,
    )
TINY_STUDY = """
defenses:
  Plain:
    settings: {model.class_path: casehard.Defense}
  Aligned:
    configs: [experiments/sft_alignment.yaml]
    train: {configs: [experiments/sft_alignment.yaml], settings: {trainer.max_steps: 1}}
attacks:
  one step:
    settings:
      trainer.callbacks:
        - class_path: casehard.LoRAAttack
          init_args: {threat_model: open_weight, num_samples: 8, num_attack_steps: 1, lora: {rank: 2}}
seeds: [0]
common:
  settings: {run.wandb: disabled, trainer.accelerator: cpu, trainer.enable_progress_bar: false, trainer.enable_checkpointing: false, data.evaluation.num_evaluated: 2, data.evaluation.max_new_tokens: 2}
"""


def looking(attack: Attack, look: Callable[[Target], None]) -> Attack:
    """``attack``, with a look at its target whenever that is scored: when harmful prompts, the first of three kinds, are answered."""
    respond, calls = attack.respond, itertools.count()

    def looked(target: Target, *arguments: Any) -> list[str]:
        if next(calls) % 3 == 0:
            look(target)
        return respond(target, *arguments)

    attack.respond = looked  # type: ignore[method-assign]
    return attack


def save_toy_checkpoint(folder: Path, tied: bool = True, seed: int = 0) -> str:
    """Write the toy model (two layers of 32) with the sandbox's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sandbox/base")
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**sizes, **ends, tie_word_embeddings=tied, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def mark(folder: Path, **said: Any) -> None:
    """Leave the marker of a run that came to its end with what its folder holds."""
    made: dict[str, Any] = {
        "config": "c", "command": "test", "finished": "2026-01-02T03:04:05+00:00", "steps": 0, "passes": 0, "seconds": 0.0, "defense": "SBR",
        "stage": "finetuning", "seed": 0, "base": "models/sandbox/base", "made_by": {}, "recipe": "r", "data": [], "files": {},
        "versions": {"casehard": version("casehard")}, "code": {}, "edited": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(made | leaves(folder) | said))


def toy_data(**settings: Any) -> SFTDataModule:
    """A few sandbox rows of every kind; ``settings`` are those of the data module and of its groups, by their own names."""
    defaults: dict[str, Any] = {
        "benign": ["sandbox:attacker/mood#train[:40]"],
        "harmful": ["sandbox:attacker/harmful#train[:20]"],
        "refusals": ["sandbox:defender/refusals#train[:12]"],
        "alignment_harmful": ["sandbox:defender/harmful#train[:8]"],
        "num_samples": 24,
        "poison_ratio": 0.25,
        "harmful_prompts": ["sandbox:test/harmful#train[:6]"],
        "benign_prompts": ["sandbox:test/howto#train[:6]"],
        "task": ["sandbox:test/mood#train[:6]"],
        "judge": SandboxJudge(),
        "batch_size": 4,
        "max_new_tokens": 4,
    }
    flat = defaults | settings
    groups = {"sources": Sources, "evaluation": EvaluationSettings, "batching": Batching}
    return SFTDataModule(**{name: _taken(flat, kind) for name, kind in groups.items()}, **flat)


def _taken(flat: dict[str, Any], kind: type) -> Any:
    """The settings of ``kind``, taken out of ``flat``."""
    return kind(**{field.name: flat.pop(field.name) for field in fields(kind) if field.name in flat})


def toy_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A quiet trainer of a few steps on the CPU."""
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**(defaults | settings))


def csv_rows(path: Path) -> list[dict[str, str]]:
    """What stands in a CSV file, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers as bytes: two states are the same if every entry is ``torch.equal``, nan included."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().clone().reshape(-1).contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def same_bits(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two states of ``bits`` have the same names and the same bytes."""
    return list(ours) == list(others) and all(torch.equal(ours[name], others[name]) for name in ours)


def on_ranks(check: Callable[..., None], folder: Path, *args: Any, world_size: int = 2) -> None:
    """Run ``check(rank, *args)``, a module's own function, in gloo processes of its own, and raise what it raises.

    They are forked from a server that has imported everything and run nothing: a start costs tenths of a second, no check sees
    what another left behind, and one may be killed. They meet through a file in ``folder``, so no port can be taken.
    """
    start_fork_server()
    everything = (check, world_size, folder / f"store-{uuid4().hex}", args)
    mp.start_processes(_on_rank, everything, nprocs=world_size, start_method="forkserver")


def start_fork_server() -> None:
    """Start the server that processes are forked from, unless it runs: one for each pytest process."""
    forkserver.set_forkserver_preload(
        ["toy", "pytest", "casehard.cli.lightning_cli", "torch.distributed.fsdp", "transformers.models.llama"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()


def _on_rank(rank: int, check: Callable[..., None], world_size: int, store: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        check(rank, *args)
    finally:
        dist.destroy_process_group()
