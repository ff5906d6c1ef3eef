"""Stage 3: multiply the bases with the weights, encode, and write an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_compress.allocation.choice import Choice
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.artifacts.directories import files_in, recover, replacing
from lowrank_compress.artifacts.documents import canonical_hash, write_json
from lowrank_compress.artifacts.files import sha256, write_text
from lowrank_compress.artifacts.manifest import (
    Key,
    Manifest,
    commit,
    committed,
    listed,
    read_manifest,
    require_intact,
)
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.experts import tokens_seen
from lowrank_compress.config import FactorizeConfig, Scheme
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.candidates import all_groups, candidates_of, yardsticks
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.export import ShardWriter, config_json, write_companions
from lowrank_compress.resources.resources import Resources
from lowrank_compress.shipped.saving import remote_code_entries, write_remote_code
from lowrank_compress.stages.card import model_card
from lowrank_compress.stages.decompose import bases_of
from lowrank_compress.stages.encode import Encoder
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.origin import CARD, Heard, about, copy_licences
from lowrank_compress.stages.pieces import Pieces
from lowrank_compress.stages.ranks import RANKS, in_storage, read_ranks, require_kept
from lowrank_compress.stages.report import REPORT, Experts, block_losses, facts, summary
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.run import require_alone
from lowrank_compress.stages.subject import scopes_of

log = logging.getLogger(__name__)
VERSION = 8


@dataclass(frozen=True)
class Inputs:
    """What the stage reads.

    Attributes
    ----------
    model
        The dense model.
    scores
        Directory of the score stage.
    heard
        What it was calibrated on, for the report and the model card.
    """

    model: Blueprint
    scores: Path
    heard: Heard = field(default_factory=Heard)


def scores_manifest(scores: Path) -> Manifest:
    """The manifest of the score stage.

    Raises
    ------
    ArtifactError
        That stage is not finished, or what it wrote (but for the ranks) was changed.
    """
    manifest = read_manifest(scores)
    if manifest is None or not (scores / RANKS).exists():
        raise ArtifactError(f"{scores} holds no finished scores. Run `lrc score` on this run first.")
    require_intact(scores, manifest, editable=(RANKS,))
    return manifest


def scheme_of_scores(scores: Manifest) -> Scheme:
    """The scheme that ranks were chosen for: the recipe's, or the one that its plans were held against."""
    return Scheme(**scores.report["scheme"])


def key(config: FactorizeConfig, inputs: Inputs) -> Key:
    """Everything the checkpoint and its report depend on: the scores, and the ranks as ranks.json has them now."""
    found = {
        "checkpoint": checkpoint_id(inputs.model.checkpoint),
        "scores": scores_manifest(inputs.scores).id,
        "ranks": sha256(inputs.scores / RANKS),
        "about": canonical_hash(about(inputs.model, inputs.heard)),
    }
    return Key("factorize", VERSION, config.model_dump(mode="json"), found)


