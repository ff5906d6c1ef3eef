"""Named tables whose entries may also come from other packages (entry points)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Generic, TypeVar

from lowrank_compress.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only table of named values; an unknown name is an error that lists the known ones.

    Parameters
    ----------
    kind
        What an entry is called in messages, for instance ``"method"``.
    group
        Entry-point group from which third-party entries are read on the first look-up. An entry point may name a
        value, or a function without arguments that returns one.
    entries
        The entries that this package itself provides. They win over third-party entries of the same name.
    entry_type
        Class, or union of classes, that a third-party value must be an instance of.
    """

    def __init__(self, kind: str, group: str, entries: Mapping[str, T], entry_type: type[T] | UnionType) -> None:
        self.kind = kind
        self._group = group
        self._own = dict(entries)
        self._type = entry_type
        self._all: dict[str, T] | None = None

    @property
    def own(self) -> Mapping[str, T]:
        """The entries of this package, whatever others are installed."""
        return self._own

    def _entries(self) -> dict[str, T]:
        if self._all is None:
            found: dict[str, Any] = {}
            for point in entry_points(group=self._group):
                value = point.load()
                if not isinstance(value, self._type) and callable(value):
                    value = value()
                if not isinstance(value, self._type):
                    expected = getattr(self._type, "__name__", str(self._type))
                    raise InputError(
                        f"The plug-in {point.value!r} registers the {self.kind} {point.name!r} as a "
                        f"{type(value).__name__}; expected a {expected}. Fix or uninstall that package."
                    )
                found[point.name] = value
            self._all = found | self._own
        return self._all

    def __getitem__(self, name: str) -> T:
        entries = self._entries()
        if name not in entries:
            raise InputError(unknown(self.kind, name, entries))
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())


def unknown(
    kind: str, name: str, known: Mapping[str, object] | list[str] | tuple[str, ...], *, guess: bool = True
) -> str:
    """Compose the message for a name that is not in a table: the nearest known name first, then all of them.

    Parameters
    ----------
    guess
        Whether a name that is nearly a known one is a slip of the pen; not so for names that the user did not choose.
    """
    close = difflib.get_close_matches(name, list(known), n=1) if guess else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}."
