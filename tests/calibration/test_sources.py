"""Where text comes from: files, tables and data sets, and what of them is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import resource
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from lowrank_compress.calibration import sources
from lowrank_compress.calibration.sources import PAPERS_DATA, Examples, Source, pieces, read_examples, read_text
from lowrank_compress.calibration.tables import quotes_are_marks
from lowrank_compress.calibration.textfiles import COMPRESSED
from lowrank_compress.calibration.tokens import encode, renderer
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.stages.identity import source_id
from tests.runs import forked
from tests.tiny import BOS, tiny_text, tiny_tokenizer

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def write(directory: Path, name: str, text: str) -> str:
    (directory / name).write_bytes(text.encode())
    return str(directory / name)


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
    with pytest.raises(CalibrationError, match=r"no\.txt:2 does not exist, nor .*no\.txt, which could have a weight"):
        read_text(Source(str(tmp_path / "no.txt:2")))
    (tmp_path / "there.txt").write_text("a")
    with pytest.raises(CalibrationError, match=r"there\.txt:2 does not exist\. Pass"):
        read_text(Source(str(tmp_path / "there.txt:2")))
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
            "Line 2 of .* has nothing in the column 'label'.* Expected the name or the number of a class",
        ),
    ],
)
def test_tables_with_mistakes(name: str, text: str, columns: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises((CalibrationError, InputError), match=message):
        read_examples(Source(write(tmp_path, name, text), *columns))


def test_the_usual_column_is_taken_where_none_is_named(tmp_path: Path) -> None:
    assert read_text(Source(write(tmp_path, "a.csv", "n,text\n1,x\n2,y\n"))) == "x\n\ny"
    assert read_examples(Source(write(tmp_path, "a.csv", "n,text\n1,x\n2,y\n"))).texts == ["x", "y"]
    source = Source(write(tmp_path, "b.csv", "body,number\nx,1\n"))
    for read in (read_text, read_examples):
        with pytest.raises(InputError, match="name the column that holds the text with --text-column: body, number"):
            read(source)


# --- Data sets of the hub: directories are loaded by the same code


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of numbered rows; named relatively, as those of the hub are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbers = range(20)
    features = {
        "text": datasets.Value("string"),
        "body": {"part": datasets.Value("string")},
        "label": datasets.ClassLabel(names=["good", "bad"]),
    }
    columns = {"text": [f"t{i}" for i in numbers], "body": [{"part": f"b{i}"} for i in numbers]}
    data = datasets.Dataset.from_dict(
        {**columns, "label": [i % 2 for i in numbers]}, features=datasets.Features(features)
    )
    data.to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("", range(20)),
        (":default", range(20)),
        (":default:train", range(20)),
        ("::train[:3]", range(3)),
        ("::train[17:]", range(17, 20)),
        ("::train[5:7]", range(5, 7)),
        ("::train[7:5]", range(0)),
        ("::train[:10%]", range(2)),
        ("::train[-2:]+train[:1]", [18, 19, 0]),
    ],
)
def test_splits_of_a_data_set(data_set: Path, split: str, numbers: range) -> None:
    source = Source(f"hf:./data{split}")
    for _ in range(2):  # row by row, and from the cache once it is there
        found = source_id(source)
        if not numbers:
            with pytest.raises(CalibrationError, match="holds no text"):
                read_text(source)
        else:
            assert read_text(source) == "\n\n".join(f"t{i}" for i in numbers)
            assert read_text(Source(source.name, "body.part")) == "\n\n".join(f"b{i}" for i in numbers)
        datasets.load_dataset("./data")
        assert source_id(source) == found  # whether cached or not


def test_a_data_set_is_read_as_far_as_it_is_needed(data_set: Path) -> None:
    read_text(Source("hf:./data::train[:3]"))
    source_id(Source("hf:./data"))
    assert not [*(data_set / "cache").rglob("*.arrow")]


def test_classes_of_a_data_set_have_names(data_set: Path) -> None:
    found = read_examples(Source("hf:./data", "text", "label"), limit=3)
    assert found == Examples(["t0", "t1", "t2"], ["0", "1", "0"], None, ["good", "bad"])


def test_more_text_than_anybody_means(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HUB_TEXT", 20)
    with pytest.raises(CalibrationError, match=r"more than 20 characters.* slice .* hf:\./data::train\[:10000\]"):
        read_text(Source("hf:./data"))


def test_a_data_set_that_cannot_be_had(data_set: Path) -> None:
    for name in (PAPERS_DATA, "hf:./data:other", "hf:./data::test", "hf:./data::test[:2]", "hf:./data::train[:x]"):
        with pytest.raises(CalibrationError, match="neither cached nor to be had from the hub"):
            read_text(Source(name))
    for name in ("hf:", "hf::a:b", "hf:name:train[:10]"):
        with pytest.raises(InputError, match=r"hf:NAME::train\[:1000\]"):
            read_text(Source(name))


# --- Tables and files


@pytest.mark.parametrize("end", COMPRESSED)
def test_compressed_files(end: str, tmp_path: Path) -> None:
    for name, content in {"a.txt": "some text\n", "a.jsonl": '{"text": "some text\\n"}'}.items():
        (tmp_path / (name + end)).write_bytes(PACK[end](content.encode()))
        assert read_text(Source(str(tmp_path / (name + end)))) == "some text\n"
        (tmp_path / (name + end)).write_bytes((tmp_path / (name + end)).read_bytes()[:-6])
        with pytest.raises(CalibrationError, match=r"cannot be read|is no UTF-8 text"):
            read_text(Source(str(tmp_path / (name + end))))
        (tmp_path / (name + end)).write_text(content)
        with pytest.raises(CalibrationError, match=f"is not what its ending {end} says"):
            read_text(Source(str(tmp_path / (name + end))))


@pytest.mark.parametrize("end", COMPRESSED)
def test_damage_anywhere_is_found(end: str, tmp_path: Path) -> None:
    text = tiny_text(300)
    whole = PACK[end](text.encode())
    path = tmp_path / f"a.txt{end}"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            found = read_text(Source(str(path)))
        except CalibrationError:
            continue
        # Bytes of no meaning, such as the time in a .gz; only .zst may do without a checksum.
        assert found == text or end == ".zst"


def test_a_parquet_table(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"data": [{"text": "one"}, {"text": "two"}], "label": [1, 0]})
    data.to_parquet(tmp_path / "a.parquet")
    assert read_text(Source(str(tmp_path / "a.parquet"), "data.text")) == "one\n\ntwo"
    assert read_examples(Source(str(tmp_path / "a.parquet"), "data.text", "label")).labels == ["1", "0"]


def test_a_json_array_has_columns_too(tmp_path: Path) -> None:
    source = write(tmp_path, "a.json", ' [{"body": "one", "more": [1]}, {"body": "two", "more": [{"x": "y"}]}]')
    assert read_text(Source(source, "body")) == "one\n\ntwo"
    with pytest.raises(InputError, match=r"a table without a column text or .*; name the column .*: body, more"):
        read_text(Source(source))
    with pytest.raises(CalibrationError, match=r"Row 1 of .* has no 'x' on the way to 'more.0.x'"):
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
    with pytest.raises(CalibrationError, match=f"Line 2 of .* has {what} in the column 'text'. Expected text"):
        read_text(Source(source))
    with pytest.raises(CalibrationError, match=f"Line 2 of .* has {what} in the column 'text'. Expected text"):
        read_examples(Source(source, "text"))


def test_half_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"Line 1 of .* has half a character"):
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
    assert text == "[user] the fox[assistant] a dog[user] the fox[assistant] a dog"
    assert BOS not in encode(tokenizer, text).tolist()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"Line 1 of .* a conversation that .* refuses \(roles must alt"):
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
        ("a.txt", b"\x1f\x8b\x08\0rest", "looks like a compressed file; give it the ending .gz"),
        ("a.txt", "text".encode("utf-16"), "looks like UTF-16 text; convert it to UTF-8"),
        ("a.txt", b"PAR1\xff\xff", "looks like a Parquet table"),
        ("a.txt", b"abc\0def", "holds NUL bytes: it is no UTF-8 text"),
        ("a.parquet", b"no table", "is not what its ending .parquet says"),
        ("a.json", b'[{"text": "a"', "Row 1 of .* is not JSON"),
        ("a.json", b"[1]", "Row 1 of .* is a JSON int"),
        ("a.csv", b"text,text\na,b\n", "two columns 'text'"),
        ("a.csv", b'text\n"never closed\n', "Row 1 of .* cannot be read .unexpected end of data"),
    ],
)
def test_files_that_are_not_what_they_seem(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
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


@pytest.mark.parametrize("style", [0, 1, 2])  # csv.QUOTE_MINIMAL, QUOTE_ALL, QUOTE_NONNUMERIC
@pytest.mark.parametrize("alphabet", ['ab "\t', 'ab "\n'])
def test_what_pandas_writes_with_tabs_comes_back(style: int, alphabet: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    for columns in (1, 2, 3):
        names = ["text", *(f"c{i}" for i in range(columns - 1))]
        values = [["".join(draw.choices(alphabet, k=draw.randint(1, 6))) for _ in names] for _ in range(30)]
        frame = pandas.DataFrame(values, columns=names)
        frame["number"] = range(30)
        frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=style)
        source = Source(str(tmp_path / "a.tsv"), "text", "number")
        assert read_examples(source) == Examples([*frame.text], [*map(str, range(30))])


@pytest.mark.parametrize(
    ("text", "are"),
    [
        ('a\tb\n"x""y"\t1\n', True),
        ('a\tb\n"x\ty"\t1\n', True),
        ('a\tb\n"x\ny"\t1\nz\t2\n', True),
        ('"a"\t"b"\n"x"\t1\n', True),
        ('a\tb\n\n"x""y"\t1', True),
        ('text\n"x\ny"\n', True),
        ('a\tb\n" i love it .\t1\nit is great . "\t1\n', False),  # one sentence a row, quoted over two
        ('a\tb\n"yes" ,\t1\n', False),
        ('a\tb\n"yes"\t1\n', False),  # no writer would have enclosed it
        ('a\tb\nit\'s "fine"\t1\n', False),
        ('a\tb\n"open\t1\n', False),
        ('a\tb\n"x""y"\t1\t2\n', False),
        ('a\tb\n"x""y"\t1\n"open\t1\n', False),
    ],
)
def test_what_quotes_are_in_a_tsv(text: str, are: bool) -> None:
    assert quotes_are_marks(iter(text.splitlines(keepends=True))) == are


def test_a_sentence_quoted_over_two_rows(tmp_path: Path) -> None:
    source = write(tmp_path, "a.tsv", 'text\tlabel\n" i love it .\t1\nit is great . "\t0\n')
    assert read_examples(Source(source, "text", "label")) == Examples(['" i love it .', 'it is great . "'], ["1", "0"])


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", 'label,text\n1,"so bad\n0,good\n1,fine\n')
    with pytest.raises(CalibrationError, match=r"Row 1 of .* cannot be read \(unexpected end of data\)"):
        read_examples(Source(source, "text", "label"))


@pytest.mark.parametrize("content", [5, None, [{"type": "text", "text": "the fox"}], {"a": "b"}])
def test_a_turn_that_is_no_text(content: Any, tmp_path: Path) -> None:
    """A template would print it as Python does."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    source = Source(write(tmp_path, "a.jsonl", json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": chat})))
    with pytest.raises(CalibrationError, match=r"Line 2 of .* whose turn 2 has a \w+ as content in .*'messages'"):
        read_text(source, renderer(tokenizer))
    with pytest.raises(CalibrationError, match=r"has a list in the column 'messages'\. Expected text"):
        read_examples(Source(source.name, "messages"))


