"""What an option is, those that allocators and methods of this package declare, and how a recipe's field says one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from lowrank_compress.errors import InputError
from lowrank_compress.registry import unknown

WHAT = "What to compress, and how"
DATA = "Calibration data"
TUNING = "Fine tuning"
WHERE = "Where and how to run"
Value = bool | int | float | str


@dataclass(frozen=True)
class Option:
    """An option that an allocator or a method declares; its value counts where that is used.

    Attributes
    ----------
    name
        What it is called in recipes, and the keyword that it is passed as.
    type
        bool, int, float or str.
    default
        None where the entry decides by itself.
    help
        One line.
    decided
        What the entry decides where the default is None.
    least, above, most
        Range of a number: least ≤ number, above < number, number ≤ most.
    loosest
        The value at which it keeps no ratio out of reach, where others may.
    """

    name: str
    type: type[Value]
    default: Value | None
    help: str
    decided: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    loosest: Value | None = None

    @property
    def described(self) -> str:
        """What `lrc list` says of it."""
        default = self.decided if self.default is None else self.default
        return f"{self.name}: {self.help}" + ("" if default is None else f" (default: {default})")

    def read(self, value: Any) -> Value:
        """Check a value, or read it from a text.

        Raises
        ------
        InputError
            It is not of the option's type, or out of range.
        """
        found = self._from_text(value) if isinstance(value, str) and self.type is not str else value
        if self.type is float and type(found) is int:
            found = float(found)
        if found is None or type(found) is not self.type or not self._in_range(found):
            raise InputError(f"The option {self.name} is {value!r}; expected {self._expected()}.")
        return found

    def _from_text(self, text: str) -> Value | None:
        if self.type is bool:
            return {"true": True, "false": False}.get(text.lower())
        try:
            return self.type(text)
        except ValueError:
            return None

    def _in_range(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        return (
            abs(value) < float("inf")
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def _expected(self) -> str:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.type]
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most))
        return " ".join([kind, ", ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)]).strip()


def settle(declared: Sequence[Option], given: Mapping[str, Any], owner: str) -> dict[str, Value | None]:
    """Decide the options that what is used declares, by name: what was given, else the default.

    Parameters
    ----------
    given
        Values by name, each of a declared option.
    owner
        What declares them, for messages.

    Raises
    ------
    InputError
        A name is of none of them, or a value is not what its option takes.
    """
    known = {option.name: option for option in declared}
    for name in given:
        if name not in known:
            raise InputError(f"{unknown('option', name, known)} They are those of {owner}.")
    return {
        name: option.default if given.get(name) is None else option.read(given[name]) for name, option in known.items()
    }


def only(declared: Sequence[Option], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options those that are declared, by name."""
    return {option.name: options[option.name] for option in declared}


FLOOR = Option("floor", float, 0.0, "Share of its uniform budget that `loss` leaves every matrix", least=0, most=1)
TEMPERATURE = Option(
    "temperature",
    float,
    None,
    "Of `block-influence`: the lower, the more unequal the blocks",
    decided="the mean influence",
    above=0,
)
CAP = Option(
    "cap", float, 0.8, "The largest share that `block-influence` takes from a block", above=0, most=1, loosest=1.0
)
ALPHA = Option("alpha", float, 0.5, "Exponent of asvd", above=0)
PEAK = Option(
    "peak", float, 0.9, "Share of the largest value, beside the sum, in the energy of `camera`", least=0, most=1
)
SUBSPACE = Option(
    "subspace", float, 1.0, "Share of the joint left singular directions that `merge` keeps", above=0, most=1
)
ALIGN = Option("align", bool, False, "Whether `merge` aligns the hidden units of experts first")


Command = Literal["calibrate", "score", "factorize"]


def setting(
    default: Any,
    help: str,
    panel: str,
    *commands: Command,
    hint: str | None = None,
    many: bool = False,
    flag: str | None = None,
    **bounds: Any,
) -> Any:
    """Describe a field as an option of the command line.

    Parameters
    ----------
    default
        Of the field.
    help
        Of the option, without its default.
    panel
        The option's place in the help.
    commands
        What takes the option besides `lrc compress`.
    hint
        What is said of the default, ``{}`` being its value; None for the value alone, if there is one.
    many
        The option may be given several times; the values of a text stand with commas between them.
    flag
        Name of the option, where it is not the field's.
    bounds
        Range of the value, as of a pydantic field.
    """
    extra = {"panel": panel, "commands": list(commands), "hint": hint, "many": many, "flag": flag}
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


def declared(option: Option, *commands: Command) -> Any:
    """Describe a field that is an option of allocators or methods of this package."""
    bounds = {"ge": option.least, "gt": option.above, "le": option.most}
    given: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    return setting(option.default, option.help, TUNING, *commands, hint=option.decided, **given)
