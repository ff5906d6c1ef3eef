"""What the scripts that measure speed share: a process that is timed and watched, and the rates of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank_compress.linalg.eigen import eigh
from lowrank_compress.resources.threads import in_threads

T = TypeVar("T")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PRODUCT = 2048  # rows and columns of the matrices whose product is timed
LARGEST_EIGH = 4096  # larger ones are extrapolated
FILE = 512 << 20  # bytes of the file that is written and read
CHUNK = 8 << 20
REPEATS = 3
LONG = 5.0  # seconds; what takes longer is timed once


@dataclass(frozen=True)
class Ran:
    """A process that has ended.

    Attributes
    ----------
    answer
        The JSON object that it printed.
    wall, cpu
        Seconds, from its start to its end; those of its own children are in the CPU time.
    moved
        Bytes that it and its children ``read`` and ``written`` by system calls (memory maps are not), and of these and
        of pages of memory maps ``from_disk`` and ``to_disk``; None where the system does not count them.
    largest
        Folder of the watched directory -> the most bytes in it at any moment that was looked at.
    """

    answer: dict[str, Any]
    wall: float
    cpu: float
    moved: dict[str, int] | None
    largest: dict[str, int]


def pin(threads: int) -> None:
    """Let every process that is started from now on compute with so many threads."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))


def timed(command: Sequence[object], watched: Path | None = None) -> Ran:
    """Run a command that prints one JSON object, and wait for it.

    Raises
    ------
    RuntimeError
        It failed; what it said is on stderr.
    """
    words = [str(word) for word in command]
    before = _moved()
    with tempfile.TemporaryFile() as out:
        begun = time.monotonic()
        process = subprocess.Popen(words, stdout=out)
        try:
            with _Watcher(watched) as watcher:
                _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.monotonic() - begun
        # What a child has read and written counts as its parent's as soon as it is waited for.
        after = _moved()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} failed with exit code {process.returncode}.")
        out.seek(0)
        text = out.read().decode()
    moved = None if before is None or after is None else {name: after[name] - before[name] for name in after}
    answer = json.loads(text[text.index("{") :])
    return Ran(answer, wall, usage.ru_utime + usage.ru_stime, moved, watcher.largest)


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a fresh process, so that this one stays small and the pinned threads count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _moved() -> dict[str, int] | None:
    """Bytes that this process and the children that it waited for have moved so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    found = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {
        "read": found["rchar"],
        "written": found["wchar"],
        "from_disk": found["read_bytes"],
        "to_disk": found["write_bytes"] - found["cancelled_write_bytes"],
    }


class _Watcher:
    """Looks at the sizes of a directory's folders all the while."""

    def __init__(self, directory: Path | None, every: float = 0.5) -> None:
        self.largest: dict[str, int] = {}
        self._directory, self._every = directory, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._directory is not None:
            last = self._ended.wait(self._every)
            folders = [path for path in _listed(self._directory) if path.is_dir()]
            for folder in folders:
                self.largest[folder.name] = max(self.largest.get(folder.name, 0), size_of(folder))
            if last:
                return


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, some of which may vanish meanwhile."""
    total = 0
    for path in _listed(directory, "**/*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _listed(directory: Path, pattern: str = "*") -> list[Path]:
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next reader finds them on the disk; where the system can."""
    for path in paths:
        if path.is_file() and hasattr(os, "posix_fadvise"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # only what is on the disk can be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory: now, or at the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:" if peak else "VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status does not say how much memory this process takes.")


def eigh_unit(size: int, keep: int) -> str:
    """Name of the work of finding the `keep` leading eigenpairs of a symmetric matrix."""
    return f"eigh {size}" if keep >= size else f"eigh {size}, {keep} vectors"


def machine_rates(device: str, eighs: Sequence[tuple[int, int]], directory: Path) -> dict[str, float]:
    """Measure how fast this process computes, and the disk reads and writes.

    Parameters
    ----------
    eighs
        (size, kept eigenpairs) of the decompositions.
    directory
        Where the disk is to be measured.

    Returns
    -------
    dict
        ``float32`` and ``float64``: operations a second of a matrix product; ``read`` and ``write``: bytes a second,
        past the page cache; `eigh_unit`: decompositions a second in float64, by the package's own route, the fastest
        that is known here: on a CPU as many at a time as there are threads. Those above `LARGEST_EIGH` are
        extrapolated by the cube of the size.
    """
    rates = {
        name: 2 * PRODUCT**3 / _seconds(_product(getattr(torch, name), device), device)
        for name in ("float32", "float64")
    }
    for size, keep in eighs:
        share = min(1.0, LARGEST_EIGH / size)
        matrix = torch.randn(round(size * share), round(size * share), dtype=torch.float64, device=device)
        matrix = matrix @ matrix.mT
        few = max(round(keep * share), 1)
        rates[eigh_unit(size, keep)] = share**3 / _eigh_seconds(matrix, few, device)
    return rates | _disk_rates(directory)


def _product(dtype: torch.dtype, device: str) -> Callable[[], object]:
    left, right = (torch.randn(PRODUCT, PRODUCT, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right


def _eigh_seconds(matrix: Tensor, keep: int, device: str) -> float:
    at_once = torch.get_num_threads() if device == "cpu" else 1
    if at_once == 1:
        return _seconds(lambda: eigh(matrix, keep), device)
    return _seconds(lambda: in_threads(lambda one: eigh(one, keep), [matrix] * at_once), device) / at_once


def _seconds(work: Callable[[], object], device: str) -> float:
    """Least time of a few."""
    least = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - begun)
        if least > LONG:
            break
    return least


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _disk_rates(directory: Path) -> dict[str, float]:
    chunk = os.urandom(CHUNK)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="disk-") as file:
        begun = time.perf_counter()
        for _ in range(FILE // CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        write = time.perf_counter() - begun
        evict([Path(file.name)])
        begun = time.perf_counter()
        with open(file.name, "rb", buffering=0) as stream:
            while stream.read(CHUNK):
                pass
        read = time.perf_counter() - begun
    return {"write": FILE / write, "read": FILE / read}
