"""Stage 3: multiply the bases with the weights, encode, and write an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_compress.allocation.storage import cost, largest_rank
from lowrank_compress.arch.resolve import Resolved, Target
from lowrank_compress.artifacts.files import sha256, write_json, write_text
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, committed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.linalg.pivot import pivot
from lowrank_compress.linalg.weighted import Projector, factors
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model import weights
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.export import ShardWriter, config_json, outside_tensors, write_companions
from lowrank_compress.model.layers import remote_code_entries, write_remote_code
from lowrank_compress.model.skeleton import meta_model
from lowrank_compress.model.surgery import Encoded, dense_part, module_entry, module_tensors
from lowrank_compress.stages.common import Reporter, Silent, checkpoint_id, environment
from lowrank_compress.stages.score import RANKS, Choice, predicted_losses, projector_of, read_ranks

VERSION = 1
REPORT = "lowrank.json"


@dataclass(frozen=True)
class Inputs:
    """What the stage reads: the dense checkpoint and the directory of the score stage."""

    checkpoint: Checkpoint
    scores: Path


@dataclass(frozen=True)
class Parts:
    """One block's compressed modules.

    Attributes
    ----------
    tensors
        All tensors of the block, by their names in the model.
    modules
        `quantization_config.modules` entries.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, Any]


def scores_manifest(scores: Path) -> Manifest:
    """The manifest of the score stage.

    Raises
    ------
    ArtifactError
        That stage is not finished.
    """
    manifest = read_manifest(scores)
    if manifest is None:
        raise ArtifactError(f"{scores} holds no finished scores. Run `lrc score` on this run first.")
    return manifest


def key(config: FactorizeConfig, inputs: Inputs) -> Key:
    """Everything the checkpoint depends on: the bases, and the ranks as ranks.json has them now."""
    found = {
        "checkpoint": checkpoint_id(inputs.checkpoint),
        "bases": scores_manifest(inputs.scores).report["bases"],
        "ranks": sha256(inputs.scores / RANKS),
    }
    return Key("factorize", VERSION, config.model_dump(mode="json", exclude={"method"}), found)


def run(
    config: FactorizeConfig, inputs: Inputs, out_dir: Path, reporter: Reporter | None = None, *, overwrite: bool = False
) -> Manifest:
    """Factorize.

    Parameters
    ----------
    config, inputs
        What to do on what.
    out_dir
        The checkpoint's directory.
    reporter
        Told about progress.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        Scores are missing or do not fit, the disk is full, or another result is in `out_dir`.
    """
    reporter = reporter or Silent()
    identity = key(config, inputs)
    found = committed(out_dir, identity, overwrite=overwrite)
    if found is not None:
        return found
    model, resolved = meta_model(inputs.checkpoint)
    dtype: torch.dtype = getattr(torch, config.dtype)
    scores = scores_manifest(inputs.scores)
    choices = read_ranks(inputs.scores / RANKS, resolved.targets)
    bases = BlockFiles(inputs.scores, scores.report["bases"], "basis")
    work = BlockFiles(out_dir.parent / "work", identity.id, "factors")
    worker = Factorizer(METHODS[config.method], inputs.checkpoint, resolved, model.base_model_prefix, config, dtype)
    blocks = range(len(resolved.blocks))
    for block in blocks:
        if not work.finished(block):
            work.write(
                block, _packed(worker.block(block, choices, bases.read(block), list(_names(model, resolved, block))))
            )
        reporter.advance("factorize", block + 1, len(blocks))

    if out_dir.exists():
        shutil.rmtree(out_dir)  # not committed: unfinished work
    out_dir.mkdir(parents=True)
    sizes = outside_tensors(inputs.checkpoint, model, resolved, dtype)
    writer = ShardWriter(out_dir, config.shard_bytes)
    for name, read in sizes.items():
        writer.add(name, read())
    modules: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for block in blocks:
        parts = _unpacked(work.read(block))
        for name, tensor in parts.tensors.items():
            writer.add(name, tensor)
        modules |= parts.modules
        losses |= _losses(METHODS[config.method], resolved.of_block(block), bases.read(block), parts.modules)
        reporter.advance("write", block + 1, len(blocks))
    shards = writer.close()
    settings = config_json(inputs.checkpoint, config.dtype, modules, remote_code_entries(model.config))
    write_json(out_dir / "config.json", settings)
    write_remote_code(out_dir)
    write_companions(inputs.checkpoint, out_dir)
    report = summary(resolved, modules, losses, scores, config)
    write_json(out_dir / REPORT, report)
    write_text(out_dir / "README.md", model_card(report))
    outputs = sorted(path.name for path in out_dir.iterdir())
    result = commit(
        out_dir,
        identity,
        outputs,
        {
            name: report[name]
            for name in ("asked_ratio", "reached_ratio", "ratio_of", "stored_elements", "claimed_elements")
        }
        | {"shards": len(shards)},
        environment(config.device),
    )
    shutil.rmtree(work.directory, ignore_errors=True)
    return result


