from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration import tokens
from lowrank_compress.calibration.sources import PAPERS_DATA, Examples, Source, read_examples, read_text, shuffled
from lowrank_compress.calibration.tables import COMPRESSED
from lowrank_compress.calibration.tokens import (
    batches_hash,
    bos_of,
    calibration_windows,
    encode,
    evaluation_windows,
    example_batches,
    load_tokenizer,
    renderer,
    window_batches,
)
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.replay import Batch
from tests.tiny import BOS, tiny_text, tiny_tokenizer

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
    assert ids.dtype == torch.int32
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
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n[1]\n',
            ("text", "label"),
            "Line 2 of .* is a JSON list; expected an object",
        ),
        ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": \n', ("text", "label"), "Line 3 of .* is not JSON"),
        ("a.txt", "text", ("text", "label"), r"is no table; examples come from \.jsonl"),
        (
            "a.csv",
            "text,label\nx,1\ny\nz,0\n",
            ("text", "label"),
            r"Row 2 of .* has 1 values under 2 column names \(text, label\)",
        ),
        # As many texts as labels, but not of the same rows.
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "y", "label": null}\n{"text": null, "label": 0}\n',
            ("text", "label"),
            "Row 2 of .* has nothing as label in the column 'label'",
        ),
    ],
)
def test_tables_with_mistakes(name: str, text: str, columns: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises((CalibrationError, InputError), match=message):
        read_examples(Source(write(tmp_path, name, text), *columns))


def test_the_text_column_must_be_named(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", "body,number\nx,1\n")
    with pytest.raises(InputError, match="name the one that holds the text with --text-column: body, number"):
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


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_compressed_files(end: str, tmp_path: Path) -> None:
    for name, content in {"a.txt": "some text\n", "a.jsonl": '{"text": "some text\\n"}'}.items():
        with COMPRESSED[end](tmp_path / (name + end), "wt") as file:
            file.write(content)
        assert read_text(Source(str(tmp_path / (name + end)))) == "some text\n"
        (tmp_path / (name + end)).write_bytes((tmp_path / (name + end)).read_bytes()[:-6])
        with pytest.raises(CalibrationError, match="cannot be read as"):
            read_text(Source(str(tmp_path / (name + end))))


def test_a_parquet_table(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"data": [{"text": "one"}, {"text": "two"}], "label": [1, 0]})
    data.to_parquet(tmp_path / "a.parquet")
    assert read_text(Source(str(tmp_path / "a.parquet"), "data.text")) == "one\n\ntwo"
    assert read_examples(Source(str(tmp_path / "a.parquet"), "data.text", "label")).labels == ["1", "0"]


def test_a_json_array_has_columns_too(tmp_path: Path) -> None:
    source = write(tmp_path, "a.json", ' [{"body": "one", "more": [1]}, {"body": "two", "more": [{"x": "y"}]}]')
    assert read_text(Source(source, "body")) == "one\n\ntwo"
    with pytest.raises(InputError, match=r"a table without a column text or messages; name the one .*: body, more"):
        read_text(Source(source))
    with pytest.raises(CalibrationError, match=r"Row 1 of .* has nothing in the column 'more.0.x'"):
        read_text(Source(source, "more.0.x"))
    assert read_text(Source(write(tmp_path, "b.json", '{"text": "a line"}\n{"text": "another"}'))) == (
        "a line\n\nanother"
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [("3", "a int"), ("2.5", "a float"), ('["a"]', "a list"), ('{"a": 1}', "a dict"), ("null", "nothing")],
)
def test_what_is_no_text_is_refused_by_row_and_column(value: str, what: str, tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n{{"text": {value}}}\n')
    with pytest.raises(CalibrationError, match=f"Row 2 of .* has {what} in the column 'text'; expected text"):
        read_text(Source(source))
    with pytest.raises(CalibrationError, match=f"Row 2 of .* has {what} in the column 'text'; expected text"):
        read_examples(Source(source, "text"))


def test_half_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"Row 1 of .* has half a character"):
        read_text(Source(write(tmp_path, "a.jsonl", '{"text": "a\\ud800"}')))


CHAT = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]
SHARED = [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "a dog"}]


@pytest.mark.parametrize(("column", "chat"), [("messages", CHAT), ("conversations", SHARED)])
def test_conversations_go_through_the_chat_template(tmp_path: Path, column: str, chat: list[dict[str, str]]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert renderer(tokenizer) is None
    source = Source(write(tmp_path, "a.jsonl", json.dumps({column: chat}) + "\n" + json.dumps({column: chat})), column)
    with pytest.raises(InputError, match=f"'{column}' .* holds conversations, and .* has no chat template"):
        read_text(source, renderer(tokenizer))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    text = read_text(source, renderer(tokenizer))
    assert text == "[user] the fox[assistant] a dog\n\n[user] the fox[assistant] a dog"
    assert BOS not in encode(tokenizer, text).tolist()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"refuses the conversation in row 1 .*roles must alternate"):
        read_text(source, renderer(tokenizer))


