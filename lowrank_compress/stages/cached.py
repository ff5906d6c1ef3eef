"""A block of a compressed checkpoint once its cache keeps a latent, and what lowrank.json says of all of them then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Target
from lowrank_compress.config import Scheme
from lowrank_compress.evaluation.size import weight_bytes
from lowrank_compress.formats.dense import dense
from lowrank_compress.formats.module import module_entry, module_tensors
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.edit import Remembered, Source
from lowrank_compress.methods.groups import Price, TargetGroup, price_of
from lowrank_compress.methods.latent import LatentGroup, rebuilt
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.surgery import LATENT, REBUILD, attention_entry
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.stages.cachebudget import cache_report, cached_at
from lowrank_compress.stages.latents import Block, Latents
from lowrank_compress.stages.ranks import choice_of, entry_of
from lowrank_compress.stages.report import beyond_claimed

# What the first word in the names of tensors of a module's first part ends with.
FIRST = "_0"


@dataclass
class Changed:
    """What becomes of a block.

    Attributes
    ----------
    tensors
        New ones, by their names on disk.
    gone
        Names in the model of those in whose place they are.
    modules, attention
        Its new entries of `LowRankConfig`.
    elements, bytes
        Of claimed weights: how many more there are than before.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    modules: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    elements: int = 0
    bytes: int = 0

    def count(self, tensors: Sequence[Tensor], sign: int) -> None:
        """Count tensors that come (1) or go (-1)."""
        self.elements += sign * sum(tensor.numel() for tensor in tensors)
        self.bytes += sign * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def changed(latents: Latents, group: LatentGroup, choice: Choice) -> Changed:
    """Let a block cache a latent: nothing of its keys and values is stored any more, but for a window of them."""
    made, plan = Changed(), latents.plan
    if choice.is_dense:
        return made
    block = latents.block(group.block)
    source = Source(block.weight, lambda target: torch.empty(0), torch.device("cpu"), plan.checkpoint.dtype)
    remembered = group.encode(source, choice, latents.bases.read(group.block)).remembered
    assert remembered is not None
    _attend(made, plan, block, group, remembered)
    if not group.beside:
        for path, members in plan.resolved.modules_of(group.block).items():
            if any(target.role in ("k", "v") for target in members):
                _empty(made, plan, block, path, members)
    return made


def _stem(plan: Blueprint, path: str) -> str:
    """Return what names on disk begin with of the tensors below a module."""
    name = next(name for name in plan.model.state_dict() if name.startswith(f"{path}."))
    return plan.name_on_disk(name).removesuffix(name.removeprefix(path))


def _attend(made: Changed, plan: Blueprint, block: Block, group: LatentGroup, remembered: Remembered) -> None:
    """Describe the attention, and add its factors."""
    heads, architecture = plan.resolved.heads, plan.resolved.architecture
    targets: dict[Role, Target] = {target.role: target for target in plan.resolved.of_block(group.block)}
    entry = (plan.checkpoint.quantization or {}).get("attention", {}).get(block.path) or attention_entry(
        targets, heads, heads.size, heads.size, rotary=False, traits=architecture.traits
    )
    made.attention[block.path] = {**entry, "latent": {"rank": remembered.rank, "window": remembered.window}}
    stem = _stem(plan, block.path)
    made.tensors |= {f"{stem}.{LATENT}.weight": remembered.inner, f"{stem}.{REBUILD}.weight": remembered.outer}
    made.count([remembered.inner, remembered.outer], 1)


