"""A toy tokenizer has one token a character and those that ``merges`` makes, so expected ids are written out by hand."""

import re
import signal
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from casehard.datamodules import chat
from casehard.datamodules.answers import THOUGHTS, answer_and_thoughts, unopened
from casehard.datamodules.chat import (
    collate,
    encode,
    encode_rows,
    prompt_ids,
    read_answers,
    require_chat_template,
    turn_end,
)
from casehard.datamodules.row import Row
from casehard.metrics.errors import SettingError

CHATML = (  # a newline after the end token
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
LLAMA2 = (  # writes BOS, refuses a system turn, opens the answer with a space
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINK = (  # opens an answer to be generated with a think tag, and a finished one without
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }};"
    "{% else %}A:{{ m.content }}{{ eos_token }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>{% endif %}"
)
TRIM = (  # trims every content, ends turns by a token that is not the tokenizer's end token
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN3 = (  # opens the last answer with an empty think block, a generated one only where thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PLAIN = (  # no special token at all; its prompt ends in a space
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
GEMMA = (  # ends turns by a token of its own, and has no system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}{{ m.content | trim }}<end_of_turn>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
PHI3 = (  # ends turns by one token and the text by another
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{{ m.content }}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (  # opens thoughts whatever it is told, and takes them out of a finished turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>{{ '\n' }}{% endif %}"
)
HARMONY = (  # every message in a channel, of which the prompt names none
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ALWAYS = (  # opens the assistant's turn after an answer too
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)
SPECIAL = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    LLAMA2: ["<s>", "</s>", "[INST]", "[/INST]"],
    THINK: ["<think>", "</s>"],
    TRIM: ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "</s>"],
    QWEN3: ["<|im_start|>", "<|im_end|>"],
    PLAIN: ["</s>"],
    GEMMA: ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"],
    PHI3: ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "</s>"],
    R1: ["<s>", "</s>", "<|User|>", "<|Assistant|>"],
    HARMONY: ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "</s>"],
    ALWAYS: ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "</s>"],
}
NAMES = ["chatml", "llama2", "think", "trim", "qwen3", "plain", "gemma", "phi3", "r1", "harmony", "always"]
TEMPLATES = pytest.mark.parametrize("template", SPECIAL, ids=NAMES)


