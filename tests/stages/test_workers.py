"""Several processes make what one makes; torchrun's part, starting and ending them, is played by forks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_compress.calibration.capture import capture
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.resources import Resources
from lowrank_compress.resources.workers import Workers, workers_of
from tests.runs import Tiny, done, lrc, results

FEW = ("--micro-batch", "2")  # four micro-batches


def start(count: int, *arguments: object) -> list[int]:
    """Fork the processes of one command, as torchrun would start them; their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            code = 1
            try:
                said = lrc(*arguments)
                code = said.code if not said.out or rank == 0 else 3
            finally:
                os._exit(code)
        started.append(pid)
    return started


def ended(started: list[int]) -> list[int]:
    """Wait for processes; their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]


def assert_same(one: Path, other: Path) -> None:
    """Equal choices, and weights to rounding."""
    assert (one / "scores/ranks.json").read_bytes() == (other / "scores/ranks.json").read_bytes()
    left, right = (load_file(run / "model/model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        largest = float(left[name].abs().sum())  # a bound that empty tensors have as well
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5 * largest)
    assert (one / "model/config.json").read_bytes() == (other / "model/config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "count", "keep"), [("auto", 2, ()), ("svd-llm", 3, ("--keep-statistics",)), ("svd", 2, ())]
)
def test_several_processes_make_what_one_makes(
    tiny: Tiny, tmp_path: Path, method: str, count: int, keep: tuple[str, ...]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    done("compress", *tiny.options(alone, method), *FEW)
    assert ended(start(count, "compress", *tiny.options(together, method), *FEW, *keep)) == [0] * count
    assert_same(alone, together)
    # It is the same run: one process finds it finished.
    before = results(together)
    done("compress", *tiny.options(together, method), *FEW)
    assert results(together) == before


def test_several_processes_evaluate_as_one(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", *tiny.options(run, "svd"))
    asked = ("eval", run, "--perplexity", tiny.heldout, "--batch-size", "1", "--json")
    assert ended(start(3, *asked)) == [0] * 3
    together = done(*asked).json["perplexity"]  # kept: not measured again
    shutil.rmtree(run / "eval")
    alone = done(*asked).json["perplexity"]
    ((name, values),) = alone.items()
    assert together == {name: pytest.approx(values, rel=1e-9)}
    assert together[name]["tokens"] == values["tokens"]


@pytest.mark.slow
def test_after_a_process_has_died_another_number_of_them_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    done("compress", *tiny.options(alone), *FEW)
    died = 0
    for seconds in (0.2, 0.5, 0.8):
        started = start(2, "compress", *tiny.options(together), *FEW)
        time.sleep(seconds)
        # torchrun ends the others when one has died.
        for pid in reversed(started):
            os.kill(pid, signal.SIGKILL)
        died += ended(started) == [-signal.SIGKILL] * 2
    assert died > 0
    done("compress", *tiny.options(together), *FEW)
    assert_same(alone, together)


def test_an_error_of_the_first_ends_it(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("compress", *tiny.options(run), *FEW)
    first, other = start(2, "compress", *tiny.options(run), *FEW, "--ratio", "0.5")
    assert ended([first]) == [2]
    os.kill(other, signal.SIGKILL)
    ended([other])


def test_more_processes_than_micro_batches(tiny: Tiny) -> None:
    skeleton = Skeleton(Checkpoint(tiny.model), torch.device("cpu"), torch.float32)
    batches = [Batch(torch.ones(2, 8, dtype=torch.long))] * 2
    with pytest.raises(InputError, match="has 2 micro-batches for 3 processes"):
        next(capture(skeleton, batches, {}, skip=lambda block: False, resources=Resources(workers=Workers(0, 3))))


def test_a_check_by_several_processes_says_so(tiny: Tiny, tmp_path: Path) -> None:
    options = [*tiny.options(tmp_path / "one", "kfac"), *FEW]
    done("compress", *options)
    done("verify", tmp_path / "one", "--write", tmp_path / "e.json")
    check = [*options[:-3], tmp_path / "two", *FEW, "--check", tmp_path / "e.json", "--tolerance", "1e-4"]
    codes = ended(start(2, "compress", *check, "--report", tmp_path / "report.json"))
    assert codes[0] in (0, 3)
    assert codes[1] == 0
    (change,) = json.loads((tmp_path / "report.json").read_text())["environment"]
    assert change == {"what": "processes", "expected": "1", "found": "2"}
    # Without a directory that both see there is none they could share.
    assert ended(start(2, "compress", *options[:-4], *FEW, "--check", tmp_path / "e.json"))[0] == 2


def test_alone_without_torchrun() -> None:
    # Some schedulers set the number alone.
    with workers_of({"WORLD_SIZE": "4"}) as workers:
        assert workers == Workers(0, 1)
        assert workers.share([1, 2, 3]) == [1, 2, 3]
        assert workers.once(lambda: 5) == 5
    assert [list(Workers(rank, 3).share(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
