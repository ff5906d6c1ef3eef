"""Kill `lrc compress` at random moments, resume it, and compare every byte with an undisturbed run.

    python scripts/kill_and_resume.py --model DIR --calibration FILE --runs 20 --seed 0

Prints a table, and exits with code 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank_compress.artifacts.files import sha256

COMPARED = ("model", "scores")
MOST_KILLS = 5


def main() -> int:
    """Run the experiment and return the exit code."""
    options = arguments()
    chooser = random.Random(options.seed)
    made = Table(
        "run", "kills", "seconds into the work, and what was finished then", "model/ and scores/", title=title(options)
    )
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as place:
        reference = Path(place) / "undisturbed"
        begun, process = start(options, reference)
        while process.poll() is None and not (reference / "run.json").exists():
            time.sleep(0.002)
        work = time.monotonic() - begun  # without the process's own end
        finish(process)
        expected = contents(reference)
        for number in range(options.runs):
            run = Path(place) / f"run-{number:02d}"
            moments = disturbed(options, run, work, chooser)
            found = contents(run)
            names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            wrong += bool(names)
            verdict = f"differ: {', '.join(names)}" if names else f"same {len(found)} files"
            made.add_row(str(number), str(len(moments)), "; ".join(moments), verdict)
            print(f"run {number}: {len(moments)} kills, {verdict}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 200).print(made)
    print(f"{options.runs - wrong} of {options.runs} runs ended in the undisturbed run's bytes ({work:.1f} s of work).")
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    """Read the command line; what it does not know goes on to `lrc compress`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="auto")
    options, options.more = parser.parse_known_args()
    return options


def title(options: argparse.Namespace) -> str:
    """Say what is compressed how."""
    return " ".join([Path(options.model).name, "--method", options.method, *options.more])


def start(options: argparse.Namespace, run: Path) -> tuple[float, subprocess.Popen[bytes]]:
    """Start `lrc compress` and wait until it holds the run's lock: return that moment and the process."""
    command = [
        *(sys.executable, "-c", "from lowrank_compress.cli.main import app; app()", "compress", options.model),
        *("--method", options.method, "--calibration", options.calibration, "--out", str(run), *options.more),
    ]
    quiet = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=quiet)
    lock = run / ".lock.pid"
    while process.poll() is None and not (lock.exists() and lock.read_text() == f"pid {process.pid}\n"):
        time.sleep(0.002)
    return time.monotonic(), process


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process; what it said is shown if it failed."""
    _, said = process.communicate()
    if process.returncode != 0:
        sys.exit(f"lrc compress failed with exit code {process.returncode}:\n{said.decode()}")


def disturbed(options: argparse.Namespace, run: Path, work: float, chooser: random.Random) -> list[str]:
    """Kill and resume until the run is done; return a description of each kill."""
    moments: list[str] = []
    while True:
        begun, process = start(options, run)
        if len(moments) < MOST_KILLS:
            after = chooser.uniform(0, work)
            try:
                process.wait(begun + after - time.monotonic())
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                moments.append(f"{after:.2f} {progress(run)}")
                continue
        finish(process)
        return moments


def progress(run: Path) -> str:
    """Say how far a killed run had come."""
    if (run / "model" / "manifest.json").exists():
        return "everything"
    if (run / "model").exists():
        return "part of model/"
    factors = len(list(run.glob("work/*.safetensors")))
    if factors or (run / "scores" / "manifest.json").exists():
        return f"scores/, {factors} blocks of factors"
    return f"{len(list(run.glob('scores/basis-*.safetensors')))} blocks of bases"


def contents(run: Path) -> dict[str, str]:
    """Hash every file of the directories that must repeat."""
    return {
        str(path.relative_to(run)): sha256(path)
        for part in COMPARED
        for path in sorted((run / part).rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    sys.exit(main())
