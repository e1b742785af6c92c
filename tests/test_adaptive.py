"""The attacker who knows a defense: named by its class, run by a study, and asked for where a run left it out."""

from pathlib import Path

import pytest
import yaml
from test_study import resolve as no_model
from toy import DEFENSES, ROOT, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, SettingError
from casehard.callbacks.results import Results
from casehard.cli.listing import listed
from casehard.evidence.study_plan import cells, read_study
from casehard.shipped import experiment

KINDS = [kind for kind, _ in DEFENSES.values() if kind.adaptive]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_adaptive_attackers_attacks_are_called_by_the_defense_and_few_and_short(kind):
    file = Path(experiment(kind.adaptive))
    attacks = [c["init_args"] for c in yaml.safe_load(file.read_text())["trainer"]["callbacks"]]
    label = kind.__name__.removesuffix("Module").replace("BesideBase", "SafeLoRA")
    assert 2 <= len(attacks) <= 4
    assert len({attack["name"] for attack in attacks}) == len(attacks)
    assert all(attack["name"].startswith(f"{label}: ") for attack in attacks)
    assert all(attack.get("num_attack_steps", 0) <= 100 and len(attack.get("score_steps", [])) <= 6 for attack in attacks)


def test_every_defense_of_casehards_own_names_one_and_no_other_file_is_there():
    named = {kind.adaptive for kind in KINDS}
    there = {f"attack/adaptive/{path.stem}" for path in (ROOT / "experiments/attack/adaptive").glob("*.yaml")}
    assert named == there
    assert Defense.adaptive == ""
    assert len(KINDS) == len(DEFENSES) - 2  # the baseline, and the tests' own


STUDY = """
defenses:
  Plain: {settings: {model.class_path: casehard.Defense}}
  Guarded: {settings: {model.class_path: casehard.SBRModule}}
attacks: {once: {}}
seeds: [0, 1]
"""


def resolve(words: list[str]) -> str:
    kind = next((word.partition("=")[2] for word in words if "class_path" in word), None)
    return yaml.safe_dump({"words": words, "model": {"class_path": kind}} if kind else {})


@pytest.mark.parametrize(("more", "runs"), [("", 2), ("adaptive: true\n", 2), ("adaptive: false\n", 0)])
def test_a_study_attacks_a_defense_by_the_attacker_who_knows_it(tmp_path, more, runs):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + more)
    found = cells(read_study(str(file)), tmp_path, resolve)
    assert len(found) == 4 + runs
    adaptive = [cell for cell in found if cell.attack == "adaptive"]
    assert [(cell.defense, cell.seed) for cell in adaptive] == [("Guarded", 0), ("Guarded", 1)][:runs]
    assert all(cell.words[cell.words.index("attack/adaptive/sbr") - 1] == "--config" for cell in adaptive)
    assert len({cell.folder for cell in found}) == len(found)


def test_a_study_says_what_adaptive_must_be(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + "adaptive: sometimes\n")
    with pytest.raises(SettingError, match="adaptive must be true or false, got 'sometimes'"):
        read_study(str(file))
    file.write_text(STUDY.replace("once", "Adaptive"))
    with pytest.raises(SettingError, match="attacks must leave the name adaptive to the defenses' own attackers"):
        read_study(str(file))
    file.write_text(STUDY.replace("once", "Adaptive") + "adaptive: false\n")
    assert not any("adaptive" in str(cell.words) for cell in cells(read_study(str(file)), tmp_path, no_model))


def test_the_list_of_defenses_names_it():
    text = " ".join(listed(["defenses"]).split())
    assert "Adaptive attacker: --config attack/adaptive/sbr." in text
    assert text.count("Adaptive attacker") == len(set(KINDS))


@pytest.mark.parametrize(("defense", "name", "said"), [("sbr", None, True), ("sbr", "SBR: mine", False), ("none", None, False)])
def test_a_run_that_left_it_out_says_how_to_run_it(tmp_path, checkpoint, capsys, defense, name, said):
    kind, settings = DEFENSES[defense]
    results = Results(str(tmp_path), export=False)
    attack = FullParameterAttack("open_weight", name=name, num_samples=8, num_attack_steps=1)
    toy_trainer(tmp_path, callbacks=[results, attack]).test(kind(checkpoint, **settings), datamodule=toy_data(), verbose=False)
    results.close()
    line = "Not run: the attacker who knows this defense. Add --config attack/adaptive/sbr"
    assert (line in capsys.readouterr().out) == said
