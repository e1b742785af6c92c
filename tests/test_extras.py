import re
import sys
import tomllib

import pytest
from test_package import FILES, imports, name_of
from toy import ROOT

from casehard import RubricJudge

OF_EVERYBODY = {"cli/commands.py", "evidence/report.py", "evidence/plots.py", "evidence/card.py", "evidence/viewer.py"}


def test_the_commands_that_read_results_need_no_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    along = {re.split(r"[\[>=<]", line)[0] for line in project["dependencies"]} | {
        "casehard",
        "huggingface_hub",
        "yaml",
    }  # by others
    for file in (file for file in FILES if name_of(file) in OF_EVERYBODY):
        assert {name.partition(".")[0] for name in imports(file)} - sys.stdlib_module_names <= along, name_of(file)
    assert "plot" not in project["optional-dependencies"]


def test_a_judge_whose_package_is_missing_says_so_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"RubricJudge needs openai, .* pip install 'casehard\[judge\]'"):
        RubricJudge("a-model", api_key_env=None)
