"""From a model to the list of its compressible matrices, with the proof that none was overlooked."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.arch.spec import Architecture, Projection, Reads, Role
from lowrank_compress.arch.table import architecture_of
from lowrank_compress.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rows:
    """The output rows of a module that belong to one part of its weight.

    Row ``g * length + j`` of the part is row ``g * stride + offset + j`` of the module, for g < `groups` and
    j < `length`. A module has ``groups * stride`` output rows in all; blocked parts have one group.
    """

    groups: int
    stride: int
    offset: int
    length: int

    @property
    def size(self) -> int:
        """Number of rows of the part."""
        return self.groups * self.length

    @property
    def total(self) -> int:
        """Number of output rows of the whole module."""
        return self.groups * self.stride

    def index(self) -> torch.Tensor:
        """Return the module's row for each row of the part, (size,) int64, increasing."""
        starts = torch.arange(self.groups, device="cpu") * self.stride + self.offset
        return (starts[:, None] + torch.arange(self.length, device="cpu")).flatten()


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix that may be compressed: a module's weight, or a part of a fused one.

    Parameters
    ----------
    name
        Path of the module, followed by ``":"`` and the role if the weight is fused.
    block
        Index of the transformer block.
    module
        Path of the module in the model.
    role
        What the matrix computes.
    shape
        (out, in) of the matrix, however the module stores it.
    rows
        Which rows of the module's output it computes.
    reads
        Input tensor, the very same for all targets of a block with this value.
    has_bias
        Whether the module has a bias.
    conv1d
        Whether the module stores its weight as (in, out).
    """

    name: str
    block: int
    module: str
    role: Role
    shape: tuple[int, int]
    rows: Rows
    reads: Reads
    has_bias: bool
    conv1d: bool

    @property
    def elements(self) -> int:
        """Number of elements of the dense matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The compressible matrices of a model, block by block in the order of computation.

    Parameters
    ----------
    architecture
        The table entry.
    blocks
        Paths of the transformer blocks in the model.
    targets
        All claimed matrices.
    """

    architecture: Architecture
    blocks: tuple[str, ...]
    targets: tuple[Target, ...]

    def of_block(self, block: int) -> tuple[Target, ...]:
        """Return the targets of one block."""
        return tuple(target for target in self.targets if target.block == block)

    def modules(self) -> dict[str, tuple[Target, ...]]:
        """Return, for the path of each claimed module, its targets in the order of the fused parts."""
        found: dict[str, tuple[Target, ...]] = {}
        for target in self.targets:
            found[target.module] = (*found.get(target.module, ()), target)
        return found


def resolve(model: PreTrainedModel) -> Resolved:
    """List the matrices of `model` that may be compressed; the model may be on the meta device.

    Every parameter with two or more dimensions inside the blocks is claimed by exactly one module of the result or
    ignored by name in the architecture's entry.

    Raises
    ------
    UnsupportedError
        The model type is not supported (see :func:`~lowrank_compress.arch.table.architecture_of`), a declared module
        is missing or of another class, a weight has another shape than the configuration implies, or a parameter is
        neither claimed nor ignored.
    """
    architecture = architecture_of(model.config)
    blocks = block_paths(model)
    targets: list[Target] = []
    for index, path in enumerate(blocks):
        found = _block_targets(model, architecture, index, path)
        _check_complete(model.get_submodule(path), path, architecture, {target.module for target in found})
        targets += found
    return Resolved(architecture, blocks, tuple(targets))


def block_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the transformer blocks of `model`, compressed or not, from first to last.

    Raises
    ------
    UnsupportedError
        The model type is not supported, or the model has no blocks where its architecture says.
    """
    architecture = architecture_of(model.config)
    path = _join(_base_prefix(model), architecture.blocks)
    blocks = _find(model, path)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        got = type(blocks).__name__ if blocks is not None else "nothing"
        raise UnsupportedError(
            f"{type(model).__name__} has {got} at {path!r}; expected the list of transformer blocks of architecture "
            f"{architecture.name!r}. Load the checkpoint with one of the Auto classes of transformers."
        )
    return tuple(f"{path}.{index}" for index in range(len(blocks)))


