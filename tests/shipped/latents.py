"""Models whose caches keep latents, and the slow attention that they must equal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from lowrank_compress.arch.resolve import resolve
from lowrank_compress.formats.dense import dense
from lowrank_compress.formats.module import joined, module_entry, module_tensors
from lowrank_compress.methods.latent import rebuilt
from lowrank_compress.model import weights
from lowrank_compress.model.surgery import attention_entry
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.swap import swap_modules


def remembering(
    model: PreTrainedModel, rank: int, window: int, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose attentions cache random latents, and the stock model with their products for keys and values."""
    generator = torch.Generator().manual_seed(seed)
    resolved, product = resolve(model), copy.deepcopy(model)
    heads, architecture = resolved.heads, resolved.architecture
    config: dict[str, Any] = {"modules": {}, "attention": {}}
    tensors: dict[str, Tensor] = {}
    for block, prefix in enumerate(resolved.blocks):
        path = f"{prefix}.{architecture.attention}"
        targets = {target.role: target for target in resolved.of_block(block)}
        inner = 0.3 * torch.randn(rank, targets["k"].shape[1], generator=generator, dtype=torch.float64)
        outer = 0.3 * torch.randn(2 * targets["k"].shape[0], rank, generator=generator, dtype=torch.float64)
        entry = attention_entry(targets, heads, heads.size, heads.size, rotary=False, traits=architecture.traits)
        config["attention"][path] = {**entry, "latent": {"rank": rank, "window": window}}
        tensors |= {f"{path}.lr_latent.weight": inner, f"{path}.lr_rebuild.weight": outer}
        for role, half in zip("kv", (outer @ inner).chunk(2), strict=True):
            module = product.get_submodule(targets[role].module)
            weights.place(module.get_parameter("weight").data, targets[role], half)
        if window:
            continue
        for name, members in resolved.modules_of(block).items():
            if not {"k", "v"} & {target.role for target in members}:
                continue
            module: Any = model.get_submodule(name)
            parts = [
                rebuilt(target, torch.float64)
                if target.role in ("k", "v")
                else dense(weights.read(module.weight.data, target))
                for target in members
            ]
            config["modules"][name] = module_entry(members, parts)
            found = module_tensors(members, parts, torch.float64)
            if module.bias is not None:
                biases = [weights.bias(module.bias.data, target) for target in members]
                found["bias"] = joined(members, biases)
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in found.items()}
    made = copy.deepcopy(model)
    swap_modules(made, LowRankConfig(**config))
    made.config.quantization_config = LowRankConfig(**config)
    lacking = made.load_state_dict(tensors, strict=False)
    assert not lacking.unexpected_keys
    return made.eval(), product


def slowly(model: PreTrainedModel, product: PreTrainedModel, window: int) -> PreTrainedModel:
    """The stock model, each token attending to its own keys of the last `window` tokens, and else to the product's."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        kept[module.layer_idx] = (key, value)
        return torch.zeros_like(query).transpose(1, 2), None

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
        for sequence in range(query.shape[0]):
            for head in range(query.shape[1]):
                for now in range(query.shape[2]):
                    mine = [
                        tuple(
                            (each if now - then < window else far)[sequence, head // group, then] for each, far in pairs
                        )
                        for pairs in [tuple(zip((key, value), kept[module.layer_idx], strict=True))]
                        for then in range(now + 1)
                    ]
                    scores = torch.stack([query[sequence, head, now] @ k for k, _ in mine]) * scaling
                    shares = scores.softmax(0)
                    out[sequence, head, now] = sum(s * v for s, (_, v) in zip(shares, mine, strict=True))
        return out.transpose(1, 2), None

    AttentionInterface.register("latents_record", record)
    AttentionInterface.register("latents_attend", attend)
    made, far = copy.deepcopy(model), copy.deepcopy(product)
    made.config._attn_implementation, far.config._attn_implementation = "latents_attend", "latents_record"
    path, blocks = resolve(model).architecture.attention, resolve(model).blocks
    for prefix in blocks:
        other = far.get_submodule(f"{prefix}.{path}")

        def first(module: nn.Module, args: Any, kwargs: Any, other: nn.Module = other) -> None:
            other(*args, **{name: each for name, each in kwargs.items() if not isinstance(each, Cache)})

        made.get_submodule(f"{prefix}.{path}").register_forward_pre_hook(first, with_kwargs=True)
    return made
