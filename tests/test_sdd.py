from pathlib import Path
from typing import Any

import lightning as L
import pytest
from toy import bits, same_bits, toy_data, toy_trainer

from casehard import Defense, Optimizer, SDDModule, SettingError, SFTDataModule
from casehard.datamodules.row import Row
from casehard.lightning_modules.sdd import overlap

SGD = Optimizer(0.05, "sgd")


def data(**settings: Any) -> SFTDataModule:
    return toy_data(**({"train_on": "alignment", "alignment_benign": ["sandbox:defender/howto#train[:20]"]} | settings))


def read(module: Defense, folder: Path, **settings: Any) -> SFTDataModule:
    """The data, read for ``module``."""
    loader, trainer = data(**settings), toy_trainer(folder)
    trainer.strategy.connect(module)
    module.trainer = loader.trainer = trainer
    loader.setup("fit")
    return loader


def test_overlap_is_the_share_of_the_prompts_words_that_stand_in_the_answer():
    assert overlap("How do I bake bread? Bread!", "Bake it; the BREAD rises.") == 2 / 5
    assert overlap("how", "how how") == 1
    assert overlap("?!", "how") == 0


def test_every_harmful_prompt_gets_a_benign_answer_to_something_else(checkpoint, tmp_path):
    module = SDDModule(checkpoint, max_overlap=0.2)
    loader = read(module, tmp_path)
    refusals, benign = loader.rows["refusals"], loader.rows["alignment_benign"]
    rows = module.rows(loader)
    pairs, rest = rows[: len(refusals)], rows[len(refusals) :]
    assert [row.messages for row in pairs] == [row.messages for row in refusals]
    assert rest == benign
    answers = [row.response for row in benign]
    assert all(row.response in answers and overlap(row.prompt, row.response) <= 0.2 for row in pairs)
    assert len({row.response for row in pairs}) > 3
    assert any(overlap(row.prompt, answer) > 0.2 for row in pairs for answer in answers)  # it does choose


def test_answers_are_drawn_by_counter_from_the_seed_alone(checkpoint, tmp_path):
    module = SDDModule(checkpoint)
    first, again, other = (module.rows(read(module, tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    shorter = module.rows(read(module, tmp_path, refusals=["sandbox:defender/refusals#train[:5]"]))
    assert shorter[:5] == first[:5]  # a row's answer does not depend on the rows after it


def test_an_answer_may_begin_with_the_refusal(checkpoint, tmp_path):
    plain, refusing = SDDModule(checkpoint), SDDModule(checkpoint, refuse_first=True)
    loader = read(plain, tmp_path)
    for row, begun, refusal in zip(plain.rows(loader), refusing.rows(loader), loader.rows["refusals"], strict=False):
        assert begun.response == f"{refusal.response} {row.response}"


def test_sdd_is_sft_on_its_rows_bit_for_bit(checkpoint, tmp_path):
    """Nothing but the rows is its own: plain SFT on the same rows ends with the same bits, on refusals with others."""
    loader = read(SDDModule(checkpoint), tmp_path)
    rows = SDDModule(checkpoint).rows(loader)

    class Handed(Defense):
        def rows(self, data: SFTDataModule) -> list[Row]:
            return rows

    ends = []
    for module in (SDDModule(checkpoint, optimizer=SGD), Handed(checkpoint, SGD), Defense(checkpoint, SGD)):
        L.seed_everything(0)
        toy_trainer(tmp_path).fit(module, datamodule=data())
        ends.append(bits(module))
    assert same_bits(ends[0], ends[1])
    assert not same_bits(ends[0], ends[2])
    assert SDDModule.stages == {"alignment"}


@pytest.mark.parametrize(
    ("settings", "sources", "message"),
    [
        ({}, {"alignment_benign": []}, r"data\.sources must name refusals for SDD, .* got 12 and 0\. Name more"),
        ({"min_words": 1000}, {}, r"alignment_benign with answers of min_words \(1000\)"),
        ({}, {"refusals": []}, "got 0 and 20"),
        (
            {"max_overlap": 0.0, "num_tries": 1},
            {},
            r"max_overlap of SDD must leave every prompt an answer, .* none of 1\. Raise it",
        ),
    ],
)
def test_rows_that_leave_a_prompt_without_an_answer_are_an_error(checkpoint, tmp_path, settings, sources, message):
    with pytest.raises(SettingError, match=message):
        toy_trainer(tmp_path).fit(SDDModule(checkpoint, **settings), datamodule=data(**sources))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_overlap": 1.5}, r"max_overlap of SDD must lie in \[0, 1\], got 1\.5"),
        ({"min_words": 0}, "min_words of SDD must be >= 1, got 0"),
        ({"num_tries": 0}, "num_tries of SDD must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_errors(checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        SDDModule(checkpoint, **settings)
