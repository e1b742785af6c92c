"""What runs came to, in sentences that claim no more than was seen."""

import math

from casehard.evidence.summary import Series, baseline, grouped, lasting, unlike
from casehard.evidence.tables import number, times
from casehard.records.rows import NONE, UNDEFENDED


def verdicts(series: list[Series]) -> list[str]:
    """Of one threat model, a sentence on every attack and defense; the baseline gets one where nothing is compared with it."""
    sentences = []
    for members in grouped(series, lambda member: member.attack).values():
        base = baseline(members)
        defended = [member for member in members if member is not base] or members
        sentences += [_sentence(member, None if member is base else base) for member in defended]
    return sentences


def _sentence(member: Series, base: Series | None) -> str:
    name = called(member)
    if not member.harmful:
        return f"Under {member.attack}, which is no attack, {name} {_ended(member)}."
    own = f"Under {member.attack}, {name} {came_to(member)}{_expected(member)}"
    if not member.scored:
        return f"{own}."
    if base is None:
        missing = "; no model without a defense was run beside it, so what the defense adds is not known"
        return f"{own}{'' if member.stage == NONE else missing}."
    if setting := unlike(member, base):
        return f"{own}; it is not compared with {called(base)}, as {setting} differs."
    as_many = _seeds(len(member.scored), len(member.scored))  # need not be said twice
    return f"{own}, where {called(base)} {came_to(base).removesuffix(as_many)}: {_compared(member, base)}."


def called(member: Series) -> str:
    """A defense in a sentence."""
    return "the undefended model" if member.defense == UNDEFENDED else member.defense


def _ended(member: Series) -> str:
    step = member.steps[-1]
    score = member.harmful_score(step)
    if math.isnan(score.estimate):
        return "was not measured: none of its answers has a verdict"
    dull = "" if member.speaks(step) else ", and it answers in gibberish, which is no safety"
    seeds = _seeds(len(member.scored), len(member.seeds))
    return f"ended at a harmful score of {number(score.estimate)} at step {step}{seeds}{dull}"


def came_to(member: Series) -> str:
    """How long a model held, seed by seed: what broke, what held, and what answers in gibberish."""
    seeds = member.scored
    if not seeds:
        return "was not measured: none of its answers has a verdict"
    ends = {seed: member.held(seed) for seed in seeds}
    broke = [broken for _, broken in ends.values() if math.isfinite(broken)]
    dull = [seed for seed in seeds if member.gibberish_of(seed) is not None]
    held = [last for seed, (last, broken) in ends.items() if math.isinf(broken) and seed not in dull]
    said = []
    if held:
        said.append(f"held to step {min(held):.0f}{_seeds(len(held), len(seeds))}")
    if broke:
        at = "before the attack" if max(broke) == 0 else f"at {_span(broke)}"
        said.append(f"broke {at}{_seeds(len(broke), len(seeds))}")
    if dull:
        since = min(step for seed in dull if (step := member.gibberish_of(seed)) is not None)
        when = "before the attack" if since == 0 else f"from step {since} on"
        said.append(f"answered in gibberish {when}{_seeds(len(dull), len(seeds))}, which is no safety")
    return " and ".join(said)


def _span(steps: list[float]) -> str:
    least, most = min(steps), max(steps)
    return f"step {least:.0f}" if least == most else f"steps {least:.0f} to {most:.0f}"


def _seeds(number_of: int, out_of: int) -> str:
    if out_of == 1:
        return " in the one seed"
    return f" in all {out_of} seeds" if number_of == out_of else f" in {number_of} of {out_of} seeds"


def _expected(member: Series) -> str:
    note = member.first.row.note
    return f" ({note})" if note else ""


def _compared(member: Series, base: Series) -> str:
    found = lasting(member, base)
    if found is None:
        return "they share no seed that was scored, and are not compared"
    ratio, seeds = found
    often = times(ratio)
    certain = f"{ratio.confidence:.0%} sure" if seeds > 1 else "one seed says nothing of others"
    if ratio.longer or ratio.shorter:
        return f"it lasts {often or ('longer' if ratio.longer else 'shorter')} ({certain})"
    return "the two are not told apart" + (f" ({often}, {certain})" if often else "")
