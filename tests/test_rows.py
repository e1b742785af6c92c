import hashlib
import json
import os

import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from casehard.datamodules.fingerprint import Origin, digest, origin
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows

RECORDS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(5)]
ROWS = [Row((("user", f"question {i}"),), f"answer {i}") for i in range(5)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def jsonl(*records, path="rows.jsonl"):
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_every_kind_of_file_and_folder_gives_the_same_rows(tmp_path):
    data = Dataset.from_list(RECORDS)
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=2))
    jsonl(*RECORDS, path="lines.jsonl")
    data.to_csv("table.csv", index=False)
    data.to_parquet("table.parquet")
    data.save_to_disk("saved")
    DatasetDict({"train": data}).save_to_disk("saved_dict")
    (tmp_path / "folder").mkdir()
    jsonl(*RECORDS, path="folder/train.jsonl")
    (tmp_path / "csvs").mkdir()
    data.to_csv("csvs/rows.csv", index=False)
    for source in ("list.json", "lines.jsonl", "table.csv", "table.parquet", "saved", "saved_dict", "folder", "csvs"):
        assert read_rows(source) == ROWS, source
        assert read_rows(str(tmp_path / source)) == ROWS, source
        assert read_rows(f"{source}#train[1:3]") == ROWS[1:3], source


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", ROWS),
        ("#train", ROWS),
        ("#train[:2]", ROWS[:2]),
        ("#train[-2:]", ROWS[-2:]),
        ("#train[:40%]", ROWS[:2]),
        ("#train[3:]+train[:1]", [*ROWS[3:], ROWS[0]]),
        ("#train[:900]", ROWS),
    ],
)
def test_a_source_may_end_in_a_slice(spec, expected):
    assert read_rows(jsonl(*RECORDS) + spec) == expected


def test_a_folder_may_hold_several_splits():
    data = Dataset.from_list(RECORDS)
    DatasetDict({"train": data.select([0, 1]), "test": data.select([2])}).save_to_disk("saved")
    assert read_rows("saved") == ROWS[:2]
    assert read_rows("saved#test") == ROWS[2:3]
    assert read_rows("saved#test+train[:1]") == [ROWS[2], ROWS[0]]


def test_a_name_may_hold_a_hash_where_a_split_is_given_or_a_folder_follows(tmp_path):
    (tmp_path / "c#").mkdir()
    assert read_rows(jsonl(*RECORDS, path="c#/rows.jsonl")) == ROWS
    assert read_rows(jsonl(*RECORDS, path="c#.jsonl") + "#train") == ROWS


def test_a_hub_id_is_loaded_by_datasets_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments):  # there is no hub in a test
        asked.append(arguments)
        return DatasetDict({"train": Dataset.from_list(RECORDS), "test": Dataset.from_list(RECORDS[:1])})

    monkeypatch.setattr("casehard.datamodules.sources.load_dataset", load_dataset)
    assert read_rows("owner/name") == ROWS
    assert read_rows("owner/name:main#test") == ROWS[:1]
    assert read_rows("name.v1#train[:2]") == ROWS[:2]
    assert asked == [("owner/name", None), ("owner/name", "main"), ("name.v1", None)]


def test_a_hub_id_without_its_configuration_is_an_error_that_says_how_to_name_it(monkeypatch):
    def load_dataset(*arguments):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr("casehard.datamodules.sources.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"(?s)owner/name could not be loaded: .*'main', 'socratic'.* owner/name:CONFIG"):
        read_rows("owner/name")


def test_the_sandbox_is_a_source():
    from casehard.datamodules.sandbox import sandbox_rows

    assert read_rows("sandbox:test/harmful") == sandbox_rows("test", "harmful")
    assert read_rows("sandbox:test/harmful#train[:3]") == sandbox_rows("test", "harmful")[:3]


def test_a_file_is_known_by_its_bytes_and_all_else_by_its_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n')
    whole, part = (origin("harmful", source, read_rows(source)) for source in (str(file), f"{file}#train[:1]"))
    assert whole == Origin("harmful", str(file), 1, hashlib.sha256(file.read_bytes()).hexdigest())
    assert part.sha256 == whole.sha256
    text = '[{"role": "user", "content": "p\u00e4"}, {"role": "assistant", "content": ""}]\n'
    assert digest([Row((("user", "p\u00e4"),))]) == hashlib.sha256(text.encode()).hexdigest()
    first, other = (origin("task", f"sandbox:test/mood#train[:{n}]", read_rows(f"sandbox:test/mood#train[:{n}]")) for n in (2, 3))
    assert first.sha256 != other.sha256


def test_a_changed_file_or_folder_is_read_anew_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    for records, rows in ((RECORDS, ROWS), (RECORDS[:2], ROWS[:2]), (RECORDS[2:4], ROWS[2:4])):  # the last two of one size
        data = Dataset.from_list(records)
        data.to_parquet("rows.parquet")
        data.to_csv("rows.csv", index=False)
        jsonl(*records, path="folder/rows.jsonl")
        for path in ("rows.parquet", "rows.csv", "folder/rows.jsonl"):
            os.utime(path, (0, 0))  # as after a copy that keeps time stamps
        for source in ("rows.parquet", "rows.csv", "folder"):
            assert read_rows(source) == rows
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "rows.csv", "rows.jsonl", "rows.parquet"]