def tokenizer_for(template, merges=()):
    tokens = ["<unk>", *string.printable, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges), unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special = SPECIAL[template]
    backend.add_special_tokens(special)
    roles = {"eos_token": {CHATML: "<|im_end|>", QWEN3: "<|im_end|>", HARMONY: "<|return|>"}.get(template, "</s>")}
    if "<s>" in special:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        roles["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles)
    tokenizer.chat_template = template
    return tokenizer


def asked_and_answered(row, tokenizer, max_length=1000):
    """The tokens of an encoded row, those of the prompt and those that are learnt, after checking that the labels say so."""
    example = encode(row, tokenizer, max_length)
    ids, labels = example["input_ids"], example["labels"]
    start = sum(label == -100 for label in labels)
    assert labels == [-100] * start + ids[start:]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokens[:start], tokens[start:]


def row(*contents, response="ok"):
    return Row(tuple(zip(("user", "assistant") * len(contents), contents, strict=False)), response)


def test_chatml_learns_the_answer_and_its_end_but_not_the_newline_after_it():
    asked, answered = asked_and_answered(row("hi"), tokenizer_for(CHATML))
    assert asked == ["<|im_start|>", *"user\n", *"hi", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
    assert answered == ["o", "k", "<|im_end|>"]


def test_llama2_writes_bos_once_though_its_tokenizer_adds_one():
    tokenizer = tokenizer_for(LLAMA2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi")["input_ids"]) == ["<s>", "h", "i"]  # it would
    asked, answered = asked_and_answered(row("hi"), tokenizer)
    assert asked == ["<s>", "[INST]", *" hi ", "[/INST]"]
    assert answered == [*" ok ", "</s>"]


def test_an_answer_opened_otherwise_than_a_generated_one_follows_the_prompt_of_generation():
    asked, answered = asked_and_answered(row("hi"), tokenizer_for(THINK))
    assert asked == [*"U:hi;A:", "<think>"]
    assert answered == [*"</think>", "o", "k", "</s>"]  # or its thoughts would never end


def test_an_empty_think_block_is_asked_with_and_never_learnt():
    asked, answered = asked_and_answered(row("hi"), tokenizer_for(QWEN3))
    assert "".join(asked).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert answered == ["o", "k", "<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        ("<think>\n\n</think>\n\nNo.", "No.", ""),
        ("\n<think>\nIs it?\nIt is.\n</think>Yes.", "Yes.", "Is it?\nIt is."),
        ("<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),  # the first alone
        ("<think>a</think>", "", "a"),
        ("<think>And so on", None, "And so on"),  # it never came to an answer
        ("Write <think>a</think>.", "Write <think>a</think>.", ""),
        (" No.\n", " No.\n", ""),
    ],
)
def test_leading_thoughts_are_no_answer(text, answer, thoughts):
    assert answer_and_thoughts(text) == (answer, thoughts)


@pytest.mark.parametrize(("opening", "closing"), THOUGHTS.items(), ids=str)
def test_thoughts_are_told_from_the_answer_by_their_marks(opening, closing):
    said = f"\nIs it?\n{closing}\n\nNo."
    assert answer_and_thoughts(f"{opening}{said}") == ("No.", "Is it?")
    assert answer_and_thoughts(f" {opening.lower()}{said}") == ("No.", "Is it?")
    assert answer_and_thoughts(said, f"Asked.\n{opening}\n") == ("No.", "Is it?")  # opened by the template
    assert answer_and_thoughts(f"<|bos|>{opening}{said}<|eot|>", special=["<|bos|>", "<|eot|>", opening, closing]) == (
        "No.",
        "Is it?",
    )
    assert answer_and_thoughts("Is it? It is", f"Asked. {opening}") == (None, "Is it? It is")
    assert answer_and_thoughts(unopened(f"{opening}\n") + "No.", f"{opening}\n") == ("No.", "")
    assert answer_and_thoughts("No.", f"Is {opening} a mark?") == ("No.", "")  # somebody asked about it


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        ("Is it?\n</think>\nNo.", "No.", "Is it?"),  # the model left out the mark that opens
        ("<think>a</think><think>b</think>c", "c", "a\nb"),
        ("<think>a</think><think>b", None, "a\nb"),
        ("<think>a</think><answer>\nb\n</answer>", "b", "a"),
        ("<think>a</think><response>b is cut o", "b is cut o", "a"),
        ("Here is my thought process: first grind it.", "Here is my thought process: first grind it.", ""),  # prose
        ("<answer>b</answer>", "<answer>b</answer>", ""),  # nobody thought
    ],
)
def test_what_stands_around_thoughts_and_answers_is_taken_off(text, answer, thoughts):
    assert answer_and_thoughts(text) == (answer, thoughts)


ANALYSIS = "<|channel|>analysis<|message|>Is it?<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>No."


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        (f"{ANALYSIS}{FINAL}<|return|>", "No.", "Is it?"),
        (f"{FINAL}<|return|>", "No.", ""),
        (f"{ANALYSIS}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{FINAL}", "No.", "Is it?\nI look."),
        (f"{ANALYSIS}<|channel|>commentary to=functions.look <|constrain|>json<|message|>{{}}<|call|>", None, "Is it?\n{}"),
        ("<|channel|>analysis<|message|>Is it", None, "Is it"),
        (f"{ANALYSIS}<|channel|>fin", None, "Is it?"),
        ("<|message|>No.<|return|>", "No.", ""),
    ],
)
def test_of_channels_the_final_one_is_the_answer(text, answer, thoughts):
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"]
    assert answer_and_thoughts(text, "<|start|>assistant", special) == (answer, thoughts)


def test_a_prompt_may_open_a_channel():
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
    opened = "<|start|>assistant<|channel|>analysis<|message|>"
    assert answer_and_thoughts(f"Is it?<|end|><|start|>assistant{FINAL}<|return|>", opened, special) == ("No.", "Is it?")
    assert answer_and_thoughts("Is it", opened, special) == (None, "Is it")


@TEMPLATES
@pytest.mark.parametrize("turns", [("hi",), ("ok", "ok", "ok")], ids=len)
@pytest.mark.parametrize("response", ["ok", "an </s> inside", "o k"])
def test_what_a_row_teaches_is_read_as_its_answer(template, turns, response):
    tokenizer = tokenizer_for(template)
    spoken = row(*turns, response=response)
    example = encode(spoken, tokenizer, 1000)
    learnt = [label for label in example["labels"] if label != -100]
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    stop = next(i for i, token in reversed(list(enumerate(learnt))) if token not in ends) + 2  # where generation stops
    (read,) = read_answers([tokenizer.decode(learnt[:stop])], [spoken], tokenizer)
    said = tokenizer.decode(tokenizer(response, add_special_tokens=False).input_ids, skip_special_tokens=True)
    assert (read.text.strip(), read.thoughts, read.cut) == (said.strip(), "", False)
    assert read_answers(["ok"], [spoken], tokenizer)[0].cut


