"""The table that `device.py` ends with: a line a figure that matters."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from device_plan import GOALS, STAGES, median


def table(parts: Mapping[str, Mapping[str, Any]], goals: Mapping[str, tuple[float, str]]) -> Iterator[str]:
    """Its lines.

    Args:
        parts: what was found, by part.
        goals: what ``device_plan.judged`` says.
    """
    machine = parts.get("machine", {}).get("figures", {})
    yield ", ".join(f"{name} {value}" for name, value in machine.items())
    for part in (part for stage in STAGES for part in stage):
        if (found := parts.get(part.name)) is not None:
            yield f"{part.name:16} {found['status']}, {found['seconds']:.0f} s"
            lines = LINES.get(part.call)
            yield from (f"    {line}" for line in (lines(found.get("figures", {})) if lines else []))
    yield f"{'goal':46} {'figure':>8}  judged"
    for goal in GOALS:
        value, verdict = goals[goal.what]
        bound = f"at least {goal.least:g}" if goal.most == math.inf else f"at most {goal.most:g}"
        yield f"{goal.what:46} {'' if math.isnan(value) else f'{value:.3f}':>8}  {verdict} ({bound})"


def _of_tests(found: dict[str, Any]) -> Iterator[str]:
    if found:
        yield f"{len(found['passed'])} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
        yield from (f"{name}: {why[:150]}" for name, why in found["failed"].items())
        longest = sorted(found["seconds"].items(), key=lambda pair: -pair[1])[:3]
        yield "longest: " + ", ".join(f"{name.rpartition('::')[2]} {seconds:.1f} s" for name, seconds in longest)


def _of_scale(found: dict[str, Any]) -> Iterator[str]:
    for kind, says in found.get("kinds", {}).items():
        ratio = f"over SFT {median(says['over_sft']):.2f} (limit {says['limit']:.2f})"
        speed = f"{says['tokens_per_second']:7.0f} tokens/s, {says['share_of_peak']:6.1%} of peak, {says['gib']:.1f} GiB"
        yield f"{kind:8} {median(says['seconds']):.4f} s a step, {ratio}, {speed}" + (
            f", busy {says['busy']:.0%}" if "busy" in says else ""
        )
    for kernel in found.get("kinds", {}).get("SFT", {}).get("kernels", []):
        yield f"{kernel['share']:6.1%} {kernel['ms']:9.2f} ms {kernel['calls']:6} x  {kernel['name'][:90]}"


def _of_steps(found: dict[str, Any]) -> Iterator[str]:
    for precision, says in found.get("precisions", {}).items():
        ratios, ours, plain = says["ratios"], says["casehard"], says["plain"]
        yield (
            f"{precision:8} over plain {median(ratios):.2f}, worst {max(ratios):.2f}; median step {median(ours):.4f} s "
            f"(plain {median(plain):.4f}), worst {max(ours):.3f} s ({max(plain):.3f}); sizes {says['sizes']['casehard']} "
            f"({says['sizes']['plain']})"
        )


def _of_generation(found: dict[str, Any]) -> Iterator[str]:
    if found:
        speed = f"{found['tokens_per_second']:.0f} tokens/s, at most {found['bound']:.0f} by memory"
        step = f", a step alone {found['step_over_bound']:.1f}" if "step_over_bound" in found else ""
        yield f"{speed}: {found['over_bound']:.1f} times the time{step}; {found['same']} of {found['alone']} answers alike"


def _of_main_job(found: dict[str, Any]) -> Iterator[str]:
    for device, job in found.items():
        rows = " ".join(f"{row['defense']}@{row['step']}: {row['harmful']:.0f}" for row in job["scores"] if row["step"])
        yield f"{device:5} {job['seconds']:.0f} s; harmful score {rows}"


def _of_patcher(found: dict[str, Any]) -> Iterator[str]:
    for run in found.get("runs", []):
        harmful = " / ".join(f"{each['step']}: {each['harmful']:.0f}" for each in run["scores"])
        before = [f"{each['accuracy']:.0f}, {each['refused']:.0f}" for each in run["scores"][:1]]
        yield f"{run['kind']:8} seed {run['seed']}: harmful score {harmful}; accuracy, benign refused before {''.join(before)}"


LINES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "device_parts:tests": _of_tests,
    "device_parts:main_job": _of_main_job,
    "scoring:main": _of_generation,
    "scale:main": _of_scale,
    "training_step:main": _of_steps,
    "patcher_against_sft:main": _of_patcher,
}
