"""A sample of what `scripts/mutate.py` tries: no traceback, no hang, no wrong answer, no file lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of a few cases of each kind, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import mutate

        names = list(mutate.cases(list(mutate.TABLES), 25))
        found = mutate.all_results(names, 1, tmp_path_factory.mktemp("mutate"), workers=1, keep=False)
        return {result.case: result for result in found}


@pytest.mark.slow
def test_sample_holds(results: dict[str, Any]) -> None:
    bad = [r for r in results.values() if r.outcome not in ("same", "refused", "stricter")]
    assert not bad, "\n".join(f"{r.case} ({r.mutation}): {r.outcome}: {r.note}" for r in bad)


def test_sample_has_both_outcomes(results: dict[str, Any]) -> None:
    assert {"same", "refused"} <= {r.outcome for r in results.values()}
