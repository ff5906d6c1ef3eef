"""Stage 4: measure a checkpoint, and for a run the dense original beside it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lowrank_compress.artifacts.directories import keep_aside, refuse_link
from lowrank_compress.artifacts.documents import canonical_hash, read_json, write_json
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.manifest import Key, Manifest, altered, commit, committed, read_manifest
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.tokens import load_tokenizer, require_known, vocabulary_of
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.evaluation.exam import examined
from lowrank_compress.evaluation.harness import harness_version, run_tasks, task_files
from lowrank_compress.evaluation.replayed import Perplexity, perplexity, position_bounds
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import task_of
from lowrank_compress.resources.resources import Resources
from lowrank_compress.resources.workers import Workers
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.examining import exam_of
from lowrank_compress.stages.identity import checkpoint_id, source_id
from lowrank_compress.stages.reading import masked_text_batches, text_batches
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.similarity import similarities
from lowrank_compress.stages.stage import Given

VERSION = 3
METRICS = "metrics.json"
RATIOS = ("asked_ratio", "reached_ratio", "ratio_of")


def key(config: EvaluateConfig, inputs: Given) -> Key:
    """Everything that the numbers depend on; texts count by content."""
    found = {"checkpoint": checkpoint_id(inputs.checkpoint)}
    if inputs.dense is not None:
        found["dense"] = checkpoint_id(inputs.dense)
    if ratios := _ratios(inputs):
        found["ratios"] = canonical_hash(ratios)
    for name in config.perplexity:
        found[f"perplexity:{name}"] = source_id(Source(name, config.text_column))
    if config.classification is not None:
        found[f"classification:{config.classification}"] = source_id(Source(config.classification))
    for name in config.sts:
        found[f"sts:{name}"] = source_id(Source(name))
    if config.tasks:
        found["lm_eval"] = harness_version()
    if config.tasks and config.include_path is not None:
        for path in task_files(Path(config.include_path)):
            found[f"task:{path}"] = sha256(path)
    unasked = {name for name in ("sts", "by_position") if not getattr(config, name)}  # keys without these are older
    return Key("evaluate", VERSION, config.model_dump(mode="json", exclude=unasked), found)


def _ratios(inputs: Given) -> dict[str, Any]:
    """What was asked for and reached, if that is known."""
    return {name: inputs.report[name] for name in RATIOS if name in inputs.report} if inputs.report else {}


def run(
    config: EvaluateConfig,
    inputs: Given,
    out_dir: Path | None,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    known: MutableMapping[str, Any] | None = None,
) -> Manifest:
    """Evaluate, and where there is a directory for it, keep the result.

    Parameters
    ----------
    config, inputs
        What to measure on what.
    out_dir
        The run's ``eval/``: each evaluation goes to ``<id>/`` below it and into the merged ``metrics.json``. None (a
        plain checkpoint) writes nothing.
    reporter
        Told about progress.
    resources
        The processes that do this together, all called with the same: they share windows, examples and requests.
    known
        Measurements of dense originals that this process has made already, and will make.

    Returns
    -------
    Manifest
        Its report holds the measurements, ``perplexity``, ``classification``, ``tasks``, ``sts`` and ``size``: see the
        command's ``--json``. On disk they are in metrics.json, as some may be no numbers.

    Raises
    ------
    LrcError
        Data are missing or do not fit the model, or the model gives numbers that are not finite.
    """
    reporter, workers = reporter or Silent(), resources.workers
    if config.by_position and not config.perplexity:
        raise InputError("--by-position parts the windows of a text: pass --perplexity TEXT, too.")
    identity = key(config, inputs)
    if out_dir is not None:
        refuse_link(out_dir)
        # What was edited is no measurement: it is kept aside and measured anew.
        found = workers.once(lambda: committed(out_dir / identity.id, identity, overwrite=True))
        if found is not None:
            return replace(found, report=read_json(out_dir / identity.id / METRICS))
    metrics: dict[str, Any] = {"perplexity": {}, "classification": {}, "tasks": {}}
    models = _models(inputs)
    for role, checkpoint in models.items():
        for warning in blueprint(checkpoint).warnings:
            reporter.warn(warning)
        measured = _measured(config, checkpoint, role, reporter, workers, {} if known is None else known)
        for kind in metrics:
            for name, values in measured[kind].items():
                slot = metrics[kind].setdefault(name, {})
                slot |= {name: values[name] for name in ("tokens", "n") if name in values}
                if kind == "classification":
                    _take_measures(slot, role, values["values"])
                else:
                    slot[role] = values["value"]
                for part, of_part in values.get("positions", {}).items():
                    there = slot.setdefault("positions", {}).setdefault(part, {"tokens": of_part["tokens"]})
                    there[role] = of_part["value"]
    if config.sts:
        metrics["sts"] = workers.once(lambda: similarities(config, models, reporter))
    metrics["size"] = size_report(inputs)

    def keep() -> Manifest:
        if out_dir is None:
            return Manifest(identity, report=metrics, environment=environment(config.device))
        before = merged(out_dir)
        _write_json(out_dir / identity.id / METRICS, metrics, ours=metrics)
        made = commit(out_dir / identity.id, identity, [METRICS], {}, environment(config.device))
        _write_json(out_dir / METRICS, merged(out_dir), ours=before)
        return replace(made, report=metrics)

    return workers.once(keep)


def _take_measures(slot: dict[str, Any], role: str, values: Mapping[str, float]) -> None:
    """Put a model's measures of labelled examples where its others are; of several, the first is told of."""
    first = next(iter(values))
    slot[role] = values[first]
    if len(values) > 1:
        slot["metric"] = first
        for name, value in values.items():
            slot.setdefault("metrics", {}).setdefault(name, {})[role] = value


