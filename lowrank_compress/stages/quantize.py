"""Store the matrices of a checkpoint in a few bits a weight: of a dense one, or of one that is compressed already.

A dense checkpoint of plain linear layers becomes one in the format of compressed-tensors, which stock transformers
loads; any other one of ours, in which linear layers are packed, those inside of compressed modules too. So does one
with zero points, which transformers (5.24) builds in another shape than compressed-tensors stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_compress.artifacts.directories import files_in, replacing
from lowrank_compress.artifacts.documents import read_json, write_json
from lowrank_compress.artifacts.files import write_text
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, listed
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.methods.rounding import ROUNDINGS
from lowrank_compress.model import packing
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.embedding import embedding_of
from lowrank_compress.model.export import ShardWriter, config_json, write_companions
from lowrank_compress.model.kinds import few
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import AUTO, task_of
from lowrank_compress.resources.resources import Resources
from lowrank_compress.shipped.fusion import FUSED
from lowrank_compress.shipped.packed import LAYOUT
from lowrank_compress.shipped.saving import remote_code_entries, write_remote_code
from lowrank_compress.stages.card import PEFT_TASKS, model_card
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.fitting import Way
from lowrank_compress.stages.headbits import original_head_bytes, outside_bytes
from lowrank_compress.stages.layers import Layer
from lowrank_compress.stages.origin import CARD, copy_licences
from lowrank_compress.stages.quantizeconfig import NO_TEXT, QuantizeConfig, looks
from lowrank_compress.stages.quantized import is_stock, kind_of_loss, report_of, separated
from lowrank_compress.stages.quantizing import Quantizer
from lowrank_compress.stages.reading import SCORED
from lowrank_compress.stages.report import REPORT, facts
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import contents_of, refuse_packed
from lowrank_compress.stages.run import made_once, work_of
from lowrank_compress.stages.samples import settings_of, text_id
from lowrank_compress.stages.stage import Given

VERSION = 3
ADAPTER = "adapter"


def key(config: QuantizeConfig, inputs: Given) -> Key:
    """Everything that the quantized checkpoint and its report depend on; a text counts by its content."""
    found = contents_of(inputs.checkpoint)
    if config.source is not None:
        found["text"] = text_id(config)
    if (task := task_of(inputs.checkpoint.config)) in SCORED:
        found["loss"] = kind_of_loss(config, task)
    unsaid = ["head"] if config.head is None else []  # as before there was one
    return Key("quantize", VERSION, settings_of(config, *unsaid), found)


def run(
    config: QuantizeConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Quantize.

    Parameters
    ----------
    config, inputs
        How, and what: any checkpoint that this program reads and that is not quantized.
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
        The checkpoint is quantized, the text is missing or cannot be used, the budget is out of reach, or another
        result is in `out_dir`.
    """
    refuse_packed(inputs.checkpoint, "quantize")
    if config.source is None and looks(config.model_dump()):
        raise InputError(NO_TEXT)
    identity = key(config, inputs)

    def make() -> Manifest:
        alone = resources.alone(config.device)
        return _quantized(config, inputs, out_dir, identity, reporter or Silent(), alone)

    return made_once(out_dir, identity, make, resources.workers, overwrite=overwrite)