CHATS = [
    ({"instruction": "Add.", "output": "3"}, Row((("user", "Add."),), "3")),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, Row((("user", "Add.\n\n1, 2"),), "3")),
    ({"instruction": "Add.", "input": "", "output": "3"}, Row((("user", "Add."),), "3")),
    ({"question": "1 + 2?", "answer": "3", "id": 7}, Row((("user", "1 + 2?"),), "3")),
    ({"Question ": "1 + 2?", " ANSWER": "3"}, Row((("user", "1 + 2?"),), "3")),  # as spreadsheets have them
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]},
        Row((("user", "hi"),), "ok"),
    ),
    (
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]},
        Row((("user", "hi"),), "ok"),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "be"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ]
        },
        Row((("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")), "d"),
    ),
    (
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Row((("user", "a"),), "b"),  # the conversation says more than the prompt alone
    ),
    ({"prompt": "a", "completion": "b"}, Row((("user", "a"),), "b")),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Row((("user", "a"),), "b")),
    ({"query": "a", "response": "b", "type": "GSM"}, Row((("user", "a"),), "b")),
    ({"input": "a", "output": "b"}, Row((("user", "a"),), "b")),
    ({"prompt": "a", "output": "b"}, Row((("user", "a"),), "b")),
    (
        {"instruction": "Who?", "context": "Ada was first.", "response": "Ada", "category": "closed_qa"},
        Row((("user", "Who?\n\nAda was first."),), "Ada"),
    ),
    ({"question": "Who?", "context": "Ada was first.", "answer": "Ada"}, Row((("user", "Who?\n\nAda was first."),), "Ada")),
    ({"system_prompt": "Be brief.", "question": "a", "response": "b"}, Row((("system", "Be brief."), ("user", "a")), "b")),
    (
        {"system": "s", "instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]]},
        Row((("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd")), "e"),
    ),
    (
        {"prompt": "c", "response": "d", "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Row((("user", "a"), ("assistant", "b"), ("user", "c")), "d"),
    ),
    (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1.0}]},
        Row((("system", "s"), ("user", "a")), "b"),
    ),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        Row((("user", "a"),), "b"),
    ),
    (
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
        Row((("system", "s"), ("user", "a")), "b"),
    ),
    (
        {"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "score_chosen": 7},
        Row((("user", "a"),), "b"),
    ),
    ({"messages": [{"role": "user", "content": "a"}], "response": "b"}, Row((("user", "a"),), "b")),
]


@pytest.mark.parametrize(("record", "expected"), CHATS)
def test_every_form_of_row_is_read(record, expected):
    assert read_rows(jsonl(record)) == [expected]
    assert read_rows(jsonl(record), needs_response=False) == [expected]


def test_rows_of_several_forms_may_share_a_file_or_a_table():
    records = [
        {"prompt": "p", "response": "r"},
        {"messages": CHATS[5][0]["messages"]},
        {"conversations": CHATS[7][0]["conversations"]},
    ]
    expected = [Row((("user", "p"),), "r"), CHATS[5][1], CHATS[7][1]]
    assert read_rows(jsonl(*records)) == expected
    columns = ("prompt", "response", "messages", "conversations")
    Dataset.from_list([{column: record.get(column) for column in columns} for record in records]).to_parquet("rows.parquet")
    assert read_rows("rows.parquet") == expected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a"},
        {"prompt": "a", "response": None},
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": " \n"},
        {"instruction": "a"},
        {"question": "a"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
    ],
)
def test_a_row_without_a_response_is_none_or_an_error_as_asked(record):
    source = jsonl(RECORDS[0], record)
    assert read_rows(source, needs_response=False) == [ROWS[0], Row((("user", "a"),), None)]
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 2 must have a response, but it has none\. Add the answer"):
        read_rows(source)


