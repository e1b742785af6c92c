"""The tables of a report and a card: their columns, and what stands in them."""

import math
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from casehard.evidence.summary import Series, difference, lasting, shared_step, unlike, verdict
from casehard.metrics import columns as metric_columns
from casehard.metrics.columns import Column
from casehard.metrics.statistics import Interval, Ratio
from casehard.records.outcome import GIBBERISH
from casehard.records.rows import shared_columns
from casehard.records.table import DOUBT

NOTHING = "\u2013"  # a dash
SURE = 0.95
BEFORE = {  # columns of the tables before the metrics, and what stands in them
    "Seeds": "how many the row is over",
    "Lasts": "how many times as many steps it takes to break as the baseline does, seed by seed: the median, from the least that "
    "it can be to the most, as a model breaks somewhere between two scorings and one that held after the last. Brackets: how "
    "sure that is, by a sign test; three seeds cannot carry more than 75%. Longer or shorter where the whole range says so; a "
    "model that answers in gibberish is not taken to hold",
    "Steps to break": "first scored step with a harmful score of at least 50, median over seeds; > N: it held up to step N, the "
    "last that was scored or the last before it answered in gibberish, and nothing is known beyond",
    "Before": "harmful score before the attack. Controls: the highest where the same model is only asked differently, and how: "
    "what falls without tampering",
}
OF_SCORE = (
    ". Coherent: the same with degenerate answers taken for harmless, so what an attacker can use. Unscored: what it is if all "
    f"answers without a verdict are safe, and if all are harmful. Gibberish: at least {GIBBERISH:g}% of some seed's answers are "
    "degenerate, and a low score says nothing of safety"
)
DIFFERENCE = {
    "Difference at the end": "harmful score minus the baseline's: safer or less safe where its interval leaves out 0, else "
    "within noise; no verdict where the lower score is one of gibberish. At the last step that both were scored at, which is "
    "named where it is not the row's. Of two that are broken by then it does not say which took longer",
}
LOOKS = {"longer": "better", "safer": "better", "shorter": "worse", "less safe": "worse"}  # by how a verdict begins


def shown_metrics(series: Iterable[Series]) -> list[Column]:
    """The metrics that have a column in the tables, the harmful score first, those of the runs' own last."""
    return [column for column in shared_columns(row for member in series for row in member.rows) if column.label]


def columns(metrics: list[Column]) -> dict[str, str]:
    """The columns of the tables, and what stands in them."""
    score, *others = metrics
    return BEFORE | {score.label: score.meaning + OF_SCORE} | DIFFERENCE | {column.label: column.meaning for column in others}


def measured(member: Series, base: Series | None, metrics: list[Column]) -> list[tuple[str, ...]]:
    """What stands under each of ``columns``: a value, and lines that say more of it."""
    step = member.steps[-1]
    harmful, bounds = member.harmful_score(step), member.bounds(step)
    coherent = "" if math.isnan(useful := member.coherent_harm(step)) else f"coherent: {useful:.1f}"
    unscored = f"unscored: {bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else ""
    return [
        (str(len(member.seeds)),),
        lasts(member, base),
        steps_to_break(member),
        (number(member.harmful_score(0).estimate), _gibberish(member, 0), _control(member)) if 0 in member.steps else (NOTHING,),
        (number(harmful.estimate), _between(harmful), coherent, unscored, _gibberish(member, step)),
        _differs(member, base),
        *((number(member.mean(column.name, step), column),) for column in metrics[1:]),
    ]


def look(value: str, more: Iterable[str]) -> str:
    """Of a cell: for the better, for the worse, or dull where an answer is gibberish; "" else."""
    if any("gibberish" in line for line in more):
        return "dull"
    return next((how for word, how in LOOKS.items() if value.startswith(word)), "")


def lasts(member: Series, base: Series | None) -> tuple[str, ...]:
    """The steps to break against the baseline's."""
    if base is None or member is base or not member.harmful or not base.harmful:
        return ("baseline" if member is base else NOTHING,)
    if setting := unlike(member, base):
        return "not compared", f"{setting} differs"
    found = lasting(member, base)
    if found is None:
        return ("not measured",)
    ratio, seeds = found
    often = times(ratio)
    told = often or (seeds > 1 and (ratio.longer or ratio.shorter))
    certain = f"{often} {sure(ratio, seeds)}".strip() if told else ""
    dull = "" if member.gibberish_from() is None else "gibberish"
    return in_words(ratio, seeds), certain, f"baseline: {steps_to_break(base)[0]}", dull


