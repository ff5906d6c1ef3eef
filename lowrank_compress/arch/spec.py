"""What a table entry says about an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowrank_compress.shipped.traits import Traits

Role = str
Reads = str
Layout = Literal["blocked", "interleaved"]


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that have a method of their own, and that can only shrink together.

    Parameters
    ----------
    name
        What users call it.
    roles
        Of its matrices, in the order of computation; a group may lack some of them in an architecture.
    label
        Its name in ranks.json, behind the path of a block.
    title
        Its name in messages.
    like
        Another group whose module methods, and whose methods in mixtures, are for this one too; "" for none.
    """

    name: str
    roles: tuple[Role, ...]
    label: str
    title: str
    like: str = ""

    @property
    def kind(self) -> str:
        """The name of the group that methods know it by."""
        return self.like or self.name


QUERY_KEY = Group("qk", ("q", "k"), "query-key", "queries and keys")
VALUE_OUTPUT = Group("vo", ("v", "o"), "value-output", "values and output")
MLP = Group("mlp", ("gate", "up", "down"), "mlp", "MLP")
EXPERTS = Group("experts", ("gate", "up", "down"), "experts", "experts", like="mlp")
"""The routed experts of a block; each of them is a whole by itself, as an MLP is."""
LATENT = Group("latent", ("q", "q_a", "q_b", "kv_a", "kv_b", "o"), "latent", "latent attention")
"""The projections of attention whose keys and values are made of a latent vector; no head of it can shrink."""
BLOCK_GROUPS = (QUERY_KEY, VALUE_OUTPUT, MLP)
"""The groups of a block with attention and one MLP, in the order of computation."""
HEAD = Group("head", ("head",), "head", "the head")
"""What turns the last hidden states to logits; it has a method only where one is given to it."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight matrix of a transformer block.

    Parameters
    ----------
    path
        Module path below the block.
    parts
        Roles of the matrices that the weight holds, in the order of its output rows; one unless the weight is fused.
    reads
        Input tensor of the module: ``"attn"`` is read by q, k and v, ``"context"`` by o, ``"mlp"`` by gate and up,
        ``"hidden"`` by down. Projections of a block with the same `reads` receive the very same tensor.
    layout
        Order of the output rows of a fused weight: ``"blocked"`` is all of the first part, then all of the next;
        ``"interleaved"`` is, for one key-value head after the other, its rows of every part; with a single one both are
        the same.
    conv1d
        Whether the module is a ``transformers.pytorch_utils.Conv1D``, whose weight is stored as (in, out).
    optional
        Whether only some blocks or configurations have it.
    """

    path: str
    parts: tuple[Role, ...]
    reads: Reads
    layout: Layout = "blocked"
    conv1d: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models whose blocks hold the same projections at the same paths.

    Parameters
    ----------
    name
        Name in the table.
    model_types
        The ``config.model_type`` values that it describes.
    blocks
        Path of the blocks' ``ModuleList`` below the base model.
    attention
        Path, below a block, of the module that turns queries, keys and values into their context.
    projections
        The claimed matrices of every block, in the order of computation.
    ignored
        Shell patterns, relative to the block, of parameters with two or more dimensions that stay as they are.
    traits
        What its attention does beyond the usual. Where queries and keys are normalised, a checkpoint that says so
        keeps all dimensions of their heads.
    groups
        What of a block has a method of its own, in the order of computation; every role is in one.
    head
        Path of a language model's head; None where a family has none.
    values
        How many values a block returns, of which the hidden states are the first, where it does not say that it returns
        a tensor; 0 where it returns them alone.
    experts
        Path, below a block, of its routed experts; "" where the family has none. Blocks without are as others are.
    router
        Path, below a block, of what chooses among them.
    whole
        Why all heads keep all their dimensions, where trying a block on a sample might not show it; "" where they need
        not.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    attention: str
    projections: tuple[Projection, ...]
    ignored: tuple[str, ...] = ()
    traits: Traits = Traits()  # noqa: RUF009  (nothing can change it)
    groups: tuple[Group, ...] = BLOCK_GROUPS
    head: str | None = "lm_head"
    values: int = 0
    experts: str = ""
    router: str = ""
    whole: str = ""

    @property
    def latent(self) -> bool:
        """Whether keys and values are made of a latent vector, so that there are no heads to make narrower."""
        return LATENT in self.groups

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalised, which forbids removing single dimensions of a head."""
        return bool(self.traits.query_norm)

    @property
    def normalised(self) -> str:
        """How queries and keys are normalised, for messages; empty where they are not."""
        if not self.head_norms:
            return ""
        return "over all heads together" if self.traits.whole_norms else "head by head"

    def group_of(self, role: Role) -> Group:
        """Return the group that has a role."""
        return next(group for group in self.groups if role in group.roles)
