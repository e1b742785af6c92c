import hashlib
import json
import os

import pytest
from datasets import Dataset, DatasetDict

from datamodules.rows import Origin, Row, digest, origin, read_rows

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

    monkeypatch.setattr("datamodules.rows.load_dataset", load_dataset)
    assert read_rows("owner/name") == ROWS
    assert read_rows("owner/name:main#test") == ROWS[:1]
    assert read_rows("name.v1#train[:2]") == ROWS[:2]
    assert asked == [("owner/name", None), ("owner/name", "main"), ("name.v1", None)]


def test_a_hub_id_without_its_configuration_is_an_error_that_says_how_to_name_it(monkeypatch):
    def load_dataset(*arguments):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr("datamodules.rows.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"(?s)owner/name could not be loaded: .*'main', 'socratic'.* owner/name:CONFIG"):
        read_rows("owner/name")


def test_the_sandbox_is_a_source():
    from datamodules.sandbox import sandbox_rows

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
    ({"prompt": "1 + 2?", "response": "3", "input": "not Alpaca's"}, Row((("user", "1 + 2?"),), "3")),
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
    ({"prompt": "an id", "question": "a", "answer": "b"}, Row((("user", "a"),), "b")),  # a whole pair before half of one
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
    assert row.prompt == "c"
    assert row.chat() == turns


def test_a_row_is_hashable_and_gives_its_turns_to_a_template():
    row = Row((("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")), "d")
    assert len({row, Row(row.messages, "d"), Row(row.messages, "e")}) == 2
    assert row.prompt == "c"
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
    with pytest.raises(ValueError, match=r"^rows\.parquet must hold rows that datasets can read \(.*no data"):
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
    with pytest.raises(ValueError, match=r"^rows\.parquet must hold rows that datasets can read \(Parquet magic .*\)\. Mend it"):
        read_rows("rows.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a" "response"}')
    with pytest.raises(ValueError, match=r"^folder must hold rows that datasets can read \("):
        read_rows("folder")
    (tmp_path / "rows.csv").write_text('prompt,response\na,"b\nc,d\n')
    with pytest.raises(ValueError, match=r"^rows\.csv must be CSV: unexpected end of data\. Mend it"):
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
        ({"prompt": ["a"], "response": "b"}, r"must have text in every turn, got a list from the user\."),
        ({"instruction": {"a": 1}, "input": "x", "output": "b"}, r"must have text in every turn, got an object from the user\."),
        ({"prompt": " \n", "response": "b"}, r"must have text in every turn, got empty text from the user\."),
        (
            turns(("system", ""), ("user", "a"), ("assistant", "b")),
            r"must have text in every turn, got empty text from the system\. Fill the turn",
        ),
        (turns(("user", None), ("assistant", "b")), r"must have text in every turn, got null from the user\."),
        ({"prompt": "a", "response": 7}, r"must have text as its response, got a number\. Write it as a string"),
        ({"prompt": "a", "response": 0.5}, r"must have text as its response, got a number\."),
        ({"prompt": "a", "response": False}, r"must have text as its response, got true or false\."),
        (turns(("user", "a"), ("assistant", ["b"])), r"must have text as its response, got a list\."),
        (turns(("user", "a"), ("tool", "b")), r"must have turns of the roles system, user, .*, got 'tool'\. Rename the role"),
        ({"messages": [{"content": "a"}]}, r"must have turns of the roles .*, got None\."),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"must have turns of the roles .*, got \['user'\]\."),
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
