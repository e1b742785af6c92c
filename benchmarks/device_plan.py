"""What `device.py` checks, in which order and how long at most, and what the figures should be."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds of a call: the longest of every stage, the first aside, and START
START = 15  # in which the server imports, and says what the machine is
RANDOM = {"checkpoint": str(ROOT / "models/sizes/qwen2_5_1_5b"), "device": "cuda", "batch_size": 8, "length": 1024}
BLOCKS = {"num_steps": 4, "num_inner_steps": 3, "num_blocks": 2, "num_warmup": 1, "profile": True}
TINY = {
    **{"batch_size": 2, "length": 24, "layers": 1, "profile": False},
    **{"num_steps": 1, "num_inner_steps": 1, "num_blocks": 1, "num_warmup": 0},
}
REAL = {
    **{"checkpoint": "{smollm2}", "rows": "{rows}", "num_pairs": 30, "num_warmup": 3, "device": "cuda"},
    **{"precisions": ["bfloat16", "float32"]},
}
SMALL = {"checkpoint": str(ROOT / "models/sandbox/aligned"), "device": "cpu"}
FEW = {**SMALL, "rows": "sandbox:attacker/harmful#train[:24]", "batch_size": 2, "num_pairs": 2, "num_warmup": 1}
ONE_ATTACK = {
    "class_path": "casehard.LoRAAttack",
    "init_args": {"threat_model": "open_weight", "num_samples": 20, "num_attack_steps": 1},
}
ONE_STEP = {
    "devices": ["cpu"],
    "settings": ["--trainer.max_steps=1", f"--trainer.callbacks=[{json.dumps(ONE_ATTACK)}]"]
    + [f"--data.evaluation.{name}=2" for name in ("num_evaluated", "max_new_tokens")],
}


@dataclass(frozen=True)
class Part:
    """A part of the check: a function of one of the scripts here, and how long it may take.

    Args:
        name: of the part.
        cap: seconds after which it is killed.
        call: ``script:function``.
        settings: arguments of the function; ``{smollm2}`` is what ``--smollm2`` said, and so on, without which it is left out.
        tiny: those that are others under ``--tiny``.
        package: without which it is left out, but for ``--tiny``.
    """

    name: str
    cap: int
    call: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None


def _scale(name: str, cap: int, tiny: Mapping[str, Any], package: str | None = None, **settings: Any) -> Part:
    return Part(name, cap, "scale:main", {**RANDOM, **BLOCKS, **settings}, {**SMALL, **TINY, **tiny}, package)


def _steps(name: str, cap: int, **settings: Any) -> Part:
    return Part(name, cap, "training_step:main", {**REAL, **settings}, {**FEW, **dict.fromkeys(settings)})


def _answers(name: str, cap: int, package: str | None = None, **settings: Any) -> Part:
    full = {"device": "cuda", "batch_size": 100, "num_pairs": 2, "num_alone": 1, **settings}
    few = {**SMALL, "prompts": "sandbox:test/harmful#train[:3]", "max_new_tokens": 3, "num_pairs": 1, "num_warmup": 0}
    tiny = {**few, "precision": "float32", "random_weights": False, "kernels": None}
    return Part(name, cap, "scoring:main", full, tiny, package)


STAGES = [  # most important first. Parts of a stage run side by side; what is timed has a stage to itself
    [Part("machine", 45, "device_parts:machine", {"device": "cuda"}, {"device": "cpu"})],
    [
        Part(
            "tests", 75, "device_parts:tests", {"files": [], "workers": 12}, {"files": ["tests/test_benchmarks.py"], "workers": 0}
        ),
        Part("main_job", 70, "device_parts:main_job", {"devices": ["cuda", "cpu"], "settings": []}, ONE_STEP),
        Part("smollm2", 60, "device_parts:smollm2", {"checkpoint": "{gguf}", "folder": "{smollm2}"}),
    ],
    [_scale("scale", 38, {"profile": True})],
    [_scale("scale_compiled", 50, {"compile_backend": None}, compile_backend="inductor")],
    [_scale("scale_liger", 36, {"kernels": None}, "liger_kernel", kernels="liger")],
    [_scale("scale_fsdp2", 35, {}, strategy=str(ROOT / "experiments/cluster/one_gpu.yaml"), profile=False)],
    [_steps("training_step", 40)],
    [_steps("training_step_graphs", 40, compile_backend="inductor", compile_mode="reduce-overhead")],
    [_answers("generation", 20, checkpoint="{smollm2}", precision="bf16-mixed")],
    [_answers("generation_liger", 20, "liger_kernel", checkpoint="{smollm2}", precision="bf16-mixed", kernels="liger")],
    [_answers("generation_1_5b", 20, checkpoint=RANDOM["checkpoint"], precision="bf16", random_weights=True)],
    [
        Part(
            "patcher",
            90,
            "patcher_against_sft:main",
            {"checkpoint": "{smollm2}", "data": "{data}", "device": "cuda"},
            {"checkpoint": str(ROOT / "models/sandbox/base"), "device": "cpu", "data": None, "precision": "32-true", "seeds": [0]}
            | {"num_sft_steps": 2, "num_rounds": 1, "num_inner_steps": 1, "num_outer_steps": 1, "score_steps": [1, 2]}
            | {"num_evaluated": 2, "max_new_tokens": 2},
        )
    ],
]


# ---- goals


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Args:
        what: is asked.
        least: the figure must be at least that, else
        most: at most.
        figure: of the figures of all parts, by name; nan or KeyError where it was not measured.
    """

    what: str
    figure: Callable[[dict[str, Any]], float]
    least: float = -math.inf
    most: float = math.inf

    def judge(self, figures: dict[str, Any]) -> tuple[float, str]:
        """The figure, and met, missed or not measured."""
        try:
            value = self.figure(figures)
        except (KeyError, ValueError, IndexError):  # ValueError: the best of nothing
            value = math.nan
        return value, "not measured" if math.isnan(value) else "met" if self.least <= value <= self.most else "missed"


