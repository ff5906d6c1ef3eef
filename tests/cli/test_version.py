from __future__ import annotations

import lowrank_compress
from tests.runs import done


def test_version() -> None:
    assert done("--version").out == f"lrc {lowrank_compress.__version__}\n"
    assert "compress" in done("--help").out