def test_a_bos_that_windows_do_not_bring_stays(tmp_path: Path) -> None:
    source = Source(write(tmp_path, "a.jsonl", json.dumps({"messages": CHAT})))
    for bos in (True, False):
        tokenizer = tiny_tokenizer(tmp_path, bos=bos)
        tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
        ids = encode(tokenizer, read_text(source, renderer(tokenizer))).tolist()
        assert ids.count(BOS) == (0 if bos else 1)


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_json_values_are_read_one_at_a_time(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_compress.calibration.textfiles.PIECE", piece)
    found = [{"text": 'a "b", [c] {d}\u2028'}, {"text": "", "n": [1, {"x": 2.5}]}, {"text": "z" * 50}]
    texts = [str(row["text"]) for row in found]
    for text in (
        json.dumps(found),
        json.dumps(found, indent=2),
        " \n " + json.dumps(found) + "\n",
        "\n".join(map(json.dumps, found)),
        "\n".join(json.dumps(row, indent=1) for row in found),
    ):
        assert read_examples(Source(write(tmp_path, "a.json", text), "text")).texts == texts
    for text, message in {
        json.dumps(found)[:-1]: "array that does not end",
        json.dumps(found)[:-4]: "Row 3 of .* is not JSON",
        '[{"text": "a"}, 7]': "Row 2 of .* is a JSON int",
        '{"text": "a"} nonsense': "Row 2 of .* is not JSON",
        '{"text": {"0": "a", "1": "b"}}': "Row 1 of .* has a dict in the column 'text'",
        "[" * 200_000: "Row 1 of .* is nested too deep",
        json.dumps(found) + "xx": "goes on behind its JSON array, with 'x'",
        json.dumps(found) + '[{"text": "b"}]': r"goes on behind its JSON array, with '\['",
        '[{"text": "a"} {"text": "b"}]': "Row 1 of .* is followed by '{'; expected a comma or ]",
        '[{"text": "a"},, {"text": "b"}]': "Row 2 of .* is not JSON",
        '[{"text": "a"},]': "Row 2 of .* is not JSON",
        '[,{"text": "a"}]': "Row 1 of .* is not JSON",
        "[]": "has no rows",
        "[ ] ]": "goes on behind its JSON array",
        "": "has no rows",
    }.items():
        if len(text) < 1000 or piece == 1000:
            with pytest.raises(CalibrationError, match=message):
                read_examples(Source(write(tmp_path, "a.json", text), "text"))


def test_values_of_a_parquet_table_are_texts_or_refused(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {"text": ["one", None], "day": pandas.to_datetime(["2020-01-01"] * 2), "raw": [b"a", b"b"]}
    )
    frame["text"] = frame["text"].astype("category")
    frame.to_parquet(tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    for column, what in {"text": "Row 2 .* nothing", "day": "Row 1 .* a datetime", "raw": "Row 1 .* a bytes"}.items():
        with pytest.raises(CalibrationError, match=f"{what} in the column '{column}'"):
            read_text(Source(source, column))
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-9], whole[:40] + bytes(60) + whole[100:], gzip.compress(whole), b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"cannot be read as Parquet|is not what its ending"):
            read_text(Source(source, "text"))


