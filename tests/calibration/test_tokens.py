from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.sources import PAPERS_DATA, Examples, Source, read_examples, read_text, shuffled
from lowrank_compress.calibration.tokens import (
    batches_hash,
    bos_of,
    calibration_windows,
    encode,
    evaluation_windows,
    example_batches,
    load_tokenizer,
    window_batches,
)
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.replay import Batch
from tests.tiny import BOS, PAD, tiny_text, tiny_tokenizer

lengths = st.integers(min_value=2, max_value=300)
seq_lens = st.integers(min_value=2, max_value=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(directory: Path, name: str, text: str) -> str:
    (directory / name).write_bytes(text.encode())
    return str(directory / name)


# --- Windows to evaluate on


@given(lengths, seq_lens)
def test_with_a_bos_every_token_is_scored_once(length: int, seq_len: int) -> None:
    ids = torch.arange(length) + 100
    windows = evaluation_windows(ids, seq_len, bos=1)
    assert all(window[0] == 1 and len(window) <= seq_len for window in windows)
    assert all(len(window) == seq_len for window in windows[:-1])
    assert torch.cat([window[1:] for window in windows]).tolist() == ids.tolist()


@given(lengths, seq_lens)
def test_without_a_bos_windows_overlap_by_one_token(length: int, seq_len: int) -> None:
    ids = torch.arange(length) + 100
    windows = evaluation_windows(ids, seq_len, bos=None)
    assert all(2 <= len(window) <= seq_len for window in windows)
    assert all(len(window) == seq_len for window in windows[:-1])
    scored = torch.cat([window[1:] for window in windows])
    assert scored.tolist() == ids[1:].tolist()
    # The context of a window's first scored token is the token before it.
    assert all(window[0] == window[1] - 1 for window in windows)


@given(lengths, seq_lens, st.booleans(), st.integers(min_value=1, max_value=9))
def test_batches_keep_all_windows_in_order(length: int, seq_len: int, bos: bool, size: int) -> None:
    windows = evaluation_windows(torch.arange(length), seq_len, 1 if bos else None)
    batches = window_batches(windows, size)
    assert all(1 <= len(batch.ids) <= size for batch in batches)
    assert all(batch.mask is None and batch.labels is None for batch in batches)
    assert [row.tolist() for batch in batches for row in batch.ids] == [window.tolist() for window in windows]
    assert sum(batch.tokens for batch in batches) == sum(map(len, windows))
    # Only the last window may be shorter: no batch is split for nothing.
    assert len(batches) <= -(-len(windows) // size) + 1


def test_no_windows_make_no_batches() -> None:
    assert window_batches([], 4) == []


# --- Windows to calibrate on


@given(st.integers(8, 300), st.integers(3, 12), st.integers(1, 50), st.booleans(), st.integers(0, 3))
def test_calibration_windows_are_whole_and_distinct(
    length: int, seq_len: int, samples: int, bos: bool, seed: int
) -> None:
    ids = torch.arange(length) + 100
    body = seq_len - bos
    if length < body:
        return
    windows = calibration_windows(ids, seq_len, samples, seed, 1 if bos else None)
    assert windows.shape == (min(samples, length // body), seq_len)
    if bos:
        assert (windows[:, 0] == 1).all()
    parts = [tuple(row) for row in windows[:, bos:].tolist()]
    cuts = {tuple(range(start + 100, start + 100 + body)) for start in range(0, length - body + 1, body)}
    assert len(set(parts)) == len(parts)
    assert set(parts) <= cuts


def test_calibration_windows_are_drawn_by_the_seed() -> None:
    ids = torch.arange(1000)

    def draw(seed: int, samples: int) -> list[list[int]]:
        return calibration_windows(ids, 10, samples, seed, None).tolist()

    assert draw(0, 30) == draw(0, 30)
    assert draw(0, 30) != draw(1, 30)
    assert draw(0, 30) != ids[:300].view(30, 10).tolist()
    # A larger set begins with the smaller one, and global state has no say.
    torch.manual_seed(5)
    assert draw(0, 50)[:30] == draw(0, 30)


def test_a_text_shorter_than_a_window() -> None:
    with pytest.raises(CalibrationError, match="has 9 tokens; one window of --seq-len 11 needs 10"):
        calibration_windows(torch.arange(9), 11, 4, 0, bos=1)
    assert calibration_windows(torch.arange(10), 11, 4, 0, bos=1).tolist() == [[1, *range(10)]]


def test_the_hash_sees_every_change() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    labels = torch.tensor([0, 1])
    batches = [Batch(ids)]
    other = ids.clone()
    other[1, 3] += 1
    hashes = [
        batches_hash(batches),
        batches_hash([Batch(other)]),
        batches_hash([Batch(ids.view(3, 4))]),
        batches_hash([Batch(ids[:1]), Batch(ids[1:])]),
        batches_hash([Batch(ids, mask)]),
        batches_hash([Batch(ids, mask, labels)]),
        batches_hash([Batch(ids, mask, labels.flip(0))]),
        batches_hash([]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert batches_hash([Batch(ids.clone())]) == hashes[0]
    drawn = {
        batches_hash(window_batches(list(calibration_windows(torch.arange(400), length, samples, seed, None)), 4))
        for length, samples, seed in [(10, 8, 0), (11, 8, 0), (10, 9, 0), (10, 8, 1)]
    }
    assert len(drawn) == 4


# --- The tokenizer


def test_text_has_no_special_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = tiny_text(300)
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.int64
    assert BOS not in ids.tolist()
    assert tokenizer.decode(ids) == text
    assert bos_of(tokenizer) == BOS
    assert bos_of(tiny_tokenizer(tmp_path, bos=False)) is None


def test_text_longer_than_the_model_is_encoded_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.model_max_length = 8
    try:
        assert tokenizer.decode(encode(tokenizer, tiny_text(300))) == tiny_text(300)
    finally:
        tokenizer.model_max_length = int(1e30)


def test_a_checkpoint_without_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"no tokenizer that transformers can load .* Put tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert encode(load_tokenizer(tmp_path), "the quick fox").tolist() == encode(tokenizer, "the quick fox").tolist()


# --- Reading


def test_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = 'First line.\n\n  "Second", with quotes,\ttabs and Umlaute: äöü.\n'
    assert read_text(Source(write(tmp_path, "a.txt", text))) == text
    # A byte order mark belongs to the file, not to the text.
    assert read_text(Source(write(tmp_path, "b.txt", "\ufeff" + text))) == text


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_a_file_without_text(text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no text"):
        read_text(Source(write(tmp_path, "a.txt", text)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_text(Source(str(tmp_path / "no.txt")))
    (tmp_path / "latin.txt").write_bytes("äöü".encode("latin-1"))
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        read_text(Source(str(tmp_path / "latin.txt")))


TABLES = {
    # Quotes are quotes, a field may hold separators and line ends, blank lines are no rows.
    "a.csv": 'label,text\nbad,"no, ""really"" bad\nstill"\n\ngood,it\'s fine\n',
    "windows.csv": '\ufefflabel,text\r\nbad,"no, ""really"" bad\r\nstill"\r\n\r\ngood,it\'s fine\r\n',
    "a.jsonl": "\n".join(
        [
            json.dumps({"text": 'no, "really" bad\nstill', "label": "bad"}),
            "",
            json.dumps({"text": "it's fine", "label": "good", "more": 1}),
        ]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    source = write(tmp_path, name, TABLES[name])
    found = read_examples(Source(source, "text", "label"))
    assert found == Examples(['no, "really" bad\nstill', "it's fine"], ["bad", "good"])
    assert read_examples(Source(source, "text")) == Examples(found.texts, None)
    assert read_text(Source(source, "text")) == 'no, "really" bad\nstill\n\nit\'s fine'


def test_quotes_in_tsv_mean_nothing(tmp_path: Path) -> None:
    """As in GLUE: a quotation mark that is never closed must not swallow the rows after it."""
    text = 'sentence\tlabel\n"so bad , it is good\t1\n\nan "odd" one\t0\n it\'s ""\t1\n'
    found = read_examples(Source(write(tmp_path, "a.tsv", text), "sentence", "label"))
    assert found == Examples(['"so bad , it is good', 'an "odd" one', ' it\'s ""'], ["1", "0", "1"])


def test_line_ends_within_a_text(tmp_path: Path) -> None:
    """Only a line feed ends a row; what else Unicode knows as line ends may stand in a text."""
    odd = "one\u2028two\x0bthree\x85four\x1cfive"
    line = json.dumps({"text": odd, "label": 1}, ensure_ascii=False)
    assert read_examples(Source(write(tmp_path, "a.jsonl", f"{line}\n{line}\n"), "text", "label")) == Examples(
        [odd, odd], ["1", "1"]
    )
    assert read_examples(Source(write(tmp_path, "a.tsv", f"text\tlabel\n{odd}\t1\n"), "text", "label")).texts == [odd]


def test_a_very_long_field(tmp_path: Path) -> None:
    text = tiny_text(200_000).replace("\n", " ")
    source = Source(write(tmp_path, "a.csv", f'text,label\n"{text}",0\n'), "text", "label")
    assert read_examples(source).texts == [text]


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "text,label\nx,1\n", ("txt", "label"), "has no column 'txt'; it has text, label"),
        ("a.csv", "text,label\nx,1\n", ("text", "class"), "has no column 'class'; it has text, label"),
        ("a.csv", "text,label\n", ("text", "label"), "has no rows"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', ("text", "label"), "Line 2 of .* is a JSON list; expected an object"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', ("text", "label"), "Line 3 of .* is not JSON"),
        ("a.txt", "text", ("text", "label"), r"is no table; a column can be named for \.jsonl"),
        ("a.csv", "text,label\nx,1\ny\nz,0\n", ("text", "label"), "3 texts and 2 labels in 3 rows"),
        # As many texts as labels, but not of the same rows.
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "y", "label": null}\n{"text": null, "label": 0}\n',
            ("text", "label"),
            "2 texts and 2 labels in 3 rows",
        ),
    ],
)
def test_tables_with_mistakes(name: str, text: str, columns: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises((CalibrationError, InputError), match=message):
        read_examples(Source(write(tmp_path, name, text), *columns))


def test_the_text_column_must_be_named(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", "text\nx\n")
    with pytest.raises(InputError, match="name the column that holds the text with --text-column"):
        read_text(Source(source))
    with pytest.raises(InputError, match="need --text-column"):
        read_examples(Source(source))


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["drei", "vier"], "label": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text(Source("hf:owner/name:config:validation")) == "one\n\ntwo"
    assert read_text(Source("hf:name", "body")) == "drei\n\nvier"
    assert read_examples(Source("hf:name:config", "text", "label")) == Examples(["one", "two"], ["1", "0"])
    assert asked == [("owner/name", "config", "validation"), ("name", None, "train"), ("name", "config", "train")]


def test_a_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(CalibrationError, match=r"neither cached nor to be had from the hub \(no network\)"):
        read_text(Source(PAPERS_DATA))


# --- Examples for a classifier


def test_examples_become_padded_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["the quick brown fox", "dog", "the lazy dog jumps over it again and again", "fox"]
    batches = example_batches(tokenizer, Examples(texts, ["b", "0", "a", "1"]), {"a": 0, "b": 1}, 64, 3)
    assert [len(batch.ids) for batch in batches] == [3, 1]
    assert torch.cat([batch.labels for batch in batches if batch.labels is not None]).tolist() == [1, 0, 0, 1]
    rows = [(batch, row) for batch in batches for row in range(len(batch.ids))]
    for text, (batch, row) in zip(texts, rows, strict=True):
        assert batch.mask is not None
        real = batch.ids[row][batch.mask[row].bool()]
        assert real.tolist() == tokenizer(text)["input_ids"]
        assert (batch.ids[row][~batch.mask[row].bool()] == PAD).all()
    # No longer than its longest text needs.
    assert all(bool((batch.mask == 1).any(0).all()) for batch in batches if batch.mask is not None)


def test_long_examples_are_truncated_with_their_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    (batch,) = example_batches(tokenizer, Examples([tiny_text(400)], None), {}, 16, 4)
    assert batch.labels is None
    assert batch.ids.tolist() == [tokenizer(tiny_text(400), truncation=True, max_length=16)["input_ids"]]
    assert batch.ids[0, 0] == BOS


@pytest.mark.parametrize("label", ["c", "2", "-1", "--1", "²", "", "1.0"])
def test_an_unknown_label(label: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"is none of the model's classes: a \(0\), b \(1\). Check --label-column"):
        example_batches(tokenizer, Examples(["fox"], [label]), {"a": 0, "b": 1}, 64, 3)


def test_a_name_wins_over_a_number(tokenizer: PreTrainedTokenizerBase) -> None:
    (batch,) = example_batches(tokenizer, Examples(["fox", "dog"], ["1", "0"]), {"1": 0, "0": 1}, 64, 3)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1]


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        example_batches(tokenizer, Examples(["fox"], ["0"]), {"a": 0}, 64, 3)


def test_examples_are_drawn_by_the_seed() -> None:
    examples = Examples([str(i) for i in range(40)], [str(-i) for i in range(40)])
    found = shuffled(examples, 30, 0)
    assert found == shuffled(examples, 30, 0)
    assert found.labels == [str(-int(text)) for text in found.texts]
    assert len(set(found.texts)) == 30
    assert found.texts != shuffled(examples, 30, 1).texts
    assert sorted(shuffled(examples, 100, 1).texts) == sorted(examples.texts)
    assert shuffled(Examples(examples.texts, None), 30, 0) == Examples(found.texts, None)


def test_the_first_examples() -> None:
    examples = Examples(["a", "b", "c"], ["0", "1", "2"])
    assert examples.first(2) == Examples(["a", "b"], ["0", "1"])
    assert examples.first(None) == examples.first(9) == examples
    assert Examples(["a", "b"], None).first(1) == Examples(["a"], None)
