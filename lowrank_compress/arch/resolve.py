"""From a model to the list of its compressible matrices, with the proof that none was overlooked."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_compress.arch.spec import EXPERTS, HEAD, LATENT, Architecture, Projection, Reads, Role
from lowrank_compress.arch.table import architecture_of
from lowrank_compress.arch.targets import Heads, Resolved, Router, Rows, Target, View
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.shipped.experts import SeparateExperts, separate
from lowrank_compress.shipped.fusion import ROLES, fusion_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def resolve(model: PreTrainedModel) -> Resolved:
    """List the matrices of `model` that may be compressed; the model may be on the meta device.

    Every parameter with two or more dimensions inside the blocks is claimed by exactly one module of the result or
    ignored by name in the architecture's entry. Experts must be separate already (`separate_experts`).

    Raises
    ------
    UnsupportedError
        The model type is not supported (see :func:`~lowrank_compress.arch.table.architecture_of`), a declared module
        is missing or of another class, a weight has another shape than the configuration implies, or a parameter is
        neither claimed nor ignored.
    """
    architecture = architecture_of(model.config)
    blocks = block_paths(model)
    heads = _heads(model)
    targets: list[Target] = []
    for index, path in enumerate(blocks):
        if _find(model, f"{path}.{architecture.attention}") is None:
            raise UnsupportedError(
                f"{type(model).__name__} has nothing at {path}.{architecture.attention}; expected the attention module "
                f"of architecture {architecture.name!r}."
            )
        found = _block_targets(model, architecture, heads, index, path)
        _check_complete(model.get_submodule(path), path, architecture, {target.parameter for target in found})
        targets += found
    outside = _outside(model, architecture, len(blocks))
    return Resolved(architecture, blocks, tuple(targets), heads, outside, _router(model, architecture, blocks))


def separate_experts(model: PreTrainedModel) -> None:
    """Give every expert of `model` modules of its own, which compute the same.

    Raises
    ------
    UnsupportedError
        The model type is not supported, or its experts are others than its entry says.
    """
    architecture = architecture_of(model.config)
    for path in block_paths(model) if architecture.experts else ():
        experts = _find(model, place := f"{path}.{architecture.experts}")
        if experts is not None:
            if not isinstance(experts, SeparateExperts) and fusion_of(experts) is None:
                raise UnsupportedError(
                    f"{type(model).__name__} has a {type(experts).__name__} at {place!r}; expected gated experts in "
                    f"two tensors, as architecture {architecture.name!r} has."
                )
            separate(model, place)


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


def _block_targets(
    model: PreTrainedModel, architecture: Architecture, heads: Heads, index: int, block: str
) -> list[Target]:
    shapes = {
        projection: _shape(model, block, projection)
        for projection in architecture.projections
        if not (projection.optional and _find(model, f"{block}.{projection.path}") is None)
    }
    width = model.config.hidden_size
    inner = next((shape[1] for projection, shape in shapes.items() if projection.reads == "hidden"), 0)
    rows: dict[Role, int] = {
        "q": heads.query * heads.size,
        "k": heads.key * heads.size,
        "v": heads.key * heads.size,
        "o": width,
        "gate": inner,
        "up": inner,
        "down": width,
    }
    columns: dict[Reads, int] = {"attn": width, "context": heads.query * heads.size, "mlp": width, "hidden": inner}
    targets: list[Target] = []
    for projection, shape in shapes.items():
        path = f"{block}.{projection.path}"
        latent = architecture.latent and architecture.group_of(projection.parts[0]) == LATENT
        if latent:
            rows |= {projection.parts[0]: shape[0]}
        expected = (sum(rows[role] for role in projection.parts), columns.get(projection.reads))
        if shape != expected and not latent:
            raise UnsupportedError(
                f"{path}.weight has shape {shape} as (out, in); expected {expected}, because the configuration implies "
                f"hidden size {width}, {heads.query} heads, {heads.key} key-value heads of size {heads.size}, and the "
                f"block's inner size is {inner}. Architecture {architecture.name!r} does not describe this model."
            )
        offset = 0
        for role in projection.parts:
            groups = heads.key if projection.layout == "interleaved" else 1
            part = Rows(groups, shape[0] // groups, offset, rows[role] // groups)
            offset += part.length
            targets.append(
                Target(
                    name=path if len(projection.parts) == 1 else f"{path}:{role}",
                    block=index,
                    parameter=f"{path}.weight",
                    view=View(part, transposed=projection.conv1d),
                    bias=f"{path}.bias" if model.get_submodule(path).bias is not None else None,
                    role=role,
                    group=architecture.group_of(role).name,
                    shape=(part.size, shape[1]),
                    reads=projection.reads,
                    heads=heads if role in ("q", "k", "v", "o") and not latent else None,
                )
            )
    return targets + _expert_targets(model, architecture, index, block)


def _expert_targets(model: PreTrainedModel, architecture: Architecture, index: int, block: str) -> list[Target]:
    path = f"{block}.{architecture.experts}"
    experts = _find(model, path) if architecture.experts else None
    if experts is None:
        return []
    if not isinstance(experts, SeparateExperts):
        raise UnsupportedError(
            f"{path} is a {type(experts).__name__}; expected experts that were made separate before."
        )
    targets = []
    for number in range(len(experts)):
        for role, leaf in zip(EXPERTS.roles, ROLES, strict=True):
            own = f"{path}.{number}.{leaf}"
            rows, columns = model.get_parameter(f"{own}.weight").shape
            view, reads = View(Rows(1, rows, 0, rows)), f"expert.{number}"
            reads = f"{reads}.hidden" if role == "down" else reads
            shape, name = (rows, columns), f"{own}.weight"
            bias = f"{own}.bias" if experts.fusion.biased else None
            targets.append(
                Target(own, index, name, view, bias, role, EXPERTS.name, shape, reads, None, number, len(experts))
            )
    return targets


def _router(model: PreTrainedModel, architecture: Architecture, blocks: tuple[str, ...]) -> Router | None:
    """Say how tokens choose among experts, by the first block that has any."""
    for block in blocks if architecture.router else ():
        router = _find(model, f"{block}.{architecture.router}")
        if router is not None and _find(model, f"{block}.{architecture.experts}") is not None:
            chosen = int(getattr(router, "top_k", 0) or model.config.num_experts_per_tok)
            return Router(architecture.router, chosen, _fixed(router))
    return None


def _fixed(router: nn.Module) -> str:
    """Why a router cannot do with fewer rows of its weight, "" where it can."""
    groups, method = getattr(router, "num_group", None), getattr(router, "topk_method", None)
    if method == "group_limited_greedy" or (method is None and (groups or 1) > 1):
        return f"it chooses among {groups} groups of equally many experts first"
    names = [name for name, _ in (*router.named_parameters(), *router.named_buffers())]
    if others := [name for name in names if name not in ("weight", "bias")]:
        return f"beside its weight it has {others[0]}, with an entry for every expert"
    return "" if names and hasattr(router, "top_k") else "it has no weight with a row for every expert"


def _outside(model: PreTrainedModel, architecture: Architecture, number: int) -> tuple[Target, ...]:
    """The head, if the model has one with a weight of its own."""
    path = architecture.head
    head = None if path is None else _find(model, path)
    name = f"{path}.weight"
    tied = name in model.all_tied_weights_keys or name in model.all_tied_weights_keys.values()
    if path is None or not isinstance(head, nn.Linear) or tied:
        return ()
    rows, columns = head.weight.shape
    view = View(Rows(1, rows, 0, rows))
    bias = None if head.bias is None else f"{path}.bias"
    return (Target(path, number, name, view, bias, "head", HEAD.name, (rows, columns), "final", None),)


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
        if f"{path}.{name}" not in claimed:
            raise UnsupportedError(
                f"{path}.{name} of shape {tuple(parameter.shape)} is neither claimed nor ignored by architecture "
                f"{architecture.name!r}; expected {', '.join(p.path for p in architecture.projections)}. "
                "This variant of the architecture is not supported."
            )


def _heads(model: PreTrainedModel) -> Heads:
    config: PreTrainedConfig = model.config
    query = config.num_attention_heads
    frequencies = (buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    return Heads(
        query=query,
        key=_key_heads(config) or query,
        size=getattr(config, "head_dim", None) or config.hidden_size // query,
        rotary=2 * len(next(frequencies, ())),
    )


def _key_heads(config: PreTrainedConfig) -> int | None:
    """Read how many heads of keys and values there are; None where it is not said."""
    grouped = getattr(config, "new_decoder_architecture", False)  # Falcon's, where multi_query says nothing then
    if getattr(config, "multi_query", False) and not grouped:
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return next((found for name in names if (found := getattr(config, name, None))), None)


def _base_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else model.base_model_prefix


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