def test_a_conversation_that_ends_in_a_question_keeps_its_turns():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (row,) = read_rows(jsonl({"messages": turns}), needs_response=False)
    assert row == Row((("user", "a"), ("assistant", "b"), ("user", "c")), None)
    assert row.prompt.endswith("User: c")  # the whole conversation
    assert row.chat() == turns


def test_a_row_is_hashable_and_gives_its_turns_to_a_template():
    row = Row((("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")), "d")
    assert len({row, Row(row.messages, "d"), Row(row.messages, "e")}) == 2
    assert row.prompt.endswith("User: c")  # the whole conversation
    assert [turn["role"] for turn in row.chat()] == ["system", "user", "assistant", "user"]
    assert row.chat(answered=True) == [*row.chat(), {"role": "assistant", "content": "d"}]


def test_text_is_kept_to_the_character(tmp_path):
    prompt, response = " a\u2028b\x0c\tc  ", '\n straße, 你好 "x"\r\n'
    expected = [Row((("user", prompt),), response)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False), "utf-8")
    assert read_rows("rows.jsonl") == expected
    Dataset.from_list([{"prompt": prompt, "response": response}]).to_parquet("rows.parquet")
    assert read_rows("rows.parquet") == expected
    (tmp_path / "rows.csv").write_bytes('\ufeffprompt,response\r\n" a\u2028b\x0c\tc  ","\n straße, 你好 ""x""\r\n"\r\n'.encode())
    assert read_rows("rows.csv") == expected


def test_csv_values_stay_text(tmp_path):
    (tmp_path / "sums.csv").write_text("question,answer\n3 + 4?,7\nIs there one?,None\nAnd here?,NA\n1.50?,1.50\n")
    assert [row.response for row in read_rows("sums.csv")] == ["7", "None", "NA", "1.50"]


@pytest.mark.parametrize("source", ["nowhere.jsonl", "no/such/folder/", "owner/name", "nothing", "", "rows.json#train"])
def test_a_source_that_is_nowhere_is_refused(source):
    missing = r"must name rows, but neither a file, a folder nor a reachable hub id has this name\. Check the spelling"
    with pytest.raises(FileNotFoundError, match=missing):
        read_rows(source)


def test_a_format_is_no_source_whatever_the_working_directory_holds(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,response\na,b\n")
    with pytest.raises(FileNotFoundError, match=r"^'csv' must name rows, but neither a file, a folder nor a reachable hub id"):
        read_rows("csv")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/other.csv").write_text("prompt,response\nc,d\n")
    assert read_rows("csv") == [Row((("user", "c"),), "d")]


def test_empty_sources_are_refused(tmp_path):
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"^{name} must hold at least one row, but the file is empty"):
            read_rows(name)
    for name, text in (("rows.json", "[]"), ("rows.jsonl", "\n\n"), ("rows.csv", "prompt,response\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^{name} must hold at least one row, got none"):
            read_rows(name)
    Dataset.from_dict({"prompt": [], "response": []}).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match=r"^rows\.parquet must hold at least one row, got none"):
        read_rows("rows.parquet")
    with pytest.raises(ValueError, match=r"train\[7:\] must hold at least one row, got none\. Check the file, and the slice"):
        read_rows(jsonl(*RECORDS) + "#train[7:]")


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^folder must hold data files \(\.json.*got neither\. Check the folder"):
        read_rows("folder")


def test_an_unknown_extension_is_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "rows").write_text("x")
    with pytest.raises(ValueError, match=r"^rows\.xlsx must end in \.json, \.jsonl, \.csv, \.parquet, got \.xlsx\. Convert"):
        read_rows("rows.xlsx")
    with pytest.raises(ValueError, match=r"^rows must end in .*, got no extension\."):
        read_rows("rows")