class Factorizer:
    """Computes one block's compressed tensors."""

    def __init__(
        self,
        method: LinearMethod,
        checkpoint: Checkpoint,
        resolved: Resolved,
        prefix: str,
        config: FactorizeConfig,
        dtype: torch.dtype,
    ) -> None:
        self.method, self.checkpoint, self.resolved = method, checkpoint, resolved
        self.prefix, self.config, self.dtype = prefix, config, dtype
        self.device = torch.device(config.device)

    def _read(self, name: str) -> Tensor:
        stored = self.checkpoint.name_on_disk(name, self.prefix)
        if stored is None:
            raise ArtifactError(f"{self.checkpoint.path} has no tensor {name}; it is not the checkpoint of this run.")
        return self.checkpoint.read(stored)

    def block(self, block: int, choices: Mapping[str, Choice], bases: Mapping[str, Tensor], names: list[str]) -> Parts:
        """Encode all claimed matrices of a block and take its other tensors along.

        Parameters
        ----------
        choices
            Format and rank of each matrix.
        bases
            The block's basis file.
        names
            Names of all the dense block's tensors in the model.
        """
        tensors: dict[str, Tensor] = {}
        modules: dict[str, Any] = {}
        replaced: set[str] = set()
        for path, targets in self.resolved.modules().items():
            if targets[0].block != block:
                continue
            chosen = [self._planned(target, choices[target.name]) for target in targets]
            if all(choice.rank is None for choice in chosen):
                continue
            stored = self._read(f"{path}.weight").to(self.device)
            bias = self._read(f"{path}.bias").double() if targets[0].has_bias else None
            parts = []
            for target, choice in zip(targets, chosen, strict=True):
                if choice.rank is None:
                    parts.append(dense_part(stored, target).cast(self.dtype))
                    continue
                weight = weights.read(stored, target).double()
                part = self.encode(target, choice, weight, bases)
                if bias is not None and f"{target.name}/mean" in bases:
                    lost = weight.cpu() - part.rebuild().cpu()
                    restored = weights.bias(bias, target) + lost @ bases[f"{target.name}/mean"]
                    weights.place_bias(bias, target, restored)
                parts.append(part)
            modules[path] = module_entry(targets, parts)
            tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in module_tensors(targets, parts, self.dtype).items()}
            if bias is not None:
                tensors[f"{path}.bias"] = bias.to(self.dtype)
            replaced |= {f"{path}.weight", f"{path}.bias"}
        for name in names:
            if name not in replaced:
                tensors[name] = self._cast(self._read(name))
        return Parts(tensors, modules)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _planned(self, target: Target, choice: Choice) -> Choice:
        """The choice in the storage asked for: what ranks.json says, or as much as fits its stored count."""
        storage = self.config.storage
        if choice.rank is None or storage == choice.format:
            return choice
        rank = min(largest_rank(storage, target.shape, choice.stored(target.shape)), min(target.shape) - 1)
        return Choice(storage, max(rank, 1))

    def encode(self, target: Target, choice: Choice, weight: Tensor, bases: Mapping[str, Tensor]) -> Encoded:
        """Factor one matrix; "auto" takes the format with the smaller metric loss after rounding, at equal stored count.

        Raises
        ------
        InputError
            The rank is above what the score stage kept.
        """
        projector = projector_of(bases, target)
        assert choice.rank is not None
        if choice.format != "auto":
            return self._encode_as(choice.format, target, choice.rank, weight, projector)
        count = cost("auto", target.shape, choice.rank)
        candidates = []
        for form in ("pivot", "pair"):
            rank = min(largest_rank(form, target.shape, count), min(target.shape) - 1, projector.expand.shape[1])
            if rank > 0:
                part = self._encode_as(form, target, rank, weight, projector)
                candidates.append((self._loss(target, part, weight, projector, bases), part))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def _encode_as(self, form: str, target: Target, rank: int, weight: Tensor, projector: Projector) -> Encoded:
        largest = projector.expand.shape[1]
        if rank > largest:
            raise InputError(
                f"{target.name} asks for rank {rank}, but its basis was kept up to rank {largest}. Repeat `lrc score` with "
                "--allocate loss, which keeps every rank that can pay, or lower the rank in ranks.json."
            )
        left, right = (factor.cpu() for factor in factors(weight, projector, rank))
        if form == "pair":
            return Encoded("pair", rank, right, left).cast(self.dtype)
        found = pivot(left, right)
        return Encoded("pivot", rank, found.pivots, found.coefficients, found.index).cast(self.dtype)

    def _loss(
        self, target: Target, part: Encoded, weight: Tensor, projector: Projector, bases: Mapping[str, Tensor]
    ) -> float:
        """Metric loss of truncation, plus that of rounding to the output dtype (see `methods.sensitivities`)."""
        left, right = (factor.cpu() for factor in factors(weight, projector, part.rank))
        error = part.rebuild() - left @ right
        rounding = bases[f"{target.name}/out_sensitivity"] @ error.square() @ bases[f"{target.name}/in_sensitivity"]
        return float(projector.tail()[part.rank] + rounding)