def run(
    config: FactorizeConfig,
    inputs: Inputs,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
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
    resources
        What this process may use, and those that do this together with it, all called with the same.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        Scores are missing or do not fit, the disk is full, or another result is in `out_dir`.
    """
    reporter, workers = reporter or Silent(), resources.workers
    plan = inputs.model
    scores = scores_manifest(inputs.scores)
    candidates = candidates_of(plan.resolved, scheme_of_scores(scores))
    choices = read_ranks(inputs.scores / RANKS, candidates)  # before anything is removed
    groups = [group for group in all_groups(candidates) if group.name in choices]
    if config.storage != scores.key.config["storage"]:  # asked for since; else what ranks.json says is followed
        choices = in_storage(groups, choices, config.storage, config.round_to)
    bases = bases_of(inputs.scores, scores)
    require_kept(inputs.scores / RANKS, groups, choices, bases)
    identity = key(config, inputs)
    workers.once(lambda: recover(out_dir, listed))
    if not overwrite:
        _refuse_other_ranks(out_dir, identity, inputs.scores / RANKS)
    found = workers.once(lambda: committed(out_dir, identity, overwrite=overwrite))
    if found is not None:
        require_alone(out_dir, found)
        return found
    work = Pieces(out_dir.parent / "work", identity.id)
    encoder = Encoder(plan, groups, config)
    blocks = scopes_of(plan.resolved, groups)
    for number, block in enumerate(own := workers.share(blocks), 1):
        if not work.finished(block):
            keep, room = partial(work.add, block), resources.for_experts
            work.finish(block, encoder.block(block, choices, bases.read(block), keep, room))
        reporter.advance("factorize", number, len(own))

    def write() -> Manifest:
        with replacing(out_dir, listed) as draft:
            result = _write(config, inputs, scores, draft, reporter, identity, groups, bases, work)
        work.remove(blocks)
        return result

    return workers.once(write)


def _write(
    config: FactorizeConfig,
    inputs: Inputs,
    scores: Manifest,
    out_dir: Path,
    reporter: Reporter,
    identity: Key,
    groups: Sequence[TargetGroup],
    bases: BlockFiles,
    work: Pieces,
) -> Manifest:
    """Put the encoded blocks together to a checkpoint, and commit it."""
    plan, dtype = inputs.model, getattr(torch, config.dtype)
    blocks = scopes_of(plan.resolved, groups)
    writer = ShardWriter(out_dir, config.shard_bytes)
    for name in plan.outside() if len(blocks) == len(plan.resolved.blocks) else ():
        writer.add(plan.name_on_disk(name), plan.rounded(name, dtype))
    kinds = ("modules", "dense_shapes", "attention", "experts", "routers", "merged")
    layout: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    stored: dict[str, Choice] = {}
    losses: dict[str, float] = {}
    seen: dict[str, int] = {}
    leads: dict[str, str] = {}
    every = candidates_of(plan.resolved, scheme_of_scores(scores))
    compared = yardsticks(every) if ALLOCATORS[scores.key.config["allocate"]].needs_loss else {}
    for block in blocks:
        for name, tensor in work.each(block):
            writer.later(name, tensor)
        notes = work.notes(block)
        for kind, entries in layout.items():
            entries |= notes.get(kind, {})
        leads |= notes.get("leads", {})
        made = {name: Choice(form, tuple(parameters)) for name, (form, *parameters) in notes["choices"].items()}
        basis = bases.read(block)
        losses |= block_losses(groups, basis, made, scores.report["unit"], compared)
        seen |= tokens_seen(basis)
        stored |= made
        for group in groups:
            if (choice := made.get(group.name)) is not None:
                shapes = ", ".join("×".join(map(str, target.shape)) for target in group.targets)
                log.info("%s (%s): %s %s", group.name, shapes, choice.format, ", ".join(map(str, choice.parameters)))
        reporter.advance("write", block + 1, len(blocks))
    shards = writer.close()
    settings = config_json(plan.checkpoint, config.dtype, layout, remote_code_entries(plan.model.config))
    write_json(out_dir / "config.json", settings)
    write_remote_code(out_dir)
    write_companions(plan.checkpoint, out_dir)
    experts = Experts(seen, layout["dense_shapes"], leads)
    report = summary(plan, groups, stored, losses, scores, config, about(plan, inputs.heard), experts)
    write_json(out_dir / REPORT, report)
    copy_licences(plan.checkpoint, report, out_dir)
    write_text(out_dir / CARD, model_card(report))
    outputs = files_in(out_dir)
    return commit(
        out_dir,
        identity,
        outputs,
        facts(report) | {"shards": len(shards)},
        environment(config.device),
    )


def _refuse_other_ranks(out_dir: Path, asked: Key, ranks: Path) -> None:
    """Say plainly what an edit of ranks.json after factorizing means."""
    there = read_manifest(out_dir)
    if there is None or there.key.inputs.get("ranks") == asked.inputs["ranks"]:
        return
    if replace(there.key, inputs={**there.key.inputs, "ranks": asked.inputs["ranks"]}) == asked:
        raise ArtifactError(
            f"{out_dir} was made from other ranks than {ranks} has now. Pass --overwrite to make it again from these."
        )
