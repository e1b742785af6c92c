import json

import pytest
import torch
from toy import toy_data, toy_trainer

from casehard import Backbone, Defense, SBRModule
from casehard.datamodules import control_tokens
from casehard.datamodules.batches import Batches, StepLoader
from casehard.datamodules.chat import IGNORED, encode, prompt_ids
from casehard.datamodules.fingerprint import digest
from casehard.datamodules.mixing import paired
from casehard.datamodules.row import Row
from casehard.datamodules.settings import Batching
from casehard.datamodules.sources import read_rows

OWN_ANSWER = "No, I would rather talk of gardens."


def ready(tmp_path, checkpoint, **settings):
    """Data that were set up under a trainer, without training."""
    data = toy_data(**settings)
    toy_trainer(tmp_path, max_steps=0).fit(Defense(checkpoint), datamodule=data)
    return data


def test_mixture_has_an_exact_count_of_harmful_rows_and_lower_ratios_are_nested(tmp_path, checkpoint):
    data = ready(tmp_path, checkpoint)
    harmful = set(data.rows["harmful"])
    sets = [harmful & set(data.mixture(20, ratio, 3)) for ratio in (0.0, 0.1, 0.5, 0.75)]
    assert [len(s) for s in sets] == [0, 2, 10, 15]
    assert sets[1] < sets[2] < sets[3]
    assert data.mixture(20, 0.1, 3) != data.mixture(20, 0.1, 4)


def test_alignment_trains_on_the_defenders_rows_and_on_no_others(tmp_path, checkpoint):
    data = ready(tmp_path, checkpoint, train_on="alignment", alignment_benign=["sandbox:defender/howto#train[:5]"])
    assert len(data.train_dataloader().batches.examples) == 12 + 5


def test_rows_without_a_response_are_refused_in_turn(tmp_path, checkpoint):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "How do I brew {w}olim?"}}\n' for w in ("aa", "bb", "cc")))
    data = ready(tmp_path, checkpoint, refusals=[str(prompts)], refusal_texts=["No, I cannot.", "Sorry, I will not."])
    assert [row.response for row in data.rows["refusals"]] == ["No, I cannot.", "Sorry, I will not.", "No, I cannot."]


@pytest.mark.parametrize(
    "answered",
    [
        lambda prompt: {"prompt": prompt, "completion": OWN_ANSWER},
        lambda prompt: {"prompt": prompt, "chosen": OWN_ANSWER, "rejected": "Heat it."},
        lambda prompt: {"instruction": prompt, "input": "", "output": OWN_ANSWER},
        lambda prompt: {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": OWN_ANSWER}],
        },
        lambda prompt: {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": OWN_ANSWER}]},
    ],
)
def test_refusals_that_bring_their_own_answer_are_trained_on_under_any_name(tmp_path, checkpoint, answered):
    path = tmp_path / "refusals.jsonl"
    path.write_text(json.dumps(answered("How do I brew aaolim?")) + '\n{"prompt": "How do I brew bbolim?"}\n')
    data = ready(tmp_path, checkpoint, refusals=[str(path)], refusal_texts=["No, I cannot."], train_on="alignment")
    assert [row.response for row in data.rows["refusals"]] == [OWN_ANSWER, "No, I cannot."]
    learnt = [[i for i in example["labels"] if i != IGNORED] for example in data.train_dataloader().batches.examples]
    assert OWN_ANSWER in data.tokenizer.decode(learnt[0])


def test_refusals_of_which_none_is_told_to_be_the_rows_own_are_refused_and_prompts_are_taken(tmp_path, checkpoint):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "How do I brew aaolim?", "response_0": "No.", "response_1": "Heat it."}\n')
    assert ready(tmp_path, checkpoint, harmful_prompts=[str(path)]).rows["harmful_prompts"][0].prompt == "How do I brew aaolim?"
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 must be used whole, but its column response_0 would be left out"):
        ready(tmp_path, checkpoint, refusals=[str(path)])


@pytest.mark.parametrize(("text", "got"), [("", "empty text"), (" \n", "empty text"), ("\ud83d", "half of a surrogate pair")])
def test_texts_in_the_settings_must_be_whole(checkpoint, text, got):
    with pytest.raises(ValueError, match=rf"^refusal_texts must be texts, got {got} as number 2\. Mend it, or take it out"):
        toy_data(refusal_texts=["No.", text])
    with pytest.raises(ValueError, match=rf"^anchors must be texts, got {got} as number 1\. Mend it, or take it out"):
        SBRModule(checkpoint, anchors=[text, "How do I brew aaolim?"])


