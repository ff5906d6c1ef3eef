"""Ways to damage a file or a JSON value, whatever it is."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HUGE = 10**18
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, HUGE, -HUGE, 2**63, 2**64, 10**400, 0.0, 0.5, -0.5, 1e308, 1e-308,
    float("nan"), float("inf"), "", " ", "x", "0", "12", "nan", "llama", "../outside/notes.txt", "/dev/zero", "a\nb",
    "\ud800",
    "é漢", "x" * 100_000, [], [None], [[[]]], [0] * 1000, ["x"], {}, {"x": 1}, {"": {}},
]  # fmt: skip


def flip(path: Path, rng: Random) -> None:
    """Change some bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 50])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: Random) -> None:
    """Leave off the end."""
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, 7, 8, 9, max(0, size - 1), rng.randrange(size + 1)]))


def extend(path: Path, rng: Random) -> None:
    """Add bytes behind the end."""
    with path.open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b"x" * 1000, b"\xff\xfe", b"{}"]))


def empty(path: Path, rng: Random) -> None:
    """Leave nothing in it."""
    path.write_bytes(b"")


def remove(path: Path, rng: Random) -> None:
    """Take it away."""
    path.unlink()


def directory(path: Path, rng: Random) -> None:
    """Put a directory in its place."""
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "notes.txt").write_text("mine")


def loop(path: Path, rng: Random) -> None:
    """Make it a link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def dangling(path: Path, rng: Random) -> None:
    """Make it a link that leads nowhere."""
    path.unlink()
    path.symlink_to(rng.choice(["nowhere", "/nowhere/at/all", "x" * 250]))


def moved(path: Path, rng: Random) -> None:
    """Move it away and link to it, as caches do."""
    target = path.with_name(f"moved-{path.name}")
    path.rename(target)
    path.symlink_to(target.name)


def fifo(path: Path, rng: Random) -> None:
    """Put a named pipe in its place."""
    path.unlink()
    os.mkfifo(path)


def unix_socket(path: Path, rng: Random) -> None:
    """Put a socket in its place."""
    path.unlink()
    with tempfile.TemporaryDirectory() as short:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"{short}/s")
        os.replace(f"{short}/s", path)


def device(path: Path, rng: Random) -> None:
    """Make it a link to a device that never ends, or holds nothing."""
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem"]))


def sparse(path: Path, rng: Random) -> None:
    """Make it huge."""
    os.truncate(path, rng.choice([300 << 20, 1 << 40]))


def garbage(path: Path, rng: Random) -> None:
    """Fill it with random bytes."""
    path.write_bytes(rng.randbytes(rng.choice([1, 8, 100, 5000])))


def swapped(path: Path, rng: Random) -> None:
    """Put another file's content into it."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if others:
        path.write_bytes(rng.choice(sorted(others)).read_bytes())


FILE: dict[str, Callable[[Path, Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "extend": extend,
    "empty": empty,
    "remove": remove,
    "directory": directory,
    "loop": loop,
    "dangling": dangling,
    "moved": moved,
    "fifo": fifo,
    "socket": unix_socket,
    "device": device,
    "sparse": sparse,
    "garbage": garbage,
    "swapped": swapped,
}


def any_file(path: Path, rng: Random) -> None:
    """Damage a file in one of these ways."""
    FILE[rng.choice(sorted(FILE))](path, rng)


def paths_of(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(*start, key), *paths_of(item, (*start, key))]
    return found


def edit(value: Any, rng: Random, within: tuple[Any, ...] = ()) -> str:
    """Change one place of a JSON value: another value, no value, or another key; return what was done."""
    places = [path for path in paths_of(value) if path[: len(within)] == within and len(path) > len(within)]
    if not places:
        return "nothing"
    *parents, last = rng.choice(places)
    owner = value
    for key in parents:
        owner = owner[key]
    way = rng.choice(["value", "value", "value", "near", "remove", "rename", "copy"])
    if way == "remove":
        del owner[last]
    elif way == "rename" and isinstance(owner, dict):
        owner[f"{last}{rng.choice(['x', ' ', '.weight'])}"] = owner.pop(last)
    elif way == "copy":
        source = value
        for key in rng.choice(places):
            source = source[key]
        owner[last] = json.loads(json.dumps(source))
    elif way == "near" and isinstance(owner[last], int | float) and not isinstance(owner[last], bool):
        owner[last] = rng.choice(
            [owner[last] + 1, owner[last] - 1, owner[last] * 2, -owner[last], float(owner[last]), str(owner[last])]
        )
    else:
        owner[last] = rng.choice(NASTY)
    return f"{way} at {'.'.join(map(str, (*parents, last)))}"


def dump(value: Any) -> str:
    """Write JSON that holds anything."""
    return json.dumps(value, indent=2)


def json_file(path: Path, rng: Random, times: int = 1, within: tuple[Any, ...] = ()) -> None:
    """Edit a JSON file's values, or how it is written."""
    value = json.loads(path.read_text())
    for _ in range(times):
        edit(value, rng, within)
    text = dump(value)
    way = rng.choice(["", "", "", "", "", "twice", "bom", "utf-16", "comment", "deep", "array", "latin", "exponent"])
    if way == "twice" and isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        text = text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(rng.choice(NASTY))},", 1)
    elif way == "deep":
        text = '{"a":' * 100_000
    elif way == "array":
        text = f"[{text}]"
    elif way == "comment":
        text = f"// mine\n{text}"
    elif way == "exponent":
        text = text.replace(": 32", ": 3.2e1")
    data = text.encode({"utf-16": "utf-16", "bom": "utf-8-sig"}.get(way, "utf-8"))
    path.write_bytes(data + (b"\xe9" if way == "latin" else b""))
