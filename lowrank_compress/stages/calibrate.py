"""Stage 1: take from the calibration set the statistics that a method needs.

Reads a checkpoint and a text; writes one safetensors file of means a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_compress.artifacts.manifest import Key, Manifest, commit, committed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.capture import capture, needs_gradient
from lowrank_compress.calibration.experts import tokens_seen
from lowrank_compress.calibration.windows import batches_hash
from lowrank_compress.config import CalibrateConfig
from lowrank_compress.errors import ArtifactError
from lowrank_compress.methods.candidates import all_groups
from lowrank_compress.methods.groups import needed, needs_data
from lowrank_compress.methods.scale import with_scales
from lowrank_compress.model.narrowing import check_narrowing
from lowrank_compress.model.remembering import check_remembering
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.reading import require_labels
from lowrank_compress.stages.reporting import Reporter, Silent, in_parts
from lowrank_compress.stages.samples import (
    batches_by_text,
    has_own,
    settings_of,
    text_id,
    too_few,
    too_short,
    with_drawn,
)
from lowrank_compress.stages.sinks import FileSink, Sink
from lowrank_compress.stages.subject import Subject
from lowrank_compress.stages.texts import PerText

VERSION = 6
# Experts that a warning names.
NAMED = 8


@dataclass(frozen=True)
class Inputs:
    """What the stage reads: a dense model, and what of it is compressed (the text is named in the config)."""

    subject: Subject


def wanted_of(config: CalibrateConfig, subject: Subject) -> dict[str, frozenset[str]]:
    """Target name -> statistics that are taken of it: those of the groups and, where plans are compared, of scales."""
    wanted = needed(subject.measured)
    return with_scales(wanted, subject.groups) if config.held_out else wanted


def key(config: CalibrateConfig, inputs: Inputs, text: str | None = None) -> Key:
    """Everything the statistics depend on; a text counts by its content, not by its path.

    `text` is the identity of that content where the text itself need not be there; None to look.
    """
    groups = inputs.subject.measured
    found = {"checkpoint": checkpoint_id(inputs.subject.checkpoint)}
    if needs_data(groups):
        found["text"] = text or text_id(config)
    settings = settings_of(config, "scheme", "rival")
    if inputs.subject.model.task == "embedding":
        settings["read_as"] = "passages"  # before, it was windows of a running text
    if inputs.subject.model.task == "masked":
        settings["read_as"] = "masked windows"
    wanted = wanted_of(config, inputs.subject)
    by_role: dict[str, set[str]] = {}
    for target in inputs.subject.resolved.targets:
        by_role.setdefault(target.role, set()).update(wanted.get(target.name, ()))
    settings["statistics"] = {role: sorted(names) for role, names in by_role.items()}
    return Key("calibrate", VERSION, settings, found)


def run(
    config: CalibrateConfig,
    inputs: Inputs,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    sink: Sink | None = None,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Calibrate.

    Parameters
    ----------
    config, inputs
        What to do on what.
    out_dir
        Directory for the manifest and, without a `sink`, the statistics.
    reporter
        Told about progress and warnings.
    sink
        Takes the statistics instead of files in `out_dir`; the manifest then says that they were not kept.
    resources
        What this process may use, and those that do this together with it, all called with the same.
    overwrite
        Replace another result in `out_dir`.

    Raises
    ------
    LrcError
        Bad data, an unsupported or damaged checkpoint, another result in `out_dir`.
    """
    reporter, workers = reporter or Silent(), resources.workers
    identity = key(config, inputs)
    found = workers.once(lambda: committed(out_dir, identity, overwrite=overwrite))
    kept = sink is None
    subject = inputs.subject
    groups, task = subject.groups, subject.model.task
    files = BlockFiles(out_dir, identity.id)
    receiver = sink or FileSink(files)
    blocks = subject.scopes
    missing = workers.once(lambda: [block for block in blocks if not receiver.finished(block)])
    complete = not missing
    if found is not None and complete and (found.report["kept"] or not kept):
        return found
    wanted = wanted_of(config, subject)
    report: dict[str, object] = {"kept": kept, "tokens": 0, "windows": 0, "tokens_sha256": None}
    outputs = [files.name(block) for block in blocks] if kept else []
    if not needs_data(groups):
        own = workers.share(missing)
        for done, part in in_parts(own, receiver.at_once):
            receiver.take({block: {} for block in part})
            reporter.advance(receiver.step, done, len(own))
        receiver.flush()
        return workers.once(lambda: commit(out_dir, identity, outputs, report, environment(config.device)))
    if has_own(config):  # the first writes it, the others find it
        workers.once(
            lambda: bool(
                batches_by_text(config, subject.checkpoint, task, advance=reporter.advance, memory=resources.budget)
            )
        )
    by_text = batches_by_text(config, subject.checkpoint, task)
    batches = [batch for part in by_text for batch in part]
    if needs_gradient(wanted):
        require_labels(batches, task)
    reporter.advance("tokenize", 1, 1)
    tokens = sum(batch.tokens for batch in batches)
    report |= {
        "tokens": tokens,
        "windows": sum(len(batch.ids) for batch in batches),
        "tokens_sha256": batches_hash(batches),
    }
    for warning in too_short(config, by_text):
        reporter.warn(warning)
    if few := too_few(groups, batches, needs_gradient(wanted)):
        reporter.warn(few)
    texts = PerText(config, by_text)
    batches = with_drawn(batches, config.drawn, subject.checkpoint, task)
    if any(group.loses_mean for group in groups):
        reporter.warn(
            "afm restores the mean through biases, and some layers of this model have none, or are experts, which see "
            "some tokens only: there it uses the uncentred Gram matrix and restores no mean."
        )
    if not complete:
        device, room = torch.device(config.device), resources.on(config.device).for_experts
        skeleton = Skeleton(subject.checkpoint, device, torch.float32, for_experts=room)
        main = all_groups(subject.candidates)
        if any(target.heads is not None for group in main if len(group.targets) > 1 for target in group.targets):
            check_narrowing(skeleton, batches[0])
        if subject.cache:
            check_remembering(skeleton, batches[0])
        out_dir.mkdir(parents=True, exist_ok=True)
        own, blind = len(workers.share(missing)), list[str]()
        captured = capture(
            skeleton,
            batches,
            wanted,
            skip=lambda block: block not in missing,
            clip=config.clip,
            advance=reporter.advance,
            spill_to=out_dir,
            resources=resources,
            halves=config.held_out,
            told=texts.told if task == "lm" and (len(by_text) > 1 or needs_gradient(wanted)) else None,
        )
        for done, part in in_parts(captured, receiver.at_once):
            receiver.take({statistics.block: statistics.means for statistics in part})
            for statistics in part:
                blind += [path for path, tokens in tokens_seen(statistics.means).items() if not tokens]
                statistics.means.clear()  # they are large, and the next block's are under way
            reporter.advance(receiver.step, done, own)
        if outside := [block for block in missing if block >= len(subject.resolved.blocks)]:
            receiver.take({block: {} for block in workers.share(outside)})
        receiver.flush()
        if blind:
            reporter.warn(
                f"{len(blind)} experts saw no token of the calibration set ({', '.join(blind[:NAMED])}"
                f"{', …' if len(blind) > NAMED else ''}): they are taken for the average of their block's. Pass more "
                "text, or a larger --samples."
            )
    report["texts"] = texts.report(workers)
    return workers.once(lambda: commit(out_dir, identity, outputs, report, environment(config.device)))


def kept(directory: Path, identity: Key) -> bool:
    """Whether the statistics of a calibration were kept in a directory."""
    try:
        found = read_manifest(directory)
    except ArtifactError:
        return False
    return found is not None and found.id == identity.id and found.report["kept"]