def _measured(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    role: str,
    reporter: Reporter,
    workers: Workers,
    known: MutableMapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """As `_measure`; a dense original that many runs have is measured once."""
    if role != "dense":
        return _measure(config, checkpoint, role, reporter, workers)
    name = canonical_hash([checkpoint_id(checkpoint), config.model_dump(mode="json")])
    if name not in known:
        known[name] = _measure(config, checkpoint, role, reporter, workers)
    return copy.deepcopy(known[name])


def _models(inputs: Given) -> dict[str, Checkpoint]:
    if inputs.dense is None:
        compressed = inputs.checkpoint.quantization is not None
        return {"compressed" if compressed else "dense": inputs.checkpoint}
    return {"compressed": inputs.checkpoint, "dense": inputs.dense}


def _measure(
    config: EvaluateConfig, checkpoint: Checkpoint, role: str, reporter: Reporter, workers: Workers
) -> dict[str, dict[str, Any]]:
    """Measure one checkpoint: kind -> name -> {"value", "tokens"}, or for examples {"values", "n"}."""
    measured: dict[str, dict[str, Any]] = {"perplexity": {}, "classification": {}, "tasks": {}}
    device = torch.device(config.device)
    replayed = bool(config.perplexity or config.classification)
    skeleton = Skeleton(checkpoint, device, torch.float32) if replayed else None
    if skeleton is not None:
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
        longest = skeleton.blueprint.longest_input()
        seq_len = config.seq_len or min(2048, longest)
        if seq_len > longest:
            raise InputError(f"--seq-len {seq_len} is more than the model's {longest} positions.")
        for name in config.perplexity:
            if skeleton.task not in ("lm", "masked"):
                raise InputError("Perplexity needs a language model; for a classifier use --classification.")
            read = text_batches if skeleton.task == "lm" else masked_text_batches
            source = Source(name, config.text_column)
            batches = read(config, tokenizer, source, seq_len, vocabulary_of(checkpoint))
            bounds = position_bounds(seq_len) if config.by_position else []
            advance = _labelled(reporter, f"{role} perplexity")
            share = perplexity(skeleton, workers.share(batches), advance, bounds=bounds)
            sums = workers.total([number for each in (share, *share.parts) for number in (each.nats, each.tokens)])
            found, *parts = (Perplexity(nats, int(scored)) for nats, scored in zip(sums[::2], sums[1::2], strict=True))
            measured["perplexity"][name] = {"value": found.value, "tokens": found.tokens}
            if config.by_position:
                measured["perplexity"][name]["positions"] = {
                    f"{first}-{end - 1}": {"value": part.value, "tokens": part.tokens}
                    for part, (first, end) in zip(parts, pairwise(bounds), strict=True)
                    if part.tokens
                }
        if config.classification is not None:
            exam = exam_of(config, skeleton.task, tokenizer, checkpoint, seq_len)
            advance = _labelled(reporter, f"{role} {next(iter(exam.measures))}")
            own = examined(skeleton, exam, advance, slice(workers.rank, None, workers.count))
            rows = exam.examples(np.asarray(workers.total(own.flatten().tolist())).reshape(own.shape))
            values = {name: float(measure(rows)) for name, measure in exam.measures.items()}
            measured["classification"][config.classification] = {"values": values, "n": exam.count(rows)}
    if config.tasks:
        measured["tasks"] = _run_tasks(config, checkpoint, role, reporter, workers)
    return measured


def _labelled(reporter: Reporter, step: str) -> Callable[[int, int], None]:
    return lambda done, total: reporter.advance(step, done, total)


def _run_tasks(
    config: EvaluateConfig, checkpoint: Checkpoint, role: str, reporter: Reporter, workers: Workers
) -> dict[str, dict[str, Any]]:
    if task_of(checkpoint.config) != "lm":
        raise InputError("--tasks needs a causal language model; for a classifier use --classification.")
    reporter.advance(f"{role} tasks", 0, 1)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=checkpoint.dtype)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    model.get_input_embeddings().register_forward_pre_hook(
        lambda embedding, inputs: require_known(tokenizer, inputs[0], embedding.num_embeddings)
    )
    found = run_tasks(
        model.to(config.device).eval(),
        tokenizer,
        config.tasks,
        include_path=None if config.include_path is None else Path(config.include_path),
        limit=config.limit,
        batch_size=config.batch_size,
        seed=config.seed,
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template,
        rank=workers.rank,
        processes=workers.count,
    )
    reporter.advance(f"{role} tasks", 1, 1)
    return {task: {"value": values} for task, values in found.values.items()}


