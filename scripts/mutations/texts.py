"""Mutations of texts and tables: lrc reads what is in them, as csv, json, pandas and pyarrow do, or refuses."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import torch
from transformers import AutoTokenizer

from mutations import damage
from mutations.place import SEQ_LEN, TABLE, Check, Mutation, Place, Said, Step, json_of
from mutations.truth import accuracy, same_perplexity, unlike
from tests.tiny import tiny_text

Known = Sequence[str] | None
"""Texts that are right readings of a file; none for one that must be refused."""


def rows_of(place: Place, count: int = 12) -> list[str]:
    """Some sentences; some of them with line ends, quotes, delimiters and other letters in them."""
    rng = place.rng
    rows = [" ".join(tiny_text(rng.choice([30, 60, 90]), seed=rng.randrange(1000)).split()) for _ in range(count)]
    spice = [
        ' "quoted" ',
        "a\nb",
        "a\r\nb",
        "a,b;c\td",
        "é漢😀",
        "\u2028 \u2029 \x85",
        "'",
        "\\n\\t\\",
        " lead",
        "trail ",
        "\x0b\x0c",
        "NULL",
        "NaN",
        "001",
        "1e5",
        "true",
        '"',
        '""',
        "\ufeff",
        "#",
        "\xa0",
    ]
    for _ in range(rng.choice([0, 1, 3])):
        number = rng.randrange(count)
        rows[number] = rng.choice([rows[number] + rng.choice(spice), rng.choice(spice) + rows[number]])
    return rows


def calibrated(model: Path, texts: Sequence[str]) -> Check:
    """Compare the hash of a calibration set with windows that are cut here."""

    def check(said: Said) -> str | None:
        got = json_of(said)
        tokenizer = AutoTokenizer.from_pretrained(model)
        known = []
        for text in texts:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            body = SEQ_LEN - 1
            order = torch.randperm(len(ids) // body, generator=torch.Generator().manual_seed(0))[:4]
            windows = ids[: len(ids) // body * body].view(-1, body)[order]
            windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], 1)
            digest = hashlib.sha256()
            for start in range(0, len(windows), 64):  # in micro-batches of 1024 tokens
                part = windows[start : start + 64]
                digest.update(f"{tuple(part.shape)}".encode())
                digest.update(part.contiguous().numpy().tobytes())
            known.append((windows.numel(), digest.hexdigest()))
        if (got["tokens"], got["tokens_sha256"]) not in known:
            return f"calibrated on other tokens than are in the text ({got['tokens']}, expected {known})"
        return None

    return check


def steps(place: Place, path: str, known: Known, *options: str, must: bool = False) -> list[Step]:
    """Measure on the text or calibrate on it."""
    model = place.take("model")
    if place.rng.random() < 0.6:
        return [Step(place.eval("model", path, *options), any_perplexity(model, known), must=must)]
    words = (
        "calibrate",
        "model",
        "--method",
        "svd-llm",
        "--calibration",
        path,
        *options,
        "--samples",
        "4",
        "--seq-len",
        str(SEQ_LEN),
        "--device",
        "cpu",
        "--out",
        "run",
        "--json",
    )
    return [Step(words, calibrated(model, known or ()), must=must)]


def any_perplexity(model: Path, known: Known) -> Check:
    """The perplexity of one of some texts."""

    def check(said: Said) -> str | None:
        if not known:
            return same_perplexity(model, None)(said)
        complaints = [same_perplexity(model, text)(said) for text in known]
        return None if None in complaints else complaints[0]

    return check


def written(path: str, data: bytes, place: Place) -> str:
    """Write a file."""
    Path(path).write_bytes(data)
    return path


def plain(place: Place) -> list[Step]:
    """A text file in some encoding, with some line ends."""
    text = "\n".join(rows_of(place))
    way = place.rng.choice(
        [
            "utf-8",
            "bom",
            "crlf",
            "cr",
            "utf-16",
            "latin-1",
            "nul",
            "one line",
            "surrogate",
            "no end",
            "suffix",
            "none",
            "deep name",
        ]
    )
    name = "text.txt"
    must = way in ("utf-8", "bom", "one line", "no end", "suffix", "none")
    known: list[str] | None = [text]
    data = text.encode()
    if way == "bom":
        data = b"\xef\xbb\xbf" + data
        known = [text, "\ufeff" + text] if text.startswith("\ufeff") else [text]
    elif way in ("crlf", "cr"):
        end = {"crlf": "\r\n", "cr": "\r"}[way]
        data = text.replace("\n", end).encode()
        known = [data.decode(), data.decode().replace("\r\n", "\n").replace("\r", "\n")]
    elif way == "utf-16":
        data, known = text.encode("utf-16"), [text]
    elif way == "latin-1":
        data, known = text.encode("latin-1", "ignore") + b" caf\xe9 ", None
    elif way == "nul":
        data = (text + "\0" + text).encode()
        known = [text + "\0" + text]
    elif way == "one line":
        text = text.replace("\n", " ")
        data, known = text.encode(), [text]
    elif way == "surrogate":
        data, known = data + b"\xed\xa0\x80", None
    elif way == "suffix":
        name = place.rng.choice(["text.md", "text.py", "text.TXT", "text.text", "text.log", "text.html"])
    elif way == "none":
        name = "text"
    elif way == "deep name":
        name = place.rng.choice(
            ["a b.txt", "é漢.txt", "a\nb.txt", "[red].txt", "-.txt", "a:b.txt", "x" * 240, "a.csv.txt"]
        )
    # Universal line ends are a way to read text.
    known = None if known is None else [*known, *(text.replace("\r\n", "\n").replace("\r", "\n") for text in known)]
    return steps(place, written(name, data, place), known, must=must)


def short(place: Place) -> list[Step]:
    """Next to nothing."""
    data = place.rng.choice(
        [b"", b"\n", b" ", b"a", b"\0", b"the", b"the of", b"\xef\xbb\xbf", b"\r\n\r\n", b"the of and to"]
    )
    return steps(place, written("text.txt", data, place), [data.decode("utf-8-sig")])


def binary(place: Place) -> list[Step]:
    """No text at all, under some ending."""
    rng = place.rng
    data = rng.choice(
        [
            rng.randbytes(2000),
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(500),
            b"\x80\x04\x95" + rng.randbytes(100),
            b"PAR1" + rng.randbytes(100) + b"PAR1",
            b"\x1f\x8b" + rng.randbytes(100),
            b"\xff" * 3000,
            b"PK\3\4" + rng.randbytes(300),
        ]
    )
    name = "text" + rng.choice(
        [
            ".txt",
            ".csv",
            ".jsonl",
            ".json",
            ".parquet",
            ".gz",
            ".jsonl.gz",
            ".txt.gz",
            ".tsv",
            ".pdf",
            ".arrow",
            ".zst",
            ".xz",
            ".zip",
            ".docx",
        ]
    )
    return steps(place, written(name, data, place), None, *rng.choice([(), ("--text-column", "text")]))


def tables(rows: Sequence[str], place: Place) -> dict[str, Callable[[], bytes]]:
    """Write rows, each with a number beside it, as files of several kinds."""
    records = [{"id": number, "text": row} for number, row in enumerate(rows)]
    frame = pandas.DataFrame(records)

    def by_csv(**how: Any) -> bytes:
        out = io.StringIO()
        writer = csv.DictWriter(out, ["id", "text"], **how)
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue().encode()

    def parquet() -> bytes:
        out = io.BytesIO()
        frame.to_parquet(out)
        return out.getvalue()

    lines = "".join(json.dumps(record, ensure_ascii=place.rng.random() < 0.5) + "\n" for record in records)
    return {
        "t.csv": lambda: by_csv(),
        "quoted.csv": lambda: by_csv(quoting=csv.QUOTE_ALL),
        "pandas.csv": lambda: frame.to_csv(index=False).encode(),
        "pandas.tsv": lambda: frame.to_csv(index=False, sep="\t").encode(),
        "t.jsonl": lambda: lines.encode(),
        "blank.jsonl": lambda: lines.replace("\n", "\n\n").encode(),
        "pandas.jsonl": lambda: str(frame.to_json(orient="records", lines=True)).encode(),
        "array.json": lambda: json.dumps(records).encode(),
        "indented.json": lambda: json.dumps(records, indent=1).encode(),
        "lines.json": lambda: lines.encode(),
        "t.parquet": parquet,
    }


def packed(name: str, data: bytes, place: Place) -> tuple[str, bytes]:
    """Compress some files."""
    way = place.rng.choice(["", "", "", ".gz", ".xz", ".bz2"])
    if name.endswith(".parquet"):
        return name, data
    return name + way, {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[way](data)


def table(place: Place) -> list[Step]:
    """A table of some kind, whole."""
    rows = rows_of(place)
    made = tables(rows, place)
    name, data = packed(*((name := place.rng.choice(sorted(made))), made[name]()), place)
    joined = "\n\n".join(rows)
    known = [joined, joined.replace("\r\n", "\n"), joined.replace("\r\n", "\n").replace("\r", "\n")]
    plain_kind = name in ("t.csv", "pandas.csv", "t.jsonl", "pandas.jsonl", "array.json", "t.parquet", "lines.json")
    simple = not any(letter in joined for letter in "\r\x0b\x0c\ufeff") and not {"NULL", "NaN"} & set(rows)
    return steps(place, written(name, data, place), known, "--text-column", "text", must=plain_kind and simple)


def broken_table(place: Place) -> list[Step]:
    """A table with something wrong in it; an independent reader says what is right, if anything is."""
    rows = rows_of(place)
    made = tables(rows, place)
    name = place.rng.choice(sorted(made))
    name, data = packed(name, made[name](), place)
    path = Path(written(name, data, place))
    place.rng.choice([damage.flip, damage.truncate, damage.extend, damage.garbage, damage.empty])(path, place.rng)
    return steps(place, name, None if path.stat().st_size > 10**6 else readings(path), "--text-column", "text")


def readings(path: Path) -> list[str]:
    """What other programs read from a column "text"."""
    found = []
    for read in (_by_json, _by_lines, _by_csv, _by_pandas, _by_parquet):
        try:
            values = read(path, path.read_bytes())
            for some in (values, [value for value in values if value is not None]):
                if all(isinstance(value, str) for value in some):
                    joined = "\n\n".join(some)
                    found += [joined, joined.replace("\r\n", "\n").replace("\r", "\n")]
        except Exception:
            continue
    return found


def _unpacked(path: Path, data: bytes) -> bytes:
    return {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}.get(path.suffix, bytes)(data)


def _by_json(path: Path, data: bytes) -> list[Any]:
    return [row["text"] for row in json.loads(_unpacked(path, data))]


def _by_lines(path: Path, data: bytes) -> list[Any]:
    return [json.loads(line)["text"] for line in _unpacked(path, data).decode("utf-8-sig").split("\n") if line.strip()]


def _by_csv(path: Path, data: bytes) -> list[Any]:
    text = _unpacked(path, data).decode("utf-8-sig")
    return [
        row["text"]
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ".tsv" in path.name else ",")
    ]


def _by_pandas(path: Path, data: bytes) -> list[Any]:
    frame = pandas.read_csv(
        io.BytesIO(_unpacked(path, data)), sep="\t" if ".tsv" in path.name else ",", dtype=str, keep_default_na=False
    )
    return list(frame["text"])


def _by_parquet(path: Path, data: bytes) -> list[Any]:
    return pyarrow.parquet.read_table(io.BytesIO(data)).column("text").to_pylist()


def odd_values(place: Place) -> list[Step]:
    """Columns that do not hold text, or not in every row."""
    rng = place.rng
    odd: list[Any] = [
        None,
        3,
        1.5,
        True,
        [],
        ["a", "b"],
        {"a": "b"},
        [{"role": "user", "content": "hi"}],
        {"messages": []},
        "",
        " ",
        "\ud800",
        float("nan"),
        [[1]],
        10**30,
    ]
    records: list[dict[str, Any]] = [{"id": number, "text": row} for number, row in enumerate(rows_of(place))]
    value = rng.choice(odd)
    where = rng.choice(["one", "all", "first", "missing", "other"])
    for number, record in enumerate(records):
        if where == "all" or (where == "first" and number == 0) or (where == "one" and number == 7):
            record["text"] = value
        elif where == "missing" and number == 5:
            del record["text"]
        elif where == "other" and number == 5:
            record["more"] = value
    texts = [record.get("text") for record in records]
    known: list[str] = []
    # An empty or missing row may be left out, or be an error.
    for some in (
        texts,
        [text for text in texts if text is not None],
        [text for text in texts if text],
        [text for text in texts if isinstance(text, str) and text.strip()],
    ):
        strings = [text for text in some if isinstance(text, str)]
        if len(strings) == len(some):
            known.append("\n\n".join(strings))
    name = rng.choice(["t.jsonl", "t.json", "t.parquet", "t.jsonl.gz"])
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    if name == "t.json":
        data = json.dumps(records).encode()
    elif name == "t.parquet":
        try:
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out)
            data = out.getvalue()
            texts = pyarrow.parquet.read_table(io.BytesIO(data)).column("text").to_pylist()
        except Exception:
            name = "t.jsonl"
    elif name.endswith(".gz"):
        data = gzip.compress(data)
    known = [text for text in known if encodable(text)]
    return steps(place, written(name, data, place), known, "--text-column", "text")


def encodable(text: str) -> bool:
    """Whether a string is text at all."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def columns(place: Place) -> list[Step]:
    """Names of columns that are there, are not there, or are not alone."""
    rng = place.rng
    rows = rows_of(place)
    wanted = rng.choice(
        ["text", "Text", "", "text ", "id", "nope", "a.b", "text.x", "a\nb", "é", "0", "\udcff", "x" * 3000, "*"]
    )
    named = rng.random() >= 0.15
    wanted = wanted if named else "text"  # which is taken where none is named
    header = rng.choice(
        [["id", "text"], ["text"], ["text", "text"], ["", "text"], ["id", wanted], ["text ", "id"], ["id", "a.b"]]
    )
    kind = rng.choice(["csv", "jsonl", "nested", "json", "dict"])
    matching = [number for number, name in enumerate(header) if name == wanted]
    known: list[str] | None = None
    if kind == "csv":
        out = io.StringIO()
        csv.writer(out).writerows(
            [
                header,
                *([row if name == header[-1] else f"{number}" for name in header] for number, row in enumerate(rows)),
            ]
        )
        data, name = out.getvalue().encode("utf-8", "surrogateescape"), "t.csv"
        readable = [
            [row if title == header[-1] else str(number) for title in header] for number, row in enumerate(rows)
        ]
        known = ["\n\n".join(row[place_] for row in readable) for place_ in matching] if len(matching) == 1 else None
    elif kind in ("jsonl", "json", "dict"):
        records = [dict.fromkeys(header, row) for row in rows]
        data = (
            "".join(json.dumps(record) + "\n" for record in records)
            if kind == "jsonl"
            else json.dumps(records if kind == "json" else {title: rows for title in header})
        ).encode()
        name = "t.jsonl" if kind == "jsonl" else "t.json"
        known = ["\n\n".join(rows)] if matching else None
    else:
        data = "".join(json.dumps({"a": {"b": row}, "text": {"x": row}}) + "\n" for row in rows).encode()
        name = "t.jsonl"
        known = ["\n\n".join(rows)] if wanted in ("a.b", "text.x") else None
    known = None if known is None else [*known, *(text.replace("\r\n", "\n").replace("\r", "\n") for text in known)]
    return steps(place, written(name, data, place), known, *(["--text-column", wanted] if named else []))


