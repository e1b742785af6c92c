import sys

import pytest

import casehard
from casehard import RubricJudge


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        (["report", "runs/x"], "matplotlib", "plot"),
        (["report", "runs/x"], "jinja2", "plot"),
        (["card", "runs/x"], "matplotlib", "plot"),
        (["card", "runs/x"], "jinja2", "plot"),
        (["answers", "runs/x"], "jinja2", "plot"),
    ],
)
def test_a_command_whose_package_is_missing_says_which_extra_brings_it(line, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"casehard {line[0]} needs {package}, .* pip install 'casehard\[{extra}\]'"):
        casehard.main(line)


def test_a_judge_whose_package_is_missing_says_so_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"RubricJudge needs openai, .* pip install 'casehard\[judge\]'"):
        RubricJudge("a-model", api_key_env=None)
