"""What safety costs, by method and setting, from the tables of docs/results: SBR at a service, and Patcher before release."""

from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import CLI
from matplotlib.axes import Axes
from steps_to_break_by_attacker import middle, table

LOOKS = {  # by how a label begins
    "undefended": ("*", "black"),
    "SFT": ("*", "black"),
    "SBR's penalty": ("s", "#D55E00"),
    "one anchor": ("s", "#D55E00"),
    "longer": ("s", "#D55E00"),
    "SBR, states": ("o", "#0072B2"),
    "SBR, the default": ("D", "#009E73"),
    "Patcher, the default": ("D", "#009E73"),
    "other": ("o", "#0072B2"),
}


def first(cell: str) -> float:
    """The number that a cell such as ``13.3 (4-31)`` begins with."""
    return float(cell.replace("*", "").split()[0])


def dots(axes: Axes, label: str, points: list[tuple[float, float]]) -> None:
    """Points of one kind."""
    marker, colour = next(look for start, look in LOOKS.items() if label.startswith(start))
    axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, ls="", ms=8, alpha=0.7)


def sandbox_service(axes: Axes, page: Path) -> None:
    """Three seeds of every customer, in the mean."""
    customers = [cells for cells in table(page, "In short").values() if cells[4]]
    for place, label in enumerate(("undefended", "SBR's penalty, the paper's form", "SBR, states", "SBR, the default")):
        dots(axes, label, [(first(cells[4].split(",")[place]), first(cells[place])) for cells in customers])


def real_service(axes: Axes, page: Path) -> None:
    """A dot a customer and seed, after the last step."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, (*_, last) in table(page, "SBR on it").items():
        for seed in last.replace("*", "").split(";"):
            harm, accuracy, _ = (part.strip() for part in seed.split("/"))
            if accuracy.isdigit():  # it says nothing where benign rows refuse first
                points.setdefault(name.rpartition(": ")[2], []).append((float(accuracy), float(harm)))
    labels = {"one anchor at 50": "one anchor, the paper's form", "SBR": "SBR, the default"}
    for name in ("undefended", "one anchor at 50", "SBR, states", "SBR"):
        dots(axes, labels.get(name, name), points[name])


def sandbox_release(axes: Axes, page: Path) -> None:
    """Variants of as many passes, in the median of seeds."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, cells in table(page, "Trained against fast attackers").items():
        costs = [sum(map(float, seed.replace("*", "").split(","))) for seed in cells[-1].split(";")]
        kind = "SFT" if name.startswith("SFT") else "default" if "default" in name else "longer" if cells[0] != "1" else "other"
        points.setdefault(kind, []).append((sum(costs) / len(costs), middle(cells[1])))
    for kind, label in (
        ("SFT", "SFT of as many passes"),
        ("default", "Patcher, the default"),
        ("other", "other inner attacks"),
        ("longer", "longer vectors"),
    ):
        dots(axes, label, points[kind])


def times(axes: Axes, pages: Path) -> None:
    """Steps that attackers take on Patcher's default over those on SFT of as many passes, and ten times as many."""
    sandbox = [(middle(cells[1]), middle(cells[4])) for cells in table(pages / "patcher.md", "Attackers with sense").values()]
    real = [(middle(cells[0]), middle(cells[1])) for cells in table(pages / "real-model.md", "The defaults on it").values()]
    for label, points, marker, colour in (("sandbox", sandbox, "o", "#0072B2"), ("SmolLM2", real, "D", "#009E73")):
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, ls="", ms=8, alpha=0.7)
    for factor in (1, 10):
        axes.plot([1, 50], [factor, 50 * factor], color="grey", lw=0.8, ls="-" if factor == 1 else "--")
    axes.annotate("ten times: the goal", (1.15, 14.5), rotation=35, fontsize=8, color="grey")
    ticks = [1, 2, 5, 10, 20, 40]
    axes.set(xscale="log", yscale="log", xlim=(1, 50), ylim=(1, 60), xticks=ticks, yticks=ticks)
    axes.set(
        xticklabels=ticks, yticklabels=ticks, xlabel="steps to break SFT of as many passes", ylabel="Patcher: a dot an attacker"
    )
    axes.minorticks_off()


def main(pages: str = "docs/results", picture: str = "docs/pictures/frontier.png") -> None:
    """Draw it.

    Args:
        pages: folder of sbr.md, patcher.md and real-model.md.
        picture: where to write it.
    """
    figure, places = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    (sandbox, real), (release, ratio) = places
    sandbox_service(sandbox, Path(pages, "sbr.md"))
    real_service(real, Path(pages, "real-model.md"))
    sandbox_release(release, Path(pages, "patcher.md"))
    times(ratio, Path(pages))
    titles = ("a service, sandbox", "a service, SmolLM2", "before release, sandbox", "before release, both")
    for axes, title in zip(places.flat, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in (sandbox, real):
        axes.set(xlabel="accuracy on the customer's new task, held out", xlim=(0, 103), ylim=(-3, 103))
    sandbox.set(ylabel="harmful score: a dot a customer")
    release.set(xlabel="benign requests refused or answered brokenly, of 100", ylabel="steps of the quickest attacker")
    release.set(xlim=(-2, None), ylim=(0, 30))
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    CLI(main, as_positional=False)