@pytest.mark.parametrize(
    ("template", "end", "learnt"),
    [
        (CHATML, "<|im_end|>", ["<|im_end|>"]),
        (LLAMA2, "</s>", [" ", "</s>"]),
        (GEMMA, "<end_of_turn>", ["<end_of_turn>", "</s>"]),
        (PHI3, "<|end|>", ["<|end|>", "\n", "</s>"]),
        (TRIM, "<|end|>", ["<|end|>", "</s>"]),
        (ALWAYS, "<|end|>", ["<|end|>", "</s>"]),
        (HARMONY, "<|return|>", ["<|return|>"]),
        (PLAIN, None, ["\n", "</s>"]),
    ],
    ids=["chatml", "llama2", "gemma", "phi3", "trim", "always", "harmony", "plain"],
)
def test_the_templates_own_end_of_a_turn_is_learnt_and_known(template, end, learnt):
    tokenizer = tokenizer_for(template)
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    _, answered = asked_and_answered(row("hi"), tokenizer)
    assert answered[-len(learnt) - 1 :] == ["k", *learnt]


def test_a_message_of_several_channels_does_not_end_where_one_of_them_does():
    tokenizer = tokenizer_for(HARMONY)
    tokenizer.chat_template = HARMONY.replace(
        "'<|return|>' if loop.last and not add_generation_prompt else '<|end|>'", "'<|end|>'"
    )
    assert turn_end(tokenizer) is None


def test_a_template_that_opens_a_turn_after_an_answer_too_is_refused_where_no_token_ends_the_turn():
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.chat_template = PLAIN.replace("{% if add_generation_prompt %}A: {% endif %}", "A: ")
    with pytest.raises(ValueError, match="must open the assistant's turn only where add_generation_prompt asks for it"):
        require_chat_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} ###{{ '\n' }}{% endfor %}"  # opens none, ends all alike
    _, answered = asked_and_answered(row("hi"), tokenizer)
    assert answered == [*"ok ###\n", "</s>"]


@pytest.mark.parametrize(
    ("template", "who"),
    [
        ("Hello.", "user"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), "assistant"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' }}"), "user"),
    ],
    ids=["constant", "without answers", "without prompts"],
)
def test_a_template_that_leaves_out_what_is_said_is_refused(template, who):
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.chat_template = template
    with pytest.raises(
        ValueError, match=f"roles user, assistant must fit the chat template, which leaves out what the {who} says"
    ):
        require_chat_template(tokenizer)


@pytest.mark.parametrize("kept", ["messages[-1:]", "messages | rejectattr('role', 'equalto', 'system')"])
def test_a_template_that_drops_a_turn_without_a_word_is_refused_for_rows_that_have_it(kept):
    tokenizer = tokenizer_for(TRIM)
    tokenizer.chat_template = TRIM.replace("in messages", f"in {kept}")
    spoken = Row((("system", "be"), ("user", "hi")), "ok")
    with pytest.raises(ValueError, match="which leaves out what the system says"):
        prompt_ids(spoken, tokenizer)


@pytest.mark.parametrize("response", ["A", "s", "/", "|", ":", "hi", " ok ", "U:hi;A:"])
def test_an_answer_that_also_occurs_in_the_closing_marks_is_still_found(response):
    template = THINK.replace("{{ eos_token }}|", "/As:|{{ eos_token }}|")
    tokenizer = tokenizer_for(THINK)
    tokenizer.chat_template = template
    _, answered = asked_and_answered(row("hi", response=response), tokenizer)
    assert answered == [*"</think>", *response, *"/As:|", "</s>"]


def test_a_trimmed_answer_is_learnt_as_the_template_writes_it():
    asked, answered = asked_and_answered(row(" hi ", response=" o k\n"), tokenizer_for(TRIM))
    assert asked == ["<|user|>", "h", "i", "<|end|>", "<|assistant|>"]
    assert answered == ["o", " ", "k", "<|end|>", "</s>"]  # <|end|> is the template's, </s> what generation stops at


