"""The demo's text, which every Python installation carries: ``pydoc`` topics and the standard library's docstrings.

Nothing of it is committed: it is extracted at run time, by parsing the sources (no module is imported for its
docstrings), and each document falls into the train, calibration or held-out part by a hash of its name. Another Python
version has slightly other texts; a document that both have is in the same part in both.
"""

import ast
import hashlib
import os
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from lowrank_compress.errors import CalibrationError, InputError

Part = Literal["train", "calibration", "heldout"]

# In percent of the hash range: calibration is below the first, held-out from the second on, train between them.
CALIBRATION_END = 7
HELDOUT_START = 92

# Folders without documentation worth reading: tests, bundled third parties, generated tables, programs, demos.
SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "idle_test",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

# Shorter repeated paragraphs ("Example:", "Raises:") are ordinary language, longer ones are copies.
SHORTEST_COPY = 40

# An installation without its sources yields the topics alone (0.4 million characters), one with them 1.5 and more.
SMALLEST_LIBRARY = 500_000


def split(name: str) -> Part:
    """Return the part that the document called `name` belongs to.

    Depends on the name alone: neither other documents nor their order nor the text can move a document.

    Parameters
    ----------
    name : str
        A document's name, as `documents` yields it.

    Returns
    -------
    {"train", "calibration", "heldout"}
        About 85, 7 and 8 percent of all names.
    """
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    if share < CALIBRATION_END:
        return "calibration"
    return "heldout" if share >= HELDOUT_START else "train"


def documents(library: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield every document's name and text, sorted by name.

    A document is one ``pydoc`` topic (``topic:NAME``) or the docstrings of one module (``module:DOTTED.NAME``). A
    paragraph that an earlier document already holds is left out (topics include one another), so that no two parts
    share one.

    Parameters
    ----------
    library : Path, optional
        Folder of the standard library's sources; that of the running interpreter by default.

    Yields
    ------
    tuple of (str, str)
        Name and text; the text is never empty and ends with a newline.

    Raises
    ------
    CalibrationError
        If the ``pydoc`` topics or the sources of the standard library are not installed.
    """
    yield from _corpus(library if library is not None else Path(sysconfig.get_paths()["stdlib"]))


def part(which: Part, library: Path | None = None) -> str:
    """Return the text of one part: its documents in order of their names, an empty line between them.

    Parameters
    ----------
    which : {"train", "calibration", "heldout"}
        The part.
    library : Path, optional
        As in `documents`.

    Raises
    ------
    InputError
        If `which` is no part.
    CalibrationError
        As `documents` does.
    """
    if which not in get_args(Part):
        raise InputError(f"Unknown part of the demo text: expected one of {', '.join(get_args(Part))}, got {which!r}.")
    return "\n".join(text for name, text in documents(library) if split(name) == which)


def write_parts(directory: Path) -> dict[str, Path]:
    """Write ``calibration.txt`` and ``heldout.txt`` into `directory`, each by rename, and return their paths by part.

    Parameters
    ----------
    directory : Path
        Created if missing; files of these names in it are replaced.

    Raises
    ------
    CalibrationError
        As `documents` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    parts: tuple[Part, ...] = ("calibration", "heldout")
    for which in parts:
        path = directory / f"{which}.txt"
        _write_atomically(path, part(which).encode())
        written[which] = path
    return written


@cache
def _corpus(library: Path) -> tuple[tuple[str, str], ...]:
    modules = list(_module_documents(library))
    found = sum(len(text) for _, text in modules)
    if found < SMALLEST_LIBRARY:
        raise CalibrationError(
            f"Too little text in the standard library's docstrings: expected at least {SMALLEST_LIBRARY:,} characters "
            f"in the sources under {library}, got {found:,}. This Python seems to be installed without its .py files; "
            "use one that has them, or pass your own text."
        )
    return tuple(_without_copies(sorted([*_topic_documents(), *modules])))


def _topic_documents() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics  # absent from some minimal installations
    except ImportError as error:
        raise CalibrationError(
            "The pydoc topics (module pydoc_data.topics) are expected with Python, but this installation lacks them; "
            "install the full standard library, or pass your own text."
        ) from error
    for name, text in topics.items():
        yield f"topic:{name}", text


def _module_documents(library: Path) -> Iterator[tuple[str, str]]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(library).with_suffix("").parts
                yield "module:" + ".".join(parts), "\n\n".join(_docstrings(path.read_bytes()))


def _docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(source)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _without_copies(named: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, text in named:
        kept: list[str] = []
        for paragraph in text.expandtabs().split("\n\n"):
            key = " ".join(paragraph.split())
            if not key or key in seen:
                continue
            if len(key) >= SHORTEST_COPY:
                seen.add(key)
            kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines()))
        if kept:
            yield name, "\n\n".join(kept) + "\n"


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
