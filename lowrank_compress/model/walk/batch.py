"""What models are run on: token ids, several sequences of one length at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In the place of a label: nothing is scored there.
IGNORED = -100


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
        int64, what a head's loss is against; None for language models, whose labels are the ids themselves. Classes
        (sequences,); for each token its class, or the one that was masked, (sequences, length), `IGNORED` where none is
        scored; of answers the positions of the first and the last token, (sequences, 2); of pairs zeros (pairs,); of a
        regression what its scores should be, of several labels 1 or 0 for each, (sequences, outputs) float64.
    kinds
        (sequences, length) int64, which sentence of a pair each token is of; None where there is but one.
    outputs
        How many losses a sequence has as a whole, of its embedding (one), of each score or of each label; 0 where
        labels or tokens say.
    paired
        Whether every two sequences are one pair, of which the first is preferred to the other (`pair_rows`).
    first
        Number of its first sequence in the calibration set; it says which half a sequence belongs to.
    """

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    kinds: Tensor | None = None
    first: int = 0
    outputs: int = 0
    paired: bool = False

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def real(self) -> Tensor | None:
        """(sequences · length,) bool: which flattened positions are no padding; None if all."""
        return None if self.mask is None else self.mask.bool().flatten()

    @property
    def terms(self) -> int:
        """How many terms the summed loss has: scored tokens, examples, ends of answers, pairs, scores, or labels."""
        if self.outputs:
            return len(self.ids) * self.outputs
        if self.labels is not None:
            return int((self.labels != IGNORED).sum())
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def pair_rows(pairs: int) -> Tensor:
    """Rows of the sequences of each pair in a batch, (pairs, 2) int64, the preferred one first.

    Both have even numbers or both have odd ones, by which a calibration set is halved; but for a last pair that is left
    over.
    """
    number = torch.arange(pairs)
    one = 2 * number - number % 2
    other = one + 2
    if pairs % 2:
        other[-1] = one[-1] + 1
    return torch.stack([one, other], 1)