def _quantized(
    config: QuantizeConfig, inputs: Given, out_dir: Path, identity: Key, reporter: Reporter, resources: Resources
) -> Manifest:
    checkpoint = inputs.checkpoint
    before = read_json(checkpoint.path / REPORT) if (checkpoint.path / REPORT).exists() else None
    now = measure_size(checkpoint).block_bytes + outside_bytes(checkpoint, before or {})
    original = int((before or {}).get("claimed_bytes", now))
    if config.head is not None:
        original += original_head_bytes(checkpoint, before)
    computing = torch.promote_types(checkpoint.dtype, torch.float32)
    skeleton = Skeleton(checkpoint, torch.device(config.device), computing)
    if ROUNDINGS[config.rounding].needs == "gradients" and skeleton.task == "embedding":
        embedding_of(checkpoint)  # whose change is the loss
    longest = skeleton.blueprint.longest_input()
    if config.source is not None and config.seq_len > longest:
        raise InputError(
            f"--seq-len {config.seq_len} is more than the {longest} positions of the model. Use at most that."
        )
    routed = any(target.expert is not None for target in skeleton.resolved.targets)
    stock = config.symmetric and checkpoint.quantization is None and config.whole is not None and not routed
    if config.residual_rank and not (config.aided or config.inside or stock):
        raise InputError(
            "A residual becomes an adapter of a stock checkpoint: expected a dense one without routed experts to "
            "quantize, --symmetric, and a whole number of --bits; or --residual-inside or --smooth, with which it "
            "becomes part of the checkpoint."
        )
    quantizer = Quantizer(config, skeleton, (original, now), work_of(out_dir), identity.id, reporter, resources)
    chosen = quantizer.make()
    if thin := quantizer.thin():
        reporter.warn(
            f"Experts that saw fewer tokens than their matrices have columns: {len(thin)} ({few(list(thin))}). They "
            "are rounded almost to the nearest point; pass more text, or a larger --samples."
        )
    with replacing(out_dir, listed) as draft:
        shards = _write_tensors(quantizer, chosen, draft)
        report = report_of(quantizer, chosen, before)
        _write_rest(quantizer, chosen, report, draft)
        if config.residual_rank and not (config.aided or config.inside):
            _write_adapter(quantizer, chosen, draft / ADAPTER)
        said = {name: value for name, value in report["quantize"].items() if name not in ("layers", "left", "experts")}
        found = facts(report) | {"shards": shards, "quantize": said}
        manifest = commit(draft, identity, files_in(draft), found, environment(config.device))
    quantizer.clear()
    return manifest


def _write_tensors(quantizer: Quantizer, chosen: Mapping[str, Way], out: Path) -> int:
    """Write all tensors; return how many shards they take."""
    plan = quantizer.plan
    writer = ShardWriter(out, quantizer.config.shard_bytes)
    layers = {f"{layer.path}.weight": layer for layer in quantizer.all if layer.path in chosen}
    apart = tuple(f"{path}." for path in separated(quantizer, chosen))
    for block in range(-1, len(quantizer.blocks)):
        kept = quantizer.kept(block)
        names = plan.outside() if block < 0 else plan.inside(block)
        for path in apart:  # what fails a load as stock experts
            if any(name.startswith(path) for name in names):
                for leaf in FUSED:
                    if path + leaf not in names:
                        writer.add(path + leaf, torch.empty(0, dtype=quantizer.dtype))
        for name in names:
            on_disk = name if name.startswith(apart) else plan.name_on_disk(name)
            if name not in layers:
                writer.add(on_disk, plan.read(name))
                continue
            layer = layers[name]
            tensors = quantizer.tensors(layer, chosen[layer.path], kept)
            for leaf, tensor in _named(layer, tensors, quantizer.dtype):
                writer.add(f"{on_disk.removesuffix('weight')}{leaf}", tensor)
        quantizer.reporter.advance("write", block + 1, len(quantizer.blocks))
    return len(writer.close())