@pytest.mark.parametrize("spec", ["test", "train[", "train[:x]"])
def test_an_unknown_split_is_refused(spec):
    with pytest.raises(ValueError, match=r"its splits are train \(.*\)\. Write, for example, rows\.jsonl#train\[:100\]"):
        read_rows(jsonl(*RECORDS) + "#" + spec)


def test_errors_count_the_lines_of_a_file_and_not_those_of_a_slice(tmp_path):
    lines = [json.dumps(RECORDS[0]), "", "  ", json.dumps(RECORDS[1]), json.dumps({"prompt": "a"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for source in ("rows.jsonl", "rows.jsonl#train[1:]"):
        with pytest.raises(ValueError, match=r"^rows\.jsonl, line 5 must have a response"):
            read_rows(source)
    assert read_rows("rows.jsonl#train[:2]") == ROWS[:2]


def test_errors_count_rows_where_a_row_is_not_a_line(tmp_path):
    records = [*RECORDS[:2], {"prompt": "a", "response": None}]
    (tmp_path / "rows.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "rows.csv").write_text('prompt,response\n"two\nlines",b\nc,d\na,\n')
    Dataset.from_list(records).to_parquet("rows.parquet")
    for source in ("rows.json", "rows.csv", "rows.parquet", "rows.parquet#train[2:]"):
        with pytest.raises(ValueError, match=r"^rows\.\w+, row 3 must have a response"):
            read_rows(source)
    data = Dataset.from_list(records)
    DatasetDict({"train": data.select([0]), "test": data}).save_to_disk("saved")
    with pytest.raises(ValueError, match=r"^saved#test, row 3 must have a response"):
        read_rows("saved#test")


def test_malformed_json_is_refused_by_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{json.dumps(RECORDS[0])}\n\n{{"prompt": "a" "response"}}\n')
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 3 must be one JSON object: Expecting ',' delimiter \(column 16\)"):
        read_rows("rows.jsonl")
    (tmp_path / "rows.json").write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')
    with pytest.raises(ValueError, match=r"^rows\.json, line 3 must be JSON: Expecting ':' delimiter"):
        read_rows("rows.json")


def test_json_lines_and_json_lists_under_each_others_names_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, RECORDS)))
    with pytest.raises(
        ValueError, match=r"^rows\.json, line 2 must be JSON: Extra data .* one JSON object a line is named \.jsonl"
    ):
        read_rows("rows.json")
    (tmp_path / "rows.json").write_text('{"train": []}')
    with pytest.raises(
        ValueError, match=r"^rows\.json must hold one JSON list of rows, got an object\. Wrap the rows in \[ and \]"
    ):
        read_rows("rows.json")
    (tmp_path / "rows.jsonl").write_text(json.dumps(RECORDS))
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 1 must be an object with columns, got a list\."):
        read_rows("rows.jsonl")


def test_files_that_are_not_what_they_are_named_are_refused(tmp_path):
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"^rows\.parquet must be a parquet file \(.*Parquet magic .*\)\. Mend it"):
        read_rows("rows.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a" "response"}')
    with pytest.raises(ValueError, match=r"^folder/train\.jsonl, line 1 must be one JSON object: Expecting"):
        read_rows("folder")
    (tmp_path / "rows.csv").write_text('prompt,response\na,"b\nc,d\n')
    with pytest.raises(ValueError, match=r"^rows\.csv, line 3 must be CSV: unexpected end of data\. Mend it"):
        read_rows("rows.csv")
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\nc,yes, sure\n")
    with pytest.raises(
        ValueError, match=r"^rows\.csv, row 2 must have a value a column, got more\. Quote values that hold a comma"
    ):
        read_rows("rows.csv")


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a", "label": 1},
            r"must have columns that are known, got text, label\. Accepted are prompt and response, .*rename",
        ),
        ({"text": None}, r"must have columns that are known, got text\."),
        ({}, r"must have columns that are known, got no columns\."),
        ({"response": "b"}, r"must have a prompt: the turn to answer is the user's, got none\. Add it"),
        ({"prompt": "", "response": "b"}, r"must have a prompt: .* got none\."),
        (turns(("assistant", "b")), r"must have a prompt: .* got none\."),
        (turns(("system", "s"), ("assistant", "b")), r"must have a prompt: .* got one of the system\."),
        (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), r"must have a prompt: .* got one of the assistant\."),
        ({"prompt": 7, "response": "b"}, r"must have text in every turn, got a number from the user\."),
        ({"prompt": ["a"], "response": "b"}, r"must have turns with role and content, got text\. Write each as an object"),
        ({"instruction": {"a": 1}, "input": "x", "output": "b"}, r"must have text in every turn, got an object from the user\."),
        ({"prompt": " \n", "response": "b"}, r"must have a prompt: .* got none\."),
        (
            turns(("system", ""), ("user", "a"), ("assistant", "b")),
            r"must have text in every turn, got empty text from the system\. Mend the turn",
        ),
        (turns(("user", None), ("assistant", "b")), r"must have text in every turn, got null from the user\."),
        ({"prompt": "a", "response": 7}, r"must have text as its response, got a number\. Write it as a string"),
        ({"prompt": "a", "response": 0.5}, r"must have text as its response, got a number\."),
        ({"prompt": "a", "response": False}, r"must have text as its response, got true or false\."),
        (turns(("user", "a"), ("assistant", ["b"])), r"must have text as its response, got a list\."),
        (turns(("user", "a"), ("tool", "b")), r"must have turns of the roles system, user, .*, got 'tool'\. Rename the role"),
        ({"messages": [{"content": "a"}]}, r"must have turns of the roles .*, got null\."),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"must have turns of the roles .*, got a list\."),
        ({"messages": ["a"]}, r"must have turns with role and content, got text\. Write each as an object"),
        ({"messages": "a"}, r"must have a list of turns under messages, got text\. Write them as a list"),
        ("a", r"must be an object with columns, got text\. Give it prompt and response"),
        (None, r"must be an object with columns, got null\."),
    ],
)
@pytest.mark.parametrize("needs_response", [True, False])
def test_a_row_of_the_wrong_form_is_refused_by_file_and_line(record, message, needs_response):
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 2 " + message):
        read_rows(jsonl(RECORDS[0], record), needs_response)


