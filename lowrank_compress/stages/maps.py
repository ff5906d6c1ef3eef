"""The matrices of a compressed model that can be fitted anew, beside what they are in the dense one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lowrank_compress.arch.targets import Target
from lowrank_compress.formats.matrix import StoredMatrix, stored_matrices
from lowrank_compress.model.names import experts_of
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.surgery import LEADS

# What may be asked of the dense model's gradients.
COSTS = frozenset({"in_fisher", "out_square", "out_fisher"})
# What reads these is added to the residual stream.
WRITERS = ("context", "hidden")
# What an MLP reads.
BEHIND = ("mlp", "hidden")


@dataclass(frozen=True, eq=False)
class Map:
    """A matrix that is to be fitted.

    Attributes
    ----------
    target
        In the dense model.
    stored
        In the compressed one.
    merged
        Whether it is of an expert that stands for others: its hidden units are no longer those of the dense model.
    """

    target: Target
    stored: StoredMatrix
    merged: bool = False

    @property
    def writes(self) -> bool:
        """Whether it is added to the residual stream."""
        return self.target.reads in WRITERS or (self.target.expert is not None and self.target.role == "down")

    @property
    def fewer_rows(self) -> bool:
        """Whether it has lost rows."""
        return self.stored.shape[0] != self.target.shape[0]

    @property
    def fewer_columns(self) -> bool:
        """Whether it has lost columns."""
        return self.stored.shape[1] != self.target.shape[1]

    @property
    def fits(self) -> bool:
        """Whether it is one that can be fitted."""
        if 0 in self.stored.shape or (self.merged and not self.writes):
            return False
        return not (self.fewer_rows if self.writes else self.fewer_columns)

    @property
    def folded(self) -> bool:
        """Whether its output metric is taken on its input side, K = Wᵀ L W, which is smaller or all that is known."""
        rows, columns = self.target.shape
        return not self.writes and (rows > columns or self.fewer_rows)

    @property
    def statistics(self) -> frozenset[str]:
        """What has to be known of the dense model's gradients."""
        return frozenset({"in_fisher", "out_square"} if self.folded else {"out_fisher"})


def maps_of(dense: Skeleton, compressed: Skeleton) -> dict[str, Map]:
    """Find what can be fitted, by name."""
    found = stored_matrices(
        compressed.model, dense.resolved.modules(), compressed.blueprint.checkpoint.quantization or {}
    )
    leaders = _leaders(compressed)
    maps = {
        target.name: Map(target, found[target.name], target.module.rpartition(".")[0] in leaders)
        for target in dense.resolved.targets
        if target.name in found
    }
    return {name: each for name, each in maps.items() if each.fits}


def _leaders(compressed: Skeleton) -> set[str]:
    """Paths of the experts that stand for others."""
    found = set[str]()
    for path, experts in experts_of(compressed.model).items():
        if experts.merged:
            leads = Counter(compressed.blueprint.read(f"{path}.{LEADS}").tolist())
            found |= {f"{path}.{lead}" for lead, count in leads.items() if count > 1}
    return found