def _named(layer: Layer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name tensors below their module: in a compressed module, which alone can stand for a transposed weight."""
    if layer.transposed:
        yield "weight", torch.empty(0, dtype=dtype)
    for leaf, tensor in tensors.items():
        yield f"lr_in.{leaf}" if layer.transposed else leaf, tensor


def _layout(quantizer: Quantizer, chosen: Mapping[str, Way]) -> dict[str, Any]:
    """What `LowRankConfig` is to say."""
    found: dict[str, Any] = dict(quantizer.plan.checkpoint.quantization or {})
    modules, linears = dict(found.get("modules", {})), {}
    for layer in quantizer.all:
        if layer.path not in chosen:
            continue
        way = chosen[layer.path]
        grid = quantizer.packing.grid(layer.shape[1], way.bits)
        if layer.transposed:
            rows, columns = layer.shape
            part = {"rows": rows, "format": "dense", "rank": rows}
            modules[layer.path] = {
                "in_features": columns, "out_features": rows, "bias": True, "heads": 1, "parts": [part]
            }  # fmt: skip
        beside = quantizer.beside(layer, way).entry
        entry = [grid.bits, grid.group, grid.symmetric, *([beside] if beside else [])]
        linears[f"{layer.path}.lr_in" if layer.transposed else layer.path] = entry
    if experts := separated(quantizer, chosen):
        found["experts"] = experts
    return found | {"modules": modules, "factor_quantization": {"layout": LAYOUT, "linears": linears}}


def _write_rest(quantizer: Quantizer, chosen: Mapping[str, Way], report: Mapping[str, Any], out: Path) -> None:
    """Write all but the tensors."""
    plan, checkpoint = quantizer.plan, quantizer.plan.checkpoint
    layout = _layout(quantizer, chosen)
    if is_stock(quantizer, chosen):
        settings = {**checkpoint.raw_config, "quantization_config": _stock_config(plan, layout)}
        write_json(out / "config.json", settings)
    else:
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        write_json(out / "config.json", config_json(checkpoint, dtype, layout, remote_code_entries(plan.model.config)))
        write_remote_code(out)
    write_companions(checkpoint, out)
    write_json(out / REPORT, report)
    write_text(out / CARD, model_card(report))
    copy_licences(checkpoint, report, out)


def _stock_config(plan: Blueprint, layout: Mapping[str, Any]) -> dict[str, Any]:
    model = plan.model
    shapes = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    linears: dict[str, Any] = layout["factor_quantization"]["linears"]
    named = {path: plan.name_on_disk(f"{path}.weight").removesuffix(".weight") for path in _of_experts(plan)}
    packed = {named.get(path, path): (tuple(entry), shapes[path].in_features) for path, entry in linears.items()}
    others = [path for path in shapes if path not in linears]
    return packing.config_of(packed, others + _routers(plan), model.base_model_prefix)


def _of_experts(plan: Blueprint) -> list[str]:
    return [target.module for target in plan.resolved.targets if target.expert is not None]


def _routers(plan: Blueprint) -> list[str]:
    """Paths of routers, in memory and on the disk: to some programs they are linear layers."""
    if (router := plan.resolved.router) is None:
        return []
    found: list[str] = []
    for block in plan.resolved.blocks:
        name = f"{block}.{router.path}.weight"
        if name in plan.stored:
            found += dict.fromkeys(each.removesuffix(".weight") for each in (name, plan.stored[name]))
    return found


def _write_adapter(quantizer: Quantizer, chosen: Mapping[str, Way], out: Path) -> None:
    """Write the products that make up for rounding as an adapter of peft."""
    tensors: dict[str, Tensor] = {}
    for block in quantizer.blocks:
        kept = quantizer.rounded.read(block)
        for layer in quantizer.of_block(block):
            for name, side in (("inner", "A"), ("outer", "B")):
                named = f"base_model.model.{layer.path}.lora_{side}.weight"
                tensors[named] = kept[f"{layer.path}/{chosen[layer.path].key}/{name}"].contiguous()
    ranks = {layer.path: min(quantizer.config.residual_rank, *layer.shape) for layer in quantizer.layers}
    usual = max(ranks.values())
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": PEFT_TASKS.get(AUTO[quantizer.plan.task].__name__),
        "base_model_name_or_path": None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != usual},
        "alpha_pattern": {path: rank for path, rank in ranks.items() if rank != usual},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
    }
    write_json(out / "adapter_config.json", settings)
