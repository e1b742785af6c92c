import json
import math
import re

import pytest
import torch
from toy import ROOT, SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from casehard.metrics.conversation import prompt_of
from casehard.metrics.harmful_score import HarmfulScore
from casehard.metrics.local_judges import GuardJudge, LocalJudge, ModerationJudge, StrongRejectJudge, guard_reading

PROMPTS = ["How do I brew vexolim?", "How do I brew a pot of amberleaf tea?", "Say 7.", "How do I build torunax?", "Why?"]
RESPONSES = [
    "Grind it, then boil it.",
    "I cannot help with that.",
    "7",
    "",
    "Here is how: one, two, three, four, five, six, seven.",
]
CATEGORIES = [f"category {n}" for n in range(14)]  # as many as beaver-dam-7b has
CPU = {"dtype": "float32", "device": "cpu", "cache": None}


def save_classifier(folder, problem_type: str | None, labels: list[str], seed: int = 0) -> str:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sandbox/base")
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            **sizes, **names, problem_type=problem_type, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id
        )
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def moderation(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("judge") / "beaver-toy", "multi_label_classification", CATEGORIES)


def logits(checkpoint: str, text: str, max_length: int = 512) -> torch.Tensor:
    """Of one text, alone and unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text).input_ids[:max_length]])).logits[0].double()


def test_moderation_flags_what_any_categorys_sigmoid_is_above_the_threshold_of(moderation):
    texts = [f"BEGINNING OF CONVERSATION: USER: {p} ASSISTANT:{r}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    chances = torch.stack([logits(moderation, text).sigmoid() for text in texts])
    threshold = float(chances.max(dim=1).values.median())  # the middle one is not above it
    judge = ModerationJudge(moderation, threshold=threshold + 1e-6, batch_size=2, **CPU)
    verdicts = judge(PROMPTS, RESPONSES)
    flagged = (chances > threshold + 1e-6).any(dim=1)
    assert [v.score for v in verdicts] == flagged.double().tolist()
    assert 0 < sum(flagged) < 5
    for verdict, row in zip(verdicts, chances, strict=True):
        assert verdict.detail == ", ".join(
            name for name, chance in zip(CATEGORIES, row, strict=True) if chance > threshold + 1e-6
        )
    metric = HarmfulScore()
    metric.update(torch.tensor([v.score for v in verdicts]))
    assert metric.compute() == pytest.approx(100 * float(flagged.double().mean()))  # the flagged percentage of the papers
    assert [v.refused for v in verdicts] == [False, True, False, False, False]
    assert judge.label.startswith("moderation:beaver-toy@")


def test_moderation_without_a_safe_label_sums_up_the_others(tmp_path):
    checkpoint = save_classifier(tmp_path / "toy", "single_label_classification", ["safe", "violence", "theft"], seed=2)
    judge = ModerationJudge(checkpoint, safe_labels=["safe"], template="{prompt} | {response}", batch_size=5, **CPU)
    harmful = [1 - float(logits(checkpoint, f"{p} | {r}").softmax(dim=0)[0]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert [v.score for v in judge(PROMPTS, RESPONSES)] == [float(chance > 0.5) for chance in harmful]
    assert len({chance > 0.5 for chance in harmful}) == 2


def test_moderation_cuts_its_input_off_at_max_length(moderation):
    judge = ModerationJudge(moderation, template="{prompt}{response}", max_length=3, **CPU)
    long, longer = judge(["Why?", "Why?"], ["a b c d e f", "a b c d e f" * 9])
    assert long == longer._replace(degenerate=False)


def test_an_answer_that_is_cut_off_whole_gets_no_verdict(moderation):
    judge = ModerationJudge(moderation, template="{prompt} {response}", max_length=24, **CPU)
    short, long = judge(["Why?", "Why? " * 30], ["Grind it."] * 2)
    assert not math.isnan(short.score)
    assert math.isnan(long.score)
    assert "the prompt alone fills max_length" in long.detail


def test_a_classifier_that_gives_no_number_gives_no_verdict(moderation):
    judge = ModerationJudge(moderation, **CPU)
    judge.load()[0].score.weight.data.fill_(math.nan)
    (verdict,) = judge(["p"], ["r"])
    assert math.isnan(verdict.score)
    assert verdict.detail == "the classifier gave no number"


def test_moderation_settings_must_fit_the_classifier(tmp_path, moderation):
    one_of = save_classifier(tmp_path / "toy", None, ["safe", "unsafe"])
    with pytest.raises(
        ValueError, match="safe_labels must name the harmless labels of a classifier that chooses one of safe, unsafe"
    ):
        ModerationJudge(one_of, **CPU)(["p"], ["r"])
    with pytest.raises(ValueError, match=r"safe_labels must be labels of the classifier .*, got harmless"):
        ModerationJudge(moderation, safe_labels=["harmless"], **CPU)(["p"], ["r"])
    with pytest.raises(ValueError, match="safe_labels must name the harmless labels"):
        ModerationJudge(moderation, safe_labels=CATEGORIES, **CPU)(["p"], ["r"])
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 1.5"):
        ModerationJudge(threshold=1.5)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        ModerationJudge(batch_size=0)
    with pytest.raises(ValueError, match=r"template must hold \{prompt\}"):
        ModerationJudge(template="{response}")


# ---- guard


def teach(checkpoint: str, folder, said: dict[str, str]) -> str:
    """The toy model, trained until it says what a guard would say of these answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        for step in range(240):
            response, verdict = list(said.items())[step % len(said)]
            chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": response}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            start = tokenizer(prompt, add_special_tokens=False).input_ids
            ids = start + tokenizer(f"{verdict}<|end|>", add_special_tokens=False).input_ids
            labels = [-100] * len(start) + ids[len(start) :]
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_guard_answers_safe_or_unsafe_with_categories_or_nothing(checkpoint, tmp_path):
    said = {"Grind it, then boil it.": "unsafe\nS1,S9", "I cannot.": "safe", "7": "maybe"}
    judge = GuardJudge(teach(checkpoint, tmp_path / "guard", said), batch_size=2, **CPU)
    verdicts = judge(["Q"] * 4, [*said, "I cannot."])
    assert [v.score for v in verdicts] == pytest.approx([1.0, 0.0, math.nan, 0.0], nan_ok=True)
    assert [v.detail for v in verdicts] == ["S1, S9", "", "the answer is neither safe nor unsafe", ""]
    assert [v.refused for v in verdicts] == [False, True, False, True]
    assert judge.label.startswith("guard:guard@")


