"""Stage 2: decompose each matrix in the method's metric, and choose ranks under the budget.

Writes a basis file a block (kept up to the largest rank that can pay) and ranks.json, which people may edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.spec import HEAD
from lowrank_compress.artifacts.directories import link, recover, replacing
from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.manifest import Key, Manifest, altered, commit, committed, listed, read_manifest
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.config import CalibrateConfig, ScoreConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.formats.table import FORMATS
from lowrank_compress.methods.candidates import Candidates, all_groups, first_groups
from lowrank_compress.methods.groups import dense_elements, needs_data, price_of
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.registry import unknown
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.cachebudget import cache_report
from lowrank_compress.stages.choice import Plan, best
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.decide import decide
from lowrank_compress.stages.decompose import VERSION, Bases
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.mixing import byte_plans
from lowrank_compress.stages.ranks import RANKS, write_ranks
from lowrank_compress.stages.reporting import Reporter, Silent, in_parts
from lowrank_compress.stages.samples import settings_of
from lowrank_compress.stages.subject import Subject
from lowrank_compress.stages.trial import Storing, clear, tried_stored


@dataclass(frozen=True)
class Inputs:
    """What the stage reads.

    Attributes
    ----------
    subject
        The dense model, and what of it is compressed.
    calibration
        Key of the calibrate stage, whose id identifies the statistics, kept or not.
    statistics
        Directory of the statistics; not read for blocks that are decomposed already.
    held_out
        Makes the text that plans are tried on, kept out of the calibration set; None where there is no such.
    again
        How the calibration is repeated for a second allocation, and where losses are measured.
    storing
        How plans for a budget in bytes become checkpoints.
    """

    subject: Subject
    calibration: Key
    statistics: Path
    held_out: Callable[[], list[Batch]] | None = None
    again: CalibrateConfig | None = None
    storing: Storing | None = None


def key(config: ScoreConfig, inputs: Inputs) -> Key:
    """Everything that bases and ranks depend on."""
    settings, found = config.model_dump(mode="json"), {"calibration": inputs.calibration.id}
    if inputs.storing is not None:
        how = [inputs.storing.factorize.model_dump(mode="json"), settings_of(inputs.storing.quantize)]
        found["storing"] = canonical_hash(how)
    return Key("score", VERSION, settings, found)


def check_options(allocate: str, storage: str, candidates: Sequence[Candidates]) -> None:
    """Refuse, before any work, unknown names and an allocator that the methods do not serve.

    Raises
    ------
    InputError
        The allocator or storage is unknown, or the allocator needs what module methods, or methods without data, lack.
    """
    allocator = ALLOCATORS[allocate]
    if storage not in FORMATS:
        raise InputError(unknown("storage", storage, FORMATS))
    wide = next((group for group in first_groups(candidates) if len(group.targets) > 1), None)
    if allocator.needs_spectrum and wide is not None:
        raise InputError(
            f"The allocator {allocate!r} looks at the singular values of single matrices; {wide.name} is compressed as "
            "a module. Use --allocate uniform, loss or block-influence."
        )
    if allocator.needs_data and not needs_data(first_groups(candidates)):
        raise InputError(
            f"The allocator {allocate!r} needs calibration data, which none of the methods takes. Use --allocate "
            "uniform or loss, or another --method."
        )
    outside = next(
        (target for group in first_groups(candidates) for target in group.targets if target.group == HEAD.name), None
    )
    if allocator.needs_data and outside is not None:
        raise InputError(
            f"The allocator {allocate!r} looks at what blocks do; {outside.name} is outside of them. Use --allocate "
            "uniform or loss, or leave it as it is."
        )
    compared = all_groups([part for part in candidates if len(part.each) > 1])
    if allocator.needs_loss and not all(group.nats for group in compared):
        raise InputError(
            "Alternatives compare by predicted losses, which must all be in nats a token: use kfac for matrices and "
            "--metric kfac for modules, or name a single method for each part."
        )


def run(
    config: ScoreConfig,
    inputs: Inputs,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    bases: Bases | None = None,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Score: decompose what is not decomposed yet, then choose ranks.

    Parameters
    ----------
    config, inputs
        What to do on what.
    out_dir
        Directory for bases, ranks.json and the manifest.
    reporter
        Told about progress.
    bases
        Those of this very config and inputs in `out_dir`, where statistics have gone to them; None to make them.
    resources
        What this process may use, and those that do this together with it, all called with the same.
    overwrite
        Replace other ranks in `out_dir`; hand-edited ones are moved to ranks.json.bak.

    Raises
    ------
    LrcError
        Statistics are missing, the ratio is out of reach, or another result is in `out_dir`.
    """
    reporter, workers = reporter or Silent(), resources.workers
    identity = key(config, inputs)
    check_options(config.allocate, config.storage, inputs.subject.candidates)
    if bases is None:
        bases = Bases(Chooser(config, inputs.subject), inputs.calibration.id, out_dir, resources=resources)
    own = workers.share(inputs.subject.scopes)
    found = workers.once(lambda: committed_scores(out_dir, identity, overwrite=overwrite, keep_edit=not overwrite))
    if found is not None:
        return found
    statistics = BlockFiles(inputs.statistics, inputs.calibration.id)
    needs = needs_data(bases.chooser.groups)
    for done, part in in_parts(own, bases.at_once):
        if todo := [block for block in part if not bases.finished(block)]:
            bases.take({block: _means(statistics, block) if needs else {} for block in todo})
        bases.take_spectra(part)
        reporter.advance("score", done, len(own))
    bases.flush()
    if (there := workers.once(lambda: _complete(out_dir, identity, overwrite))) is not None:
        return there
    if inputs.storing is None:
        plan, found = decide(bases, inputs.held_out, inputs.again, reporter, resources)
    else:
        plan, found = workers.once(
            lambda: _choose_stored(
                inputs,
                bases,
                lambda plan, place: _commit(config, inputs, bases, plan, [], identity, place),
                reporter,
                resources.alone(config.device),
            )
        )
    # Ranks that were edited stay where nothing but bases of a second allocation was missing.
    return workers.once(
        lambda: (
            _complete(out_dir, identity, overwrite) or _commit(config, inputs, bases, plan, found, identity, out_dir)
        )
    )