def odd_files(place: Place) -> list[Step]:
    """Something else than a file."""
    rng = place.rng
    text = Path("text" + rng.choice([".txt", ".csv", ".jsonl", ".parquet", ".json"]))
    content = (
        "\n".join(rows_of(place))
        if text.suffix == ".txt"
        else tables(rows_of(place), place)[
            {".csv": "t.csv", ".jsonl": "t.jsonl", ".parquet": "t.parquet", ".json": "array.json"}[text.suffix]
        ]()
    )
    text.write_bytes(content.encode() if isinstance(content, str) else content)
    way = rng.choice(sorted(damage.FILE))
    known = readings(text) if text.suffix != ".txt" else [content if isinstance(content, str) else ""]
    if way == "sparse":
        os.truncate(text, 3_000_000)
    else:
        damage.FILE[way](text, rng)
    if text.is_file() and not text.is_symlink():
        try:
            known = readings(text) if text.suffix != ".txt" else [text.read_bytes().decode("utf-8-sig")]
        except UnicodeDecodeError:
            known = []
    elif way != "moved":
        known = []
    known = [*known, *(one.replace("\r\n", "\n").replace("\r", "\n") for one in known)]
    more = () if text.suffix == ".txt" else ("--text-column", "text")
    return steps(place, str(text), known, *more)