def _empty(made: Changed, plan: Blueprint, block: Block, path: str, members: tuple[Target, ...]) -> None:
    """Take keys and values out of a module; queries in the same one stay as they are stored."""
    module, dtype = block.module(members[0]), plan.checkpoint.dtype
    names = [name for name in plan.model.state_dict() if name.startswith(f"{path}.") and name != members[0].bias]
    before = {name.removeprefix(f"{path}."): plan.read(name) for name in names}
    sizes = [replace(target, shape=(len(block.rows(target)), target.shape[1])) for target in members]
    parts = [rebuilt(target, dtype) for target in sizes]
    compressed = isinstance(module, CompressedLinear)
    if members[0].role == "q" and not compressed:
        weight = before["weight"].T if members[0].view.transposed else before["weight"]
        parts[0] = dense(weight[block.rows(members[0])])
    entry, tensors = module_entry(members, parts), module_tensors(members, parts, dtype)
    if members[0].role == "q" and compressed:
        entry["parts"][0] = module.entry["parts"][0]
        tensors["lr_in.weight"] = before["lr_in.weight"][: module.parts[0].width]
        tensors |= {leaf: tensor for leaf, tensor in before.items() if leaf.partition(".")[0].endswith(FIRST)}
    made.modules[path] = entry
    stem = _stem(plan, path)
    made.tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in tensors.items()}
    made.gone |= set(names)
    made.count(list(before.values()), -1)
    made.count(list(tensors.values()), 1)


def described(
    latents: Latents,
    report: Mapping[str, Any],
    choices: Mapping[str, Choice],
    losses: Mapping[str, float],
    made: Sequence[Changed],
) -> dict[str, Any]:
    """Make lowrank.json of that of the checkpoint whose cache was made smaller.

    What keys and values were stored as is taken out of it; modules that were made narrower as one keep their entries,
    which count what is left of them.
    """
    plan, config = latents.plan, latents.config
    itemsize = plan.checkpoint.dtype.itemsize
    groups = all_groups(candidates_of(plan.resolved, Scheme(**report["scheme"])))
    matrices: dict[str, Any] = {name: dict(matrix) for name, matrix in report["matrices"].items()}
    for group in latents.groups:
        if (choice := choices[group.name]).is_dense:
            continue
        elements = group.price(choice).elements
        entry = {"dense": 0, "dense_bytes": 0, "stored": elements, "stored_bytes": elements * itemsize}
        for target in () if group.beside else group.targets:
            taken = _taken(plan, groups, matrices, target)
            entry |= {name: entry[name] + taken[name] for name in ("dense", "dense_bytes")}
        matrices[group.name] = {
            "shape": list(group.shape),
            **entry_of(group, choice),
            **entry,
            "indices": 0,
            "predicted_loss": losses[group.name],
            "cached": cached_at(group, choice),
        }
    others, whole = beyond_claimed(report, plan)
    claimed = report["claimed_elements"]
    stored = report["stored_elements"] + sum(each.elements for each in made)
    found = {**report, "stored_elements": stored, "reached_ratio": (claimed - stored) / (claimed + others)}
    if "reached_ratio_bytes" in report:  # an older version counted elements alone
        found["stored_bytes"] = report["stored_bytes"] + sum(each.bytes for each in made)
        found["reached_ratio_bytes"] = 1 - (found["stored_bytes"] + others * itemsize) / whole
    cache = cache_report(latents.groups, choices, config.kv_ratio, config.kv_window)["cache"]
    cache |= {"dense": latents.stock, "reached": 1 - cache["kept"] / latents.stock}
    return {**found, "cache": cache, "matrices": matrices}


def _taken(
    plan: Blueprint, groups: Sequence[TargetGroup], matrices: dict[str, Any], target: Target
) -> Mapping[str, Any]:
    """Take the matrix of keys or values, as narrow as it is, out of the report; say what it was in the dense model."""
    name = next(
        (each.name for each in groups if each.name in matrices and target.name in {t.name for t in each.targets}), None
    )
    if name is None:
        return {"dense": target.elements, "dense_bytes": weight_bytes(plan, target)}
    if name == target.name:
        return {"dense": target.elements, "dense_bytes": 0} | matrices.pop(name)
    group = next(group for group in groups if group.name == name)
    matrix, itemsize = matrices[name], plan.checkpoint.dtype.itemsize
    matrix.setdefault("indices", price_of(group, choice_of(group, matrix)).indices)
    matrix["stored"] -= target.elements
    matrix["stored_bytes"] = Price(matrix["stored"], matrix["indices"]).bytes(itemsize)
    return {"dense": 0, "dense_bytes": 0}