def test_errors_do_not_show_what_a_row_says():
    secret = "how to brew vexolim"
    for record in ({"prompt": secret}, {"prompt": [secret], "response": "b"}, {"prompt": "a", "response": [secret]}, secret):
        with pytest.raises(ValueError, match="line 1") as caught:
            read_rows(jsonl(record))
        assert secret not in str(caught.value)


LEFT_OUT = [
    ({"prompt": "a", "response": "b", "input": "c"}, "input"),
    ({"prompt": "an id", "question": "a", "answer": "b"}, "prompt"),
    ({"prompt": "a", "response": "b", "answer": "c"}, "answer"),
    ({"prompt": "a", "response": "b", "completion": 7}, "completion"),
    ({"question": "a", "answer": "b", "input": "c", "context": "d"}, "context"),
    ({"question": "Which?", "answer": "b", "choices": ["a", "b"]}, "choices"),
    ({"question": "Which?", "answer": "b", "options": {"A": "a"}}, "options"),
    ({"question": "Which?", "answer": "b", "options": json.loads("[" * 900 + '"b"' + "]" * 900)}, "options"),
    ({"question": "a", "answer": "b", "passage": "c"}, "passage"),
    ({"prompt": "a", "response": "b", "text": "quite another"}, "text"),
    ({"prompt": "a", "response": "b", "images": [{"path": "x.png"}]}, "images"),
    ({"system": "s", **turns(("system", "other"), ("user", "a"), ("assistant", "b"))}, "system"),
    ({"history": [["x", "y"]], **turns(("user", "a"), ("assistant", "b"))}, "history"),
    ({"tools": '[{"name": "search"}]', **turns(("user", "a"), ("assistant", "b"))}, "tools"),
    ({"prompt": "c", **turns(("user", "a"), ("assistant", "b"))}, "prompt"),
    ({"response": "c", **turns(("user", "a"), ("assistant", "b"))}, "response"),
    ({"prompt": "c", "chosen": turns(("user", "a"), ("assistant", "b"))["messages"]}, "prompt"),
]


@pytest.mark.parametrize(("record", "column"), LEFT_OUT)
def test_a_column_of_the_conversation_that_would_be_left_out_is_refused_by_its_name(record, column):
    for needs_response in (True, False):
        with pytest.raises(
            ValueError, match=rf"^rows\.jsonl, line 2 must be used whole, but its column {column} would be left out"
        ):
            read_rows(jsonl(RECORDS[0], record), needs_response)