def size_report(inputs: Given) -> dict[str, Any]:
    """Sizes of the dense and the compressed checkpoint, and the share removed."""
    sizes = {role: measure_size(checkpoint) for role, checkpoint in _models(inputs).items()}
    report: dict[str, Any] = {
        scope: {role: getattr(size, field) for role, size in sizes.items()}
        for scope, field in (
            ("blocks", "blocks"),
            ("block_bytes", "block_bytes"),
            ("model", "model"),
            ("bytes", "bytes"),
            ("kv_bytes_per_token", "kv_bytes_per_token"),
            ("kv_bytes_4096", "kv_bytes_4096"),
        )
    }
    if len(sizes) == 2:
        for values in report.values():
            values["ratio"] = 1 - values["compressed"] / values["dense"] if values["dense"] else 0.0
    return report | _ratios(inputs)


def _write_json(path: Path, value: dict[str, Any], *, ours: dict[str, Any]) -> None:
    """Write a JSON file; what is there and is not what we wrote is kept aside."""
    try:
        same = canonical_hash(read_json(path)) == canonical_hash(ours)
    except (ArtifactError, ValueError):
        same = False
    if not same:
        keep_aside(path)
    write_json(path, value)


def merged(out_dir: Path) -> dict[str, Any]:
    """Gather all evaluations of a run that are as they were written, by their ids."""
    evaluations: dict[str, Any] = {}
    for path in sorted(out_dir.glob(f"*/{METRICS}")):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(path.parent)
            if manifest is not None and manifest.id == path.parent.name and not altered(path.parent, manifest):
                key = manifest.key
                evaluations[path.parent.name] = {"config": key.config, "inputs": key.inputs, **read_json(path)}
    return {"schema": 1, "evaluations": evaluations}
