"""The matrices of a compressed model that can be fitted anew, beside what they are in the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_compress.arch.targets import Target
from lowrank_compress.formats.matrix import StoredMatrix, stored_matrices
from lowrank_compress.model.skeleton import Skeleton

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
    """

    target: Target
    stored: StoredMatrix

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
        return 0 not in self.stored.shape and not (self.fewer_rows if self.writes else self.fewer_columns)

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
    maps = {target.name: Map(target, found[target.name]) for target in dense.resolved.targets if target.name in found}
    return {name: each for name, each in maps.items() if each.fits}
