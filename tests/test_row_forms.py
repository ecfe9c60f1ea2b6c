"""Rows of data are read in every public form, by one reader, and a row that cannot be read is named."""

import json

import pytest

from helpers_tidar import tiny_tidar
from helpers_tokenizers import byte_tokenizer
from wavedraft.bench.prompts import encode_kinds, read_kinds
from wavedraft.training import Row, RowEncoder, open_rows, prompt_ids, read_prompts, regenerate, row_of
from wavedraft.training.dialogue import encode_row
from wavedraft.training.row_forms import COLUMNS, check_columns, read_columns
from wavedraft.training.row_sources import rows_of_file

ASKED, SAID = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}
SYSTEM = {"role": "system", "content": "be brief"}
FORMS = [
    {"messages": [ASKED, SAID]},
    {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]},
    {"conversations": [ASKED, SAID], "id": 7},
    {"messages": json.dumps([ASKED, SAID])},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "who?"}]}, {**SAID, "tool_calls": None}]},
    {"prompt": "who?", "answer": "me"},
    {"prompt": "who?", "completion": "me"},
    {"prompt": [ASKED], "completion": [SAID]},
    {"prompt": "who?", "response": "me", "answer": None},
    {"question": "who?", "response": "me"},
    {"question": "who?", "answer": "me", "kind": 3},
    {"instruction": "who?", "input": "", "output": "me", "text": "### Instruction: who? ### Response: me"},
    {"input": "who?", "output": "me"},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if is_loud %}LOUD{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content or m.tool_calls[0].function.name }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.mark.parametrize("values", FORMS, ids=lambda values: "-".join(values))
def test_every_form_is_the_same_dialogue(values):
    row = row_of(values, "here")
    assert row.messages == [ASKED, SAID]
    assert row.prompt().messages == [ASKED] and row.prompt().question == "who?" and row.prompt().text is None
    row.check_teaches()


def test_an_input_stands_after_its_instruction_and_a_system_prompt_before():
    row = row_of({"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "be brief"}, "here")
    assert [turn["content"] for turn in row.messages] == ["be brief", "Add.\n\n1 and 2", "3"]
    assert row.prompt().question is None, "a template must write the system prompt"
    sharegpt = {"conversations": [{"from": "human", "value": "who?"}], "system_prompt": "be brief"}
    assert row_of(sharegpt, "here").messages == [SYSTEM, ASKED]


def test_a_prompt_is_what_stands_before_the_last_answer():
    row = row_of({"messages": [SYSTEM, ASKED, SAID, ASKED, SAID]}, "here")
    assert row.prompt().messages == [SYSTEM, ASKED, SAID, ASKED]
    assert row.prompt().prompt() == row.prompt()


def test_columns_of_other_names_are_mapped():
    values = {"query": "who?", "reply": "me", "prompt": "another", "rubric": [1]}
    columns = read_columns("prompt=query, answer=reply")
    assert columns == {"prompt": "query", "answer": "reply"}
    assert row_of(values, "here", columns).messages == [ASKED, SAID]
    alpaca = FORMS[11]
    assert row_of(alpaca, "here", {"text": "text"}).messages == [], "words come from no other column"
    assert row_of({"q": "who?", "functions": TOOLS}, "here", {"prompt": "q", "tools": "functions"}).tools == TOOLS
    assert read_columns(None) is None
    for said, message in [
        ("prompt", "must name a column for each part"),
        ("prompt=", "must name a column"),
        ("ask=question", "'ask', which is no part of a row. Parts are messages, prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_columns(said)
    with pytest.raises(ValueError, match="`columns` must name"):
        check_columns("prompt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id": 3, "query": "q", "none": None}, r"here has `id`, `query`\. What is read: `messages` or .* --columns"),
        ({}, "here has no columns"),
        ({"messages": "hello"}, "here: `messages` must be a list, but is 'hello'"),
        ({"messages": []}, "here has an empty list of turns"),
        ({"messages": ["hello"]}, "here: turn 1 must have `role` and `content`, .*, but is 'hello'"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "here: turn 2 must have"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 must have .* each of them text"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator'. Read are human, user"),
        ({"prompt": 5, "answer": "x"}, "`prompt` must be text or a list of turns, but is 5"),
        ({"question": "who?", "answer": 42}, "`answer` must be text or a list of turns, but is 42"),
        ({"text": ["a"]}, r"`text` must be text, but is \['a'\]"),
        ({"prompt": "who?", "answer": "me", "output": "you"}, "`answer` and `output`, and only one can be its answer"),
        ({"prompt": "who?", "tools": "clock"}, "`tools` must be a list, but is 'clock'"),
        ({"prompt": "who?", "chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object of keywords"),
    ],
)
def test_a_row_that_cannot_be_read_is_told_what_it_has_and_what_is_read(values, message):
    with pytest.raises(ValueError, match=message):
        row_of(values, "here")


def test_what_lacks_an_answer_or_a_prompt_is_told():
    with pytest.raises(ValueError, match=r"here has a prompt and no answer .* data regenerate"):
        row_of({"prompt": "who?"}, "here").check_teaches()
    for values in ({"text": "abc"}, {"messages": [SAID]}, {"messages": [SYSTEM, SAID]}):
        with pytest.raises(ValueError, match=r"here has .* A prompt is read from"):
            row_of(values, "here").prompt()
    said = "here has `prompt`. .* With columns {'answer': 'reply'}, only these are read"
    with pytest.raises(ValueError, match=said):
        row_of({"prompt": "who?"}, "here", {"answer": "reply"})


# -- the chat template


def test_tools_and_options_reach_the_template():
    tokenizer = byte_tokenizer(WITH_TOOLS)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
    result = {"role": "tool", "content": "noon"}
    values = {
        "messages": [ASKED, call, result, SAID],
        "tools": json.dumps(TOOLS),
        "chat_template_kwargs": {"is_loud": 1},
    }
    row = row_of(values, "here")
    encoded = encode_row(row, tokenizer, 999)
    written = "[clock]LOUD<|im_start|>user who?<|im_end|><|im_start|>assistant clock<|im_end|><|im_start|>tool noon"
    assert tokenizer.decode(encoded["input_ids"]).startswith(written)
    taught = [token for token, label in zip(*encoded.values(), strict=True) if label != -100]
    assert tokenizer.decode(taught) == "clock<|im_end|>me<|im_end|>"
    assert tokenizer.decode(prompt_ids(row, tokenizer)) == f"{written}<|im_end|><|im_start|>assistant "
    again = row_of(json.loads(json.dumps(row.prompt().prompt_columns())), "here")
    assert again == row.prompt(), "a regenerated row is read as its prompt was"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": TOOLS}, "here has `tools`, but the chat template of .* reads no `tools`"),
        (
            {"chat_template_kwargs": {"loud": 1}},
            "`chat_template_kwargs.loud`, but the chat template .* reads no `loud`",
        ),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "is set by what reads the row"),
    ],
)
def test_what_the_template_does_not_read_is_refused(given, message):
    plain = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    tokenizer = byte_tokenizer(plain)
    row = row_of({"prompt": "who?", "answer": "me", **given}, "here")
    for read in (lambda: encode_row(row, tokenizer, 99), lambda: prompt_ids(row, tokenizer)):
        with pytest.raises(ValueError, match=message):
            read()