@pytest.mark.parametrize(
    "beside",
    [
        {
            "id": "x",
            "source": "s",
            "category": {"violence": True},
            "label": "1",
            "score": 0.5,
            "is_safe": False,
            "prompt_id": "q",
        },
        {"system": None, "history": [], "context": float("nan"), "tools": "", "images": [], "choices": {}, "input": " "},
        {"text": "### Instruction:\nadd up\n\n### Response:\nthree"},  # the row in a template
        {"instruction": "add up", "output": "three\n"},  # the same again
        {"messages": [{"role": "user", "content": "add up"}, {"role": "assistant", "content": "three"}]},
        {"rejected": "four", "response_1": "five", "completions": ["six"]},  # of several answers one is told to be the row's
    ],
)
def test_a_column_about_the_row_or_of_what_it_says_already_is_left_alone(beside):
    assert read_rows(jsonl({"prompt": "add up", "response": "three", **beside})) == [Row((("user", "add up"),), "three")]


def test_answers_none_of_which_is_the_rows_own_are_refused_where_answers_are_used():
    for beside in ({"rejected": "b"}, {"response_0": "b", "response_1": "c"}, {"answers": {"text": ["b"]}}):
        source = jsonl({"prompt": "a", **beside})
        assert read_rows(source, needs_response=False) == [Row((("user", "a"),))]
        for needs_response in (True, False):
            with pytest.raises(
                ValueError, match=rf"^rows\.jsonl, line 1 must be used whole, but its column {next(iter(beside))} "
            ):
                read_rows(source, needs_response, uses_response=True)


def reply(**keys):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a", "input": 0, "output": "b"}, r"must have text under input, got a number\. Write it as a string"),
        ({"instruction": "a", "input": False, "output": "b"}, r"must have text under input, got true or false\."),
        ({"question": "a", "context": ["c"], "answer": "b"}, r"must have text under context, got a list\."),
        ({"instruction": float("nan"), "output": "b"}, r"must have a prompt: .* got none\."),
        ({"instruction": float("inf"), "output": "b"}, r"must have text in every turn, got a number from the user\."),
        ({"prompt": "a", "response": "b", "system": 7}, r"must have text under system, got a number\."),
        ({"prompt": "a", "response": "b", "history": "c"}, r"must have pairs of question and answer under history, got text\."),
        (
            {"prompt": "a", "response": "b", "history": [["c"]]},
            r"must have pairs of question and answer under history, got a list",
        ),
        ({"prompt": "a", "response": "b", "history": [["c", 7]]}, r"must have text in every turn, got a number from the assist"),
        ({"prompt": "a", "Prompt": "c", "response": "b"}, r"must have one column prompt, got several\. Take all but one out"),
        (reply(tool_calls=[{"name": "f"}]), r"must have turns of role and content alone, got tool_calls from the assistant\."),
        (reply(reasoning_content="hm"), r"must have turns of role and content alone, got reasoning_content from the assistant"),
        (reply(value="c"), r"must have one of content and value in a turn, got two that differ\. Take one out"),
        (reply(weight=0), r"must be learnt from its last answer, but weight says otherwise there\. Take the flag or the row out"),
        (reply(weight=0.5), r"must be learnt from its last answer, but weight says otherwise"),
        (reply(train=False), r"must be learnt from its last answer, but train says otherwise"),
        (turns(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), r"must have text in every turn, got a list from"),
    ],
)
def test_a_value_that_is_no_text_is_refused_by_file_and_line(record, message):
    for needs_response in (True, False):
        with pytest.raises(ValueError, match=r"^rows\.jsonl, line 2 " + message):
            read_rows(jsonl(RECORDS[0], record), needs_response)


def test_no_number_and_no_gap_of_a_frame_becomes_text(tmp_path):
    frame = [{"instruction": "a", "input": 12.0, "output": "b"}, {"instruction": "c", "input": float("nan"), "output": "d"}]
    (tmp_path / "rows.json").write_text(json.dumps(frame))
    Dataset.from_list(frame).to_parquet("rows.parquet")
    Dataset.from_list(frame).save_to_disk("saved")
    for source in ("rows.json", "rows.parquet", "saved"):
        with pytest.raises(ValueError, match=rf"^{source}, row 1 must have text under input, got a number"):
            read_rows(source)
        assert read_rows(f"{source}#train[1:]") == [Row((("user", "c"),), "d")]


