"""Steps to break under every attacker, from the tables of docs/results/patcher.md: a dot an attacker, the quickest marked."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import CLI

DEFENDERS = (
    "SFT alignment,\n680 passes",
    "SFT alignment,\n2,440 passes",
    "Patcher, one slow\nattacker, 2,440 passes",
    "the same, one pass\na row, 2,400 passes",
    "Patcher, five fast\nattackers, 2,440 passes",
)


def table(page: Path, title: str) -> dict[str, list[str]]:
    """Cells of the first table under the heading ``title``, by their row's first."""
    section = page.read_text().partition(f"## {title}\n")[2]
    lines = section[section.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    found = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in found}


def middle(cell: str) -> float:
    """Median of the seeds of a cell such as ``12, > 40, 12``; the last scored step counts for a model that held."""
    return statistics.median(float(step.strip(" >*")) for step in cell.split(","))


def main(page: str = "docs/results/patcher.md", picture: str = "docs/pictures/steps_to_break.png") -> None:
    """Draw it.

    Args:
        page: Markdown with the tables "Attackers with sense" and "The attackers that count".
        picture: where to write it.
    """
    attackers = table(Path(page), "Attackers with sense")
    summary = table(Path(page), "The attackers that count")
    columns = list(zip(*attackers.values(), strict=True))
    figure, axes = plt.subplots(figsize=(8, 3.7), layout="constrained")
    for place, (column, row) in enumerate(zip(columns, summary.values(), strict=True)):
        found = [middle(cell) for cell in column]
        for steps, label, look in (
            (found, "ten attackers on harmful rows alone", {"marker": "o", "color": "#0072B2", "ms": 7, "alpha": 0.35}),
            ([min(found)], "the quickest of them", {"marker": "o", "color": "#D55E00", "ms": 10}),
            ([middle(row[4])], "a slow one: AdamW 1e-4, poison 0.2", {"marker": "D", "color": "#009E73", "ms": 8}),
        ):
            axes.plot(steps, [len(columns) - place] * len(steps), ls="", label="" if place else label, **look)
    axes.set(xscale="log", xlabel="attack steps until the harmful score reaches 50 (median of three seeds)")
    axes.set_ylim(0.5, len(columns) + 0.5)
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(range(len(columns), 0, -1), DEFENDERS)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        frameon=False, loc="lower center", bbox_to_anchor=(0.42, 1), ncols=3, fontsize=9, columnspacing=1.2, handletextpad=0.3
    )
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    CLI(main, as_positional=False)