def _block_targets(model: PreTrainedModel, architecture: Architecture, index: int, block: str) -> list[Target]:
    shapes = {projection: _shape(model, block, projection) for projection in architecture.projections}
    width = model.config.hidden_size
    inner = next(shape[1] for projection, shape in shapes.items() if projection.reads == "hidden")
    heads, kv_heads, head_dim = _head_sizes(model.config)
    rows: dict[Role, int] = {
        "q": heads * head_dim,
        "k": kv_heads * head_dim,
        "v": kv_heads * head_dim,
        "o": width,
        "gate": inner,
        "up": inner,
        "down": width,
    }
    columns: dict[Reads, int] = {"attn": width, "context": heads * head_dim, "mlp": width, "hidden": inner}
    targets: list[Target] = []
    for projection, shape in shapes.items():
        path = f"{block}.{projection.path}"
        expected = (sum(rows[role] for role in projection.parts), columns[projection.reads])
        if shape != expected:
            raise UnsupportedError(
                f"{path}.weight has shape {shape} as (out, in); expected {expected}, because the configuration implies "
                f"hidden size {width}, {heads} heads, {kv_heads} key-value heads of size {head_dim}, and the block's "
                f"inner size is {inner}. Architecture {architecture.name!r} does not describe this model."
            )
        offset = 0
        for role in projection.parts:
            groups = heads if projection.layout == "interleaved" else 1
            part = Rows(groups, shape[0] // groups, offset, rows[role] // groups)
            offset += part.length
            targets.append(
                Target(
                    name=path if len(projection.parts) == 1 else f"{path}:{role}",
                    block=index,
                    module=path,
                    role=role,
                    shape=(part.size, shape[1]),
                    rows=part,
                    reads=projection.reads,
                    has_bias=model.get_submodule(path).bias is not None,
                    conv1d=projection.conv1d,
                )
            )
    return targets


def _shape(model: PreTrainedModel, block: str, projection: Projection) -> tuple[int, int]:
    """Return (out, in) of a claimed module after checking that it is what the entry says."""
    path = f"{block}.{projection.path}"
    module = _find(model, path)
    expected = Conv1D if projection.conv1d else nn.Linear
    if not isinstance(module, Conv1D | nn.Linear) or not isinstance(module, expected):
        got = type(module).__name__ if module is not None else "nothing"
        raise UnsupportedError(
            f"{type(model).__name__} has {got} at {path!r}; expected a {expected.__name__}. Models that are already "
            "compressed or quantized cannot be compressed; start from the dense checkpoint."
        )
    weight = module.weight
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedError(
            f"{path}.weight is a {weight.dtype} tensor of shape {tuple(weight.shape)}; expected a floating-point "
            "matrix. Quantized models cannot be compressed; start from the dense checkpoint."
        )
    rows, columns = weight.shape
    return (columns, rows) if projection.conv1d else (rows, columns)


def _check_complete(block: nn.Module, path: str, architecture: Architecture, claimed: set[str]) -> None:
    for name, parameter in block.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or any(fnmatch(name, pattern) for pattern in architecture.ignored):
            continue
        module, _, leaf = f"{path}.{name}".rpartition(".")
        if module not in claimed or leaf != "weight":
            raise UnsupportedError(
                f"{path}.{name} of shape {tuple(parameter.shape)} is neither claimed nor ignored by architecture "
                f"{architecture.name!r}; expected {', '.join(p.path for p in architecture.projections)}. "
                "This variant of the architecture is not supported."
            )


def _head_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key-value heads, and the size of one head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim


def _base_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else model.base_model_prefix


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
