"""Store a compressed checkpoint in another dtype, block by block; all else of it stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_compress.artifacts.directories import files_in, replacing
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, listed
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.report import recast
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import contents_of, refuse_packed, rewrite
from lowrank_compress.stages.run import made_once
from lowrank_compress.stages.stage import Given
from lowrank_compress.strict import Strict

VERSION = 4


class CastConfig(Strict):
    """What the cast checkpoint depends on."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    shard_bytes: int = 1_000_000_000


def key(config: CastConfig, inputs: Given) -> Key:
    """Everything that the cast checkpoint and its report depend on."""
    return Key("cast", VERSION, config.model_dump(mode="json"), contents_of(inputs.checkpoint))


def run(
    config: CastConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Cast.

    Parameters
    ----------
    config, inputs
        The dtype, and what to store in it.
    out_dir
        The directory of the new checkpoint, which appears whole or not at all.
    reporter
        Told about progress.
    resources
        Its processes are all called with the same; the first does it.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        The checkpoint is not compressed by this package, has a value beyond the dtype, or another result is in
        `out_dir`.
    """
    if inputs.checkpoint.quantization is None:
        raise CheckpointError(
            f"{inputs.checkpoint.path} is not compressed by this program; there is nothing of ours to cast. `lrc "
            "compress` takes --dtype."
        )
    refuse_packed(inputs.checkpoint, "cast")
    identity = key(config, inputs)

    def make() -> Manifest:
        with replacing(out_dir, listed) as draft:
            report = _write(config, inputs.checkpoint, draft, reporter or Silent())
            return commit(draft, identity, files_in(draft), report, environment("cpu"))

    return made_once(out_dir, identity, make, resources.workers, overwrite=overwrite)


def _write(config: CastConfig, checkpoint: Checkpoint, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write the whole checkpoint; return what the manifest is to report."""
    plan = blueprint(checkpoint)
    dtype: torch.dtype = getattr(torch, config.dtype)
    found = rewrite(
        checkpoint,
        out,
        lambda block, name: plan.rounded(name, dtype),
        dtype=config.dtype,
        shard_bytes=config.shard_bytes,
        report=lambda report: recast(report, plan, config.dtype),
        advance=lambda done, total: reporter.advance("cast", done, total),
    )
    return found | {"dtype": config.dtype}