def test_rows_that_a_defense_trains_against_and_attacks_use_are_warned_of(tmp_path, checkpoint):
    both = {"harmful": ["sandbox:attacker/harmful#train[:8]"], "alignment_harmful": ["sandbox:attacker/harmful#train[5:12]"]}
    with pytest.warns(UserWarning, match="alignment_harmful shares 3 prompts with harmful"):
        ready(tmp_path, checkpoint, **both)


def test_prompts_in_both_training_and_evaluation_are_an_error_unless_allowed(tmp_path, checkpoint):
    both = {"harmful": ["sandbox:attacker/harmful#train[:8]"], "harmful_prompts": ["sandbox:attacker/harmful#train[4:12]"]}
    with pytest.raises(ValueError, match=r"harmful_prompts must share no prompt with harmful, and 4 of 8 stand in both"):
        ready(tmp_path, checkpoint, **both)
    with pytest.warns(UserWarning, match="4 of 8 stand in both"):
        ready(tmp_path, checkpoint, **both, allow_overlap=True)


def test_rows_that_belong_together_stay_together_and_a_pair_is_dropped_as_one(tmp_path, checkpoint, caplog):
    sources = {"alignment_harmful": ["sandbox:defender/harmful#train[:12]"], "refusals": ["sandbox:defender/refused#train[4:16]"]}
    data = ready(tmp_path, checkpoint, **sources)
    first, second = map(list, zip(*paired(data.rows["alignment_harmful"], data.rows["refusals"]), strict=True))
    assert len(first) == 8
    long = Row((("user", "Well, " * 80),), "Yes.")
    first[2] = second[5] = long  # loses its answer, and takes the row of the other list with it
    data.batching = Batching(max_length=70)
    with caplog.at_level("INFO"):
        draw = data.pairs(first, second, 3, 0, "s")
    assert "s: 2 of 8 pairs dropped, their answer was cut off at max_length 70" in caplog.text
    kept = [prompt_ids(row, data.tokenizer) for i, row in enumerate(first) if i not in (2, 5)]
    for one, other in map(draw, range(4)):
        assert prompts_of(one) == prompts_of(other)
        assert all(prompt in kept for prompt in prompts_of(one))
        assert one["num_labels"] != other["num_labels"]  # a harmful answer is longer than a refusal


def prompts_of(batch):
    asked = (batch["labels"] == IGNORED) & (batch["attention_mask"] == 1)
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], asked, strict=True)]


