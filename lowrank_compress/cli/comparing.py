"""A comparison as people read it: lines for a terminal, Markdown for a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lowrank_compress.stages.changes import Change
from lowrank_compress.stages.comparison import Comparison
from lowrank_compress.stages.differences import TensorDifference, WeightDifference

# More than so many of a kind are counted, not listed; --json and a .json report hold all.
LISTED = 20
TITLES = {"same": "the same bytes", "within tolerance": "the same within the tolerance", "different": "different"}


def headline(found: Comparison, expected: str) -> str:
    """Say in one paragraph what differs, and what to do."""
    counts = f"{len(found.files)} of {found.compared['files']} files and {len(found.tensors)} of "
    counts += f"{found.compared['tensors']} tensors are not what {expected} expects"
    first = [each.tensor for each in found.tensors if each.stage == "model"] or [each.file for each in found.files]
    if found.inputs:
        cause = f"The inputs differ ({', '.join(change.what for change in found.inputs[:4])}): restore them."
    elif found.environment and found.tolerance is None:
        cause = "The environment differs too: allow for its last bits with --tolerance 1e-4, or use the expected one."
    else:
        cause = "If the change is meant, write a new expectation with `lrc verify RUN --write`."
    return f"{counts}, the first {first[0]}. {cause}"


def as_lines(found: Comparison) -> list[str]:
    """Return the lines of a comparison, causes first."""
    lines: list[str] = []
    if found.environment:
        lines += _list("Environment differs", map(_change, found.environment), len(found.environment))
    if found.inputs:
        lines += _list("Inputs differ", map(_change, found.inputs), len(found.inputs))
    lines += _list("Files", (f"{each.file}: {each.state}" for each in found.files), len(found.files))
    lines += _list("Tensors", map(_tensor, _tensors(found)), len(found.tensors))
    weights = _weights(found)
    lines += _list(_weights_title(found), map(_weight, weights), len(weights))
    if found.tensors and not found.reference:
        lines.append("The expected tensors are not at hand (--against), so single elements were not compared.")
    return [*lines, _sum(found)]


def as_markdown(found: Comparison, expected: str) -> str:
    """Return a report of a comparison."""
    parts = [f"# {expected}: {TITLES[found.verdict]}\n", _sum(found) + "\n"]
    if found.environment:
        rows = ((change.what, change.expected, change.found) for change in found.environment)
        parts += _table("Environment", ("", "expected", "found"), rows, len(found.environment))
    if found.inputs:
        rows = ((change.what, change.expected, change.found) for change in found.inputs)
        parts += _table("Inputs", ("", "expected", "found"), rows, len(found.inputs))
    parts += _table("Files", ("file", "state"), ((f.file, f.state) for f in found.files), len(found.files))
    tensors = ((f"{t.stage}: {t.tensor}", _problem(t)) for t in _tensors(found))
    parts += _table("Tensors", ("tensor", "what differs"), tensors, len(found.tensors))
    moved = _weights(found)
    weights = ((w.weight, _distance(w)) for w in moved)
    parts += _table(_weights_title(found), ("weight", "distance"), weights, len(moved))
    return "\n".join(parts)


def _sum(found: Comparison) -> str:
    compared = f"{found.compared['files']} files, {found.compared['tensors']} tensors"
    if found.verdict == "same":
        return f"The same bytes: {compared}."
    farthest = f"; farthest weight: {_distance(found.weights[0])}" if found.weights else ""
    within = "" if found.tolerance is None else f" (tolerance {found.tolerance:g}{farthest})"
    differing = f"{len(found.files)} of {found.compared['files']} files, {len(found.tensors)} of "
    differing += f"{found.compared['tensors']} tensors have other bytes"
    return f"{TITLES[found.verdict].capitalize()}{within}: {differing}."


def _tensors(found: Comparison) -> list[TensorDifference]:
    """Those of the checkpoint first, which people know by name."""
    return sorted(found.tensors, key=lambda each: each.stage != "model")


def _weights(found: Comparison) -> list[WeightDifference]:
    return [weight for weight in found.weights if weight.distance > 0]


def _weights_title(found: Comparison) -> str:
    estimated = any(weight.estimated for weight in found.weights)
    how = "estimated, to 9 %; " if estimated else ""
    return f"Distance of what is computed with ({how}{len(found.weights)} tensors in all)"


def _change(change: Change) -> str:
    return f"{change.what}: {change.expected} → {change.found}"


def _tensor(tensor: TensorDifference) -> str:
    return f"{tensor.stage}: {tensor.tensor}: {_problem(tensor)}"


def _problem(tensor: TensorDifference) -> str:
    found = tensor.elements
    if found is None:
        return tensor.problem
    return (
        f"{tensor.problem}; {found.count:,} elements, first {list(found.index)}: {_both(found.expected, found.found)}; "
        f"largest relative difference {found.largest:.3g}; of the norm {found.norm:.3g}"
    )


def _both(expected: float, found: float) -> str:
    """Print two numbers with as many digits as it takes to tell them apart."""
    shown = [(f"{expected:.{digits}g}", f"{found:.{digits}g}") for digits in (6, 9, 17)]
    return " → ".join(next((pair for pair in shown if pair[0] != pair[1]), shown[-1]))


def _weight(weight: WeightDifference) -> str:
    return f"{weight.weight}: {_distance(weight)}"


def _distance(weight: WeightDifference) -> str:
    if weight.distance == float("inf"):
        return "no counterpart"
    return f"{'about ' if weight.estimated else ''}{weight.distance:.2g} of its norm"


def _list(title: str, entries: Iterable[str], count: int) -> Iterator[str]:
    if count:
        yield f"{title}:"
        yield from (f"  {entry}" for entry, _ in zip(entries, range(LISTED), strict=False))
    if count > LISTED:
        yield f"  … and {count - LISTED} more"


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], count: int) -> Iterator[str]:
    if not count:
        return
    body = [" | ".join(cell.replace("|", "\\|") for cell in row) for row, _ in zip(rows, range(LISTED), strict=False)]
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    yield f"## {title}\n\n" + "\n".join(f"| {line} |" for line in [*head, *body])
    yield f"\n… and {count - LISTED} more\n" if count > LISTED else ""
