"""What the spectra of a model say: of its matrices, of what leaves its blocks, and of how its heads talk."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.arch.targets import Target
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.config import DiagnoseConfig, evaluate_config
from lowrank_compress.errors import InputError
from lowrank_compress.linalg.intruders import intruder_dimensions
from lowrank_compress.linalg.spectra import (
    effective_rank,
    matrix_entropy,
    matrix_nuclear_norm,
    power_law,
    singular_values,
    stable_rank,
)
from lowrank_compress.model import weights
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.workers import started
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.opponents import checkpoint_at, require_one_kind
from lowrank_compress.stages.reading import text_batches
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.talking import Talk
from lowrank_compress.strict import COMMAND_LINE, stage_config
from lowrank_compress.texts import Place


def diagnose(
    model: Place,
    *,
    base: Place | None = None,
    text: Place | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Look at the spectra of a model, as ``lrc diagnose`` does.

    Parameters
    ----------
    model
        A run directory, a checkpoint directory or a name on the Hugging Face hub.
    base
        The model that it was tuned from.
    text
        A text to look at representations of.
    device
        "auto", "cpu", "cuda" or "cuda:N".
    reporter
        Told about progress and warnings; None for silence, and Python warnings.
    fields
        Any other field of `config.DiagnoseConfig`.

    Returns
    -------
    dict
        ``matrices``, by name; ``blocks``, of representations, where there is a text; ``channels``: see ``lrc diagnose
        --json``.

    Raises
    ------
    LrcError
        The input is not what it must be; the message says what to do.
    """
    options = {name: str(place) for name, place in (("base", base), ("text", text)) if place is not None}
    config = stage_config(
        DiagnoseConfig, "The call of diagnose", {**options, "device": str(compute_device(device)), **fields}
    )
    return run(str(model), config, reporter)


def run(target: str, config: DiagnoseConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Diagnose as a config says; see :func:`diagnose`.

    Raises
    ------
    LrcError
        As there.
    """
    reporter = reporter or Silent()
    if started() > 1:
        raise InputError("lrc diagnose works in one process; start it without torchrun.")
    checkpoint = checkpoint_at(target, config.trust_remote_code)
    model = _skeleton(checkpoint, config)
    for warning in model.blueprint.warnings:
        reporter.warn(warning)
    base = None if config.base is None else checkpoint_at(config.base, config.trust_remote_code)
    if base is not None:
        require_one_kind((target, str(config.base)), (model.blueprint, blueprint(base)))
    batches = [] if config.text is None else _windows(checkpoint, model.blueprint, config, config.text)
    looked = iter(()) if base is None else Walk([_skeleton(base, config)]).forwards()
    matrices: dict[str, Any] = {}
    blocks: list[dict[str, Any]] = []
    talk = Talk(config.channels, config.components)
    walk = Walk([model], batches)
    for step, other in itertools.zip_longest(walk.forwards(), looked):
        if batches:
            blocks.append({"block": step.index, **_representations(step, batches)})
        targets = model.resolved.of_block(step.index)
        read = _matrices(model, step, targets)
        tuned_from = None if other is None else _matrices(model, other, targets)
        for target_ in targets:
            name, matrix = target_.name, read[target_.name]
            matrices[name] = {
                "block": step.index,
                "role": target_.role,
                "shape": list(target_.shape),
                **spectrum(singular_values(matrix)),
            }
            if tuned_from is not None:
                found = intruder_dimensions(matrix, tuned_from[name], top=config.top, epsilon=config.epsilon)
                matrices[name] |= {"intruders": list(found.indices), "cosines": list(found.cosines)}
        if config.channels:
            talk.hear(step.index, {target_.role: (target_, read[target_.name]) for target_ in targets})
        if other is not None:
            other.leave()
        step.leave()
        reporter.advance("diagnose", step.index + 1, walk.blocks)
    found = {"model": target, "matrices": matrices, "blocks": blocks, "channels": talk.found() if talk.heard else None}
    if base is not None:
        found |= {"base": config.base, "top": config.top, "epsilon": config.epsilon}
    return found


def spectrum(values: Tensor) -> dict[str, Any]:
    """Say what a matrix's singular values come to."""
    law = power_law(values)
    return {
        "rank": int((values > 0).sum()),
        "spectral_norm": float(values[0]),
        "norm": float(values.norm()),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
        "alpha": None if law is None else law.alpha,
        "alpha_distance": None if law is None else law.distance,
        "alpha_count": None if law is None else law.count,
    }


def _skeleton(checkpoint: Checkpoint, config: DiagnoseConfig) -> Skeleton:
    return Skeleton(checkpoint, torch.device(config.device), torch.promote_types(checkpoint.dtype, torch.float32))


def _windows(checkpoint: Checkpoint, plan: Blueprint, config: DiagnoseConfig, text: str) -> list[Batch]:
    """Windows of a text, one a batch."""
    longest = plan.longest_input()
    seq_len = config.seq_len or min(512, longest)
    if seq_len > longest:
        raise InputError(f"--seq-len {seq_len} is more than the model's {longest} positions.")
    asked = evaluate_config(COMMAND_LINE, limit=config.limit, batch_size=1)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    source = Source(text, config.text_column)
    found = text_batches(asked, tokenizer, source, seq_len, vocabulary_of(checkpoint))
    # Two tokens and their mean lie on one line, which says nothing.
    if kept := [batch for batch in found if batch.ids.shape[1] > 2]:
        return kept
    raise InputError(f"{text} has too few tokens to look at representations of. Pass a longer text.")


def _representations(step: Step, batches: list[Batch]) -> dict[str, float]:
    """Means over windows of what their hidden states behind a block come to."""
    rows: list[dict[str, float]] = []
    for number in range(len(batches)):
        _, leaving = step.run(number)
        states = leaving[0]
        entropy = matrix_entropy(states)
        rows.append(
            {
                "matrix_nuclear_norm": matrix_nuclear_norm(states),
                "nuclear_norm": matrix_nuclear_norm(states, exact=True),
                "matrix_entropy": entropy,
                "effective_rank": float(torch.tensor(entropy, dtype=torch.float64).exp()),
                "stable_rank": stable_rank(singular_values(states.double() - states.double().mean(0))),
            }
        )
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _matrices(model: Skeleton, step: Step, targets: tuple[Target, ...]) -> dict[str, Tensor]:
    """All matrices of a block, (out, in), multiplied out."""
    (block,) = step.blocks
    restore_modules(block)
    state = _state(block, model.resolved.blocks[step.index])
    return {target.name: weights.read(state[target.parameter], target) for target in targets}


def _state(block: nn.Module, prefix: str) -> Mapping[str, Tensor]:
    return {f"{prefix}.{leaf}": tensor for leaf, tensor in block.state_dict().items()}
