"""Names are anybody's: none reaches a terminal, a table or a folder that would take it for more than a name."""

import math
import re
from dataclasses import replace

import pytest
from test_results import ROW
from toy import LengthJudge, toy_data, toy_trainer

from casehard import Defense, LoRA, LoRAAttack
from casehard.cli.main import main
from casehard.evidence.study_plan import read_study
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import require_judge, unscored
from casehard.metrics.names import plain, require_name
from casehard.records.rows import Run, read_run, write_run

HOSTILE = ["a\nb", "\x1b[31mred", "\u202eevil", "a\0b", "\x9b1m", "\ttab", "\u2028x", "\ud800", '=HYPERLINK("http://x")', "+1", "-1", "@x", " ", "", " x", "a" * 81]  # fmt: skip
FINE = ["LoRAAttack", "rubric:org/model@1a2b3c4d", "[bold red]x", "a|b", "<img src=x>", "café", "攻撃", "a=b", "1e-4"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_what_is_more_than_a_name_is_refused_wherever_one_is_given(name):
    with pytest.raises(SettingError, match=r"^what must be .*, got .*\. Choose another name\.$") as refused:
        require_name("what", name)
    assert str(refused.value).isprintable()
    judge = LengthJudge()
    judge.name = name
    with pytest.raises(SettingError, match="name"):
        require_judge(judge)
    if name:  # which is the class's
        with pytest.raises(SettingError, match="name of an attack must be"):
            LoRAAttack("open_weight", name=name)
    assert plain(name).isprintable()
    assert not plain(name).startswith(tuple("=+-@"))


@pytest.mark.parametrize("name", FINE)
def test_other_names_are_taken(name):
    require_name("what", name)
    assert plain(name) == name


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/b", "..", ".", "a\\b", "x" * 201])
def test_the_name_of_a_folder_is_no_path(name):
    with pytest.raises(SettingError, match=r"run\.version must be"):
        require_name("run.version", name, folder=True)
    require_name("run.version", "x" * 200, folder=True)


def test_a_studys_names_are_names(tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text('defenses: {"=1+1": {}}\nattacks: {a: {}}\nseeds: [0]\n')
    with pytest.raises(SettingError, match=re.escape("a name in defenses must be no formula to a spreadsheet")):
        read_study(str(study))


@pytest.mark.parametrize("column", ["attack", "defense", "judge", "note", "trained"])
@pytest.mark.parametrize("cell", ["a\nb", "\x1b[2J", "\u202eevil"], ids=ascii)
def test_a_foreign_table_with_such_a_cell_is_refused_by_file_and_line(tmp_path, column, cell):
    write_run(Run(tmp_path, [replace(ROW, **{column: cell})], [[]]), answers=False)
    with pytest.raises(
        SettingError, match=rf"attacks.csv, line [23] must have one line of letters that can be seen as its {column}, got "
    ) as refused:
        read_run(tmp_path)
    assert str(refused.value).isprintable()


def test_what_code_says_of_an_attack_stands_in_one_line(checkpoint, tmp_path):
    class Talking(LoRAAttack):
        def notes(self, target):
            return ["=1+1\n\x1b[31m", "and more"]

    class Label(Defense):
        label = "\x1b[31m"

    settings = {"num_samples": 8, "num_attack_steps": 1, "batch_size": 4, "lora": LoRA(rank=2)}
    attack = Talking("open_weight", **settings)
    trainer, module = toy_trainer(tmp_path, callbacks=[attack]), Defense(checkpoint)
    trainer.test(module, toy_data(), verbose=False)
    assert {row.note for row in attack.run(trainer, module)} == {"1+1 [31m; and more"}
    with pytest.raises(SettingError, match="the label of Label must be"):
        toy_trainer(tmp_path, callbacks=[attack]).test(Label(checkpoint), toy_data(), verbose=False)


@pytest.mark.parametrize(
    "args", [["report", "no\x1b[2J\u202ewhere"], ["report", "--no\x1b[2J\u202ewhere"], ["card", "a\x9b2J"]], ids=ascii
)
def test_no_error_moves_a_cursor_or_turns_letters_round(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr().err + str(stop.value.code)
    assert not {"\x1b", "\u202e", "\x9b"} & set(said)
    assert "\\x1b[2J" in said or "\\x9b2J" in said


def test_why_a_judge_gave_no_verdict_is_told_in_one_line():
    told = unscored("own", [(math.nan, False, "\x1b[31mHTTP\n500\u202e")])
    assert "1 times [31mHTTP 500" in told
    assert told.isprintable()
