"""What all tests share: one thread, no network, files in temporary directories only, and runs on a tiny checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when the libraries are imported, hence before them.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch
from hypothesis import settings

from tests.runs import Tiny, lrc
from tests.tiny import save_tiny, tiny_text

torch.set_num_threads(1)
# A busy machine is no failure, and the same examples are tried everywhere.
settings.register_profile("lrc", deadline=None, derandomize=True)
settings.load_profile("lrc")
ASSETS = Path(__file__).parents[1] / "../shared/assets"


FEW = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run of the tests be short."""
    parser.addoption(
        "--cases",
        choices=("all", "few"),
        default="all",
        help=f"few: at most {FEW} cases of each test, evenly spread, and none of those marked slow",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --cases few does."""
    if config.getoption("cases") == "all":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(each[place]) for each in cases.values() for place in evenly(len(each), FEW)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def evenly(count: int, most: int) -> list[int]:
    """Choose at most so many places, the first and the last among them."""
    return list(range(count)) if count <= most else [place * (count - 1) // (most - 1) for place in range(most)]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the memo of file hashes, and all other caches, out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """Where trained models and texts are; the test is skipped where they are not."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs the trained models and texts in {ASSETS.resolve()}")
    return ASSETS.resolve()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny llama with a text to calibrate on and another to evaluate on."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "calibration.txt").write_text(tiny_text(8000))
    (place / "heldout.txt").write_text(tiny_text(2000, seed=1))
    return Tiny(save_tiny("llama", place / "llama"), place / "calibration.txt", place / "heldout.txt")


@pytest.fixture(scope="session")
def pristine(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs by method, made once a session and not to be written to."""
    place = tmp_path_factory.mktemp("runs")

    def find(method: str) -> Path:
        run = place / method
        if not run.exists():
            assert lrc("compress", *tiny.options(run, method)).code == 0
        return run

    return find


@pytest.fixture
def finished(pristine: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies of finished runs, to do with as a test likes."""

    def copy(method: str) -> Path:
        run = tmp_path / f"finished-{method}"
        shutil.copytree(pristine(method), run)
        return run

    return copy
