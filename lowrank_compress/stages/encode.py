"""One block's weights and bases to the tensors and config entries of its compressed modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Target
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.formats.dense import dense
from lowrank_compress.formats.module import joined, module_entry, module_tensors
from lowrank_compress.formats.spec import Encoded
from lowrank_compress.methods.edit import Edit, Source
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.casting import cast
from lowrank_compress.model.surgery import KEPT, LATENT, LEADS, REBUILD, ROTARY, attention_entry
from lowrank_compress.shipped.formats.base import INDEX_DTYPE
from lowrank_compress.shipped.fusion import FUSED


@dataclass
class EncodedBlock:
    """One block of the compressed checkpoint.

    Attributes
    ----------
    tensors
        All tensors of the block, by their names on disk.
    modules, dense_shapes, attention, experts, routers, merged
        The block's entries of `LowRankConfig`.
    leads
        Path of an expert -> that of the one that stands for it, where that is another.
    choices
        How each group is stored.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    dense_shapes: dict[str, list[int]] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    routers: dict[str, dict[str, int]] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {
            "modules": self.modules,
            "dense_shapes": self.dense_shapes,
            "attention": self.attention,
            **({"experts": self.experts} if self.experts else {}),
            **({"routers": self.routers} if self.routers else {}),
            **({"merged": self.merged, "leads": self.leads} if self.merged else {}),
            "choices": {name: [choice.format, *choice.parameters] for name, choice in self.choices.items()},
        }


