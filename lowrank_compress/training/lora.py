"""Adapters on the factors of low-rank matrices: peft trains a few numbers, and they are merged into the factors."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lowrank_compress.errors import InputError
from lowrank_compress.shipped.modules import put


def add_adapters(model: nn.Module, layers: Collection[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Put LoRA adapters (Hu et al., ICLR 2022) on linear layers, which are changed in place; return what they learn.

    Parameters
    ----------
    layers
        Names of ``nn.Linear`` modules.
    rank
        Of each adapter, scaled by one.
    seed
        Of their random halves; the others are zero, so that nothing changes at first.

    Raises
    ------
    InputError
        peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs peft. Install it: pip install 'lowrank_compress[adapters]'.")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers)), model)
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def merge_adapters(model: nn.Module, layers: Collection[str]) -> None:
    """Add the adapters to the weights that they are on, and take them away."""
    for name in layers:
        adapted: Any = model.get_submodule(name)
        adapted.merge()
        put(model, name, adapted.get_base_layer())
