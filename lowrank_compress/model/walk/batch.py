"""What models are run on: token ids, several sequences of one length at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids of several sequences of one length.

    Attributes
    ----------
    ids
        (sequences, length) int64.
    mask
        (sequences, length) int64, 1 for real tokens; None where nothing is padded.
    labels
        (sequences,) int64 class labels; None for language models, whose labels are the ids themselves.
    kinds
        (sequences, length) int64, which sentence of a pair each token is of; None where there is but one.
    pooled
        Whether a sequence has one loss as a whole, that of its embedding.
    first
        Number of its first sequence in the calibration set; it says which half a sequence belongs to.
    """

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    kinds: Tensor | None = None
    first: int = 0
    pooled: bool = False

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def real(self) -> Tensor | None:
        """(sequences · length,) bool: which flattened positions are no padding; None if all."""
        return None if self.mask is None else self.mask.bool().flatten()