class Encoder:
    """Computes compressed blocks.

    Parameters
    ----------
    plan
        The dense checkpoint.
    groups
        What may be compressed.
    config
        Storage, output dtype and device.
    """

    def __init__(self, plan: Blueprint, groups: Sequence[TargetGroup], config: FactorizeConfig) -> None:
        self.plan, self.groups = plan, groups
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.source = Source(plan.weight, plan.bias, torch.device(config.device), self.dtype, config.round_to)

    def block(self, block: int, choices: Mapping[str, Choice], bases: Mapping[str, Tensor]) -> EncodedBlock:
        """Encode all groups of a block and take its other tensors along.

        Parameters
        ----------
        choices
            Of each group (see `ranks.in_storage`).
        bases
            The block's basis file.

        Raises
        ------
        InputError
            A choice needs more than what the score stage kept.
        """
        made, edits = EncodedBlock(), list[Edit]()
        for group in self.groups:
            if group.block == block:
                edit = (
                    Edit(choice)
                    if (choice := choices[group.name]).is_dense
                    else group.encode(self.source, choice, bases)
                )
                edits.append(edit)
                made.choices[group.name] = edit.choice
        self._experts(block, edits, made)
        replaced = self._modules(block, edits, made) | self._routers(edits, made)
        self._attention(block, edits, made)
        for name in self.plan.inside(block):
            if name not in replaced and (on_disk := self._on_disk(name, made)) not in made.tensors:
                alone = on_disk == name or name not in self.plan.pieces
                made.tensors[on_disk] = (self.plan.rounded if alone else self.plan.whole)(name, self.dtype)
        return made

    def _experts(self, block: int, edits: Sequence[Edit], made: EncodedBlock) -> None:
        """Have all experts of a block stored one by one if any is changed, beside what fails a load as stock ones."""
        changed = {name for edit in edits for name in edit.parts}
        own = [target for target in self.plan.resolved.of_block(block) if target.expert is not None]
        if any(target.name in changed for target in own):
            path = own[0].module.rsplit(".", 2)[0]
            made.experts[path] = len({target.expert for target in own})
            made.tensors |= {f"{path}.{leaf}": torch.empty(0, dtype=self.dtype) for leaf in FUSED}
        for found in (edit.merged for edit in edits if edit.merged is not None):
            leads = found.leads.tolist()
            made.merged[found.path] = len(set(leads))
            made.tensors[f"{found.path}.{LEADS}"] = found.leads.to(INDEX_DTYPE)
            made.leads |= {f"{found.path}.{n}": f"{found.path}.{lead}" for n, lead in enumerate(leads) if lead != n}

    def _routers(self, edits: Sequence[Edit], made: EncodedBlock) -> set[str]:
        """Take the rows of experts that are gone from routers; return the names of the tensors that become others."""
        replaced: set[str] = set()
        for router in (edit.router for edit in edits if edit.router is not None):
            for leaf, _ in self.plan.model.get_submodule(router.path).named_parameters():
                name = f"{router.path}.{leaf}"
                rows, on_disk = self.plan.rounded(name, self.dtype), self.plan.name_on_disk(name)
                made.routers[router.path] = {"experts": len(rows), "kept": len(router.kept)}
                made.tensors[on_disk] = rows[router.kept]
                made.tensors[f"{on_disk.removesuffix(leaf)}{KEPT}"] = router.kept.to(INDEX_DTYPE)
                replaced.add(name)
        return replaced

    def _on_disk(self, name: str, made: EncodedBlock) -> str:
        """Where a tensor of the dense model goes: to its name there, but for experts that are stored one by one."""
        return name if name.startswith(tuple(f"{path}." for path in made.experts)) else self.plan.name_on_disk(name)

    def _modules(self, block: int, edits: Sequence[Edit], made: EncodedBlock) -> set[str]:
        """Put parts together to modules; return the names of the stock tensors that they replace."""
        plan = self.plan
        encoded = {name: part for edit in edits for name, part in edit.parts.items()}
        changed = {name: bias for edit in edits for name, bias in edit.biases.items()}
        replaced: set[str] = set()
        for path, targets in plan.resolved.modules_of(block).items():
            first = targets[0]
            if not any(target.name in encoded for target in targets):
                continue
            parts = [encoded.get(target.name) or self._dense(target) for target in targets]
            on_disk = self._on_disk(first.parameter, made)
            stem = on_disk.removesuffix(first.parameter.removeprefix(f"{path}."))
            if all(part.format == "dense" for part in parts):
                weight = joined(targets, [part.inner for part in parts])
                # A fused gate and up lose rows of both.
                halves = [len(parts)] if first.role == "gate" and len(parts) > 1 else []
                made.dense_shapes[path] = [*weight.shape, *halves]
                made.tensors[on_disk] = weight.T if first.view.transposed else weight
            else:
                made.modules[path] = module_entry(targets, parts)
                if parts[0].shape[1] != first.shape[1] or made.modules[path]["out_features"] != first.view.rows.total:
                    made.dense_shapes[path] = [made.modules[path]["out_features"], parts[0].shape[1]]
                named = module_tensors(targets, parts, self.dtype)
                made.tensors |= {stem + leaf: tensor for leaf, tensor in named.items()}
            replaced.add(first.parameter)
            if first.bias is not None:
                biases = [changed.get(target.name, plan.bias(target).double()) for target in targets]
                made.tensors[self._on_disk(first.bias, made)] = cast(
                    joined(targets, biases), self.dtype, f"The bias of {path}"
                )
                replaced.add(first.bias)
        return replaced

    def _dense(self, target: Target) -> Encoded:
        """Take a matrix as it is."""
        return dense(self.plan.weight(target)).cast(self.dtype, target.name)

    def _attention(self, block: int, edits: Sequence[Edit], made: EncodedBlock) -> None:
        """Describe an attention whose heads have become narrower, or whose cache keeps a latent."""
        heads, resolved = self.plan.resolved.heads, self.plan.resolved
        narrower = {edit.heads.group: edit.heads for edit in edits if edit.heads is not None}
        remembered = next((edit.remembered for edit in edits if edit.remembered is not None), None)
        if not narrower and remembered is None:
            return
        path = f"{resolved.blocks[block]}.{resolved.architecture.attention}"
        targets: dict[Role, Target] = {target.role: target for target in resolved.of_block(block)}
        widths = [narrower[name].width if name in narrower else heads.size for name in ("qk", "vo")]
        index = next((edit.index for edit in narrower.values() if edit.index is not None), None)
        made.attention[path] = attention_entry(
            targets, heads, *widths, rotary=index is not None, traits=resolved.architecture.traits
        )
        query = targets["q"].parameter
        on_disk = self.plan.name_on_disk(query).removesuffix(query.removeprefix(path))
        if index is not None:
            made.tensors[f"{on_disk}.{ROTARY}"] = index.to(INDEX_DTYPE)
        if remembered is not None:
            made.attention[path]["latent"] = {"rank": remembered.rank, "window": remembered.window}
            made.tensors[f"{on_disk}.{LATENT}.weight"] = remembered.inner
            made.tensors[f"{on_disk}.{REBUILD}.weight"] = remembered.outer
