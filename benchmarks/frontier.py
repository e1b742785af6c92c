"""What safety costs, by method and setting, from the tables of docs/results: SBR at a service, and Patcher before release."""

from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import CLI
from steps_to_break_by_attacker import middle, table


def first(cell: str) -> float:
    """The number that a cell such as ``13.3 (4-31)`` begins with."""
    return float(cell.replace("*", "").split()[0])


def main(pages: str = "docs/results", picture: str = "docs/pictures/frontier.png") -> None:
    """Draw it.

    Args:
        pages: folder of sbr.md and patcher.md.
        picture: where to write it.
    """
    figure, (sbr, patcher) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    customers = [cells for cells in table(Path(pages, "sbr.md"), "In short").values() if cells[3]]
    for place, (label, marker, colour) in enumerate(
        (("undefended", "*", "black"), ("SBR's penalty, the paper's form", "s", "#D55E00"), ("SBR, the default", "D", "#009E73"))
    ):
        points = [(first(cells[3].split(",")[place]), first(cells[place])) for cells in customers]
        sbr.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, ls="", ms=8, alpha=0.7)
    sbr.set(xlabel="accuracy on the customer's new task", ylabel="harmful score: a dot a customer", xlim=(0, 103), ylim=(-3, 103))
    found = table(Path(pages, "patcher.md"), "Trained against fast attackers")
    for name, cells in found.items():
        costs = [sum(map(float, seed.replace("*", "").split(","))) for seed in cells[-1].split(";")]
        kind = "SFT" if name.startswith("SFT") else "default" if "default" in name else "longer" if cells[0] != "1" else "other"
        look = {"SFT": ("*", "black"), "default": ("D", "#009E73"), "longer": ("s", "#D55E00"), "other": ("o", "#0072B2")}[kind]
        patcher.plot(sum(costs) / len(costs), middle(cells[1]), marker=look[0], color=look[1], ls="", ms=8, alpha=0.7)
    for kind, (marker, colour) in {
        "SFT of as many passes": ("*", "black"),
        "Patcher, the default": ("D", "#009E73"),
        "other inner attacks": ("o", "#0072B2"),
        "longer vectors": ("s", "#D55E00"),
    }.items():
        patcher.plot([], [], marker=marker, color=colour, ls="", label=kind)
    patcher.set(xlabel="benign requests refused or answered brokenly, of 100", ylabel="steps of the quickest attacker")
    patcher.set(xlim=(-2, None), ylim=(0, 30))
    for axes in (sbr, patcher):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    CLI(main, as_positional=False)
