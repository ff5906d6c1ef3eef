"""lowrank.json and the model card of a compressed checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices
from lowrank_compress.arch.targets import Target
from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.config import FactorizeConfig, Scheme
from lowrank_compress.evaluation.size import measure_size, weight_bytes
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.groups import Price, TargetGroup, dense_elements, price_of, replaced
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.stages.cachebudget import cache_report, cached_at
from lowrank_compress.stages.curves import predicted_losses
from lowrank_compress.stages.ranks import choice_of, entry_of
from lowrank_compress.stages.subject import claimed_of

REPORT = "lowrank.json"
_FACTS = (
    *("asked_ratio", "reached_ratio", "ratio_of", "stored_elements", "claimed_elements"),
    *("stored_bytes", "claimed_bytes", "reached_ratio_bytes", "cache"),
)


@dataclass(frozen=True)
class Experts:
    """What the report tells of routed experts.

    Attributes
    ----------
    seen
        How many tokens of the calibration set each saw, by its path.
    shapes
        (out, in) of matrices that are stored dense and smaller, by their modules' paths.
    leads
        Path of an expert that another one stands for -> path of that.
    """

    seen: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    leads: Mapping[str, str]


def facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Take from lowrank.json what the manifest of its checkpoint repeats, as far as it is there."""
    return {name: report[name] for name in _FACTS if name in report}


def block_losses(
    groups: Sequence[TargetGroup],
    basis: Mapping[str, Tensor],
    choices: Mapping[str, Choice],
    unit_of_loss: str,
    yardsticks: Mapping[str, Sequence[TargetGroup]],
) -> dict[str, float]:
    """Predicted loss of the groups that `choices` names, of one block, at the rank they are stored with.

    `yardsticks` says whose totals losses of alternatives are shares of (`candidates.yardsticks`).
    """
    return {
        group.name: 0.0
        if choices[group.name].is_dense
        else _loss(group, basis, choices[group.name], unit_of_loss == "nats", yardsticks.get(group.name, ()))
        for group in groups
        if group.name in choices
    }


def _loss(
    group: TargetGroup, basis: Mapping[str, Tensor], choice: Choice, nats: bool, yardsticks: Sequence[TargetGroup]
) -> float:
    alone = np.array([choice.parameters], dtype=np.int64)
    choices = Choices(choice.format, alone, alone[:, 0], alone[:, 0])
    return float(predicted_losses(group, basis, choices, nats or group.cached > 0, yardsticks)[0])


def summary(
    plan: Blueprint,
    groups: Sequence[TargetGroup],
    choices: Mapping[str, Choice],
    losses: Mapping[str, float],
    scores: Manifest,
    config: FactorizeConfig,
    about: Mapping[str, Any],
    experts: Experts,
) -> dict[str, Any]:
    """Make lowrank.json: what was asked, what was reached, and how each matrix or module is stored."""
    itemsize = getattr(torch, config.dtype).itemsize
    matrices = {
        group.name: {
            "shape": list(group.shape),
            **entry_of(group, choices[group.name]),
            "dense": dense_elements(group),
            "stored": price_of(group, choices[group.name]).elements,
            "dense_bytes": sum(weight_bytes(plan, target) for target in replaced(group)),
            "stored_bytes": price_of(group, choices[group.name]).bytes(itemsize),
            "predicted_loss": losses[group.name],
            **({"cached": cached_at(group, choices[group.name])} if group.cached else {}),
        }
        for group in groups
    }
    planned = scores.report
    removed = sum(matrix["dense"] - matrix["stored"] for matrix in matrices.values())
    kept = planned["claimed_elements"] - sum(matrix["dense"] for matrix in matrices.values())
    compressed = {target.name for group in groups for target in group.targets}
    before = sum(weight_bytes(plan, target) for target in claimed_of(plan.resolved, compressed))
    after = kept * itemsize + sum(matrix["stored_bytes"] for matrix in matrices.values())
    others = planned["denominator"] - planned["claimed_elements"]
    whole = before if planned["ratio_of"] == "blocks" else measure_size(plan.checkpoint).bytes
    return {
        "schema": 1,
        "method": config.method,
        "scheme": planned["scheme"],
        "plan": planned["plan"],
        "plans": planned["plans"],
        "dtype": config.dtype,
        "asked_ratio": planned["asked_ratio"],
        "reached_ratio": removed / planned["denominator"],
        "ratio_of": planned["ratio_of"],
        "claimed_elements": planned["claimed_elements"],
        "stored_elements": planned["claimed_elements"] - removed,
        "claimed_bytes": before,
        "stored_bytes": after,
        "reached_ratio_bytes": 1 - (after + others * itemsize) / whole,
        "unit": planned["unit"],
        "about": dict(about),
        **cache_report(groups, choices, planned.get("cache", {}).get("asked"), planned["scheme"].get("kv_window")),
        "matrices": matrices,
        **({"experts": found} if (found := _experts(plan, groups, matrices, experts)) else {}),
    }