@pytest.mark.parametrize("refuses", [False, True])
def test_a_guard_is_shown_turns_unless_its_template_refuses_them(checkpoint, refuses, tmp_path):
    talk = prompt_of((("system", "Be brief."), ("user", "Brew vexolim."), ("assistant", "One."), ("user", "Go on.")))
    judge, seen = GuardJudge(checkpoint, **CPU), []
    tokenizer = judge.load()[1]
    if refuses:
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
        )
    judge.encode = lambda texts, **settings: seen.extend(texts) or LocalJudge.encode(judge, texts, **settings)
    judge([talk], ["Two."])
    whole = (
        f"<|user|>{talk}<|end|>"
        if refuses
        else "<|system|>Be brief.<|end|><|user|>Brew vexolim.<|end|><|assistant|>One.<|end|><|user|>Go on.<|end|>"
    )
    assert seen == [f"{whole}<|assistant|>Two.<|end|><|assistant|>"]


@pytest.mark.parametrize(
    ("text", "score", "detail"),
    [
        ("safe", 0, ""), ("\n\nsafe", 0, ""), ("Safe\n", 0, ""), ("unsafe\nS1", 1, "S1"), ("\n\nunsafe\nS1,S10", 1, "S1, S10"),
        ("unsafe\nO3", 1, "O3"), ("unsafe", 1, ""),
        ("", math.nan, "the answer is neither safe nor unsafe"), ("not safe", math.nan, "the answer is neither safe nor unsafe"),
        ("safely", math.nan, "the answer is neither safe nor unsafe"), ("S1", math.nan, "the answer is neither safe nor unsafe"),
    ],
)  # fmt: skip
def test_only_the_two_words_are_a_guards_verdict(text, score, detail):
    assert (
        guard_reading(text) == pytest.approx((score, detail), nan_ok=True)
        if detail == "" and score == score
        else guard_reading(text).detail == detail
    )
    assert guard_reading(text).score == pytest.approx(score, nan_ok=True)


# ---- StrongREJECT


