"""Text to windows of tokens: deterministic, hashed, every token scored exactly once.

Text is tokenised without special tokens. A window is [bos, if the tokenizer adds one] + tokens, `seq_len` in all.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.model.replay import Batch

if TYPE_CHECKING:
    import datasets

PAPERS_DATA = "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes
    ----------
    name
        A text file; a .jsonl, .csv or .tsv file (with `text_column`); or ``hf:NAME[:CONFIG[:SPLIT]]``.
    text_column, label_column
        Columns of a table. `label_column` makes labelled examples for a classifier.
    """

    name: str
    text_column: str | None = None
    label_column: str | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the source is a data set of the Hugging Face hub."""
        return self.name.startswith("hf:")

    @property
    def suffix(self) -> str:
        """File ending in lower case."""
        return Path(self.name).suffix.lower()


@dataclass(frozen=True)
class Examples:
    """Texts, labelled or not."""

    texts: list[str]
    labels: list[str] | None

    def first(self, count: int | None) -> Examples:
        """Return the first `count` examples; None for all."""
        return Examples(self.texts[:count], None if self.labels is None else self.labels[:count])


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises
    ------
    InputError
        The checkpoint has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers raises many types here
        raise InputError(
            f"{path} has no tokenizer that transformers can load ({str(problem).strip().splitlines()[0]}). Put "
            "tokenizer.json and tokenizer_config.json beside the weights."
        ) from problem


def read_text(source: Source) -> str:
    """Read a source as one text; rows of a table or data set are joined by blank lines.

    Raises
    ------
    CalibrationError
        It is missing, empty, or has no such column.
    """
    if source.is_hub:
        rows = _hub_rows(source)
        column = source.text_column or "text"
        text = "\n\n".join(str(row) for row in _column(rows, column, source))
    elif source.suffix in TABLES or source.suffix == ".jsonl":
        if source.text_column is None:
            raise InputError(f"{source.name} is a table; name the column that holds the text with --text-column.")
        text = "\n\n".join(_column(_file_rows(source), source.text_column, source))
    else:
        text = _read_file(source)
    if not text.strip():
        raise CalibrationError(f"{source.name} holds no text. Pass a file with text in it.")
    return text


def read_examples(source: Source) -> Examples:
    """Read texts, and labels if their column is named, from a table or data set.

    Raises
    ------
    CalibrationError, InputError
        Not a table, a column is missing, or there are no rows.
    """
    if source.text_column is None:
        raise InputError("Examples need --text-column and a .jsonl, .csv or .tsv file or an hf: data set.")
    rows = _hub_rows(source) if source.is_hub else _file_rows(source)
    texts = _column(rows, source.text_column, source)
    labels = None if source.label_column is None else _column(rows, source.label_column, source)
    if not texts:
        raise CalibrationError(f"{source.name} has no rows. Pass a file with examples in it.")
    if labels is not None and not len(texts) == len(labels) == len(rows):
        raise CalibrationError(
            f"{source.name} has {len(texts)} texts and {len(labels)} labels in {len(rows)} rows. Fill in or remove the "
            "incomplete rows."
        )
    return Examples(texts, labels)


def _read_file(source: Source) -> str:
    try:
        return Path(source.name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(
            f"The text file {source.name} does not exist. Pass an existing file, or hf:NAME[:CONFIG[:SPLIT]]."
        ) from None
    except (UnicodeDecodeError, OSError) as problem:
        raise CalibrationError(f"{source.name} cannot be read as UTF-8 text ({problem}).") from problem


def _file_rows(source: Source) -> list[dict[Any, Any]]:
    if source.suffix not in TABLES and source.suffix != ".jsonl":
        raise InputError(f"{source.name} is no table; a column can be named for .jsonl, .csv and .tsv files only.")
    text = _read_file(source)
    if source.suffix in TABLES:
        quoting = csv.QUOTE_NONE if source.suffix == ".tsv" else csv.QUOTE_MINIMAL
        csv.field_size_limit(max(len(text), csv.field_size_limit()))
        return list(csv.DictReader(io.StringIO(text), delimiter=TABLES[source.suffix], quoting=quoting))
    rows = []
    # Not `splitlines`: JSON may hold other line ends, such as U+2028, within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise CalibrationError(f"Line {number} of {source.name} is not JSON ({problem}).") from problem
        if not isinstance(row, dict):
            raise CalibrationError(
                f"Line {number} of {source.name} is a JSON {type(row).__name__}; expected an object."
            )
        rows.append(row)
    return rows


def _column(rows: Sequence[dict[Any, Any]], column: str, source: Source) -> list[str]:
    if rows and column not in rows[0]:
        raise InputError(f"{source.name} has no column {column!r}; it has {', '.join(map(str, rows[0]))}.")
    return [str(row[column]) for row in rows if row.get(column) is not None]


def load_hub(source: Source) -> datasets.Dataset:
    """Load a data set ``hf:NAME[:CONFIG[:SPLIT]]`` of the hub, from the cache where it is there.

    Raises
    ------
    CalibrationError
        It is neither cached nor to be had.
    """
    name, config, split = [*source.name.removeprefix("hf:").split(":"), "", ""][:3]
    import datasets

    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as problem:  # the datasets library raises many types
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise CalibrationError(
            f"The data set {source.name} is neither cached nor to be had from the hub ({first}). "
            "Pass a text file with --calibration instead."
        ) from problem
    return cast("datasets.Dataset", data)


def _hub_rows(source: Source) -> list[dict[Any, Any]]:
    return [dict(row) for row in load_hub(source)]


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bos token that the tokenizer puts before a text, if it does."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and with_special and with_special[0] == bos else None  # pyright: ignore


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a text, (tokens,) int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def calibration_windows(ids: Tensor, seq_len: int, samples: int, seed: int, bos: int | None) -> Tensor:
    """Cut a calibration set: the first `samples` full windows after a seeded shuffle, (windows, seq_len) int64.

    A text with fewer full windows gives all it has.

    Raises
    ------
    CalibrationError
        The text is shorter than one window.
    """
    body = seq_len - (bos is not None)
    count = len(ids) // body
    if count == 0:
        raise CalibrationError(
            f"The calibration text has {len(ids)} tokens; one window of --seq-len {seq_len} needs {body}. Pass more "
            "text or a smaller --seq-len."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    windows = ids[: count * body].view(count, body)[order]
    return windows if bos is None else torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def evaluation_windows(ids: Tensor, seq_len: int, bos: int | None) -> list[Tensor]:
    """Cut a text so that every token is scored once: windows (length,) int64, at most `seq_len` long.

    With a bos each window is [bos] + tokens and all its tokens are scored. Without one, consecutive windows overlap
    by one token of context, so that all tokens but the very first of the text are scored. In both cases a window
    scores all its positions but the first.
    """
    if bos is not None:
        return [torch.cat([torch.tensor([bos]), part]) for part in ids.split(seq_len - 1)]
    return [ids[start : start + seq_len] for start in range(0, len(ids) - 1, seq_len - 1)]


def window_batches(windows: Sequence[Tensor], size: int) -> list[Batch]:
    """Group windows of equal length into batches of at most `size`, in order."""
    batches: list[Batch] = []
    pending: list[Tensor] = []
    for window in windows:
        if pending and (len(pending) == size or len(window) != len(pending[0])):
            batches.append(Batch(torch.stack(pending)))
            pending = []
        pending.append(window)
    return [*batches, Batch(torch.stack(pending))] if pending else batches


def example_batches(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, label_ids: Mapping[str, int], seq_len: int, size: int
) -> list[Batch]:
    """Tokenise labelled texts as the model expects them (special tokens included), padded within each batch.

    Raises
    ------
    InputError
        A label is not one of the model's classes, or the tokenizer cannot pad.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("The tokenizer has no padding token, which batches of a classifier need. Set `pad_token`.")
    labels = None if examples.labels is None else [_label(label, label_ids) for label in examples.labels]
    batches = []
    for part in _chunks(range(len(examples.texts)), size):
        encoded = tokenizer(
            [examples.texts[i] for i in part], padding=True, truncation=True, max_length=seq_len, return_tensors="pt"
        )
        mask: Tensor = encoded["attention_mask"]  # pyright: ignore[reportAssignmentType]
        ids: Tensor = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        batches.append(Batch(ids, mask, None if labels is None else torch.tensor([labels[i] for i in part])))
    return batches


def _label(label: str, label_ids: Mapping[str, int]) -> int:
    if label in label_ids:
        return label_ids[label]
    numbers = {str(number): number for number in label_ids.values()}
    if label in numbers:
        return numbers[label]
    known = ", ".join(f"{name} ({number})" for name, number in label_ids.items())
    raise InputError(f"The label {label!r} is none of the model's classes: {known}. Check --label-column.")


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def shuffled(examples: Examples, samples: int, seed: int) -> Examples:
    """Take the first `samples` examples after a seeded shuffle."""
    order = torch.randperm(len(examples.texts), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    labels = None if examples.labels is None else [examples.labels[i] for i in order]
    return Examples([examples.texts[i] for i in order], labels)


def batches_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 over all token ids, masks and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in (batch.ids, batch.mask, batch.labels):
            if part is not None:
                digest.update(f"{tuple(part.shape)}".encode())
                digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