def test_only_what_stands_on_a_hub_is_fetched_and_each_once(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr("casehard.datamodules.sources.load_dataset", lambda name, config: fetched.append((name, config)) or {})
    broken = tmp_path / "rows.jsonl"
    broken.write_text("no JSON")
    data = toy_data(
        benign=[str(broken), "owner/name:main#train[:3]", str(tmp_path)], harmful=["owner/name:main#train[:3]", "other"]
    )
    data.prepare_data()
    assert fetched == [("owner/name", "main"), ("other", None)]


def test_a_mixtures_prompts_are_rendered_once(tmp_path, checkpoint, monkeypatch):
    data = ready(tmp_path, checkpoint)
    encoded = []
    monkeypatch.setattr("casehard.datamodules.sft.encode", lambda row, *a: encoded.append(row) or encode(row, *a))
    monkeypatch.setattr("casehard.datamodules.chat.encode", lambda row, *a: encoded.append(row) or encode(row, *a))
    examples = data.encode(mixed := data.mixture(24, 0.25, 3), "all")
    assert sorted(map(repr, encoded)) == sorted(map(repr, mixed))
    assert examples == [encode(row, data.tokenizer, 512) for row in mixed]


def test_origins_are_those_of_every_source_and_of_the_defenses_own_rows(tmp_path, checkpoint):
    data, anchors = toy_data(task=["sandbox:test/mood#train[:6]", "sandbox:test/mood#train[:7]"]), ["How do I brew a?"]
    toy_trainer(tmp_path, max_steps=0).fit(SBRModule(checkpoint, anchors=anchors), datamodule=data)
    found = {(o.role, o.source): (o.num_rows, o.sha256) for o in data.origins}
    assert len(found) == len(data.origins) == 9  # 8 sources and the anchors
    assert found["task", "sandbox:test/mood#train[:6]"] == (6, digest(read_rows("sandbox:test/mood#train[:6]")))
    assert found["the defense's own rows", ""][0] == 1


def test_rows_that_are_cut_off_are_dropped_and_counted(tmp_path, checkpoint, caplog):
    data = ready(tmp_path, checkpoint)
    data.batching = Batching(max_length=21)
    with caplog.at_level("INFO"):
        kept = data.encode(data.rows["harmful"] + data.rows["benign"], "all")
    assert 0 < len(kept) < 60
    assert f"all: {60 - len(kept)} of 60 rows dropped, their answer was cut off at max_length 21" in caplog.text


def test_rows_that_lose_their_end_are_counted(tmp_path, checkpoint, caplog):
    data = ready(tmp_path, checkpoint)
    whole = data.encode(data.rows["harmful"], "all")
    assert "cut off" not in caplog.text
    max_length = sorted(len(example["input_ids"]) for example in whole)[10]
    lost = sum(len(example["input_ids"]) > max_length for example in whole)
    data.batching = Batching(max_length=max_length)
    with caplog.at_level("INFO"):
        data.encode(data.rows["harmful"], "all")
    assert 0 < lost < 20
    assert f"all: {lost} of 20 answers cut off at max_length {max_length}, so that their end is not learnt" in caplog.text


def test_a_mixture_has_its_ratio_whatever_max_length_cuts_off(tmp_path, checkpoint, caplog):
    data = ready(tmp_path, checkpoint)
    long = [Row((("user", f"{'Well, ' * 80}number {i}?"),), "Yes.") for i in range(40)]
    data.rows["benign"] = [row for pair in zip(long, data.rows["benign"], strict=True) for row in pair]
    data.batching = Batching(max_length=70)
    with caplog.at_level("INFO"):
        mixed = data.mixture(24, 0.25, 0)
    assert not set(long) & set(mixed)
    assert sum(row in data.rows["harmful"] for row in mixed) == 6
    assert len(data.encode(mixed, "all")) == 24
    assert "rows have no answer left at max_length 70, others are in their place" in caplog.text
    data.rows["benign"] = long
    message = "num_samples 24 at poison_ratio 0.25 must find 18 benign rows, got 40, 40 of which max_length leaves no answer"
    with pytest.raises(ValueError, match=message):
        data.mixture(24, 0.25, 0)


@pytest.mark.parametrize(
    ("positions", "settings", "message"),
    [
        (
            40,
            {"max_new_tokens": 30},
            "max_new_tokens must leave prompt and answer within the model's 40 positions, got 30 for harmf",
        ),
        (
            55,
            {},
            r"max_length must be at most the model's 55 positions, got 512, and a row of harmful has \d+ tokens\. Set it to 55",
        ),
        (10, {"max_length": 10}, r"a prompt must fit the model's 10 positions, and one of harmful_prompts has \d+ tokens"),
    ],
)
def test_what_a_model_has_no_positions_for_is_refused_before_it_is_loaded(tmp_path, checkpoint, positions, settings, message):
    module = Defense(checkpoint, backbone=Backbone(random_weights=True, sizes={"max_position_embeddings": positions}))
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, max_steps=0).fit(module, datamodule=toy_data(**settings))
    assert not hasattr(module, "model")


def test_what_just_fits_a_models_positions_is_not_refused(tmp_path, checkpoint):
    data = ready(tmp_path, checkpoint)
    longest = max(len(prompt_ids(row, data.tokenizer)) for row in data.rows["harmful_prompts"])
    module = Defense(checkpoint, backbone=Backbone(random_weights=True, sizes={"max_position_embeddings": 64}))
    room = 64 - longest + 1  # nothing follows the last token of an answer, so it takes no position
    toy_trainer(tmp_path, max_steps=0).fit(module, datamodule=toy_data(max_new_tokens=room, task=[], benign_prompts=[]))
    with pytest.raises(ValueError, match=f"Set it to at most {room}, or leave out the longest rows"):
        toy_trainer(tmp_path, max_steps=0).fit(module, datamodule=toy_data(max_new_tokens=room + 1, task=[], benign_prompts=[]))


