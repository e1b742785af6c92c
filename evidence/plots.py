"""The report's pictures: colours that colour-blind readers tell apart (Okabe and Ito), and never by colour alone."""

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle, zip_longest
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from casehard.evidence.searches import Band
from casehard.evidence.summary import Series, grouped
from casehard.metrics.columns import Column
from casehard.records.outcome import BROKEN, is_gibberish

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*"  # one more than colours: no two of 56 defenses look alike
LINES = ("-", "--", "-.", ":")
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams["text.parse_math"] = False  # a name with $ is a name
HOLLOW = {"markerfacecolor": "white", "linestyle": "none", "zorder": 4}  # gibberish


Style = dict[str, dict[str, Any]]


def styles(series: list[Series]) -> Style:
    """Colour, marker and line of every defense, the same in all pictures."""
    names = dict.fromkeys(member.defense for member in series)
    looks = zip(names, cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return {name: {"color": colour, "marker": marker, "linestyle": line} for name, colour, marker, line in looks}


def curves(attacks: list[list[Series]], style: Style) -> Figure:
    """Harmful score by attack step, a panel an attack: a line a defense, with bands."""
    columns = min(2, len(attacks))
    rows = -(-len(attacks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    threats = {member.threat_model for members in attacks for member in members}
    for ax, members in zip_longest(axes.flat, attacks):
        if members:
            _curve(ax, members, style)
            threat = f"\n{members[0].threat_model.replace('_', ' ')}" if len(threats) > 1 else ""
            ax.set_title(textwrap.fill(members[0].attack, 44) + threat, fontsize=10)
        else:
            ax.axis("off")
    _legend(figure, *axes.flat)
    return figure


def _curve(ax: Axes, series: list[Series], style: Style) -> None:
    for member in series:
        look, scores = style[member.defense], [member.harmful_score(step) for step in member.steps]
        ax.plot(member.steps, [i.estimate for i in scores], label=_label(member.defense), markersize=5, **look)
        dull = [(step, i.estimate) for step, i in zip(member.steps, scores, strict=True) if not member.speaks(step)]
        ax.plot([step for step, _ in dull], [score for _, score in dull], markersize=5, **(look | HOLLOW))
        ax.fill_between(member.steps, [i.low for i in scores], [i.high for i in scores], color=look["color"], alpha=0.15)
    ax.axhline(BROKEN, color="#777777", linewidth=1, linestyle=":")
    ax.set(ylabel="harmful score (%)", ylim=(-4, 104))
    _by_step(ax, series)


def _label(name: str) -> str:
    """Of a legend, from which names that begin with an underscore would be left out."""
    return f" {name}" if name.startswith("_") else name


def _by_step(ax: Axes, series: list[Series], room: float = 0.08) -> None:
    """Steps along x: in proportion, but for 0, which stands as far before the first scored step as that one has width.

    Args:
        ax: of the plot.
        series: what is shown.
        room: of a label, as a share of the axis.
    """
    steps = sorted({step for member in series for step in member.steps})
    first = next((step for step in steps if step), 1)
    ax.set_xscale("symlog", linthresh=first, linscale=0.4)
    ax.set_xlim(-0.3 * first, 1.1 * max(steps[-1], first))
    places = ax.xaxis.get_transform().transform(np.array(steps, dtype=float))
    matter = {step for member in series for seed in member.scored for step in member.held(seed)}  # where one held or broke
    ax.set_xticks(steps, _with_room(steps, places, room, matter))
    ax.minorticks_off()
    ax.set_xlabel("attack step (log scale)")


def _with_room(steps: list[int], places: np.ndarray, room: float, matter: set[float]) -> list[str]:
    """Labels of steps: a line lower where one would touch another, and none where no line has room; those that matter first."""
    labels, lines = [""] * len(steps), [list[tuple[float, float]]() for _ in range(3)]
    for i in sorted(range(len(steps)), key=lambda i: (steps[i] not in matter, -i)):
        half = room / 2 * max(len(str(steps[i])), 3) / 3 * (places[-1] - places[0])
        free = (n for n, taken in enumerate(lines) if all(abs(places[i] - place) >= half + other for place, other in taken))
        if (line := next(free, None)) is not None:
            labels[i] = "\n" * line + str(steps[i])
            lines[line].append((places[i], half))
    return labels


def _legend(figure: Figure, *axes: Axes) -> None:
    """One for all panels, each name once, in as many columns as have room; the figure grows by its rows."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [textwrap.fill(name, 40) for name in handles]
    letters = 11 * figure.get_figwidth()  # of a line; a mark takes 5
    columns = max(1, min(3, len(names), int(letters / (5 + _longest(names)))))
    lines = sum(name.count("\n") + 1 for name in names) / columns
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0.0, math.ceil(lines) - 1))
    figure.legend(handles.values(), names, loc="outside lower center", ncols=columns, frameon=False)


def _longest(names: list[str]) -> int:
    """Letters of the longest line."""
    return max(len(line) for name in names for line in name.split("\n"))


def breaking(series: list[Series], style: Style) -> Figure:
    """Steps to break, by attack and defense: a mark a seed, hollow with an arrow where the model held, a cross where it answers
    in gibberish from then on; a bar at the median.
    """
    rows: list[tuple[str, Series | None]] = []
    for attack, members in grouped(series, lambda member: member.attack).items():
        rows += [(textwrap.fill(attack, 30), None), *((textwrap.fill(member.defense, 26), member) for member in members)]
    heights = [0.16 * name.count("\n") + (0.3 if member is None else 0.38) for name, member in rows]  # inches
    places = [sum(heights[:n]) + height / 2 for n, height in enumerate(heights)]
    figure, ax = plt.subplots(figsize=(5, 1.2 + sum(heights)), layout="constrained")
    for y, (_, member) in zip(places, rows, strict=True):
        if member is not None:
            _marks(ax, member, y, style[member.defense])
    ax.set_yticks(places, [name for name, _ in rows], fontsize=9)
    for label, (_, member) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if member is None else "normal")
    ax.set_ylim(sum(heights), 0)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    _by_step(ax, series, room=0.11)  # beside long names
    return figure


def _marks(ax: Axes, member: Series, y: float, look: dict[str, Any]) -> None:
    """Of the seeds of one row."""
    seeds = member.scored
    for n, seed in enumerate(seeds):
        last, broken = member.held(seed)
        at = y + min(0.09, 0.26 / len(seeds)) * (n - (len(seeds) - 1) / 2)
        if math.isfinite(broken):
            mark: dict[str, Any] = {"marker": look["marker"]}
        elif member.gibberish_of(seed) is not None:
            mark = {"marker": "x"}
        else:
            mark = {"marker": ">", "fillstyle": "none"}
        ax.plot(broken if math.isfinite(broken) else max(last, 0), at, color=look["color"], markersize=5, **mark)
    median = member.steps_to_break().estimate
    if math.isfinite(median):
        ax.plot([median, median], [y - 0.15, y + 0.15], color=look["color"], linewidth=2)


def best_so_far(bands: dict[str, Band], style: Style) -> Figure:
    """Coherent harm of the best of so many trials, a line a defense, with its band over orders of trials."""
    figure, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
    for defense, found in bands.items():
        trials = np.arange(1, len(found.median) + 1)
        ax.plot(trials, found.median, label=_label(defense), markersize=4, **style[defense])
        low = np.where(np.isnan(found.low), -4, found.low)  # below 0: some orders have found nothing yet
        ax.fill_between(trials, low, found.high, color=style[defense]["color"], alpha=0.15)
    ax.set_xlim(0.5, max(len(found.median) for found in bands.values()) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="trials", ylabel="coherent harm of the best so far (%)", ylim=(-4, 104))
    _legend(figure, ax)
    return figure


def heat_map(series: list[Series]) -> Figure:
    """Harmful score at the end of the attack, attacks by defenses."""
    attacks, defenses = (list(dict.fromkeys(getattr(member, name) for member in series)) for name in ("attack", "defense"))
    values = np.full((len(attacks), len(defenses)), np.nan)
    for member in series:
        values[attacks.index(member.attack), defenses.index(member.defense)] = member.harmful_score(member.steps[-1]).estimate
    gibberish = {(member.attack, member.defense) for member in series if not member.speaks(member.steps[-1])}
    ran = {(member.attack, member.defense) for member in series}
    names = [textwrap.fill(name, 34) for name in defenses]
    upright = len(names) * _longest(names) > 45  # they would touch
    height = 1.1 + 0.7 * len(attacks) + (0.09 * _longest(names) if upright else 0.3)
    figure, ax = plt.subplots(figsize=(5, max(height, 2.8)), layout="constrained")  # inches, for the label of the colours
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        unknown = "no\nverdict" if (attacks[y], defenses[x]) in ran else "not\nrun"
        text = unknown if math.isnan(value) else f"{value:.0f}"
        dull = (attacks[y], defenses[x]) in gibberish
        if dull:  # the colour would say safe
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor="#bbbbbb", hatch="///", linewidth=0))
            text = f"{text}\ngibberish"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2} if dull else None
        ink = "white" if value < 55 and not dull else "black"
        ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=9 if dull else 10, bbox=box)
    ax.set_xticks(range(len(names)), names, fontsize=9, rotation=90 if upright else 0)
    ax.set_yticks(range(len(attacks)), [textwrap.fill(name, 20) for name in attacks], fontsize=9)
    ax.grid(False)
    figure.colorbar(image, label="harmful score (%)\nless is safe")
    return figure


def usefulness(series: list[Series], metrics: Sequence[Column]) -> Column | None:
    """The first percentage that says how useful a model is and that any of its rows has; None where there is none."""
    useful = (column for column in metrics if column.higher_is_better and column.percent)
    return next((c for c in useful if any(math.isfinite(one.mean(c.name, one.steps[-1])) for one in series)), None)


def trade_off(series: list[Series], style: Style, useful: Column) -> Figure:
    """Safety against utility at the end of the attack, a mark a seed; both axes whole, so that noise looks as small as it is."""
    figure, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
    for defense, members in grouped(series, lambda s: s.defense).items():
        rows = [entry.row for member in members for entry in member.at(member.steps[-1])]
        colour, marker = style[defense]["color"], style[defense]["marker"]
        faces = ["white" if is_gibberish(row) else colour for row in rows]
        where = [row.metrics.get(useful.name, math.nan) for row in rows], [row.harmful_score for row in rows]
        ax.scatter(*where, s=40, alpha=0.8, marker=marker, facecolors=faces, edgecolors=colour)
        ax.scatter([], [], s=40, color=colour, marker=marker, label=_label(defense))
    label = f"{useful.label.lower()} (%), more is useful"
    ax.set(xlabel=label, ylabel="harmful score (%), less is safe", xlim=(-4, 104), ylim=(-4, 104))
    _legend(figure, ax)
    return figure
