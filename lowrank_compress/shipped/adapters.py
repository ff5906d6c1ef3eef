"""LoRA adapters on compressed layers, by the names that these have in the stock model."""

from __future__ import annotations

import copy
import sys
from typing import Any, ClassVar

from torch import Tensor

from .formats.latent import Rebuilt
from .growing import grown
from .imports import when_imported
from .linear import CompressedLinear

PEFT = "peft.tuners.lora.model"
FACTORS = 'the factors are plain linear layers: pass target_modules="all-linear", or ["lr_in", "lr_out"]'
REBUILT = (
    "its keys or values are rebuilt from what the cache keeps, without the layer; leave it out of target_modules: "
    '["q_proj", "o_proj", "up_proj", "down_proj"]'
)
# Ways to begin that look at, or change, the one weight that a compressed layer does not have.
OF_THE_WEIGHT = ("corda", "kasa", "loftq", "lora_ga", "mica", "olora", "pissa")


class AdaptedLayer:
    """What peft's LoRA layer does otherwise where its base is a `CompressedLinear`: it is mixed into that.

    Training is peft's own: the base's output and, beside it, that of the adapter. Merged, the base is another layer, of
    a rank that is higher by the adapter's (see `grown`), so that it computes the same; to unmerge puts the old one
    back.
    """

    lr_peft: ClassVar[Any]
    base_layer: CompressedLinear

    def _get_in_out_features(self, module: CompressedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Take LoRA as it was first described; its variants look at the base's weight."""
        try:
            found = super().resolve_lora_variant(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as problem:
            raise ValueError(f"A compressed layer takes plain LoRA only ({problem}), but {FACTORS}") from problem
        if found is not None:
            raise ValueError(f"A compressed layer takes plain LoRA only, no {type(found).__name__}, but {FACTORS}")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
        """Add an adapter, unless it is one that changes the base's weight."""
        start = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights"))
        if isinstance(start, str) and start.lower().startswith(OF_THE_WEIGHT):
            raise ValueError(f"A compressed layer has no one weight for init_lora_weights={start!r}, but {FACTORS}")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, by default the active ones, into a base layer that computes what both do.

        Raises
        ------
        ValueError
            `safe_merge` is asked for and an adapter is not finite.
        RuntimeError
            An adapter has a bias and the base has none.
        """
        for name in self.lr_peft.check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            outer, scale = self.lora_B[name], self.scaling[name]
            factors: list[Tensor] = [outer.weight, self.lora_A[name].weight]
            if outer.bias is not None:
                if self.base_layer.bias is None:
                    raise RuntimeError("An adapter with lora_bias=True cannot be merged into a layer without a bias.")
                factors.append(outer.bias)
            if safe_merge and not all(bool(factor.isfinite().all()) for factor in factors):
                raise ValueError(f"The adapter {name} has NaN or infinite elements, and is not merged.")
            if not self.merged_adapters:
                self.lr_unmerged = [self.base_layer]  # in a list, or it would be a child
            left, right, *bias = factors
            self.base_layer = grown(self.base_layer, left.double() * scale, right, *(each * scale for each in bias))
            self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Put the base layer back that was there before."""
        if self.merged_adapters:
            (before,) = self.__dict__.pop("lr_unmerged")
            self.base_layer = before.to(self.base_layer.weight.device)
            self.merged_adapters.clear()


def _factors(names: Any) -> bool:
    """Whether factors are among the names of the layers that are to have adapters, as all linear ones are."""
    return isinstance(names, set | list | tuple) and any(name.endswith(("lr_in", "lr_out")) for name in names)


def adapt_peft() -> None:
    """Let peft put LoRA adapters on compressed layers, now or when it is imported.

    peft has a hook for layers of others, `LoraConfig._register_custom_module`, but on each config by itself: it is
    called as an adapter is put on such a layer.
    """
    when_imported(PEFT, _adapt)


def _adapt() -> None:
    model: Any = sys.modules[PEFT].LoraModel
    stock: Any = model._create_new_module
    layers = getattr(stock, "lr_layers", None)
    if layers is None:
        layers = {}

        def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
            if type(base) in layers:
                if any(isinstance(part, Rebuilt) for part in base.parts):
                    raise ValueError(f"{kwargs.get('target_name', 'A layer')} takes no adapter: {REBUILT}")
                if _factors(lora_config.target_modules):
                    # Its factors come next. Its own name is there where it is that of a dense layer elsewhere, too.
                    return target
                lora_config = copy.copy(lora_config)  # the caller's own can still be pickled
                lora_config._register_custom_module(layers)
            return stock(lora_config, adapter_name, target, **kwargs)

        create.lr_layers = layers  # pyright: ignore[reportFunctionMemberAccess]
        model._create_new_module = staticmethod(create)
    own = sys.modules["peft.tuners.lora.layer"]
    layers[CompressedLinear] = type("LowRankLoraLinear", (AdaptedLayer, own.Linear), {"lr_peft": own})