def test_a_trimmed_answer_that_is_opened_otherwise_is_found():
    tokenizer = tokenizer_for(THINK)
    tokenizer.chat_template = THINK.replace("A:{{ m.content }}", "A:{{ m.content | trim }}")
    _, answered = asked_and_answered(row("say ok\n", response=" ok\n"), tokenizer)  # untrimmed, it occurs in the prompt
    assert answered == [*"</think>", "o", "k", "</s>"]


def test_an_end_token_is_added_where_the_template_writes_none():
    asked, answered = asked_and_answered(row("hi"), tokenizer_for(PLAIN))
    assert asked == [*"Q: hi\nA: "]
    assert answered == ["o", "k", "\n", "</s>"]


def test_merges_inside_the_answer_are_those_of_the_whole_text():
    asked, answered = asked_and_answered(row("ok"), tokenizer_for(PLAIN, merges=[("o", "k"), ("ok", "\n")]))
    assert asked == [*"Q: ", "ok\n", *"A: "]
    assert answered == ["ok\n", "</s>"]


def test_a_merge_across_the_border_leaves_the_prompt_as_generation_sees_it():
    tokenizer = tokenizer_for(PLAIN, merges=[(" ", "o"), ("k", "\n")])
    whole = tokenizer.convert_ids_to_tokens(tokenizer("Q: hi\nA: ok\n")["input_ids"])
    assert whole == [*"Q: hi\nA:", " o", "k\n"]  # the merge that the row must not have
    asked, answered = asked_and_answered(row("hi"), tokenizer)
    assert asked == [*"Q: hi\nA: "]
    assert answered == ["o", "k\n", "</s>"]


def test_a_merge_right_after_the_border_is_kept():
    tokenizer = tokenizer_for(LLAMA2, merges=[(" ", "o")])
    asked, answered = asked_and_answered(row("hi"), tokenizer)
    assert asked == ["<s>", "[INST]", *" hi ", "[/INST]"]
    assert answered == [" o", "k", " ", "</s>"]


def test_earlier_turns_are_context_and_only_the_last_answer_is_learnt():
    asked, answered = asked_and_answered(row("a", "b", "c"), tokenizer_for(LLAMA2))
    assert asked == ["<s>", "[INST]", *" a ", "[/INST]", *" b ", "</s>", "[INST]", *" c ", "[/INST]"]
    assert answered == [*" ok ", "</s>"]


def test_a_system_turn_is_context():
    spoken = Row((("system", "be"), ("user", "hi")), "ok")
    asked, answered = asked_and_answered(spoken, tokenizer_for(TRIM))
    assert asked == ["<|system|>", "b", "e", "<|end|>", "<|user|>", "h", "i", "<|end|>", "<|assistant|>"]
    assert answered == ["o", "k", "<|end|>", "</s>"]


def test_a_system_turn_that_the_template_refuses_is_an_error_that_names_the_roles():
    spoken = Row((("system", "be"), ("user", "hi")), "ok")
    said = r"roles system, user must fit the chat template, which says: Only user and assistant roles are supported!\. Leave out"
    with pytest.raises(ValueError, match=said):
        prompt_ids(spoken, tokenizer_for(LLAMA2))
    with pytest.raises(ValueError, match="roles system, user"):
        encode(spoken, tokenizer_for(LLAMA2), 100)


@TEMPLATES
@pytest.mark.parametrize("merges", [[], [(" ", "o"), ("o", "k"), ("\n", "o"), (":", " "), (":", "o")]], ids=["plain", "merged"])
@pytest.mark.parametrize("turns", [("hi",), ("ok", "ok", "ok"), ("o", "k", " ok ", "hi", "ok")], ids=len)
@pytest.mark.parametrize("response", ["ok", "k", " ok", "ok ok"])
def test_every_row_starts_with_what_generation_sees_and_ends_in_one_end_token(template, merges, turns, response):
    tokenizer = tokenizer_for(template, merges)
    spoken = row(*turns, response=response)
    prompt = prompt_ids(spoken, tokenizer)
    example = encode(spoken, tokenizer, 1000)
    answer = example["input_ids"][len(prompt) :]
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"] == [-100] * len(prompt) + answer
    assert answer.count(tokenizer.eos_token_id) == 1
    assert answer[-1] == tokenizer.eos_token_id
    assert response.strip() in tokenizer.decode(answer)
    off = {"enable_thinking": False}  # which most templates do not know
    rendered = tokenizer.apply_chat_template(spoken.chat(), add_generation_prompt=True, tokenize=False, **off)
    assert tokenizer.decode(prompt) == rendered


