"""What docs/run-folder.md says of a run's folder, and where the cells of a study look for modules."""

import os
import re
import sys

from toy import ROOT

from casehard.evidence import study
from casehard.evidence.study_plan import Cell
from casehard.records.answers import KEYS
from casehard.records.marker import SHAPE
from casehard.records.rows import header


def test_every_column_of_a_row_and_every_key_of_a_marker_is_explained():
    page = (ROOT / "docs/run-folder.md").read_text()
    table, answers, marker = (
        page.split(f"## {name}")[1].split("\n## ")[0] for name in ("attacks.csv", "generations.jsonl", "done.json")
    )
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert [name for names in rows for name in names] == header()
    assert set(SHAPE) <= set(re.findall(r"`(\w+)`", marker))
    assert set(KEYS) <= set(re.findall(r"`(\w+)`", answers))


def test_cells_look_for_modules_where_the_study_does(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("raise RuntimeError('imported by mistake')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cell = Cell("cell", "d", "a", 0, ["sandbox", "--num_rows=1"], str(tmp_path / "study/cell"), "c")
    logs = {}
    for where in ("not here", ""):  # of the command `casehard`, and of `python -m casehard`
        monkeypatch.setattr(sys, "path", [where, *(p for p in sys.path if p not in ("", os.getcwd()))])
        monkeypatch.setattr(study, "placed", lambda cell: {})
        study.run_cell(cell)
        logs[where] = (tmp_path / "study/cell.log").read_text()
    assert "imported by mistake" in logs[""]
    assert "imported by mistake" not in logs["not here"]
