"""Make the key-value cache of a compressed checkpoint smaller: of each token it keeps a latent from then on.

Nothing else of the checkpoint is changed. What keys and values are computed by is the compressed model's own, and so is
the text's loss that errors of them are weighed by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.artifacts.directories import files_in, replacing
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, listed
from lowrank_compress.errors import CheckpointError, InputError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.cacheconfig import CacheConfig
from lowrank_compress.stages.cached import changed, described
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.latents import Latents
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import contents_of, refuse_packed, write_anew
from lowrank_compress.stages.run import made_once, work_of
from lowrank_compress.stages.samples import has_own, settings_of, text_id
from lowrank_compress.stages.stage import Given

VERSION = 1


def key(config: CacheConfig, inputs: Given) -> Key:
    """Everything that the new checkpoint and its report depend on; a text counts by its content."""
    return Key("cache", VERSION, settings_of(config), contents_of(inputs.checkpoint) | {"text": text_id(config)})


def run(
    config: CacheConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Let the cache keep latents.

    Parameters
    ----------
    config, inputs
        How, and of what.
    out_dir
        The directory of the new checkpoint, which appears whole or not at all; see `work_of` for the state meanwhile.
    reporter
        Told about progress and warnings.
    resources
        What the first process may use; all are called with the same.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        The checkpoint is dense, quantized, of a family whose attention cannot do it, or caches latents already; the
        text cannot be used, the ratio is out of reach, or another result is in `out_dir`.
    """
    checkpoint = inputs.checkpoint
    if checkpoint.quantization is None:
        raise CheckpointError(
            f"{checkpoint.path} is not compressed by this program. Of a dense model `lrc compress --method dense "
            f"--kv-ratio {config.kv_ratio:g}` makes the cache smaller."
        )
    refuse_packed(checkpoint, "cache")
    if has_own(config):
        raise InputError("--calibration self is for dense models, which write a text well. Name a text.")
    identity = key(config, inputs)

    def make() -> Manifest:
        alone = resources.alone(config.device)
        return _make(config, inputs, out_dir, identity, reporter or Silent(), alone)

    return made_once(out_dir, identity, make, resources.workers, overwrite=overwrite)


def _make(
    config: CacheConfig, inputs: Given, out_dir: Path, identity: Key, reporter: Reporter, resources: Resources
) -> Manifest:
    checkpoint = inputs.checkpoint
    plan = blueprint(checkpoint)
    latents = Latents(config, plan, work_of(out_dir), identity.id, reporter, resources)
    choices, losses = latents.choose()
    blocks = [changed(latents, group, choices[group.name]) for group in latents.groups]
    layout: dict[str, Any] = dict(checkpoint.quantization or {})
    for name in ("modules", "attention"):
        layout[name] = {
            **layout.get(name, {}),
            **{path: e for each in blocks for path, e in getattr(each, name).items()},
        }

    def tensors(block: int) -> Iterator[tuple[str, Tensor]]:
        gone = blocks[block].gone if block >= 0 else set()
        for name in plan.outside() if block < 0 else plan.inside(block):
            if name not in gone:
                yield name, plan.read(name)

    with replacing(out_dir, listed) as draft:
        report = write_anew(
            checkpoint,
            draft,
            tensors,
            layout,
            lambda block: blocks[block].tensors if block >= 0 else {},
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            shard_bytes=config.shard_bytes,
            report=lambda before: described(latents, before, choices, losses, blocks),
            advance=lambda done, total: reporter.advance("write", done, total),
        )
        report |= {"predicted_loss": sum(losses.values())}
        manifest = commit(draft, identity, files_in(draft), report, environment(config.device))
    latents.clear()
    return manifest