@TEMPLATES
def test_prompt_ids_do_not_look_at_the_response(template):
    tokenizer = tokenizer_for(template)
    assert prompt_ids(row("hi", response=None), tokenizer) == prompt_ids(row("hi", response="ok"), tokenizer)


def test_a_row_is_cut_on_the_right():
    tokenizer = tokenizer_for(LLAMA2)  # <s> [INST] _ h i _ [/INST] | _ o k _ </s>
    whole = encode(row("hi"), tokenizer, 12)
    assert len(whole["input_ids"]) == 12
    assert encode(row("hi"), tokenizer, 13) == whole
    cut = encode(row("hi"), tokenizer, 9)
    assert cut == {"input_ids": whole["input_ids"][:9], "labels": whole["labels"][:9]}
    assert [label != -100 for label in encode(row("hi"), tokenizer, 8)["labels"]] == [False] * 7 + [True]
    assert encode(row("hi"), tokenizer, 7) is None
    assert encode(row("hi"), tokenizer, 1) is None


def test_rows_cut_off_before_their_answer_are_dropped_and_counted():
    tokenizer = tokenizer_for(LLAMA2)
    rows = [row("hi"), row("a much longer question"), row("yo"), row("another long question")]
    examples, num_dropped = encode_rows(rows, tokenizer, 12)
    assert examples == [encode(rows[0], tokenizer, 12), encode(rows[2], tokenizer, 12)]
    assert num_dropped == 2


def test_a_max_length_that_leaves_no_answer_is_refused():
    rows = [row("hi"), row("a much longer question")]
    message = r"max_length must leave room for an answer, got 7, which cuts off every one of 2 rows\. The shortest needs 8"
    with pytest.raises(ValueError, match=message):
        encode_rows(rows, tokenizer_for(LLAMA2), 7)
    assert encode_rows(rows, tokenizer_for(LLAMA2), 8)[1] == 1  # as the message promises


def test_an_answer_that_the_template_rewrites_is_refused():
    tokenizer = tokenizer_for(THINK)
    tokenizer.chat_template = THINK.replace("A:{{ m.content }}", "A:{{ m.content.split('>')[-1] }}")
    with pytest.raises(ValueError, match=r"chat template must write an answer as it is, .* Take out of the answers"):
        encode(row("hi", response="<b>ok"), tokenizer, 100)


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tokenizer_for(PLAIN)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"must have an end token, got none\. Set its eos_token"):
        encode(row("hi"), tokenizer, 100)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = tokenizer_for(CHATML)
    require_chat_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"must have a chat template, got none\. .*chat_template\.jinja"):
        require_chat_template(tokenizer)


EXAMPLES = [
    {"input_ids": [5, 6, 0], "labels": [-100, 6, 0]},  # 0, the end token, pads too
    {"input_ids": [7, 8, 9, 4, 0], "labels": [-100, -100, 9, 4, 0]},
]


def test_right_padding_by_hand():
    batch = collate(EXAMPLES, pad_token_id=0, padding_side="right")
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [7, 8, 9, 4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, -100], [-100, -100, 9, 4, 0]]


def test_left_padding_by_hand():
    batch = collate(EXAMPLES, pad_token_id=0, padding_side="left")
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 0], [7, 8, 9, 4, 0]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 0], [-100, -100, 9, 4, 0]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_padding_side_changes_nothing_but_the_place_of_the_pads(padding_side):
    tokenizer = tokenizer_for(CHATML)
    examples, _ = encode_rows([row("hi"), row("a longer one", response="no"), row("a", "b", "c")], tokenizer, 1000)
    batch = collate(examples, tokenizer.eos_token_id, padding_side)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    for i, example in enumerate(examples):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == example["input_ids"]
        assert batch["labels"][i][real].tolist() == example["labels"]
        assert (batch["labels"][i][~real] == -100).all()
    assert all(t.dtype == torch.int64 and t.shape == batch["labels"].shape for t in batch.values())


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "(TimeoutError)"),
        ("{{ 'x' * 10 ** 18 }}", "(MemoryError)"),
        ("{{ 'x' * 10 ** 30 }}", "(OverflowError)"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 2000000 }}", "must add at most 1,000,000 letters to a row, got 2,000,0"),
    ],
)  # fmt: skip
def test_a_template_without_end_or_bound_is_refused(monkeypatch, template, why):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    tokenizer = tokenizer_for(CHATML)
    tokenizer.chat_template = template
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(SettingError, match=re.escape(why)):
        chat.require_chat_template(tokenizer)
    assert signal.getsignal(signal.SIGALRM) == before
