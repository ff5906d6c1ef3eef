"""A few numbers of a large tensor, from which its distance to another one can be estimated."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The variance of an estimated squared distance is at most 2/64 of its square: a distance is right to 9 % (one standard
# deviation), whatever the tensors.
BUCKETS = 64
DEVIATION = 0.5 * math.sqrt(2 / BUCKETS)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sketch:
    """A count sketch: each element, with a random sign, is added to one of `BUCKETS` sums.

    Signs and buckets follow from an element's place alone (the bits of Philox, which are the same everywhere), so that
    the sketch is linear: that of a difference is the difference of the sketches, and its expected squared length is the
    squared Frobenius norm.

    Attributes
    ----------
    norm
        Frobenius norm of the tensor itself.
    sums
        float32 (BUCKETS,); rounding limits what can be told apart to 1e-7 of the norm.

    References
    ----------
    Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002.
    """

    norm: float
    sums: np.ndarray

    def text(self) -> str:
        """Return the sums as base64 of little-endian float32."""
        return base64.b64encode(self.sums.astype("<f4").tobytes()).decode()

    @classmethod
    def parse(cls, norm: float, text: str) -> Sketch:
        """Read what `text` wrote.

        Raises
        ------
        ValueError
            It is something else.
        """
        sums = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        if sums.shape != (BUCKETS,) or not np.isfinite(sums).all():
            raise ValueError(f"a sketch is {BUCKETS} finite numbers")
        return cls(norm, sums)

    def distance(self, other: Sketch) -> float:
        """Estimate the norm of the difference of both tensors, relative to this one's norm."""
        return relative(float(np.linalg.norm(self.sums.astype(np.float64) - other.sums)), self.norm)


def sketch(pieces: Iterable[Tensor]) -> Sketch:
    """Take the sketch of a tensor that comes in pieces, each read once."""
    bits = np.random.Philox(key=0)
    sums, square = np.zeros(BUCKETS), 0.0
    for piece in pieces:
        for part in piece.detach().flatten().to("cpu", torch.float64).split(_CHUNK):
            values = part.numpy()
            drawn = bits.random_raw(len(values))
            signed = np.where(drawn & BUCKETS, -values, values)
            sums += np.bincount((drawn % BUCKETS).astype(np.intp), signed, BUCKETS)
            square += float(values @ values)
    return Sketch(math.sqrt(square), sums.astype(np.float32))


def relative(size: float, norm: float) -> float:
    """Divide a distance by a norm; no distance is 0 even of nothing."""
    return size / norm if norm else (math.inf if size else 0.0)
