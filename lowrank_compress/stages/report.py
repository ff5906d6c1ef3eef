"""lowrank.json and the model card of a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_compress.allocation.storage import cost
from lowrank_compress.arch.resolve import Resolved, Target
from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.config import FactorizeConfig
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.linear import LinearMethod
from lowrank_compress.stages.bases import predicted_losses


def block_losses(
    method: LinearMethod, targets: tuple[Target, ...], bases: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> dict[str, float]:
    """Predicted loss of each matrix of a block at the rank it is stored with."""
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
    where = "inside the blocks" if report["ratio_of"] == "blocks" else "of the model"
    return f"""---
library_name: transformers
tags: [low-rank, lowrank_compress]
---

# A low-rank compressed checkpoint

Method `{report["method"]}`: {report["reached_ratio"]:.2%} of the parameters {where} were removed
({report["claimed_elements"]:,} weights inside the blocks became {report["stored_elements"]:,} stored elements).

```python
import lowrank_compress  # or pass trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/checkpoint")
```

`config.json` says how each layer is stored; `lowrank.json` is a report for people.
"""