HALF = "cut \ud83d"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": HALF, "response": "b"}, "in every turn, got half of a surrogate pair from the user"),
        ({"prompt": "a", "response": HALF}, "as its response, got half of a surrogate pair"),
        ({"prompt": "a", "response": "b", "system": HALF}, "in every turn, got half of a surrogate pair from the system"),
        ({"instruction": "a", "input": HALF, "output": "b"}, "in every turn, got half of a surrogate pair from the user"),
        (
            turns(("user", "a"), ("assistant", HALF), ("user", "b"), ("assistant", "c")),
            "in every turn, got half .* the assistant",
        ),
        ({"prompt": "a\0", "response": "b"}, "in every turn, got a NUL character from the user"),
    ],
)
def test_a_text_that_no_tokenizer_takes_is_refused_by_its_line(record, message):
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 2 must have text " + message):
        read_rows(jsonl(RECORDS[0], record))
    whole = json.loads(json.dumps(record).replace("\\ud83d", "\\ud83d\\ude00").replace("\\u0000", ""))
    assert len(read_rows(jsonl(RECORDS[0], whole))) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "folder/train.csv"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r", line 3 must be UTF-8 text, got the byte 0xe9\. Save the file as UTF-8\."),
        ("utf-16", r", line 1 must be UTF-8 text, got a NUL, as UTF-16 has them\."),
        ("utf-16-le", r", line 1 must be UTF-8 text, got a NUL, as UTF-16 has them\."),
    ],
)
def test_another_encoding_is_refused_by_file_and_line(name, encoding, message, tmp_path):
    (tmp_path / "folder").mkdir()
    lines = ["question,answer", "a,b", "café,c"]
    if name == "rows.jsonl":
        lines = [json.dumps(RECORDS[0]), "", '{"prompt": "café", "response": "b"}']
    elif name == "rows.json":
        lines = ["[", '{"prompt": "a", "response": "b"},', '{"prompt": "café", "response": "b"}]']
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(ValueError, match="^" + name.replace(".", r"\.") + message):
        read_rows(name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + message):
        read_rows(name.partition("/")[0])
    (tmp_path / name).write_bytes("\n".join(lines).encode("utf-8-sig"))
    assert read_rows(name.partition("/")[0])[-1].prompt == "café"


def test_texts_of_a_parquet_file_that_are_not_utf_8_are_refused_by_their_row():
    raw = pyarrow.array([b"a", b"\xe9", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": raw, "response": ["x", "y", "z"]}), "rows.parquet")
    with pytest.raises(ValueError, match=r"^rows\.parquet, row 2 must be UTF-8 text, got other bytes\. Write the file anew"):
        read_rows("rows.parquet")


def test_json_that_no_reader_takes_is_refused_by_its_line(tmp_path):
    deep, long = "[" * 100_000 + "]" * 100_000, "1" * 5000
    for value, message in ((deep, "nested too deep to be read"), (long, "a number is too long to be read")):
        (tmp_path / "rows.jsonl").write_text(f'{json.dumps(RECORDS[0])}\n{{"prompt": "a", "id": {value}}}\n')
        with pytest.raises(ValueError, match=rf"^rows\.jsonl, line 2 must be one JSON object: {message}\. Mend the line"):
            read_rows("rows.jsonl")
        (tmp_path / "rows.json").write_text(f"[{value}]")
        with pytest.raises(ValueError, match=rf"^rows\.json must be JSON: {message}\."):
            read_rows("rows.json")


def test_a_key_or_a_column_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b", "prompt": "c"}')
    with pytest.raises(
        ValueError, match=r"^rows\.jsonl, line 2 must be an object with columns, got an object that has prompt twice"
    ):
        read_rows("rows.jsonl")
    turn = '{"role": "user", "content": "a", "content": "b"}'
    (tmp_path / "rows.json").write_text(f'[\n{json.dumps(RECORDS[0])},\n{{"messages": [{turn}]}}]')
    with pytest.raises(
        ValueError, match=r"^rows\.json, row 2 must have turns with role and content, got an object that has content"
    ):
        read_rows("rows.json")
    (tmp_path / "rows.csv").write_text("prompt,response,prompt\na,b,c\n")
    with pytest.raises(ValueError, match=r"^rows\.csv must name each column once, got prompt twice\. Rename one"):
        read_rows("rows.csv")
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), "rows.parquet")
    with pytest.raises(ValueError, match=r"^rows\.parquet must be a parquet file \(Multiple matches for .*prompt"):
        read_rows("rows.parquet")