def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"a\\ud800": "x", "b\\u0007": "y"}')
    with pytest.raises(InputError) as raised:
        read_text(Source(source, "c"))
    assert str(raised.value).isprintable()
    assert str(raised.value).encode()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.csv.gz", "a.parquet"])
def test_a_huge_file_of_nothing(name: str, tmp_path: Path) -> None:
    """Refused by its first bytes: to hash it would take hours."""
    with open(tmp_path / name, "wb") as file:
        file.write(b"text\n" if name == "a.txt" else b"")
        file.truncate(1 << 40)
    with pytest.raises(CalibrationError, match=r"NUL bytes|is not what its ending"):
        source_id(Source(str(tmp_path / name)))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read \(.*Input/output error"):
        source_id(Source("/proc/self/mem"))
    with pytest.raises(CalibrationError, match="is no regular file"):
        source_id(Source("/dev/zero"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CalibrationError, match=r"cannot be read \(.*symbolic links"):
        source_id(Source(str(tmp_path / "loop")))
    with pytest.raises(CalibrationError, match="does not exist"):
        source_id(Source(write(tmp_path, "a.txt", "x") + "/b.txt"))
    with pytest.raises(CalibrationError, match=r"cannot be read \(.*name too long"):
        source_id(Source(str(tmp_path / ("a" * 300))))


def test_memory_does_not_follow_the_text(tmp_path: Path) -> None:
    """One row of 1.2 MB without a line end takes 250 MB if it is tokenised whole."""
    tokenizer = tiny_tokenizer(tmp_path)
    text = tiny_text(400_000).replace("\n", " ") * 3
    source = Source(write(tmp_path, "a.jsonl", json.dumps({"text": text})))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def work() -> None:
        encode(tokenizer, "the quick fox " * 25_000)  # as much as is tokenised at once
        before = peak()
        assert len(encode(tokenizer, pieces(source))) > 200_000
        assert peak() - before < 60

    assert forked(work) == 0
