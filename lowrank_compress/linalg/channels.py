"""How attention heads of one layer talk to those of later ones: singular directions that are written and read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """Singular directions in the residual stream of a map of each head, by falling singular value.

    Attributes
    ----------
    values
        σ, (heads, r).
    vectors
        What is written or read, (heads, d, r) with orthonormal columns.
    """

    values: Tensor
    vectors: Tensor


def product_directions(left: Tensor, right: Tensor) -> tuple[Directions, Directions]:
    """Decompose the products A B of each head without forming them: their left and their right singular directions.

    With A = Q R and Bᵀ = Q' R' it is the SVD of R R'ᵀ (r, r), turned by Q and Q'; in float64, returned in float32.

    Parameters
    ----------
    left, right
        A (heads, d, r) and B (heads, r, d).
    """
    outer, one = torch.linalg.qr(left.double())
    inner, other = torch.linalg.qr(right.double().mT)
    u, values, vh = torch.linalg.svd(one @ other.mT)
    return Directions(values.float(), (outer @ u).float()), Directions(values.float(), (inner @ vh.mT).float())


def cosines(written: Directions, read: Directions) -> Tensor:
    """⟨uᵢ, rⱼ⟩ of all directions that heads write, and others read: (writing heads, reading heads, r, r)."""
    heads, width, size = written.vectors.shape
    others, _, reads = read.vectors.shape
    flat = written.vectors.mT.reshape(-1, width) @ read.vectors.mT.reshape(-1, width).T
    return flat.view(heads, size, others, reads).transpose(1, 2)


def composition_scores(written: Directions, read: Directions, between: Tensor) -> Tensor:
    """Composition scores ‖R M‖ / (‖R‖ ‖M‖) of maps M that write and maps R that read, (writing heads, reading heads).

    N. Elhage et al., A Mathematical Framework for Transformer Circuits, 2021; Frobenius norms. By singular directions,
    with M = Σ σᵢ uᵢ vᵢᵀ and R = Σ sⱼ qⱼ rⱼᵀ, it is √(Σᵢⱼ (sⱼ σᵢ ⟨rⱼ, uᵢ⟩)²) / (‖s‖ ‖σ‖): about 1/√d for unrelated
    maps of dimension d. One pair of directions with a high cosine is a channel through the residual stream, which the
    score of all of them hides (J. Merullo, C. Eickhoff, E. Pavlick, Talking Heads, NeurIPS 2024; G. Franco, M.
    Crovella, Sparse Attention Decomposition, arXiv 2410.00340).

    Parameters
    ----------
    written, read
        The directions.
    between
        Their `cosines`.
    """
    weighted = written.values[:, None, :, None] * read.values[None, :, None, :] * between
    norms = written.values.norm(dim=1)[:, None] * read.values.norm(dim=1)[None]
    return torch.where(norms > 0, weighted.flatten(2).norm(dim=2) / norms.clamp(min=1e-30), 0.0)
