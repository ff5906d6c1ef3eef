"""One block's weights and bases to the tensors and config entries of its compressed modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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

    def block(
        self,
        block: int,
        choices: Mapping[str, Choice],
        bases: Mapping[str, Tensor],
        keep: Callable[[dict[str, Tensor]], None] | None = None,
        room: int = 0,
    ) -> EncodedBlock:
        """Encode all groups of a block and take its other tensors along.

        Parameters
        ----------
        choices
            Of each group (see `ranks.in_storage`).
        bases
            The block's basis file.
        keep, room
            Where finished tensors of more than `room` bytes have come together, `keep` is called with them, and they
            are not among those that are returned. Without `keep`, all are.

        Raises
        ------
        InputError
            A choice needs more than what the score stage kept.
        """
        made, edits, replaced, given = EncodedBlock(), list[Edit](), set[str](), set[str]()

        def hand_over() -> None:
            if keep is not None and sum(tensor.nbytes for tensor in made.tensors.values()) > room:
                keep(made.tensors)
                given.update(made.tensors)
                made.tensors = {}

        own = [group for group in self.groups if group.block == block]
        modules = self.plan.resolved.modules_of(block)
        home = {target.name: path for path, targets in modules.items() for target in targets}
        waits = Counter(path for group in own for path in {home[target.name] for target in group.targets})
        encoded: dict[str, Callable[[], Encoded]] = {}
        biases: dict[str, Tensor] = {}
        for group in own:
            choice = choices[group.name]
            edit = Edit(choice) if choice.is_dense else group.encode(self.source, choice, bases)
            made.choices[group.name] = edit.choice
            self._experts(block, edit, made)
            replaced |= self._router(edit, made)
            encoded |= {name: partial(edit.parts.__getitem__, name) for name in edit.parts}
            biases |= edit.biases
            edits.append(replace(edit, parts={}))
            # A module is put together as soon as all is known of it, and its parts are let go.
            for path in dict.fromkeys(home[target.name] for target in group.targets):
                waits[path] -= 1
                if not waits[path]:
                    parts = {t.name: encoded.pop(t.name) for t in modules[path] if t.name in encoded}
                    replaced |= self._module(path, modules[path], parts, biases, made)
                    hand_over()
        self._attention(block, edits, made)
        for name in self.plan.inside(block):
            if name not in replaced and (on_disk := self._on_disk(name, made)) not in given | made.tensors.keys():
                alone = on_disk == name or name not in self.plan.pieces
                made.tensors[on_disk] = (self.plan.rounded if alone else self.plan.whole)(name, self.dtype)
                hand_over()
        return made

    def _experts(self, block: int, edit: Edit, made: EncodedBlock) -> None:
        """Have all experts of a block stored one by one if any is changed, beside what fails a load as stock ones."""
        own = [target for target in self.plan.resolved.of_block(block) if target.expert is not None]
        if not made.experts and any(target.name in edit.parts for target in own):
            path = own[0].module.rsplit(".", 2)[0]
            made.experts[path] = len({target.expert for target in own})
            made.tensors |= {f"{path}.{leaf}": torch.empty(0, dtype=self.dtype) for leaf in FUSED}
        if (found := edit.merged) is not None:
            leads = found.leads.tolist()
            made.merged[found.path] = len(set(leads))
            made.tensors[f"{found.path}.{LEADS}"] = found.leads.to(INDEX_DTYPE)
            made.leads |= {f"{found.path}.{n}": f"{found.path}.{lead}" for n, lead in enumerate(leads) if lead != n}

    def _router(self, edit: Edit, made: EncodedBlock) -> set[str]:
        """Take the rows of experts that are gone from a router; return the names of the tensors that become others."""
        if (router := edit.router) is None:
            return set()
        replaced = set[str]()
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

    def _module(
        self,
        path: str,
        targets: Sequence[Target],
        parts: Mapping[str, Callable[[], Encoded]],
        changed: Mapping[str, Tensor],
        made: EncodedBlock,
    ) -> set[str]:
        """Put parts together to a module; return the names of the stock tensors that it replaces."""
        if not parts:
            return set()
        plan, first = self.plan, targets[0]
        made_of = [parts[target.name]() if target.name in parts else self._dense(target) for target in targets]
        on_disk = self._on_disk(first.parameter, made)
        stem = on_disk.removesuffix(first.parameter.removeprefix(f"{path}."))
        if all(part.format == "dense" for part in made_of):
            weight = joined(targets, [part.inner for part in made_of])
            # A fused gate and up lose rows of both.
            halves = [len(made_of)] if first.role == "gate" and len(made_of) > 1 else []
            made.dense_shapes[path] = [*weight.shape, *halves]
            made.tensors[on_disk] = weight.T if first.view.transposed else weight
        else:
            made.modules[path] = module_entry(targets, made_of)
            if made_of[0].shape[1] != first.shape[1] or made.modules[path]["out_features"] != first.view.rows.total:
                made.dense_shapes[path] = [made.modules[path]["out_features"], made_of[0].shape[1]]
            named = module_tensors(targets, made_of, self.dtype)
            made.tensors |= {stem + leaf: tensor for leaf, tensor in named.items()}
        replaced = {first.parameter}
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
