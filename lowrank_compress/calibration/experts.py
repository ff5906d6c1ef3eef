"""What routed experts see of a batch, and what stands for the statistics of those that saw nothing.

A statistic of an expert is a sum over the tokens that are routed to it. Those of activations are divided by *all*
tokens; those of gradients, which are taken at the expert's own matrices and so contain the router's weight, by its
share of the losses: losses · its tokens / all tokens. So Gram ⊗ Fisher is in nats a token, as it is for a matrix that
sees everything, and losses of all matrices of a model compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.statistics import HALVES, ROUTED, STATISTICS, TOKENS, first_half, statistic_key
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.experts import routed

# Elements of the outputs of all experts that are compared in one go; it changes no result but in the last bits.
AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens of a batch that one expert sees.

    Attributes
    ----------
    tokens
        Which tokens of the batch these are, (n,) int64, ascending.
    rows
        Which of the rows that enter the expert are real tokens, (n,) int64.
    sequence, place
        (n,): the sequence that each is of, and its number among the expert's tokens of that sequence.
    weights
        What the router multiplies the expert's output with, (sequences, most of any sequence, 1) float64; 0 where no
        token is.
    """

    tokens: Tensor
    rows: Tensor
    sequence: Tensor
    place: Tensor
    weights: Tensor

    def packed(self, values: Tensor) -> Tensor:
        """Sort rows (tokens, n) by sequence: (sequences, most of any sequence, n), zeros where no token is."""
        return self.spread(values[self.rows])

    def spread(self, values: Tensor) -> Tensor:
        """Sort what there is of each of the tokens, (n, k), in the same way."""
        found = values.new_zeros(*self.weights.shape[:2], values.shape[-1])
        found[self.sequence, self.place] = values
        return found

    @property
    def real(self) -> Tensor:
        """Where there is a token in what was sorted, (sequences, most of any sequence) bool."""
        return torch.arange(self.weights.shape[1], device=self.counts.device) < self.counts[:, None]

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens there are of each sequence, (sequences,) float64."""
        return torch.bincount(self.sequence, minlength=len(self.weights)).double()


class Routing:
    """Where the tokens of a batch go in one block; it is known when the block's experts run."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._found: dict[int, Routed] = {}
        self.aside = False
        """Whether experts are run on tokens that the router does not send them."""

    def watch(self, experts: nn.Module) -> RemovableHandle:
        """Note what the experts are called with; where some stand for others, tokens are theirs that do."""

        def before(module: Any, args: tuple[Tensor, ...]) -> None:
            index = args[1].detach()
            index = module.get_buffer("lr_leads").long()[index] if module.merged else index
            self._chosen, self._found = (index, args[2].detach()), {}

        return experts.register_forward_pre_hook(before)

    def chosen(self, index: Tensor, weights: Tensor) -> Routing:
        """Note the router's choices, (tokens, experts a token)."""
        self._chosen, self._found = (index, weights), {}
        return self

    def of(self, expert: int) -> Routed:
        """Return the tokens that an expert sees."""
        if expert not in self._found:
            assert self._chosen is not None
            self._found[expert] = self._routed(expert, *self._chosen)
        return self._found[expert]

    def _routed(self, expert: int, index: Tensor, weights: Tensor) -> Routed:
        tokens, places = routed(index, expert)
        count, length = self._batch.ids.shape
        rows = torch.arange(len(tokens), device=tokens.device)
        if self._batch.mask is not None:
            rows = rows[self._batch.mask.bool().flatten().to(tokens.device)[tokens]]
        sequence = tokens[rows] // length
        counts = torch.bincount(sequence, minlength=count)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sequence]
        own = weights.new_zeros(count, int(counts.max()), 1, dtype=torch.float64)
        own[sequence, place, 0] = weights[tokens, places][rows].double()
        return Routed(tokens[rows], rows, sequence, place, own)


@torch.no_grad()
def likeness(experts: Sequence[Any], x: Tensor) -> Tensor:
    """Sum over tokens of the cosines between what experts make of each: (experts, experts) float64.

    Parameters
    ----------
    experts
        Those of a block.
    x
        (tokens, size): all real tokens, wherever the router sends them.
    """
    found = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, AT_ONCE // (len(experts) * x.shape[1]))):
        outputs = torch.stack([expert(part) for expert in experts])
        units = nn.functional.normalize(outputs.double(), dim=-1).movedim(1, 0)
        found += (units @ units.mT).sum(0)
    return found


def routed_keys(targets: Sequence[Target], wanted: Mapping[str, frozenset[str]]) -> dict[int, str]:
    """Return, for each expert that a statistic is wanted of, the key of its share of the tokens."""
    experts = {target.expert for target in targets if target.expert is not None and wanted.get(target.name)}
    return {
        target.expert: statistic_key(target, ROUTED)
        for target in targets
        if target.expert in experts and target.role == "down"
    }


def of_experts(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what says how many tokens the experts of a block saw."""
    return {key: mean for key, mean in means.items() if key == TOKENS or key.endswith(f"/{ROUTED}")}


def tokens_seen(means: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many tokens each expert of a block saw, by its path."""
    own = of_experts(means)
    total = float(own.pop(TOKENS, torch.zeros(())))
    return {key.rpartition("/")[0].rpartition(".")[0]: round(total * float(share)) for key, share in own.items()}


def fill_unseen(
    targets: Sequence[Target], wanted: Mapping[str, frozenset[str]], means: MutableMapping[str, Tensor]
) -> None:
    """Let the average of the experts that saw tokens stand for what is not known of those that saw none, in place.

    Zero moments would say that nothing is lost whatever becomes of such an expert. Where there are moments of both
    halves of the calibration set, the same is done in each half for the experts that saw nothing of that half.
    """
    shares = routed_keys(targets, wanted)
    alike: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for target in targets:
        if target.expert is not None:
            for name in wanted.get(target.name, frozenset()):
                if STATISTICS[name].filled:
                    alike[target.role, name][target.expert] = statistic_key(target, name)
    for (_, name), keys in alike.items():
        whole = {expert: (keys[expert], float(means[shares[expert]])) for expert in keys}
        if first_half(next(iter(keys.values()))) not in means:
            _fill(means, whole)
            continue
        firsts = {e: (first_half(keys[e]), float(means[first_half(shares[e])])) for e in keys}
        if all(0 < firsts[e][1] < whole[e][1] for e in keys):
            continue
        share = means[HALVES][int(STATISTICS[name].gradient)].item()
        second = {key: (means[key] - share * means[first_half(key)]) / (1 - share) for key in keys.values()}
        _fill(means, firsts)
        _fill(second, {e: (keys[e], whole[e][1] - firsts[e][1]) for e in keys})
        for key in keys.values():
            means[key] = share * means[first_half(key)] + (1 - share) * second[key]


def _fill(means: MutableMapping[str, Tensor], seen: Mapping[int, tuple[str, float]]) -> None:
    """Average what was seen; `seen` are the keys of all experts, and how much each has seen."""
    there = [means[key] for key, share in seen.values() if share > 0]
    if there and len(there) < len(seen):
        average = sum(there[1:], there[0]) / len(there)
        for key, share in seen.values():
            if share <= 0:
                means[key] = average.clone()