def test_a_table_that_pandas_wrote(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ['so "good"', "a\ttab", "two\nlines", "NA", "1"], "label": [1, 0, 1, 0, 1]})
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        frame.to_csv(tmp_path / name, sep=separator, index=False)
        found = read_examples(Source(str(tmp_path / name), "text", "label"))
        assert found == Examples(list(frame.text), ["1", "0", "1", "0", "1"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\x1f\x8b\x08\0rest", "looks like a file that is gzip-compressed"),
        ("a.txt", "text".encode("utf-16"), "looks like UTF-16 text; convert it to UTF-8"),
        ("a.txt", b"PAR1\xff\xff", "looks like a Parquet table"),
        ("a.txt", b"abc\0def", "holds NUL characters"),
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.json", b'[{"text": "a"', "cannot be read as json"),
        ("a.json", b"[1]", "Row 1 of .* is a JSON int"),
        ("a.csv", b"text,text\na,b\n", "two columns 'text'"),
        ("a.csv", b'text\n"never closed\n', "holds no text|never closed"),
    ],
)
def test_files_that_are_not_what_they_seem(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if "never closed" in message:
        assert read_text(Source(str(tmp_path / name))) == "never closed\n"
        return
    with pytest.raises(CalibrationError, match=message):
        read_text(Source(str(tmp_path / name)))


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is a directory; expected a text file or a table"):
        read_text(Source(str(tmp_path)))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationError, match="is no regular file"):
        read_text(Source(str(tmp_path / "pipe.txt")))
    with pytest.raises(InputError, match="is no table; --text-column is for"):
        read_text(Source(write(tmp_path, "a.txt", "x"), "text"))


def test_splits_of_the_hub_may_be_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*given: object, split: str) -> datasets.Dataset:
        asked.append((*given, split))
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_text(Source("hf:owner/name:config:train[:10]"))
    read_text(Source("hf:name::train[10%:20%]+test[:5]"))
    assert asked == [("owner/name", "config", "train[:10]"), ("name", None, "train[10%:20%]+test[:5]")]
    with pytest.raises(InputError, match="hf:NAME::train"):
        read_text(Source("hf:name:train[:10]"))


# --- Long texts


@pytest.mark.parametrize("part", [200, 1000])
def test_a_text_in_parts_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerBase, part: int) -> None:
    text = tiny_text(3000) + "   \n\n " + "fox" * 400 + " a\n" * 90
    whole = encode(tokenizer, text).tolist()
    pieces = (text[i : i + 37] for i in range(0, len(text), 37))
    for one in (text, pieces):
        assert encode(tokenizer, one, part=part, context=60).tolist() == whole


@pytest.mark.assets
@pytest.mark.parametrize("model", ["stories260k-llama-gqa", "books-gpt2-2m", "sst2-bert-mini"])
def test_trained_tokenizers_in_parts(assets: Path, model: str) -> None:
    """BPE over the whole text, byte-level BPE, word pieces: none sees where a part ends."""
    tokenizer = load_tokenizer(assets / "models" / model)
    text = (assets / "text" / "wikitext2-valid.txt").read_text()[:100_000]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode(tokenizer, text, part=1500).tolist() == whole


def test_memory_does_not_follow_the_text(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the tokenizer, which is what takes memory, sees more than a part with what is around it."""
    seen: list[int] = []
    inner = tokens._tokens

    def counted(tokenizer: PreTrainedTokenizerBase, text: str) -> object:
        seen.append(len(text))
        return inner(tokenizer, text)

    monkeypatch.setattr(tokens, "_tokens", counted)
    encode(tokenizer, tiny_text(60_000).replace("\n", " "), part=4096, context=512)  # one line
    assert len(seen) > 12
    assert max(seen) <= 4096 + 2 * 512


def test_tokens_beyond_the_vocabulary_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    worst = int(encode(tokenizer, "the quick fox").max())
    with pytest.raises(InputError, match=rf"makes the token .* with id {worst}, but .* below {worst} only"):
        encode(tokenizer, "the quick fox", worst)


# --- Examples for a classifier


def test_pairs_of_sentences(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path, "a.csv", "premise,hypothesis,label\na fox,a dog,0\nthe fox,the lazy dog,1\n")
    found = read_examples(Source(source, "premise,hypothesis", "label"))
    assert found == Examples(["a fox", "the fox"], ["0", "1"], ["a dog", "the lazy dog"])
    for example, (batch,) in (
        (i, example_batches(tokenizer, found.picked([i]), {"a": 0, "b": 1}, 64, 3)) for i in (0, 1)
    ):
        alone = tokenizer(found.texts[example], (found.seconds or [])[example])["input_ids"]
        assert batch.ids.tolist() == [alone]
    with pytest.raises(InputError, match="names 3 columns"):
        read_examples(Source(source, "premise,hypothesis,label"))
    with pytest.raises(InputError, match="are for classifiers"):
        read_text(Source(source, "premise,hypothesis"))


def test_examples_of_one_length_make_a_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["the quick brown fox", "dog", "the lazy dog jumps over it again and again", "fox", "dog", "dog"]
    tokenizer.padding_side = "left"
    found = example_batches(tokenizer, Examples(texts, ["b", "0", "a", "1", "0", "0"]), {"a": 0, "b": 1}, 64, 2)
    expected: dict[int, list[tuple[list[int], int]]] = {}
    for text, label in zip(texts, (1, 0, 0, 1, 0, 0), strict=True):
        ids = tokenizer(text)["input_ids"]
        expected.setdefault(len(ids), []).append((ids, label))  # pyright: ignore
    rows: dict[int, list[tuple[list[int], int]]] = {}
    for batch in found:
        assert batch.mask is None
        assert batch.labels is not None
        assert len(batch.ids) <= 2
        rows.setdefault(batch.ids.shape[1], []).extend(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
    assert rows == expected


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


def test_a_tokenizer_need_not_pad(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.pad_token = None
    assert len(example_batches(tokenizer, Examples(["fox", "the dog"], ["0", "0"]), {"a": 0}, 64, 3)) == 2


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