def _scaled(figures: dict[str, Any], kind: str) -> dict[str, Any]:
    """A kind under the variant that trains fastest by SFT, of those that it was measured under."""
    variants = [found["kinds"] for name, found in figures.items() if name.startswith("scale") and kind in found.get("kinds", {})]
    return dict(max(variants, key=lambda kinds: float(kinds["SFT"]["share_of_peak"]))[kind])


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _ratios(figures: dict[str, Any]) -> list[list[float]]:
    """Of each precision, under the variant whose median is least where it is greatest."""
    variants = [found["precisions"].values() for name, found in figures.items() if name.startswith("training_step") and found]
    ratios = [[says["ratios"] for says in variant] for variant in variants]
    return min(ratios, key=lambda variant: max(map(median, variant)))


def _answered(figures: dict[str, Any]) -> float:
    """Under the variant that writes SmolLM2's answers fastest."""
    return min(
        float(found["over_bound"]) for name, found in figures.items() if name in ("generation", "generation_liger") and found
    )


GOALS = [
    Goal("tests marked gpu that fail", lambda f: len(f["tests"]["failed"]) if f["tests"]["passed"] else math.nan, most=0),
    Goal("SFT of Qwen2.5-1.5B, share of peak", lambda f: _scaled(f, "SFT")["share_of_peak"], least=0.5),
    Goal("SBR over SFT, seconds a step", lambda f: median(_scaled(f, "SBR")["over_sft"]), most=1.03),
    Goal(
        "Patcher over SFT, over its limit",
        lambda f: median(_scaled(f, "Patcher")["over_sft"]) / _scaled(f, "Patcher")["limit"],
        most=1.03,
    ),
    Goal("SmolLM2 on real rows over plain, median", lambda f: max(median(ratios) for ratios in _ratios(f)), most=0.6),
    Goal("SmolLM2 on real rows over plain, worst step", lambda f: max(max(ratios) for ratios in _ratios(f)), most=1.0),
    Goal("SmolLM2, a token over the memory bound", _answered, most=4.0),
    Goal("Qwen2.5-1.5B, a token over the memory bound", lambda f: f["generation_1_5b"]["over_bound"], most=4.0),
]


def judged(parts: Mapping[str, Mapping[str, Any]], tiny: bool) -> dict[str, tuple[float, str]]:
    """Every goal's figure, and what is to be said of it; nothing is where no GPU was, or parts were tiny."""
    figures = {name: found.get("figures", {}) for name, found in parts.items()}
    on_gpu = not tiny and "gib" in figures.get("machine", {})
    return {goal.what: goal.judge(figures if on_gpu else {}) for goal in GOALS}
