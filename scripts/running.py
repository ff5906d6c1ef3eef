"""What the scripts share: calling `lrc` in this process, and where the development models and texts are."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lowrank_compress.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT.parent / "shared" / "assets"


def lrc(*arguments: object) -> dict[str, Any]:
    """Run an `lrc` command that takes ``--json`` as a user would, but without the seconds that imports take.

    Returns
    -------
    dict
        What the command printed on stdout.

    Raises
    ------
    RuntimeError
        The command failed; with what it printed on stderr.
    """
    words = [str(argument) for argument in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [*words, "--json"])
    if result.exit_code != 0:
        raise RuntimeError(f"lrc {' '.join(words)} failed ({result.exit_code}): {result.stderr}") from result.exception
    return json.loads(result.stdout)


def perplexity(checkpoint: Path, text: Path, *options: object) -> float:
    """Perplexity of one checkpoint, whatever it is, without a dense original beside it."""
    metrics = lrc("eval", checkpoint, "--perplexity", text, *options)
    (values,) = metrics["perplexity"].values()
    return values.get("compressed", values.get("dense"))


def write_between(page: Path, mark: str, content: str) -> None:
    """Replace what stands in a page between the lines ``<!-- mark -->`` and ``<!-- /mark -->``.

    Raises
    ------
    ValueError
        The marks are not there, or more than once.
    """
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    pattern = re.compile(f"(?<={re.escape(opening)}\n).*?(?={re.escape(closing)})", re.DOTALL)
    written, count = pattern.subn(lambda _: f"{content}\n", page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: expected {opening} … {closing} once, found it {count} times")
    page.write_text(written, encoding="utf-8")
