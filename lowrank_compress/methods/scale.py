"""How much more, or less, an error in a matrix costs than its two factors say: one number for each group.

A predicted loss in nats is ½ tr(F Δ G Δᵀ) for an error Δ of a matrix: the Fisher information of its weights taken for
F ⊗ G, as if inputs and gradients had nothing to do with each other, nor one token of a sequence with the next. The
information itself is E[vec S vec Sᵀ] with S = Σ_t g_t x_tᵀ over a sequence, the gradient in the weights, and its trace
is E‖S‖². So c = E‖S‖² / (tr F · tr G) is what a loss of F ⊗ G is to be multiplied with to have that trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.methods.groups import TargetGroup

SCALE = frozenset({"row_fisher", "out_square", "in_square"})
"""The statistics that it is made of: their sums are E‖S‖², tr F and tr G."""


def decisive(group: TargetGroup) -> list[Target]:
    """Those matrices of a group whose gradients its losses are made of."""
    wanted = group.statistics()
    return [
        target
        for target in group.targets
        if any(STATISTICS[name].gradient for name in wanted.get(target.name, frozenset()))
    ]


def with_scales(wanted: Mapping[str, frozenset[str]], groups: Sequence[TargetGroup]) -> dict[str, frozenset[str]]:
    """Add what the scales of groups are made of to the statistics that are wanted of each target.

    Nothing where a group has no predicted loss in nats, or is of routed experts: of these there is no scale.
    """
    found = dict(wanted)
    if all(group.nats and all(target.expert is None for target in group.targets) for group in groups):
        for target in (target for group in groups for target in decisive(group)):
            found[target.name] = found.get(target.name, frozenset()) | SCALE
    return found


def scales_of(groups: Sequence[TargetGroup], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the scales of those groups that the statistics of a block tell them of: ``<group>/scale``, (1,) float64."""
    found = {}
    for group in groups:
        keys = [{name: statistic_key(target, name) for name in SCALE} for target in decisive(group)]
        if keys and all(key in means for each in keys for key in each.values()):
            sums = [{name: float(means[key].double().sum()) for name, key in each.items()} for each in keys]
            product = sum(each["out_square"] * each["in_square"] for each in sums)
            scale = sum(each["row_fisher"] for each in sums) / product if product > 0 else 1.0
            found[f"{group.name}/scale"] = torch.tensor([scale], dtype=torch.float64)
    return found