def names(place: Place) -> list[Step]:
    """Names of texts that lead nowhere."""
    choices = [
        "",
        " ",
        ".",
        "..",
        "/",
        "nowhere.txt",
        "/dev/null",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "hf:",
        "hf::",
        "hf:a:b:c:d:e",
        "hf:nope/nope",
        "hf:x:y:train[:10]",
        "hf:../x",
        "http://localhost/x",
        "x" * 5000,
        "a\nb",
        "\udcff",
        "~",
        "~/notes.txt",
        "~nobody/x",
        "model",
        "model/config.json",
        "file:///x",
        "hf:" + "x" * 500,
        "hf:model",
        "s3://x/y",
        "-",
        "*",
        "hf:.",
        "hf:work",
    ]
    target = place.rng.choice(choices)
    known: list[str] | None = None
    if target == "model/config.json":
        known = [(place.template / target).read_text()]
    elif target == "~/notes.txt":
        known = ["at home"]
    return steps(place, target, known, *place.rng.choice([(), (), ("--text-column", "text")]))


def labels(place: Place) -> list[Step]:
    """Examples for a classifier: its accuracy is that of the examples taken one by one, whatever the tokenizer pads."""
    rng = place.rng
    model = place.take(rng.choice(["bert", "classifier"]))
    frame = pandas.read_csv(place.template / TABLE)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if rng.random() < 0.5:
        settings["padding_side"] = rng.choice(["left", "right"])
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    if rng.random() < 0.3:
        config["pad_token_id"] = rng.choice([0, 2, 3, None])
        (model / "config.json").write_text(json.dumps(config))
    titles = ["LABEL_0", "LABEL_1", "LABEL_2"]
    way = rng.choice(["good", "good", "names", "unknown", "float", "missing", "nope", "empty", "long"])
    if way == "names":
        frame["label"] = [titles[label] for label in frame["label"]]
    elif way == "unknown":
        frame["label"] = frame["label"].astype(object)
        frame.loc[3, "label"] = rng.choice([3, -1, "x", "LABEL_3", "", " 1", "1.0"])
    elif way == "float":
        frame["label"] = frame["label"].astype(float)
    elif way == "missing":
        frame["label"] = frame["label"].astype(object)
        frame.loc[3, "label"] = None
    elif way == "empty":
        frame = frame.iloc[:0]
    elif way == "long":
        frame.loc[2, "text"] = "the of and " * 400
    if rng.random() < 0.5:
        frame.to_csv("t.csv", index=False)
        name = "t.csv"
    else:
        frame.to_json("t.jsonl", orient="records", lines=True)
        name = "t.jsonl"
    size = rng.choice([1, 2, 5, 12])
    numbers = [titles.index(label) if label in titles else label for label in frame["label"]]

    def check(said: Said) -> str | None:
        (values,) = json_of(said)["classification"].values()
        if way not in ("good", "names", "long", "float"):
            return f"accuracy {values} on labels that cannot be right"
        return unlike(
            "accuracy",
            values.get("dense"),
            accuracy(model, list(frame["text"]), [int(number) for number in numbers], 32),
        )

    words = (
        "eval",
        str(model),
        "--classification",
        name,
        "--text-column",
        "text",
        "--label-column",
        "nope" if way == "nope" else "label",
        "--batch-size",
        str(size),
        "--seq-len",
        "32",
        "--device",
        "cpu",
        "--json",
    )
    return [Step(words, check, must=way in ("good", "names") and config.get("pad_token_id") == 3)]


MUTATIONS: dict[str, Mutation] = {
    "plain": plain,
    "plain again": plain,
    "short": short,
    "binary": binary,
    "table": table,
    "table again": table,
    "table again again": table,
    "broken table": broken_table,
    "broken table again": broken_table,
    "odd values": odd_values,
    "odd values again": odd_values,
    "columns": columns,
    "columns again": columns,
    "odd files": odd_files,
    "names": names,
    "labels": labels,
    "labels again": labels,
}