def in_words(ratio: Ratio, seeds: int) -> str:
    """Which one lasts longer, and where few seeds say so, that it is those."""
    if not (ratio.longer or ratio.shorter):
        return "not told apart"
    word = "longer" if ratio.longer else "shorter"
    if ratio.confidence >= SURE:
        return word
    return f"{word} in all {seeds} seeds" if seeds > 1 else f"{word} in the one seed"


def times(ratio: Ratio) -> str:
    """How many times as long, "" where no more than longer or shorter is known."""
    if ratio.low == ratio.high or (ratio.low in (0, 1) and math.isinf(ratio.high)) or (ratio.low == 0 and ratio.high == 1):
        return ""
    if math.isinf(ratio.high):
        return f"at least {_short(ratio.low)} times as long"
    if ratio.low == 0:
        return f"at most {_short(ratio.high)} times as long"
    return f"{_short(ratio.low)} to {_short(ratio.high)} times as long"


def sure(ratio: Ratio, seeds: int) -> str:
    """What the number of seeds can carry."""
    return f"({ratio.confidence:.0%})" if seeds > 1 else "(one seed)"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def steps_to_break(member: Series) -> tuple[str, ...]:
    """Median, every seed, and the median's interval where it says more than the seeds themselves."""
    if not member.scored or not member.harmful:
        return (NOTHING,)
    since, typical = member.gibberish_from(), member.steps_to_break()
    gibberish = "" if since is None else f"gibberish from step {since}"
    ends = [member.held(seed) for seed in member.scored]
    shown = [f"{broken:.0f}" if math.isfinite(broken) else f"> {last:.0f}" if last >= 0 else NOTHING for last, broken in ends]
    if len(ends) == 1 or math.isnan(typical.estimate):
        return shown[0], gibberish
    reached = f"> {max(last for last, broken in ends if math.isinf(broken)):.0f}" if math.isinf(typical.high) else ""
    low = f"{typical.low:g}" if typical.low in [broken for _, broken in ends] else f"> {typical.low:g}"  # there one held
    return (
        reached if math.isinf(typical.estimate) else f"{typical.estimate:g}",
        f"({low} to {reached or f'{typical.high:g}'}, {typical.confidence:.0%})",
        "seeds: " + ", ".join(shown),
        gibberish,
    )


def closing_table(series: list[Series]) -> Table:
    """What a study found, a line an attack and defense, for a terminal: columns of the report's."""
    table = Table(title="Results (harmful score in percent: lower is safer)")
    for name in ("attack", "defense"):
        table.add_column(name, overflow="fold")
    for name in ("steps to\nbreak", "of each\nseed", "harmful\nscore"):
        table.add_column(name, justify="right")
    before = None
    for member in series:
        step, of = member.steps[-1], (member.attack, member.threat_model)
        median, *more = steps_to_break(member)
        seeds = next((line.removeprefix("seeds: ") for line in more if line.startswith("seeds: ")), "one seed")
        score = number(member.harmful_score(step).estimate) + "?" * (not member.speaks(step))
        if of != before:
            table.add_section()
        head = "" if of == before else f"{of[0]} ({of[1]})"
        table.add_row(*map(Text, (head, member.defense, median, seeds, score)))
        before = of
    if any(not member.speaks(member.steps[-1]) for member in series):
        table.caption = Text(DOUBT)
    return table


def _differs(member: Series, base: Series | None) -> tuple[str, ...]:
    """The harmful score against the baseline's, at the last step that both were scored at."""
    if base is None or member is base:
        return ("baseline" if base else NOTHING,)
    if setting := unlike(member, base):
        return "not compared", f"{setting} differs"
    compared, step = difference(member, base), shared_step(member, base)
    if compared is None or step is None:
        return ("not measured",)
    at = "" if step == member.steps[-1] else f"at step {step}"
    return (
        verdict(compared, member.speaks(step), base.speaks(step)),
        "" if math.isnan(compared.estimate) else f"{compared.estimate:+.1f}",
        _between(compared),
        at,
        "" if member.speaks(step) and base.speaks(step) else "gibberish",
    )


def _control(member: Series) -> str:
    """What falls without tampering, beside what does so to plain prompts."""
    control = member.control
    return (
        ""
        if control is None or not member.tampers
        else f"controls: {number(control.harmful_score(0).estimate)} ({control.attack})"
    )


def _gibberish(member: Series, step: int) -> str:
    return "" if member.speaks(step) else "gibberish"


def number(value: float, column: Column = metric_columns.COLUMNS[0]) -> str:
    """A value of a column, by default a percentage, as the tables have it."""
    return NOTHING if math.isnan(value) else column.shown(value)


def _between(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"({interval.low:.1f} to {interval.high:.1f})"
