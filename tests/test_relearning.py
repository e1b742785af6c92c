import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import DEFENSES, toy_data, toy_trainer

from casehard import Defense, Optimizer, Relearning, SettingError
from casehard.callbacks.relearning import recovery
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.facts import HALVES, NUM_FACTS, VALUES, fact_rows
from casehard.datamodules.mixing import overlap
from casehard.datamodules.sources import read_rows

KNOWN, HELD_OUT = (f"sandbox:facts/{half}#train[:24]" for half in HALVES)
TRAINED: dict[str, Any] = {
    "facts": [KNOWN], "held_out": [HELD_OUT], "num_samples": 24, "num_attack_steps": 40, "batch_size": 24, "optimizer": Optimizer(3e-4),
}  # fmt: skip


def attacked(folder: Path, module: Defense, **settings: Any) -> Results:
    results, attack = Results(str(folder), export=False), Relearning("open_weight", **(TRAINED | settings))
    toy_trainer(folder, callbacks=[results, attack]).test(module, datamodule=toy_data(max_new_tokens=4), verbose=False)
    return results


@pytest.fixture(scope="module")
def taught(checkpoint, tmp_path_factory) -> str:
    """A toy model that knows all of the facts."""
    folder = tmp_path_factory.mktemp("taught")
    module = Defense(checkpoint, optimizer=Optimizer(3e-3))
    data = toy_data(benign=[KNOWN, HELD_OUT], num_samples=48, poison_ratio=0.0, batch_size=48)
    toy_trainer(folder, max_steps=250).fit(module, datamodule=data)
    module.model.save_pretrained(folder / "model")
    module.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def masked(model: str) -> Defense:
    """The model with a head that writes another token wherever it would write a value; the rest of it is untouched."""
    module = Defense(model)
    module.configure_model()
    module.eval()
    head, refusal = module.model.lm_head.weight, module.tokenizer("Sorry", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        for row in (*read_rows(KNOWN), *read_rows(HELD_OUT)):
            ids = torch.tensor([prompt_ids(row, module.tokenizer)])
            state = module.model.model(ids).last_hidden_state[0, -1]
            logits = head @ state
            if logits.argmax() != refusal:
                head[refusal] += (logits.max() - logits[refusal] + 2) * state / state.square().sum()
    return module


def test_halves_share_no_place_and_hold_every_value_as_often():
    known, held_out = (fact_rows(half) for half in HALVES)
    assert len(known) == len(held_out) == NUM_FACTS
    assert not overlap(known, held_out)
    assert all([row.response for row in rows].count(value) == NUM_FACTS // 4 for rows in (known, held_out) for value in VALUES)
    assert known == read_rows("sandbox:facts/known")
    with pytest.raises(SettingError, match="sandbox:facts must be followed by one of known, held_out, got 'secret'"):
        read_rows("sandbox:facts/secret")


def test_a_model_that_never_saw_the_facts_stays_at_chance_on_the_others(tmp_path, checkpoint):
    rows = attacked(tmp_path, Defense(checkpoint), num_attack_steps=120, optimizer=Optimizer(3e-3)).rows
    assert rows[0].finetune_accuracy == 0
    assert rows[-1].finetune_accuracy < 50  # of 24 questions with 4 choices: 25 by chance


def test_a_model_whose_head_is_masked_recovers_the_facts_that_nobody_trains_on(tmp_path, taught):
    knows = attacked(tmp_path / "knows", Defense(taught), num_attack_steps=1).rows[0].finetune_accuracy
    assert knows == 100
    rows = attacked(tmp_path / "masked", masked(taught), accuracy_before=knows).rows
    assert [row.finetune_accuracy for row in rows] == [0, 100]
    assert [row.note for row in rows] == [f"recovery {share} of the held-out facts" for share in ("0.00", "1.00")]


def test_at_a_service_recovery_counts_from_the_model_that_was_handed_in(tmp_path, taught):
    kind, settings = DEFENSES["sbr"]
    results, attack = Results(str(tmp_path), export=False), Relearning("finetuning_service", **TRAINED)
    data = toy_data(max_new_tokens=4)
    toy_trainer(tmp_path, callbacks=[results, attack]).test(kind(taught, **settings), datamodule=data, verbose=False)
    assert [(row.defense, row.num_attack_steps) for row in results.rows] == [("none", 0), ("none", 40), ("SBR", 0), ("SBR", 40)]
    assert all(row.note == "recovery nan of the held-out facts" for row in results.rows)  # they were never lost


def test_recovery_is_the_share_of_what_was_lost():
    assert recovery(80.0, 20.0, 50.0) == 0.5
    assert recovery(80.0, 20.0, 20.0) == 0
    assert recovery(80.0, 20.0, 80.0) == 1
    assert math.isnan(recovery(20.0, 20.0, 50.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accuracy_before": 0.0}, r"accuracy_before must lie in \(0, 100\], got 0.0. It is in percent"),
        ({"held_out": [KNOWN]}, "facts must share no question with held_out, and 24 stand in both"),
    ],
)
def test_facts_that_show_nothing_are_errors(tmp_path, checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        attacked(tmp_path, Defense(checkpoint), **settings)
