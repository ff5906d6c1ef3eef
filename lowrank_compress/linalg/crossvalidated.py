"""How far each regression of `refine` is to trust its sample: λ by cross-validation over two halves of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_compress.linalg.refine import Sample, Solution, Task, error, project, solved, truncate
from lowrank_compress.linalg.weighted import Projector

LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""What λ is chosen from."""

LARGE = 512
"""From how many inputs on candidates are solved and scored in single precision, as which λ is best shows in few digits,
and fitted on the first half alone: the second one has tokens enough to tell."""


@dataclass(frozen=True, eq=False)
class Present:
    """What stands in a task's place now, (k, n), and what its bias adds to the right one, (k,), or None."""

    matrix: Tensor
    bias: Tensor | None = None


def cross_validate(
    tasks: Sequence[Task],
    present: Sequence[Present],
    halves: tuple[Sample, Sample],
    anchor: Tensor | None = None,
    lambdas: Sequence[float] = LAMBDAS,
) -> list[float | None]:
    """Choose λ for each task of a common regression, or None where what is there is to stay.

    The search goes downhill from the middle of `lambdas`, so that most need not be tried.

    Parameters
    ----------
    tasks, present
        Maps that read the same inputs, and what they are now.
    halves
        Moments of the common targets over two halves of the sample.
    anchor
        Of the common solution.
    lambdas
        To choose from, ascending.
    """
    if min(half.count for half in halves) == 0:
        return [None] * len(tasks)
    folds = [halves, halves[::-1]]
    if len(halves[0].gram) >= LARGE:
        folds = [(halves[0].single(), halves[1].single())]
    tried: list[dict[int, float]] = [{} for _ in tasks]
    least = [
        sum(error(task, now.matrix, now.bias, other.of(task.base)) for _, other in folds)
        for task, now in zip(tasks, present, strict=True)
    ]
    ordered = sorted(lambdas)
    while wanted := {place for scores in tried if (place := _next(scores, len(ordered))) is not None}:
        for place in sorted(wanted):
            asking = [number for number, scores in enumerate(tried) if _next(scores, len(ordered)) == place]
            sums = [0.0] * len(asking)
            for fit, other in folds:
                for slot, value in enumerate(_scored([tasks[n] for n in asking], fit, other, anchor, ordered[place])):
                    sums[slot] += value
            for number, value in zip(asking, sums, strict=True):
                tried[number][place] = value
    best = [min(scores, key=lambda place: (scores[place], place)) for scores in tried]
    return [
        ordered[place] if scores[place] < keep else None for place, scores, keep in zip(best, tried, least, strict=True)
    ]


def _next(tried: dict[int, float], count: int) -> int | None:
    """Where to try next, downhill from the middle; None at the bottom."""
    if not tried:
        return count // 2
    best = min(tried, key=lambda place: (tried[place], place))
    return next((place for place in (best - 1, best + 1) if 0 <= place < count and place not in tried), None)


def _scored(tasks: Sequence[Task], fit: Sample, other: Sample, anchor: Tensor | None, strength: float) -> list[float]:
    """Fit tasks on one half, and score them on the other."""
    values = []
    fits = {affine: fit.centred() if affine else fit for affine in {task.affine for task in tasks}}
    solutions = {affine: solved(sample, anchor, strength) for affine, sample in fits.items()}
    for task in tasks:
        sample, known = fits[task.affine], solutions[task.affine]
        found = truncate(task, task.image(known.matrix), sample, known)
        bias = fit.of(task.base).offset(found) if task.affine else None
        values.append(error(task, found, bias, other.of(task.base)))
    return values


def refit(
    tasks: Sequence[Task], chosen: Sequence[float | None], sample: Sample, anchor: Tensor | None = None
) -> list[tuple[Tensor, Projector | None] | None]:
    """Fit the tasks that have a λ on all of a sample.

    Returns
    -------
    list
        For each task W*, (m, n), and its projection to the rank on the smaller side; None where what is there stays.
    """
    found: list[tuple[Tensor, Projector | None] | None] = [None] * len(tasks)
    samples = {affine: sample.centred() if affine else sample for affine in {task.affine for task in tasks}}
    for strength in sorted({value for value in chosen if value is not None}):
        solutions: dict[bool, Solution] = {}
        for number, task in enumerate(tasks):
            if chosen[number] != strength:
                continue
            if task.affine not in solutions:
                solutions[task.affine] = solved(samples[task.affine], anchor, strength)
            known = solutions[task.affine]
            image = task.image(known.matrix)
            found[number] = task.whole(image), project(task, image, samples[task.affine], known)
    return found
