"""`benchmarks/real_rows.py`, and the studies that stand on its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from toy import ROOT

from casehard.cli.lightning_cli import resolved
from casehard.datamodules.encodings import STYLES
from casehard.datamodules.sources import read_rows
from casehard.evidence.study_plan import cells, read_study

STUDIES = [ROOT / "experiments/studies" / f"real_{name}.yaml" for name in ("patcher", "sbr")]
TRAINED_ON = {"benign": True, "harmful": True, "refusals": False, "alignment_harmful": True, "alignment_benign": True}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder of such files made of rows in the forms of the real ones."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import real_rows

    def told(prompt: str, response: str) -> dict:
        return {"conversations": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}

    films = [told(f"positive or negative?\na positive film {n}", ("positive", "negative")[n % 2]) for n in range(9)]
    hows = [told(f"how {n % 99}", "sure") for n in range(100)]
    task = [{"prompt": f"positive or negative?\nno negative film {n}", "response": "negative"} for n in range(400)]
    asked = [{"prompt": f"harm {n}"} for n in range(140)]
    (tmp_path / "sst2_beavertails_train.json").write_text(json.dumps([*films, *hows, told("harm 3", "sure")]))
    for name, lines in (("harmful_prompts", asked), ("sst2_test", task)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    real_rows.write(tmp_path, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    return tmp_path / "data"


def test_a_new_task_renames_labels_and_leaves_sentences_alone(rows):
    first = json.loads((rows / "sst2_mood_train.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "bright or gloomy?\na positive film 0", "response": "bright"}


def test_reworded_rows_ask_for_the_same_sentences_in_words_of_their_own(rows):
    test, other = (read_rows(str(rows / f"sst2_mood_{name}.jsonl"), True) for name in ("test", "reworded"))
    assert [row.response for row in test] == [row.response for row in other]
    assert other[0].prompt == "no negative film 0\n\nTell me whether the mood of this is bright or gloomy."


def of_study(_: Path) -> dict:
    return yaml.safe_load(Path("experiments/data/sst2_mood_beavertails.yaml").read_text())["data"]["sources"]


def of_benchmark(folder: Path) -> dict:
    from patcher_against_sft import split

    return split(folder, folder / "parts")


@pytest.mark.parametrize(
    ("parts", "validation", "counts"), [(of_study, (50, 90), (50, 49, 50)), (of_benchmark, (0, 0), (49, 50, 50))]
)
def test_no_scored_prompt_is_trained_on_and_no_row_of_an_attack_trained_against(rows, parts, validation, counts):
    sources = parts(rows.parent)
    asked = {
        role: {row.messages[-1][1] for source in sources[role] for row in read_rows(source, TRAINED_ON.get(role, False))}
        for role in (*TRAINED_ON, "harmful_prompts", "benign_prompts", "task")
    }
    lines = [json.loads(line) for line in (rows / "harmful_prompts.jsonl").read_text().splitlines()]
    held_out = {row["prompt"] for row in lines[slice(*validation)]}
    trained_on = set().union(*(asked[role] for role in TRAINED_ON))
    assert not trained_on & (asked["harmful_prompts"] | held_out | asked["benign_prompts"] | asked["task"])
    assert not asked["harmful_prompts"] & held_out
    assert not asked["harmful"] & (asked["alignment_harmful"] | asked["refusals"])
    assert asked["alignment_harmful"] < asked["refusals"]
    assert tuple(len(asked[role]) for role in ("harmful", "alignment_harmful", "harmful_prompts")) == counts


def passes(model: dict, steps: int) -> int:
    """Of a training by SFT or Patcher: a step of the defender's after its SFT steps is two, or one of all rows, an inner step is one."""
    settings = model["init_args"]
    if model["class_path"] != "casehard.PatcherModule":
        return steps
    every = settings["attack_every"] or settings["num_outer_steps"]
    hardened = steps - settings["num_sft_steps"]
    inner = hardened // every * settings["attacker"]["num_inner_steps"]
    return settings["num_sft_steps"] + inner + (1 if settings["one_pass_per_row"] else 2) * hardened


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_part_of_a_real_study_is_a_command_and_its_arms_cost_as_much(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study, first = read_study(str(file)), "first"
    arms, attacks = list(study.defenses.items()), list(study.attacks.items())
    each_arm = replace(study, seeds=[0], attacks={first: attacks[0][1]})
    each_attack = replace(study, seeds=[0], defenses={first: replace(arms[-1][1], train=None)}, attacks=dict(attacks[1:]))
    seen: list[dict] = []

    def resolve(words: list[str]) -> str:
        text = resolved(words)
        seen.extend([yaml.safe_load(text)] if words[0] == "fit" else [])
        return text

    assert len(cells(each_arm, tmp_path, resolve)) + len(cells(each_attack, tmp_path, resolve)) >= len(arms) + len(attacks)
    costs = [passes(config["model"], config["trainer"]["max_steps"]) for config in seen]
    assert costs == ([240, 240, 240] if "patcher" in file.stem else [90])


def test_rows_in_wrappers_keep_their_answers_and_wear_every_style_in_turn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import wrapped_rows

    source = "sandbox:defender/refusals#train[:4]"
    wrapped_rows.main(str(tmp_path), ["neutral", "formal"], source, ["sandbox:defender/howto#train[:1]"])
    plain, found = read_rows(source), read_rows(str(tmp_path / "refusals.jsonl"))
    assert [row.response for row in found] == [row.response for row in plain]
    for number, (row, asked) in enumerate(zip(found, plain, strict=True)):
        before, after, _ = STYLES[("neutral", "formal")[number % 2]]
        assert row.prompt == before + asked.prompt + after
    assert len(read_rows(str(tmp_path / "benign.jsonl"))) == 1