def _experts(
    plan: Blueprint, groups: Sequence[TargetGroup], matrices: Mapping[str, Any], experts: Experts
) -> dict[str, Any]:
    """Tell of each routed expert what it saw, how many elements it has and keeps, and by what entries."""
    own: dict[str, list[Target]] = {}
    for target in plan.resolved.targets:
        if target.expert is not None:
            own.setdefault(target.module.rpartition(".")[0], []).append(target)
    entries: dict[str, list[str]] = {}
    shared: set[str] = set()
    for group in groups:
        for path in dict.fromkeys(t.module.rpartition(".")[0] for t in group.targets if t.expert is not None):
            entries.setdefault(path, []).append(group.name)
            shared |= {path} if len({target.expert for target in group.targets}) > 1 else set()
    found = {}
    for path, targets in own.items():
        names, dense = entries.get(path, []), sum(target.elements for target in targets)
        removed, width = sum(matrices[name]["dense"] - matrices[name]["stored"] for name in names), {}
        if path in shared:  # the choice is one for all experts
            shapes = [experts.shapes.get(target.module, target.shape) for target in targets]
            removed, width = dense - sum(map(math.prod, shapes)), {"width": shapes[0][0]}
        found[path] = {
            "tokens": experts.seen.get(path),
            "dense": dense,
            "stored": dense - removed,
            "entries": names,
            **width,
            **({"leads_to": experts.leads[path]} if path in experts.leads else {}),
        }
    return found


def beyond_claimed(report: Mapping[str, Any], plan: Blueprint) -> tuple[int, int]:
    """Find again what a report does not say, of the checkpoint `plan` that it is of.

    Returns
    -------
    tuple
        Elements that count in its ratio and are not claimed, none or all the rest of the model, which stay as they
        are; and the bytes that all of what the ratio is of had before.
    """
    claimed, elements = report["claimed_elements"], report["stored_elements"]
    removed, others = claimed - elements, 0
    if removed:
        others = round(removed / report["reached_ratio"]) - claimed
    elif report["ratio_of"] == "model":
        others = measure_size(plan.checkpoint).model - elements
    bytes_now = report["stored_bytes"] + others * getattr(torch, report["dtype"]).itemsize
    return others, round(bytes_now / (1 - report["reached_ratio_bytes"]))


def recast(report: Mapping[str, Any], plan: Blueprint, dtype: str) -> dict[str, Any]:
    """Make lowrank.json of a checkpoint from that of the one whose weights it holds in another dtype.

    Parameters
    ----------
    report
        That of the checkpoint that was cast.
    plan
        That checkpoint.
    dtype
        In which the weights are stored now.
    """
    if "reached_ratio_bytes" not in report:  # an older version counted elements alone
        return {**report, "dtype": dtype}
    itemsize = getattr(torch, dtype).itemsize
    groups = {group.name: group for group in all_groups(candidates_of(plan.resolved, Scheme(**report["scheme"])))}

    def price(name: str, matrix: Mapping[str, Any]) -> Price:
        if "indices" in matrix:  # written by another stage than what chose among groups
            return Price(matrix["stored"], matrix["indices"])
        return price_of(groups[name], choice_of(groups[name], matrix))

    matrices = {
        name: {**matrix, "stored_bytes": price(name, matrix).bytes(itemsize)}
        for name, matrix in report["matrices"].items()
    }
    kept = report["claimed_elements"] - sum(matrix["dense"] for matrix in matrices.values())
    after = kept * itemsize + sum(matrix["stored_bytes"] for matrix in matrices.values())
    others, whole = beyond_claimed(report, plan)
    return {
        **report,
        "dtype": dtype,
        "stored_bytes": after,
        "reached_ratio_bytes": 1 - (after + others * itemsize) / whole,
        "matrices": matrices,
    }
