"""`lrc diagnose`: what it found, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_compress.cli.terminal import console, number, print_json, table

READS = {"q": "queries", "k": "keys", "v": "values"}


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print a diagnosis."""
    if as_json:
        print_json(found)
        return
    out = console()
    tuned = "base" in found
    rows = [
        [
            name,
            "×".join(map(str, each["shape"])),
            str(each["rank"]),
            number(each["stable_rank"]),
            number(each["effective_rank"]),
            number(each["spectral_norm"]),
            number(each["alpha"]),
            *([f"{len(each['intruders'])} of {len(each['cosines'])}", f"{min(each['cosines']):.3f}"] if tuned else []),
        ]
        for name, each in found["matrices"].items()
    ]
    columns = ["matrix", "shape", "rank", "stable rank", "effective rank", "spectral norm", "tail exponent α"]
    out.print(table(found["model"], [*columns, *(["intruders", "least cosine"] if tuned else [])], rows))
    if tuned:
        out.print(
            f"Intruders: of the leading {found['top']} left singular vectors those whose largest cosine to any of "
            f"{found['base']} is below {found['epsilon']:g}.",
            soft_wrap=True,
        )
    if found["blocks"]:
        rows = [[str(each["block"]), *(number(each[name]) for name in _MEASURES)] for each in found["blocks"]]
        out.print(
            table("Representations that leave each block (means over windows)", ["block", *_MEASURES.values()], rows)
        )
    if found["channels"]:
        _talk(found["channels"])


_MEASURES = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "matrix_entropy": "matrix entropy",
    "matrix_nuclear_norm": "Matrix Nuclear-Norm",
    "nuclear_norm": "by exact singular values",
}


def _talk(found: Mapping[str, Any]) -> None:
    """Print which heads compose, and through which single directions."""
    out = console()
    title = f"Heads that compose (unrelated ones: about {found['unrelated']:.3f})"
    rows = [[*_ends(each), f"{each['score']:.3f}"] for each in found["pairs"]]
    out.print(table(title, ["written by", "read by", "composition score"], rows, left=2))
    rows = [[*_ends(each), f"{each['cosine']:.3f}"] for each in found["channels"]]
    out.print(table("Channels of single directions", ["written by", "read by", "cosine"], rows, left=2))


def _ends(each: Mapping[str, Any]) -> list[str]:
    one, other = each["from"], each["to"]
    ends = [f"block {one['block']} head {one['head']}"]
    ends.append(f"block {other['block']} head {other['head']} {READS[other['reads']]}")
    directions = (one.get("direction"), other.get("direction"))
    return [end if way is None else f"{end} · {way}" for end, way in zip(ends, directions, strict=True)]