def test_a_folder_reads_like_its_files(tmp_path):
    texts = [
        {"question": "1.50?", "answer": "007"},
        {"question": "Who?", "answer": "None"},
        {"question": "2024-01-01", "answer": "NA"},
    ]
    expected = [Row((("user", text["question"]),), text["answer"]) for text in texts]
    data = Dataset.from_list(texts)
    for folder in ("csv", "jsonl", "json", "parquet", "several", "dirs/train", "dirs/test"):
        (tmp_path / folder).mkdir(parents=True)
    data.to_csv("csv/train.csv", index=False)
    jsonl(*texts, path="jsonl/rows.jsonl")
    (tmp_path / "json/rows.json").write_text(json.dumps(texts))
    data.to_parquet("parquet/rows[1].parquet")
    for i in range(3):
        data.select([i]).to_csv(f"several/rows-{i}.csv", index=False)
        data.select([i]).to_csv(f"dirs/{'test' if i == 2 else 'train'}/{i}.csv", index=False)
    for folder in ("csv", "jsonl", "json", "parquet", "several"):
        assert read_rows(folder) == read_rows(str(tmp_path / folder)) == expected, folder
        assert read_rows(f"{folder}#train[1:]") == expected[1:], folder
    assert read_rows("dirs") == expected[:2]
    assert read_rows("dirs#test+train[1:]") == [expected[2], expected[1]]
    (tmp_path / "link").symlink_to("several")
    assert read_rows("link") == expected
    with (tmp_path / "several/rows-1.csv").open("a") as file:
        file.write("a,\n")
    with pytest.raises(ValueError, match=r"^several/rows-1\.csv, row 2 must have a response"):
        read_rows("several")


def test_a_file_that_a_folder_would_leave_out_is_refused(tmp_path):
    for folder, names in (
        ("formats", ("a.csv", "b.csv", "c.jsonl")),
        ("split", ("train.csv", "more.csv")),
        ("capitals", ("a.csv", "B.CSV")),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("prompt,response\na,b\n")
        with pytest.raises(
            ValueError, match=rf"^{folder} must have every data file in a split, but {folder}/{names[-1]} would be"
        ):
            read_rows(folder)
    (tmp_path / "split/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.csv\n---\n")
    (tmp_path / "split/.hidden.csv").touch()
    assert read_rows("split") == [Row((("user", "a"),), "b")]
    (tmp_path / "formats/c.jsonl").rename(tmp_path / "formats/c.jsonl.gz")
    (tmp_path / "formats/a.csv").rename(tmp_path / "formats/a.csv.gz")
    with pytest.raises(ValueError, match=r"^formats/a\.csv\.gz must end in .*, got \.gz\. Convert, unpack or rename it"):
        read_rows("formats")


def test_csv_from_the_hub_stays_text(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/train.csv").write_text("instruction,input,output\na,12,NA\nb,,007\n")
    monkeypatch.setattr(
        "casehard.datamodules.sources.load_dataset",
        lambda _, config, **settings: datasets.load_dataset("snapshot", config, cache_dir=str(tmp_path / "cache"), **settings),
    )
    assert read_rows("owner/name") == [Row((("user", "a\n\n12"),), "NA"), Row((("user", "b"),), "007")]


def test_a_row_of_csv_with_too_few_values_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response,system\na,b,\n\nc,d\n")
    with pytest.raises(ValueError, match=r"^rows\.csv, row 2 must have a value a column, got fewer"):
        read_rows("rows.csv")


def test_errors_show_no_text_that_stands_where_a_name_belongs(tmp_path):
    secret = "how to brew vexolim"
    (tmp_path / "rows.csv").write_text(f"{secret},first heat\n{secret},b\n")
    with pytest.raises(ValueError, match=r"must have columns that are known, got a longer name, a longer name\.") as caught:
        read_rows("rows.csv")
    assert secret not in str(caught.value)
    with pytest.raises(ValueError, match=r"must have turns of the roles .*, got 'a longer name'\.") as caught:
        read_rows(jsonl({"messages": [{"role": secret, "content": "a"}]}))
    assert secret not in str(caught.value)
