"""What a block's cache keeps as a group: one latent a token, of which keys and values are rebuilt together.

The matrices of keys and values stand above one another, W = [W_k; W_v], (2 · kv, hidden). In the K-FAC metric, with
G = E[x xᵀ] of what both read and F = blockdiag(F_k, F_v) of the gradients at their outputs (of keys before they are
normalised and rotated),

    min over rank r of ‖F^½ (W − A B) G^½‖_F

costs as little as factoring either alone, and what keys and values have in common is kept once. The cache keeps B x;
what it costs is not stored elements but r numbers a token, so that its curve counts these. Half the squared loss
estimates the loss increase in nats, as of kfac.

CSKV (2024) factors the two apart, in the Gram metric, and keeps a window of exact keys and values; MLA (DeepSeek-V2,
2024, section 2.1) is trained with a joint latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice, Choices, of_ranks
from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import statistic_key
from lowrank_compress.errors import InputError
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.linalg.weighted import Projector, factors
from lowrank_compress.methods.edit import Edit, Remembered, Replacement, Source
from lowrank_compress.methods.groups import Price, Weights, uses
from lowrank_compress.methods.halves import halves_of
from lowrank_compress.methods.joint import fit_joint_held_out, joint
from lowrank_compress.methods.linear import Damping
from lowrank_compress.model.casting import cast
from lowrank_compress.shipped.formats.latent import Rebuilt

FORMAT = "latent"
LABEL = "key-value"


@dataclass(frozen=True)
class LatentGroup:
    """Keys and values of a block, which one latent is cached for.

    Attributes
    ----------
    name
        The block's path and "key-value".
    targets
        Keys and values.
    window
        Of so many last tokens exact keys and values are kept besides. Then their matrices stay, and what rebuilds the
        others is stored beside them; with 0 it is in their place.
    """

    name: str
    targets: tuple[Target, Target]
    window: int
    formats: tuple[str, ...] = (FORMAT,)

    @property
    def beside(self) -> bool:
        """Whether the matrices stay as they are."""
        return self.window > 0

    @property
    def block(self) -> int:
        """The targets'."""
        return self.targets[0].block

    @property
    def shape(self) -> tuple[int, int]:
        """(2 · kv, hidden)."""
        return (sum(target.shape[0] for target in self.targets), self.targets[0].shape[1])

    @property
    def cached(self) -> int:
        """Numbers that a stock cache keeps of a token."""
        return self.shape[0]

    @property
    def identity(self) -> tuple[str, ...]:
        """Its metrics."""
        return ("latent", "blockdiag Fisher^½", "Gram^½")

    @property
    def nats(self) -> bool:
        """Losses are in nats."""
        return True

    @property
    def parallel(self) -> bool:
        """It is, as single matrices are."""
        return True

    @property
    def loses_mean(self) -> bool:
        """It restores no mean."""
        return False

    def statistics(self) -> Mapping[str, frozenset[str]]:
        """Moments of what both read, and of the gradients at the output of each."""
        return {target.name: frozenset({"in_gram", "out_fisher"}) for target in self.targets}

    def choices(self, format: str, multiple: int = 1) -> Choices:
        """All latents of fewer numbers than keys and values have, up to a rank that loses nothing.

        What they store, as choices count it, is what is cached of a token.
        """
        ranks = np.arange(multiple, min(self.cached, self.shape[1] + 1), multiple, dtype=np.int64)
        return of_ranks(FORMAT, ranks, ranks)

    def parameters(self, format: str) -> tuple[str, ...]:
        """The rank."""
        return ("rank",)

    def price(self, choice: Choice) -> Price:
        """Elements of both factors."""
        return Price(choice.parameters[0] * sum(self.shape), 0)

    def keep(self, choice: Choice) -> int:
        """The rank."""
        return choice.parameters[0]

    def kept(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The largest rank that its basis serves, from the shapes of its tensors."""
        return shapes[f"{self.name}/expand"][1]

    def decompose(
        self, weights: Weights, means: Mapping[str, Tensor], damping: Damping, keep: int
    ) -> dict[str, Tensor]:
        """Decompose jointly; where there are halves, with the shrinkage that loses least on the other half.

        ``values`` (r,), ``total``, ``expand`` (k, keep), ``contract`` (keep, k), and ``held_out`` (keep + 1,) where
        there are halves.
        """
        weight = torch.cat([weights(target).double() for target in self.targets])
        halves, predicted = halves_of(means, uses(self)), None
        if halves is not None:
            moments = [self._moments(half, weight) for half in (halves.first, halves.second)]
            damping, predicted = fit_joint_held_out(weight, moments, damping)
        projector = joint(weight, *self._moments(means, weight), damping, max(keep, 1))
        tensors = {
            "values": projector.values,
            "total": torch.tensor(projector.total, dtype=torch.float64),
            "expand": projector.expand[:, :keep].float(),
            "contract": projector.contract[:keep].float(),
        }
        if predicted is not None:
            tensors["held_out"] = predicted[: max(keep, 1) + 1]
        return {f"{self.name}/{name}": tensor for name, tensor in tensors.items()}

    def _moments(self, means: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """G (hidden, hidden) and F (2 · kv, 2 · kv), float64."""
        like = {"device": weight.device, "dtype": torch.float64}
        fishers = [means[statistic_key(target, "out_fisher")].to(**like) for target in self.targets]
        return means[statistic_key(self.targets[0], "in_gram")].to(**like), torch.block_diag(*fishers)

    def basis_elements(self, keep: int) -> int:
        """Both factors of a projector."""
        return 2 * keep * min(self.shape)

    def working_bytes(self) -> int:
        """Squares of both sides, and the weight a few times."""
        rows, columns = self.shape
        return torch.float64.itemsize * (6 * min(self.shape) ** 2 + rows**2 + columns**2 + 3 * rows * columns)

    def tail(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> Tensor:
        """Squared loss at rank 0, 1, …, as far as the basis was kept: (… + 1,) float64."""
        held_out = basis.get(f"{self.name}/held_out")
        if held_out is not None and not on_sample:
            return held_out.double().cpu()
        return self._projector(basis, torch.float32).tail()

    def losses(self, basis: Mapping[str, Tensor], choices: Choices, *, on_sample: bool = False) -> np.ndarray:
        """Those at the ranks."""
        tail, ranks = self.tail(basis, on_sample=on_sample).numpy(), choices.parameters[:, 0]
        return tail[ranks[ranks < len(tail)]]

    def total(self, basis: Mapping[str, Tensor], *, on_sample: bool = False) -> float:
        """That of rank 0."""
        return float(self.tail(basis, on_sample=on_sample)[0])

    def encode(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> Edit:
        """Factor; without a window keys and values lose their matrices."""
        left, right = (factor.cpu() for factor in self._factors(source, choice, basis))
        remembered = Remembered(
            self.window,
            cast(right, source.dtype, f"A factor of {self.name}"),
            cast(left, source.dtype, f"A factor of {self.name}"),
        )
        parts = {} if self.beside else {target.name: rebuilt(target, source.dtype) for target in self.targets}
        return Edit(choice, parts, remembered=remembered)

    def replace(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> list[Replacement]:
        """Multiply the factors; what is exact in a window is left as it is, as if the window held all."""
        if self.beside:
            return []
        left, right = self._factors(source, choice, basis)
        sizes = [target.shape[0] for target in self.targets]
        return [
            Replacement(target, matrix)
            for target, matrix in zip(self.targets, (left @ right).split(sizes), strict=True)
        ]

    def _factors(self, source: Source, choice: Choice, basis: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A (2 · kv, r) and B (r, hidden)."""
        projector, (rank,) = self._projector(basis, source.precise), choice.parameters
        if rank > (kept := projector.expand.shape[1]):
            raise InputError(
                f"{self.name} asks for rank {rank}, but its basis was kept up to rank {kept}. Repeat `lrc score` with "
                "--overwrite, or lower the rank in ranks.json."
            )
        weight = torch.cat([source.weight(target) for target in self.targets]).to(source.device)
        moved = replace(
            projector, expand=projector.expand.to(source.device), contract=projector.contract.to(source.device)
        )
        return factors(weight, moved, rank)

    def _projector(self, basis: Mapping[str, Tensor], dtype: torch.dtype) -> Projector:
        return Projector(
            basis[f"{self.name}/values"],
            float(basis[f"{self.name}/total"]),
            basis[f"{self.name}/expand"].to(dtype),
            basis[f"{self.name}/contract"].to(dtype),
        )


def rebuilt(target: Target, dtype: torch.dtype) -> Encoded:
    """Say of a matrix that the attention rebuilds what it would emit."""
    return Encoded(Rebuilt.format, (), target.shape, torch.empty(0, target.shape[1], dtype=dtype))
