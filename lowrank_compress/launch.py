"""Run another program as ``python -m`` does, with compressed checkpoints known to transformers.

``python -m lowrank_compress.launch lm_eval run …`` is ``python -m lm_eval run …`` after ``import lowrank_compress``:
for programs that load models and know nothing of this package, without their flag for remote code.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m lowrank_compress.launch MODULE [ARGUMENTS …], such as: … launch lm_eval run --model hf …"


def main(arguments: Sequence[str]) -> None:
    """Run the module that is named first as the main program, with the arguments that follow.

    This package is imported by now: a module's package always is before the module runs.

    Raises
    ------
    SystemExit
        No module is named, or there is none of that name; or the module ends so.
    """
    if not arguments or arguments[0].startswith("-"):
        help_wanted = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if help_wanted else sys.stderr)
        raise SystemExit(0 if help_wanted else 2)
    name = arguments[0]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        print(f"There is no module {name} here; expected the name that `python -m` takes.\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = list(arguments)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
