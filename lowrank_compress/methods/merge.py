"""Experts merged to fewer: which of them, and what becomes of their matrices (Sub-MoE, AAAI 2026).

Which: K-means on the outputs of all experts on all tokens, each output scaled to length 1, so that the distance of two
experts is that of their cosine, and the largest possible one is 2. All that K-means needs is the Gram matrix of these,
S_ij = E[cos(y_i, y_j)], so that it works with rows of a root of S.

What: of the matrices W_e (m, n) of a cluster, α_e the shares of its tokens that they see, the joint decomposition is
[W_1 … W_k] = U Σ [V_1ᵀ … V_kᵀ]; all get U Σ Σ_e α_e V_eᵀ. With all m directions of U that is Σ_e α_e W_e, the mean by
frequency; with fewer, its projection on those that the cluster uses most.

Hidden units have no order of their own. Where they are aligned, those of each expert are first put in the order in
which they are most like the leader's: weight matching, Ainsworth et al., Git Re-Basin, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lowrank_compress.arch.spec import Role
from lowrank_compress.linalg.eigen import eigh

SEED = 0
STARTS = 8  # of K-means, for each number of clusters
STEPS = 100  # most of them from one start; it ends where nothing moves any more


def clusterings(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster by K-means, into every number of clusters.

    Parameters
    ----------
    similarity
        S, (n, n) float64, symmetric and positive semi-definite.

    Returns
    -------
    labels
        (n, n) int64: row k − 1 is the cluster, of k, of each.
    inertia
        (n,) float64, never rising: Σ of squared distances to the centres of k clusters, at k − 1; the last one is 0.
    """
    values, vectors = eigh((similarity + similarity.mT) / 2)
    points = vectors * values.sqrt()
    count = len(points)
    labels, inertia = torch.zeros(count, count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    for clusters in range(1, count + 1):
        own = _k_means(points, clusters) if clusters < count else torch.arange(count)
        lost = _inertia(points, own, clusters)
        if clusters > 1 and lost > inertia[clusters - 2]:
            # No start was as good as fewer clusters: part what fits worst from those.
            own = _filled(points, labels[clusters - 2], clusters)
            lost = _inertia(points, own, clusters)
        labels[clusters - 1], inertia[clusters - 1] = own, lost
    inertia[-1] = 0.0
    return labels, inertia


def leads_of(labels: Tensor, shares: Tensor) -> Tensor:
    """Return for each expert the one of its cluster that sees most tokens, the first of several, (n,) int64."""
    leads = torch.empty_like(labels)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        leads[members] = members[shares[members].argmax()]
    return leads


def merged(matrices: Sequence[Tensor], shares: Tensor, kept: float) -> Tensor:
    """Merge matrices of one role of a cluster's experts, float64.

    Parameters
    ----------
    matrices
        W_e, (m, n), as the experts' hidden units are to stand; or, if all directions are kept, biases, (m,).
    shares
        Tokens that each of them sees, (k,); where none sees any, all count the same.
    kept
        Share of the m directions of U that is kept, at least one.
    """
    alpha = shares / shares.sum() if float(shares.sum()) > 0 else torch.full_like(shares, 1 / len(shares))
    mean = sum((weight * each for weight, each in zip(matrices[1:], alpha[1:], strict=True)), matrices[0] * alpha[0])
    if kept >= 1:
        return mean
    joint = sum((weight @ weight.mT for weight in matrices[1:]), matrices[0] @ matrices[0].mT)
    directions = eigh(joint, max(1, round(kept * len(joint))))[1]
    return directions @ (directions.mT @ mean)


def alignment(lead: Mapping[Role, Tensor], other: Mapping[Role, Tensor]) -> Tensor:
    """Return the order, (width,) int64, in which the hidden units of an expert are most like those of another one.

    A unit has a row of gate and up and a column of down; likeness is the sum of the three cosines.
    """
    likeness = torch.zeros(())
    for role in ("gate", "up", "down"):
        here, there = (
            nn.functional.normalize(weights[role].mT if role == "down" else weights[role], dim=1)
            for weights in (lead, other)
        )
        likeness = likeness + here @ there.mT
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def _k_means(points: Tensor, clusters: int) -> Tensor:
    """Return the best labels of several starts, by Lloyd's steps."""
    generator = torch.Generator().manual_seed(SEED)
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(STARTS):
        labels = (points[:, None] - _start(points, clusters, generator)).square().sum(-1).argmin(1)
        for _ in range(STEPS):
            before, labels = labels, _filled(points, labels, clusters)
            labels = (points[:, None] - _centres(points, labels, clusters)).square().sum(-1).argmin(1)
            if torch.equal(labels, before):
                break
        labels = _filled(points, labels, clusters)
        lost = float(_inertia(points, labels, clusters))
        if lost < least:
            best, least = labels, lost
    return best


def _start(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw centres, each with a chance in proportion to its squared distance from those before: k-means++."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(clusters - 1):
        chances = (points[:, None] - points[chosen]).square().sum(-1).amin(1)
        if float(chances.sum()) <= 0:
            chances = torch.ones_like(chances)
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
    return points[chosen]


def _filled(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Give each cluster that has nobody the one farthest from its centre, of those who are not alone."""
    for empty in sorted(set(range(clusters)) - set(labels.tolist())):
        labels = labels.clone()
        counts = torch.bincount(labels, minlength=clusters)
        labels[_distances(points, labels, clusters).where(counts[labels] > 1, -1.0).argmax()] = empty
    return labels


def _centres(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    sums = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points)
    return sums / torch.bincount(labels, minlength=clusters).clamp_min(1)[:, None]


def _distances(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    return (points - _centres(points, labels, clusters)[labels]).square().sum(-1)


def _inertia(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    return _distances(points, labels, clusters).sum()