def _names(model: Any, resolved: Resolved, block: int):
    prefix = f"{resolved.blocks[block]}."
    return (name for name in model.state_dict() if name.startswith(prefix))


def _packed(parts: Parts) -> dict[str, Tensor]:
    """Put a block's tensors and module entries into one tensor file."""
    entries = json.dumps(parts.modules, sort_keys=True).encode()
    return parts.tensors | {"__modules__": torch.frombuffer(bytearray(entries), dtype=torch.uint8)}


def _unpacked(tensors: dict[str, Tensor]) -> Parts:
    entries = json.loads(bytes(tensors.pop("__modules__").tolist()))
    return Parts(tensors, entries)


def _losses(
    method: LinearMethod, targets: tuple[Target, ...], bases: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> dict[str, float]:
    losses = {}
    for target in targets:
        part = stored_part(target, modules)
        if part["format"] != "dense":
            losses[target.name] = float(predicted_losses(method.unit, bases, target)[part["rank"]])
        else:
            losses[target.name] = 0.0
    return losses


def stored_part(target: Target, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Look up how a matrix is stored in the config's module entries."""
    entry = modules.get(target.module)
    if entry is None:
        return {"format": "dense", "rank": target.shape[0]}
    _, _, role = target.name.removeprefix(target.module).partition(":")
    if not role:
        return entry["parts"][0]
    start = 0
    wanted = target.rows.offset * target.rows.groups
    for part in entry["parts"]:
        if start == wanted:
            return part
        start += part["rows"]
    raise ArtifactError(f"config.json's entry of {target.module} has no part for {target.name}.")


def summary(
    resolved: Resolved,
    modules: Mapping[str, Any],
    losses: Mapping[str, float],
    scores: Manifest,
    config: FactorizeConfig,
) -> dict[str, Any]:
    """Make lowrank.json: what was asked, what was reached, and how each matrix is stored."""
    matrices = {}
    for target in resolved.targets:
        part = stored_part(target, modules)
        matrices[target.name] = {
            "shape": list(target.shape),
            "format": part["format"],
            "rank": None if part["format"] == "dense" else part["rank"],
            "stored": int(cost(part["format"], target.shape, part["rank"])),
            "predicted_loss": losses[target.name],
        }
    stored = sum(matrix["stored"] for matrix in matrices.values())
    claimed = sum(target.elements for target in resolved.targets)
    planned = scores.report
    return {
        "schema": 1,
        "method": config.method,
        "dtype": config.dtype,
        "asked_ratio": planned["asked_ratio"],
        "reached_ratio": (claimed - stored) / planned["denominator"],
        "ratio_of": planned["ratio_of"],
        "claimed_elements": claimed,
        "stored_elements": stored,
        "unit": planned["unit"],
        "matrices": matrices,
    }


def model_card(report: Mapping[str, Any]) -> str:
    """Write a short README.md for the checkpoint."""
    return f"""---
library_name: transformers
tags: [low-rank, lowrank_compress]
---

# A low-rank compressed checkpoint

Method `{report["method"]}`: {report["reached_ratio"]:.2%} of the {report["ratio_of"]} parameters were removed
({report["claimed_elements"]:,} weights inside the blocks became {report["stored_elements"]:,} stored elements).

```python
import lowrank_compress  # or pass trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/checkpoint")
```

`config.json` says how each layer is stored; `lowrank.json` is a report for people.
"""
