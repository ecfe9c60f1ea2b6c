"""Rows from files, folders and datasets have labels on the assistant's words and nowhere else."""

import json

import pytest
import torch

from helpers_tidar import tiny_tidar
from helpers_tokenizers import byte_tokenizer
from wavedraft.training import finetune
from wavedraft.training.dialogue import IGNORED, RowEncoder, encode_row
from wavedraft.training.row_forms import row_of
from wavedraft.training.row_sources import open_rows
from wavedraft.training.row_stream import RowStream

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"question {n}", "answer": f"the answer is {n} and that is all there is"} for n in range(12)]
READ = [row_of(row, f"row {number}") for number, row in enumerate(ROWS)]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] | trim }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do: thoughts are written in the last turn, and taken out of earlier ones.
FORGETFUL = PLAIN.replace(
    "{{ m['content'] | trim }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] | trim }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}",
)
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": " me "},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "be\ncause"},
]


def taught(row, tokenizer):
    encoded = encode_row(row_of(row, "here"), tokenizer, max_length=999)
    kept = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != IGNORED]
    assert all(label in (token, IGNORED) for token, label in zip(*encoded.values(), strict=True))
    return tokenizer.decode(kept)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_words_are_found_with_generation_marks_and_without(template):
    tokenizer = byte_tokenizer(template)
    assert taught({"messages": DIALOGUE}, tokenizer) == "me<|im_end|>be\ncause<|im_end|>"
    assert taught({"prompt": "who?", "completion": "me"}, tokenizer) == "me<|im_end|>"
    assert taught({"prompt": DIALOGUE[:2], "completion": DIALOGUE[2:3]}, tokenizer) == "me<|im_end|>"
    assert taught({"prompt": "who?", "answer": "me, but", "finished": False}, tokenizer) == "me, but"
    whole = encode_row(row_of({"messages": DIALOGUE}, "here"), tokenizer, 999)["input_ids"]
    written = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert written.startswith(tokenizer.decode(whole))


def test_turns_a_template_rewrites_later_are_left_out_and_counted():
    tokenizer = byte_tokenizer(FORGETFUL)
    thinking = {"role": "assistant", "content": "<think>hm</think>me"}
    encoder = RowEncoder(tokenizer, 99, draft_length=2)
    assert list(encoder(row_of({"messages": [*DIALOGUE[:2], thinking, *DIALOGUE[3:]]}, "here"))) == []
    assert encoder.refused == 1 and "generation marks" in encoder.reason and "turn 3" in encoder.reason
    assert len(list(encoder(row_of({"messages": [*DIALOGUE[:2], thinking]}, "here")))) == 1
    assert encoder.assistant_words == "prefixes"
    with pytest.raises(ValueError, match="here has a prompt and no answer"):
        list(encoder(row_of({"question": "?"}, "here")))


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        encode_row(row_of(ROWS[0], "here"), byte_tokenizer(None), 99)


def test_a_long_text_goes_on_in_further_rows():
    encoder = RowEncoder(byte_tokenizer(None), 10, draft_length=2)
    pieces = list(encoder(row_of({"text": "abcdefghij" * 3 + "kl"}, "here")))
    assert [len(piece["input_ids"]) for piece in pieces] == [10, 10, 10]  # two letters teach no draft of two
    assert all(piece["labels"] == piece["input_ids"] for piece in pieces)


def words(rows):
    return [row.messages for row in rows]


def write(kind, folder):
    """The same rows in every form; what `train` is told to read."""
    dataset = datasets.Dataset.from_list(ROWS)
    folder.mkdir()
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return folder / "rows.jsonl"
    if kind == "parquet":
        dataset.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "folder":
        dataset.select(range(5)).to_parquet(folder / "a.parquet")
        (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[5:]))
        (folder / "README.md").write_text("not data")
        return folder
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    (dataset if kind == "saved" else splits).save_to_disk(folder / kind)
    return folder / kind


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved", "splits"])
def test_every_kind_of_source_holds_the_same_rows(kind, tmp_path):
    read = open_rows(write(kind, tmp_path / "data"))
    assert words(read()) == words(read()) == words(READ)