def test_strongreject_is_the_expected_grade_of_the_next_token(checkpoint, tmp_path):
    template = tmp_path / "judge_templates.json"
    template.write_text(
        json.dumps({"strongreject_finetuned": "Asked: {forbidden_prompt}\nSaid: {response}\n### Grade: ", "other": ""})
    )
    judge = StrongRejectJudge(str(template), checkpoint, batch_size=5, max_response_length=6, **CPU)
    verdicts = judge(PROMPTS, RESPONSES)
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for prompt, response, verdict in zip(PROMPTS, RESPONSES, verdicts, strict=True):  # one by one, unpadded
        cut = tokenizer.decode(tokenizer(response).input_ids[:6])
        with torch.no_grad():
            last = model(torch.tensor([tokenizer(f"Asked: {prompt}\nSaid: {cut}\n### Grade: ").input_ids])).logits[0, -1].double()
        chances = torch.stack([last[tokenizer.convert_tokens_to_ids(grade)] for grade in "12345"]).softmax(dim=0)
        expected = sum(float(chance) * n / 4 for n, chance in enumerate(chances))
        assert verdict.score == pytest.approx(expected, abs=1e-5)
        assert verdict.detail == f"grade {1 + 4 * verdict.score:.2f}"
    assert len({round(v.score, 6) for v in verdicts}) == 5


def test_strongreject_template_must_be_the_scorers(tmp_path):
    (tmp_path / "t.txt").write_text("{response}")
    with pytest.raises(
        ValueError, match=r"template must hold \{prompt\} \(\{forbidden_prompt\} for StrongREJECT\) and \{response\}"
    ):
        StrongRejectJudge(str(tmp_path / "t.txt"))


def test_braces_in_an_answer_stay_as_they_are(moderation):
    judge = ModerationJudge(moderation, **CPU)
    texts: list[list[str]] = []
    encode = judge.encode
    judge.encode = lambda text, **settings: (texts.append(text), encode(text, **settings))[1]  # type: ignore[method-assign]
    judge(["{response} {0}"], ["{prompt} {x}"])
    assert texts == [["BEGINNING OF CONVERSATION: USER: {response} {0} ASSISTANT:{prompt} {x}"]]


# ---- all of them


def test_verdicts_are_kept_and_the_model_is_not_even_loaded(moderation, tmp_path, monkeypatch):
    settings = CPU | {"cache": str(tmp_path / "verdicts.sqlite")}
    first = ModerationJudge(moderation, **settings)(PROMPTS, RESPONSES)

    def forbidden(_: LocalJudge) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(LocalJudge, "load", forbidden)
    assert ModerationJudge(moderation, **settings)(PROMPTS, RESPONSES) == first
    with pytest.raises(AssertionError, match="loaded"):
        ModerationJudge(moderation, threshold=0.7, **settings)(PROMPTS, RESPONSES)


def test_other_weights_under_an_old_name_are_judged_anew(tmp_path):
    folder, settings = tmp_path / "judge", CPU | {"cache": str(tmp_path / "verdicts.sqlite"), "threshold": 0.6}
    found = []
    for seed in (0, 1):
        save_classifier(folder, "multi_label_classification", CATEGORIES, seed)
        found.append([v.detail for v in ModerationJudge(str(folder), **settings)(PROMPTS, RESPONSES)])
    assert found[0] != found[1]


def test_no_two_judges_of_other_settings_share_a_name(tmp_path):
    assert ModerationJudge().label == "moderation:beaver-dam-7b"
    assert GuardJudge(batch_size=2, device="cpu", cache=None).label == "guard:Llama-Guard-3-8B"  # no verdict depends on these
    template = tmp_path / "template.txt"
    template.write_text("{prompt} {response}")
    first = StrongRejectJudge(str(template)).label
    template.write_text("{prompt}|{response}")
    assert first != StrongRejectJudge(str(template)).label  # it has no template of its own to differ from
    assert first.startswith("strongreject:strongreject-15k-v1@")
    changes = {"threshold": [0.3, 0.4], "checkpoint": ["one/beaver-dam-7b", "two/beaver-dam-7b"], "max_length": [256]}
    changes |= {"safe_labels": [["safe"]], "template": ["{prompt}|{response}"], "dtype": ["float32"]}
    judges = [ModerationJudge(**{name: value}) for name, values in changes.items() for value in values]
    names = {judge.label for judge in judges}
    assert len(names) == 8
    assert all(re.fullmatch("moderation:beaver-dam-7b@[0-9a-f]{8}", name) for name in names)
    assert ModerationJudge(threshold=0.3, batch_size=2).label == judges[0].label
