"""`benchmarks/drift.py`: how far a job moves states that are held, and others."""

import re

import pytest
import torch
from toy import FAST, ROOT, looking, toy_data, toy_trainer

from casehard import SBRModule


def test_a_held_state_stays_and_others_go_as_far_as_is_said(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import drift

    anchor = "sandbox:defender/refusals#train[:1]"
    module = SBRModule(checkpoint, anchors=anchor, anchor_weight=1e4)
    attack, seen = drift.Watched("finetuning_service", **FAST), []
    looking(attack, lambda target: seen.append(drift.states(target, target.data.evaluation.harmful)))
    data = toy_data(refusals=[anchor])
    toy_trainer(tmp_path, callbacks=[attack]).test(module, datamodule=data, verbose=False)
    said = capsys.readouterr().out
    found = [(float(a), float(b)) for a, b in re.findall(r"step 3, [a-z ]+: ([\d.]+)% \((-?[\d.]+)\)", said)]
    assert len(found) == 2 * 6  # undefended, and under SBR
    (free, _), (held, cosine), (harmful, _) = found[0], found[6], found[7]
    assert (held < 0.2 * free, cosine) == (True, 1)
    start, end = seen[0], seen[-1]
    assert harmful == pytest.approx(100 * float(torch.mean((end - start) ** 2) / torch.mean(start**2)), abs=0.01)
    assert said.count("before, ") == 2 * 6