def test_a_template_that_refuses_messages_is_told_by_the_row():
    tokenizer = byte_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match="here: the chat template refuses these messages: no system here"):
        encode_row(row_of(FORMS[0], "here"), tokenizer, 99)
    encoder = RowEncoder(tokenizer, 99, draft_length=1)
    assert list(encoder(row_of(FORMS[0], "here"))) == [] and encoder.refused == 1 and "no system" in encoder.reason


def test_only_answers_of_regenerate_are_cut_at_loops():
    encoder = RowEncoder(byte_tokenizer(WITH_TOOLS), 9999, draft_length=1)
    table = (
        "a sentence of enough words to be worth learning from, whatever comes to follow after it: " + "1, 2, 3, " * 40
    )
    (human,) = encoder(row_of({"prompt": "p", "answer": table}, "here"))
    assert encoder.loops == {"kept": 0, "cut": 0, "dropped": 0}
    (own,) = encoder(row_of({"prompt": "p", "answer": table, "finished": True}, "here"))
    assert encoder.loops == {"kept": 1, "cut": 1, "dropped": 0}
    assert len(own["input_ids"]) < 160 < 400 < len(human["input_ids"])


# -- files


def test_arrays_lines_and_tables_hold_the_same_rows(tmp_path):
    rows = [{"question": f"who {n}?", "response": "me, \u2028\nand you"} for n in range(3)]
    (tmp_path / "array.json").write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text(lines.replace("\n{", "\n\n{"), encoding="utf-8")
    for name, comma in (("table.csv", ","), ("table.tsv", "\t")):
        cells = [f'"{row["question"]}"{comma}"{row["response"]}"\n' for row in rows]
        (tmp_path / name).write_text(f"question{comma}response\n" + "".join(cells), encoding="utf-8", newline="")
    expected = [row_of(row, "").messages for row in rows]
    for file in sorted(tmp_path.iterdir()):
        assert [row.messages for row in rows_of_file(file)] == expected, file
        assert [row.question for row in read_prompts(file)] == ["who 0?", "who 1?", "who 2?"]
    assert len(list(open_rows(tmp_path)())) == 15
    places = {file.name: [row.place for row in rows_of_file(file)][1] for file in tmp_path.iterdir()}
    assert places["array.json"].endswith("array.json, row 2") and places["lines.jsonl"].endswith("line 3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2 is not JSON .*: '{\"text\": '"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"a\.json, line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, 5]', r"a\.json, row 2 must be a JSON object, but is 5"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', r"a\.jsonl, line 2 must be a JSON object, but is 'b'"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl is not UTF-8 text: .* 0xff. Save it as UTF-8"),
        ("a.txt", "a".encode("utf-16"), r"a\.txt is not UTF-8 text"),
        ("a.csv", b"prompt,answer\na,b,c\n", r"a\.csv, line 2 has more values"),
        ("a.jsonl", b'{"text": "a"}\n\n{"words": "b"}\n', r"a\.jsonl, line 3 has `words`. What is read"),
        ("a.yaml", b"- a\n", r"a\.yaml is not of a supported type: \.csv"),
        ("a.parquet", b"a", r"a\.parquet is not a Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_rows(tmp_path / name)())


def test_prompts_of_bench_have_kinds_where_their_rows_have(tmp_path):
    rows = [{"kind": "a", "prompt": "one"}, {"question": "two"}, {"kind": "a", "messages": [SYSTEM, ASKED, SAID]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    kinds = read_kinds(tmp_path / "rows.json")
    assert {kind: [row.messages for row in of_kind] for kind, of_kind in kinds.items()} == {
        "a": [[{"role": "user", "content": "one"}], [SYSTEM, ASKED]],
        "all": [[{"role": "user", "content": "two"}]],
    }
    tokenizer = byte_tokenizer(WITH_TOOLS)
    encoded, filler = encode_kinds(tokenizer, kinds)
    written = "<|im_start|>system be brief<|im_end|><|im_start|>user who?<|im_end|><|im_start|>assistant "
    assert tokenizer.decode(encoded["a"][1]) == written and tokenizer.decode(filler) == "one\nbe brief\nwho?\ntwo"


def test_files_of_prompts(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    lines = read_prompts(tmp_path / "lines.txt")
    assert [row.question for row in lines] == ["one", " two "] and lines[1].place.endswith("lines.txt, line 3")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.jsonl").write_text('{"prompt": "p"}\n{"text": "abc"}\n')
    (tmp_path / "notes.yaml").write_text("- a\n")
    (tmp_path / "wide.txt").write_bytes("one\n".encode("utf-16"))
    for name, message in [
        ("empty.jsonl", r"empty\.jsonl holds no prompts"),
        ("text.jsonl", r"text\.jsonl, line 2 has `text` and no prompt"),
        ("notes.yaml", "not of a supported type"),
        ("wide.txt", "is not UTF-8"),
        ("nothing.txt", "There is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="so it has no columns"):
        read_prompts(tmp_path / "lines.txt", {"prompt": "q"})


def test_every_part_of_a_row_is_in_the_table():
    assert {"tools", "chat_template_kwargs", "kind", "finished"} < COLUMNS.keys()
    assert not [name for names in COLUMNS.values() for name in names if sum(name in n for n in COLUMNS.values()) > 1]


# -- regenerate


def test_regenerate_refuses_prompts_and_files_before_it_writes(tmp_path):
    model, tokenizer, output = tiny_tidar(), byte_tokenizer(None), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="Prompt 2: `messages` need the chat template"):
        regenerate(model, tokenizer, [{"prompt": "who?"}, {"messages": [SYSTEM, ASKED]}], output)
    with pytest.raises(ValueError, match="Prompt 1 has `words`"):
        regenerate(model, tokenizer, [{"words": "who?"}], output)
    assert not output.exists()
    output.write_text('{"prompt": "who?", "num_tokens": 3}\n{"prompt": "mine", "answer": "x"}\nno end')
    kept = output.read_bytes()
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2 is no answer of an earlier run"):
        regenerate(model, tokenizer, [Row("here", [ASKED])], output)
    assert output.read_bytes() == kept


def test_what_stands_before_and_beside_a_pair_is_read():
    pair = {"instruction": "Sum it up.", "output": "Short."}
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    asked = [{"role": "user", "content": "Sum it up."}, {"role": "assistant", "content": "Short."}]
    for history in ([["Hi.", "Hello."]], said, json.dumps([["Hi.", "Hello."]])):
        assert row_of(pair | {"history": history}, "row").messages == [*said, *asked]
    system = row_of(pair | {"history": [["Hi.", "Hello."]], "system": "Be brief."}, "row").messages
    assert system == [{"role": "system", "content": "Be brief."}, *said, *asked]
    assert row_of(pair | {"history": []}, "row").messages == row_of(pair | {"history": None}, "row").messages == asked
    assert row_of(pair | {"context": "A long story."}, "row").messages[0]["content"] == "Sum it up.\n\nA long story."
    for history in (["Hi."], [["Hi."]], [["Hi.", 3]], "Hi.", [{"role": "user"}]):
        with pytest.raises(ValueError, match=r"row: .*history"):
            row_of(pair | {"history": history}, "row")
    with pytest.raises(ValueError, match="row has `input` and `context`"):
        row_of(pair | {"input": "x", "context": "y"}, "row")
