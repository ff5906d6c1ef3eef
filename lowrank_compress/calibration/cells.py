"""What stands in a row of a table: texts, conversations, labels; anything else is refused by row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_compress.calibration.tables import shown
from lowrank_compress.errors import CalibrationError, InputError

Chat = list[dict[str, Any]]
Render = Callable[[Chat], str]
"""Makes one text of a conversation, as the model was trained to read it."""

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_MISSING = object()


@dataclass(frozen=True)
class Cell:
    """A value in a row of a table.

    Attributes
    ----------
    value
        As the table has it.
    place, column, source
        Row, column and name of the table, for messages.
    """

    value: Any
    place: str
    column: str
    source: str

    @classmethod
    def find(cls, row: Mapping[str, Any], column: str, place: str, source: str) -> Cell:
        """Look up a column, or a path with dots into nested values.

        Raises
        ------
        InputError
            There is no such column.
        CalibrationError
            The path ends in nothing.
        """
        value = row.get(column, _MISSING)
        if value is not _MISSING:
            return cls(value, place, column, source)
        first, *path = column.split(".")
        if first not in row:
            raise InputError(f"{place} of {source} has no column {column!r}; it has {shown(row)}.")
        value = row[first]
        for part in path:
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                has = shown(value) if isinstance(value, Mapping) else f"is a {type(value).__name__}"
                raise CalibrationError(f"{place} of {source} has no {part!r} on the way to {column!r} (there: {has}).")
        return cls(value, place, column, source)

    def text(self) -> str:
        """Return the value, which must be a text.

        Raises
        ------
        CalibrationError
            It is anything else, or has half a character.
        """
        if not isinstance(self.value, str):
            raise self._refused("text. Name another column (dots lead into nested values, as in data.text)")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise self._problem("half a character (a lone surrogate)") from None
        return self.value

    def rendered(self, render: Render | None) -> str:
        """Return the value, a text or a conversation, as text.

        Raises
        ------
        CalibrationError, InputError
            It is neither; or a conversation that the chat template refuses, or that there is no template for.
        """
        chat = _conversation(self.value)
        if chat is None:
            return self.text()
        for number, turn in enumerate(chat, 1):
            for part in ("role", "content"):
                if not isinstance(turn[part], str):
                    raise self._problem(
                        f"a conversation whose turn {number} has a {_kind(turn[part])} as {part}", " Expected text."
                    )
        if render is None:
            raise InputError(
                f"The column {self.column!r} of {self.source} holds conversations, and the model's tokenizer has no "
                "chat template to make text of them. Name a column of plain text, or add chat_template.jinja to the "
                "checkpoint."
            )
        try:
            text = render(chat)
        except Exception as problem:  # whatever a template may raise
            first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise self._problem(f"a conversation that the model's chat template refuses ({first})") from None
        return self._with(text).text()

    def label(self) -> str:
        """Return the value, the name or the number of a class, as a text.

        Raises
        ------
        CalibrationError
            It is neither.
        """
        value = self.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # what Arrow and pandas make of whole numbers where one is missing
        if not isinstance(value, str | int) or value == "":
            raise self._refused("the name or the number of a class")
        return str(value)

    def words(self) -> list[str]:
        """Return the value, a list of words or a text of words with blanks between them, as words.

        Raises
        ------
        CalibrationError
            It is anything else, or there are none.
        """
        found = self.value.split() if isinstance(self.value, str) else self.value
        if not isinstance(found, list) or not found:
            raise self._refused("a list of words, or a text with blanks between them")
        return [self._with(word).text() for word in found]

    def labels(self) -> list[str]:
        """Return the value, a list of names or numbers of classes or a text of them, as texts.

        Raises
        ------
        CalibrationError
            It is anything else.
        """
        found = self.value.split() if isinstance(self.value, str) else self.value
        if not isinstance(found, list):
            raise self._refused("a list of labels, or a text with blanks between them")
        return [self._with(label).label() for label in found]

    def answer(self, context: str) -> tuple[int, int] | None:
        """Return from which character of a text to which the value, an answer, stands; None for none.

        It is a text, of which the first occurrence is taken, or as SQuAD has it: `text` and `answer_start`, lists of
        which the first counts.

        Raises
        ------
        CalibrationError
            It is anything else, or does not stand there.
        """
        value, start = self.value, None
        if isinstance(value, Mapping):
            texts, starts = value.get("text"), value.get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise self._refused("an answer: a text, or text and answer_start")
            value, start = (texts[0], starts[0]) if texts else ("", None)
        if not isinstance(value, str):
            raise self._refused("an answer: a text, or text and answer_start")
        if not value:
            return None
        start = context.find(value) if start is None else start
        if not isinstance(start, int) or start < 0 or not context.startswith(value, start):
            raise self._problem(f"the answer {value[:60]!r}, which does not stand in the text", "")
        return start, start + len(value)

    def answers(self) -> tuple[str, ...]:
        """Return the texts of the value, which `answer` reads: all that are right; none where there is no answer."""
        texts = self.value["text"] if isinstance(self.value, Mapping) else [self.value]
        return tuple(self._with(text).text() for text in texts if text)

    def number(self) -> float:
        """Return the value, a number or the text of one.

        Raises
        ------
        CalibrationError
            It is anything else, or not finite.
        """
        try:
            found = math.nan if isinstance(self.value, bool) else float(self.value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise self._refused("a number. Name another column with --label-column")
        return found

    def numbers(self) -> list[float]:
        """Return the value, a number or a list of numbers, as numbers.

        Raises
        ------
        CalibrationError
            It is anything else, or one is not finite.
        """
        found = self.value if isinstance(self.value, list) else [self.value]
        return [self._with(number).number() for number in found]

    def flag(self) -> bool:
        """Return the value, which says whether something applies: true or false, 1 or 0, or the text of one.

        Raises
        ------
        CalibrationError
            It is anything else.
        """
        value = self.value.strip().casefold() if isinstance(self.value, str) else self.value
        found = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}.get(
            str(value).casefold()
        )
        if found is None or not isinstance(value, str | int | float):
            raise self._refused("1 or 0, true or false")
        return found

    def marks(self) -> list[str] | list[bool]:
        """Return which labels apply: names or numbers of them, or for each whether it does.

        The value is a list, or a text with semicolons, of names or numbers; or a list of true and false, 1.0 and 0.0.

        Raises
        ------
        CalibrationError
            It is anything else, or a list of both.
        """
        found = self.value
        if isinstance(found, str):
            return [self._with(part.strip()).label() for part in found.split(";")] if found.strip() else []
        if isinstance(found, int) and not isinstance(found, bool):
            found = [found]
        if not isinstance(found, list):
            raise self._refused("a list of labels, or a text with semicolons between them")
        if found and all(isinstance(each, bool | float) for each in found):
            return [self._with(each).flag() for each in found]
        if any(isinstance(each, bool | float) for each in found):
            raise self._problem(f"a list of unlike values, {found!r}", " Expected names or numbers of labels.")
        return [self._with(each).label() for each in found]

    def _with(self, value: Any) -> Cell:
        return Cell(value, self.place, self.column, self.source)

    def _refused(self, expected: str) -> CalibrationError:
        what = f"a {_kind(self.value)}" if self.value not in (None, "") else "nothing"
        return self._problem(what, f" Expected {expected}.")

    def _problem(self, what: str, more: str = "") -> CalibrationError:
        return CalibrationError(
            f"{self.place} of {self.source} has {what} in the column {self.column!r}.{more} Repair or remove the row."
        )


def _kind(value: Any) -> str:
    return type(value).__name__


def _conversation(value: Any) -> Chat | None:
    """Return a value as a conversation if it is one: role and content, or from and value."""
    if not (isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)):
        return None
    if all("role" in turn and "content" in turn for turn in value):
        return [dict(turn) for turn in value]
    if all("from" in turn and "value" in turn for turn in value):
        return [{"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]} for turn in value]
    return None