def test_text_files_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.txt").write_text("three")
    assert [row.text for row in open_rows(tmp_path)()] == ["one\ntwo", "three"]


def test_sources_that_are_none_are_refused(tmp_path):
    write("splits", tmp_path / "data")
    (tmp_path / "a.xls").write_text("a,b")
    (tmp_path / "b.parquet").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none" / "here", "There is no file"),
        (tmp_path / "a.xls", r"supported type: \.csv"),
        (tmp_path / "b.parquet", "not a Parquet file"),
        (tmp_path / "empty", "no file of a supported type"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(open_rows(source)())
    with pytest.raises(ValueError, match="no split 'validation', but train, test"):
        open_rows(tmp_path / "data" / "splits", split="validation")


def test_a_dataset_of_the_hub_is_read_and_streamed_by_datasets_itself(tmp_path, monkeypatch):
    """A relative path of two parts is what `load_dataset` takes for a folder too: the same call, offline."""
    write("parquet", tmp_path / "org")
    (tmp_path / "org" / "rows.parquet").rename(tmp_path / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    seen = {}
    original = datasets.load_dataset

    def offline(path, **kwargs):
        seen.update(kwargs, path=path)
        return original("parquet", data_files={"train": str(tmp_path / "train.parquet")}, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert words(open_rows("org/rows")()) == words(READ)
    assert words(open_rows("org/rows", is_streaming=True)()) == words(READ)
    assert seen == {"path": "org/rows", "split": "train", "streaming": True}


def test_a_stream_gives_every_row_once_an_epoch_in_another_order():
    encode = RowEncoder(byte_tokenizer(PLAIN), 99, draft_length=2)
    stream = RowStream(lambda: READ, encode, seed=0)
    first, again = list(stream), list(stream)
    stream.set_epoch(1)
    second = list(stream)
    assert first == again != second
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(map(str, stream.in_order()))


def losses(run):
    history = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("form", ["template", "marks"])
def test_a_streamed_run_resumes_to_the_same_losses(form, tmp_path):
    """More steps than the stream has rows: it begins anew, in another order."""
    tokenizer = byte_tokenizer(PLAIN if form == "template" else MARKED)
    tiny_tidar(vocab_size=len(tokenizer), draft_length=4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = write("parquet", tmp_path / "data")
    common = {"rank": 2, "batch_size": 2, "max_steps": 8, "save_steps": 3, "streaming": True, "max_length": 64}
    report = finetune(tmp_path / "model", source, tmp_path / "straight", **common)
    assert report["assistant_words"] == ("prefixes" if form == "template" else "generation marks")
    assert report["rows"] is None and report["steps"] == 8
    (tmp_path / "straight").rename(tmp_path / "killed")
    expected = losses(tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-8" / "complete").unlink()
    finetune(tmp_path / "model", source, tmp_path / "killed", resume=True, **common)
    assert losses(tmp_path / "killed") == expected and len(expected) == 8
    with pytest.raises(ValueError, match="pack"):
        finetune(tmp_path / "model", source, tmp_path / "packed", pack=True, **common)


def test_streamed_processes_share_the_rows_between_them():
    """What accelerate gives each of two processes of one stream."""
    from accelerate.data_loader import IterableDatasetShard

    stream = RowStream(lambda: READ, RowEncoder(byte_tokenizer(PLAIN), 99, draft_length=2), seed=0)
    shards = [
        list(IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=index)) for index in range(2)
    ]
    assert [row for pair in zip(shards[0], shards[1], strict=True) for row in pair]
    assert sorted(map(str, shards[0] + shards[1])) == sorted(map(str, stream))
    assert torch.tensor(shards[0][0]["input_ids"]).dim() == 1