def _complete(out_dir: Path, identity: Key, overwrite: bool) -> Manifest | None:
    """The manifest of this very result, if nothing but bases was missing: its ranks stay, edited or not."""
    there = None if overwrite else read_manifest(out_dir)
    if there is None or there.id != identity.id or not (out_dir / RANKS).exists():
        return None
    return None if set(altered(out_dir, there)) - {RANKS} else there


def _choose_stored(
    inputs: Inputs, bases: Bases, commit: Callable[[Plan, Path], object], reporter: Reporter, resources: Resources
) -> tuple[Plan, list[dict[str, Any]]]:
    """Choose among plans for a budget in bytes as they are stored in the end."""
    plans, storing = byte_plans(bases), inputs.storing
    if storing is None or inputs.held_out is None or len(plans) == 1 or not (batches := inputs.held_out()):
        return plans[0], []
    found = tried_stored(plans, storing, commit, batches, reporter, resources)
    clear(storing, len(plans))
    return best(plans, found), found


def _commit(
    config: ScoreConfig,
    inputs: Inputs,
    bases: Bases,
    plan: Plan,
    tried: Sequence[Mapping[str, Any]],
    identity: Key,
    out_dir: Path,
) -> Manifest:
    """Write the ranks of a plan, and commit: bases and ranks of another result stand until then, together."""
    budget, subject = bases.chooser.budget, inputs.subject
    groups, choices = plan.groups, plan.choices
    stored = sum(price_of(group, choices[group.name]).elements for group in groups)
    claimed = sum(target.elements for target in subject.claimed)
    report = {
        "asked_ratio": config.ratio,
        "reached_ratio": (sum(dense_elements(group) for group in groups) - stored) / budget.denominator,
        "ratio_of": config.ratio_of,
        "denominator": budget.denominator,
        "claimed_elements": claimed,
        "stored_elements": claimed - sum(dense_elements(group) for group in groups) + stored,
        **({} if config.bytes is None else {"asked_bytes": config.bytes.share}),
        **cache_report(groups, choices, config.kv_ratio, config.scheme.kv_window),
        "predicted_loss": plan.predicted,
        "plan": plan.name,
        "plans": list(tried),
        "unit": "nats" if plan.bases.chooser.nats else "relative",
        "scheme": plan.bases.chooser.config.scheme.model_dump(mode="json"),
        "bases": plan.bases.files.id,
        "bases_prefix": plan.bases.files.prefix,
        "spectra": None if bases.spectra is None else bases.spectra.id,
    }
    files = bases.names(subject.scopes)
    if plan.bases.files.name(0) not in files:
        files += plan.bases.names(subject.scopes)
    with replacing(out_dir, listed) as draft:
        for name in files:
            link(bases.files.directory / name, draft / name)
        write_ranks(draft / RANKS, groups, choices)
        return commit(draft, identity, [RANKS, *files], report, environment(config.device))


def _means(statistics: BlockFiles, block: int) -> dict[str, Tensor]:
    if not statistics.path(block).exists():
        raise ArtifactError(
            f"{statistics.directory} has no statistics of block {block}, and no basis that was kept serves these "
            "options (`lrc compress` drops statistics, and keeps only the ranks that it needs). Repeat `lrc calibrate` "
            "with the same recipe, or `lrc compress` with --keep-statistics."
        )
    return statistics.read(block)


def committed_scores(out_dir: Path, identity: Key, *, overwrite: bool, keep_edit: bool = True) -> Manifest | None:
    """As `manifest.committed`, but edited ranks are no damage; unless they are to be kept, they are chosen anew."""
    recover(out_dir, listed)
    return committed(out_dir, identity, overwrite=overwrite, editable=(RANKS,) if keep_edit else ())
