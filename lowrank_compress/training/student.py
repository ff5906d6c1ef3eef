"""A compressed model, or a block of one, in the form in which it is trained, and what is trained of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_compress.errors import InputError
from lowrank_compress.model.casting import cast
from lowrank_compress.shipped.latent import LatentAttention
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.modules import find, put
from lowrank_compress.training.lora import add_adapters, merge_adapters
from lowrank_compress.training.pairs import Entry, is_low_rank, paired, stored

Train = Literal["all", "low-rank"]


class Student:
    """A model or a block of one, whose low-rank matrices are pairs while it is trained.

    Parameters
    ----------
    model
        With compressed layers as they are stored; it is changed in place.
    entries
        Path of each compressed layer in the model -> its entry of `quantization_config.modules`.
    blocks
        Paths of the transformer blocks; "" where the model is one.
    train
        "all": everything in the blocks, and outside of them norms and what is compressed; "low-rank": the low-rank
        matrices alone (WeLore, 2024, section 4), and what keys and values are rebuilt by.
    lora, seed
        Instead train adapters of that rank on the factors of low-rank matrices, merged in the end; None for no such.

    Attributes
    ----------
    learning
        What is trained: name -> parameter. All others require no gradient.

    Raises
    ------
    InputError
        Nothing of it is to be trained, or peft is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[str, Entry],
        blocks: Sequence[str],
        train: Train,
        lora: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.entries = {find(model, path)[0]: entry for path, entry in entries.items()}
        for name, entry in self.entries.items():
            put(model, name, paired(self._layer(name), entry))
        model.requires_grad_(False)
        self.learning = self._low_rank() if train == "low-rank" else self._all(blocks)
        if not self.learning:
            raise InputError("The checkpoint has no low-rank matrices that could be trained. Pass --train all.")
        for parameter in self.learning.values():
            parameter.requires_grad_(True)
        self._adapted: dict[str, nn.Parameter] = {}
        if lora is not None:
            self._adapted = self._factors()
            model.requires_grad_(False)
            self.learning = add_adapters(model, [name.removesuffix(".weight") for name in self._adapted], lora, seed)

    def _factors(self) -> dict[str, nn.Parameter]:
        """Find the factors of layers all of whose parts are low-rank, as an adapter is on a whole factor."""
        whole = tuple(f"{name}.lr_" for name, entry in self.entries.items() if all(map(is_low_rank, entry["parts"])))
        found = {name: parameter for name, parameter in self.learning.items() if name.startswith(whole)}
        if not found:
            raise InputError("The checkpoint has no low-rank matrices that adapters could be put on. Leave --lora out.")
        return found

    def _layer(self, name: str) -> CompressedLinear:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, CompressedLinear)
        return layer

    def _all(self, blocks: Sequence[str]) -> dict[str, nn.Parameter]:
        inside = tuple(f"{path}." if path else "" for path in blocks)
        outside = tuple(f"{name}." for name, module in self.model.named_modules() if _is_trained_outside(module))
        return {
            name: parameter for name, parameter in self.model.named_parameters() if name.startswith(inside + outside)
        }

    def _low_rank(self) -> dict[str, nn.Parameter]:
        found = {}
        for name, entry in self.entries.items():
            layer, low_rank = self._layer(name), [is_low_rank(part) for part in entry["parts"]]
            for part, trained in zip(layer.parts, low_rank, strict=True):
                if trained:
                    found[f"{name}.{part.outer}.weight"] = layer.get_parameter(f"{part.outer}.weight")
            if any(low_rank):
                inner = found[f"{name}.lr_in.weight"] = layer.lr_in.get_parameter("weight")
                if not all(low_rank):
                    widths = torch.tensor([part.width for part in layer.parts])
                    rows = torch.tensor(low_rank).repeat_interleave(widths)[:, None].to(inner.device)
                    inner.requires_grad_(True)  # before which there is nothing to hook
                    inner.register_hook(lambda gradient, rows=rows: gradient * rows)
        for name, module in self.model.named_modules():
            if isinstance(module, LatentAttention):
                for factor in ("lr_latent.weight", "lr_rebuild.weight"):
                    found[f"{name}.{factor}".removeprefix(".")] = module.get_parameter(factor)
        return found

    @torch.no_grad()
    def finish(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Put everything that was trained into its format and round it: by name, as it will be stored.

        The model computes with just this afterwards, in the dtype that it had.

        Raises
        ------
        NumericsError
            A value is not finite, or beyond the dtype.
        """
        if self._adapted:
            merge_adapters(self.model, [name.removesuffix(".weight") for name in self._adapted])
            self.learning, self._adapted = self._adapted, {}
        found = {}
        for name, entry in self.entries.items():
            layer = self._layer(name)
            if not any(f"{name}.{leaf}" in self.learning for leaf, _ in layer.named_parameters()):
                continue
            tensors = stored(layer, entry, dtype, name)
            like = layer.lr_in.get_parameter("weight")
            final = CompressedLinear(**entry, stock=layer.stock, device=like.device, dtype=like.dtype)
            final.load_state_dict(tensors)
            put(self.model, name, final.train(layer.training))
            found |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        within = tuple(f"{name}." for name in self.entries)
        for name, parameter in self.learning.items():
            if not name.startswith(within):
                found[name] = cast(parameter.detach(), dtype, name).cpu()
                parameter.copy_(found[name])
        return found


def _is_trained_outside(module: nn.Module) -> bool:
    """Whether a module outside of the blocks is trained: one that is compressed, or a norm."""
    parameters = list(module.parameters())
    return isinstance(module, CompressedLinear) or (
        0 < len(parameters) <= 2 and all(parameter.ndim == 1 for parameter in parameters)
    )