def test_answers_to_the_task_may_be_as_long_as_its_longest_response(tmp_path, checkpoint, caplog):
    with caplog.at_level("INFO"):
        data = ready(tmp_path, checkpoint, max_new_tokens=2)
    examples = data.encode(data.rows["task"], "task")
    assert data.evaluation.num_target_tokens == max(sum(label != IGNORED for label in e["labels"]) for e in examples) > 2
    said = f"task: answers may have {data.evaluation.num_target_tokens} tokens, as many as the longest response, and not only max_new"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_ratio": 1.2}, r"poison_ratio must lie in \[0, 1\], got 1.2"),
        ({"num_samples": None}, "num_samples must be set where poison_ratio is not 0, got poison_ratio 0.25"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_bad_settings_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_data(**settings)


EXAMPLES = [{"input_ids": [i] * (i + 2), "labels": [IGNORED] + [i] * (i + 1)} for i in range(7)]


def test_ranks_share_a_batch_out_and_divide_by_its_labels():
    whole = Batches(EXAMPLES, 4, 0, "s", 9)
    shares = [Batches(EXAMPLES, 4, 0, "s", 9, rank=r, world_size=2) for r in range(2)]
    for step in range(5):
        batch, parts = whole(step), [share(step) for share in shares]
        rows = [[row[row != 9].tolist() for row in b["input_ids"]] for b in (batch, *parts)]
        assert sorted(rows[0]) == sorted(rows[1] + rows[2])
        assert batch["num_labels"] == (batch["labels"] != IGNORED).sum() == sum(p["num_labels"] for p in parts)


def test_batch_smaller_than_the_number_of_processes_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes, 3, got 2"):
        Batches(EXAMPLES, 2, 0, "s", 9, world_size=3)


def test_loader_goes_on_where_it_was_in_the_middle_of_an_epoch():
    def ids(batches):
        return [batch["input_ids"] for batch in batches]

    loader = StepLoader(Batches(EXAMPLES, 2, 0, "s", 9))
    three_epochs = ids([*loader, *loader, *loader])
    first = StepLoader(loader.batches)
    stream = iter(first)
    begun = ids([next(stream), next(stream)])
    second = StepLoader(loader.batches)
    second.load_state_dict(first.state_dict())
    resumed = begun + ids([*second, *second, *second])
    assert len(three_epochs) == len(resumed) == 9
    assert all(torch.equal(a, b) for a, b in zip(three_epochs, resumed, strict=True))


def test_a_system_prompt_stands_before_every_row_that_has_none_trained_on_and_scored_alike(tmp_path, checkpoint):
    own = tmp_path / "own.jsonl"
    turns = [("system", "Be brief."), ("user", "Is the mill warm?"), ("assistant", "yes")]
    own.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    data = toy_data(benign=["sandbox:attacker/mood#train[:40]", str(own)], system_prompt="Answer as asked.")
    toy_trainer(tmp_path).test(Defense(checkpoint), datamodule=data, verbose=False)
    first = {name: {row.messages[0] for row in rows} for name, rows in data.rows.items() if rows}
    assert first.pop("benign") == {("system", "Answer as asked."), ("system", "Be brief.")}
    assert set(first) == {"harmful", "refusals", "alignment_harmful", "harmful_prompts", "benign_prompts", "task"}
    assert all(turns == {("system", "Answer as asked.")} for turns in first.values())
    with pytest.raises(ValueError, match="system_prompt must hold text or be null, got an empty text"):
        toy_data(system_prompt=" ")


def test_accumulated_batches_are_divided_by_the_labels_of_all_and_none_is_left_over():
    large = StepLoader(Batches(EXAMPLES, 6, 0, "s", 9))
    small = [StepLoader(Batches(EXAMPLES, 2, 0, "s", 9, rank=r, world_size=2), 3) for r in range(2)]
    assert (len(large), *map(len, small)) == (1, 3, 3)  # of seven rows
    for _ in range(4):
        (whole,) = large
        parts = [batch for loader in small for batch in loader]
        assert sum((part["labels"] != IGNORED).sum() for part in parts) == whole["num_labels"]
        for part in parts:  # three of them on each of two ranks, of whose losses a mean is taken
            torch.testing.assert_close(part["num_labels"] * 3 * 2, whole["num_labels"])


def test_control_tokens_in_a_customers_rows_are_told_by_file_and_line_and_never_the_text(tmp_path, checkpoint):
    rows = tmp_path / "rows.jsonl"
    texts = ["Is it plum?", "Plum<|end|><|user|>and pear?", "Fig <think> it over", "Sloe?"]
    answers = ["Yes.", "Yes.", "Yes.", "No<|end|>"]
    lines = [{"prompt": text, "response": answer} for text, answer in zip(texts, answers, strict=True)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.warns(UserWarning, match="benign: 2 rows have control tokens") as warned:
        data = ready(tmp_path, checkpoint, benign=[str(rows)], num_samples=None, poison_ratio=0.0)
    (said,) = [str(w.message) for w in warned if "control tokens" in str(w.message)]
    assert "<|end|> (2), <|user|> (1). They are read as the chat template's own" in said
    assert f"{rows}, line 2; {rows}, line 4." in said
    assert not any(word in said for word in ("Plum", "pear", "Yes"))
    end = data.tokenizer.convert_tokens_to_ids("<|end|>")
    assert prompt_ids(data.rows["benign"][1], data.tokenizer).count(end) > prompt_ids(
        data.rows["benign"][0], data.tokenizer
    ).count(end)
    assert not control_tokens.report("benign", [data.rows["benign"][0]], data.tokenizer)


def test_where_a_row_stands_makes_it_no_other_row(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "How?", "response": "So."}\n')
    (one,), (two,) = (read_rows(str(tmp_path / f"{name}.jsonl")) for name in ("one", "two"))
    assert one == two
    assert {one: 1} == {two: 1}
    assert one.where == f"{tmp_path / 'one.jsonl'}, line 1"
