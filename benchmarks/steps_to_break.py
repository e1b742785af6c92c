"""Steps to break of many runs, as a table and a picture: one line a learning rate of the attacker, one dot a seed."""

import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import CLI

from casehard.records.outcome import first_broken

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by colour-blind readers


def steps(run: Path) -> dict[tuple[str, str], tuple[int, bool]]:
    """By attack and learning rate: the first scored step with a harmful score of 50 or more, or the last one and False."""
    scored: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in csv.DictReader((run / "attacks.csv").open()):
        scored[row["attack"], row["learning_rate"]].append((int(row["num_attack_steps"]), float(row["harmful_score"])))
    broken = {key: first_broken(found) for key, found in scored.items()}
    return {key: (found[-1][0], False) if (step := broken[key]) is None else (step, True) for key, found in scored.items()}


def main(runs: list[str], picture: str | None = None, plotted: str = r"^\d+$") -> None:
    """Print the table; with a picture, draw it over the number of inner steps that stands at the beginning of a run's name.

    Args:
        runs: run folders, named GROUP_sSEED.
        picture: where to write it, such as steps.png.
        plotted: groups that are drawn, as a regular expression.
    """
    groups: dict[str, dict[tuple[str, str], list[tuple[int, bool]]]] = defaultdict(lambda: defaultdict(list))
    for run in map(Path, runs):
        for key, found in steps(run).items():
            groups[run.name.rpartition("_s")[0]][key].append(found)
    for group, keys in groups.items():
        for (attack, rate), found in keys.items():
            shown = ", ".join(str(step) if broke else f"> {step}" for step, broke in sorted(found))
            middle = statistics.median(step for step, _ in found)
            print(f"{group:10} {attack:20} {rate or '-':8} median {middle:<6g} of {shown}")
    if picture is None:
        return
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    drawn = sorted((int(group), keys) for group, keys in groups.items() if re.search(plotted, group))
    for colour, key in zip(COLOURS, sorted({key for _, keys in drawn for key in keys}), strict=False):
        series = [(inner, [step for step, _ in keys[key]]) for inner, keys in drawn if key in keys]
        middles = [statistics.median(found) for _, found in series]
        axes.plot([inner for inner, _ in series], middles, color=colour, label=f"learning rate {key[1]}" if key[1] else key[0])
        dots = [(inner, step) for inner, found in series for step in found]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, alpha=0.45, ms=5)
    axes.set(yscale="log", xlabel="inner attacker's steps in training", ylabel="attack steps until harmful score ≥ 50")
    axes.set_xticks([inner for inner, _ in drawn])
    axes.set_yticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    CLI(main, as_positional=False)
