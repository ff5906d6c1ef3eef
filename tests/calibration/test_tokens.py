from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_compress.calibration import tokens
from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.sources import Examples, Source, read_examples, read_text, shuffled
from lowrank_compress.calibration.tokens import bos_of, encode, load_tokenizer
from lowrank_compress.calibration.windows import (
    batches_hash,
    calibration_windows,
    drawn_windows,
    evaluation_windows,
    window_batches,
)
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.walk.batch import Batch
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


# --- Long texts


@pytest.mark.parametrize("part", [200, 1000])
def test_a_text_in_parts_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerBase, part: int) -> None:
    text = tiny_text(3000) + "   \n\n " + "fox" * 400 + " a\n" * 90
    whole = encode(tokenizer, text).tolist()
    pieces = (text[i : i + 37] for i in range(0, len(text), 37))
    for one in (text, pieces):
        assert encode(tokenizer, one, part=part, context=60).tolist() == whole


WORDS = [
    "the",
    "of",
    "and",
    "fox",
    "dog",
    "über",
    "naïve",
    "12345",
    "7",
    "don't",
    "I'll",
    "日本語",
    "🙂👍",
    "e\u0301tude",
]
WORDS += ["---", ",.", "\u200d", "x"]
SPACES = ["  ", "\n", "\n\n", "\t", " \n ", ",", *"   "]
LLAMA3 = r"(?i:'s|'t|'re|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def mixed(length: int, seed: int) -> str:
    """Words of several scripts with all kinds of space between them."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(length))


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits and normalises as those of a family do."""
    special = {"special_tokens": ["<unk>"], "show_progress": False}
    letters = pre_tokenizers.ByteLevel.alphabet()
    made: tuple[Tokenizer, Any, Any, Any] = {
        "llama-3": (
            Tokenizer(models.BPE()),
            None,
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, **special),
        ),
        "gpt-2": (
            Tokenizer(models.BPE()),
            None,
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, **special),
        ),
        "unigram": (
            Tokenizer(models.Unigram()),
            normalizers.NFKC(),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **special),
        ),
        "bert": (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(vocab_size=200, **special),
        ),
    }[kind]
    tokenizer, normalizer, splitter, trainer = made
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator([mixed(2000, 99)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["llama-3", "gpt-2", "unigram", "bert"])
def test_tokenizers_of_all_families_in_parts(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for seed in range(10):
        text = mixed(400, seed)
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for part in (97, 300):
            assert encode(tokenizer, text, part=part, context=60).tolist() == whole


def test_what_has_no_end_is_cut() -> None:
    """A word, or a space, that is longer than a part: no part of it is tokenised twice, or all at once."""
    tokenizer = tokenizer_of("bert")
    for run, count in (("a" * 5000, 10), (" " * 5000, 0)):
        found = encode(tokenizer, f"fox {run} dog", part=500, context=100)
        words = [*encode(tokenizer, "fox").tolist(), *encode(tokenizer, "dog").tolist()]
        assert [found[0], found[-1]] == words
        assert abs(len(found) - 2 - count) <= 1


def test_no_more_is_read_than_is_wanted(tokenizer: PreTrainedTokenizerBase) -> None:
    read: list[int] = []

    def given() -> Iterator[str]:
        for number in range(100):
            read.append(number)
            yield "the quick fox " * 50

    found = encode(tokenizer, given(), most=700, part=1000, context=100)
    assert found[:700].tolist() == encode(tokenizer, "the quick fox " * 5000)[:700].tolist()
    assert len(read) < 20


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


def test_ids_beyond_all_numbers_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    first = str(tokenizer.convert_ids_to_tokens(int(encode(tokenizer, "the quick fox")[0])))
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["vocab"][first] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="below 96 only"):
        encode(load_tokenizer(tmp_path), "the quick fox", 96)


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


def test_classes_are_told_by_name_where_data_set_and_model_name_them(tokenizer: PreTrainedTokenizerBase) -> None:
    """Their numbers need not be the same: roberta-large-mnli begins with the data set's last class."""
    model = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}

    def found(names: list[str] | None, labels: list[str]) -> list[int]:
        examples = Examples(["fox"] * len(labels), labels, None, names)
        (batch,) = example_batches(tokenizer, examples, model, 64, 8)
        assert batch.labels is not None
        return batch.labels.tolist()

    assert found(["entailment", "neutral", "contradiction"], ["0", "1", "2"]) == [2, 1, 0]
    assert found(["yes", "maybe", "no"], ["0", "1", "2"]) == [0, 1, 2]
    assert found(None, ["0", "ENTAILMENT"]) == [0, 2]
    with pytest.raises(InputError, match="some names are the same, but not all"):
        found(["entailment", "neutral", "no"], ["0"])
    with pytest.raises(InputError, match="The label '-1' is none"):
        found(["entailment", "neutral", "contradiction"], ["-1"])


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


def test_settings_that_fail_only_when_they_are_used(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("windows", "each", "drawn"), [(12, 4, 3), (11, 4, 2), (3, 4, 0), (12, 0, 0)])
def test_windows_of_random_tokens_are_like_those_of_text(windows: int, each: int, drawn: int) -> None:
    text = torch.randint(5, 9, (windows, 200), generator=torch.Generator().manual_seed(1))
    text[:, 0] = 7
    batches = window_batches(list(text), 2)
    found = drawn_windows(batches, 50, each)
    assert [len(batch.ids) for batch in found] == [2] * (drawn // 2) + [1] * (drawn % 2)
    for batch in found:
        assert batch.ids.shape[1] == 200
        assert (batch.ids[:, 0] == 7).all()
        assert len(batch.ids[:, 1:].unique()) > 45  # of the whole vocabulary, not of what the text has
    again = drawn_windows(window_batches(list(text), 5), 50, each)
    assert [row.tolist() for batch in again for row in batch.ids] == [row.tolist() for b in found for row in b.ids]
    text[0, 0] = 8
    free = torch.cat([batch.ids for batch in drawn_windows(window_batches(list(text), 2), 50, 1)])
    assert len(free[:, 0].unique()) > 1
