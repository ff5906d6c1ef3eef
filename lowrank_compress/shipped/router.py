"""The router that chooses among some of the experts that the model was made with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .formats.base import INDEX_DTYPE


class PrunedRouter(nn.Module):
    """A router that knows fewer experts; it is mixed into a family's own router class.

    The stock class computes with the rows of its weight, and of its bias, that are left, and so shares a token among
    the experts that are left. What it returns is told in stock numbers: it equals the stock router whose logits of the
    other experts are -inf, and so do its logits, (tokens, stock experts).

    Notes
    -----
    ``lr_kept`` (experts left,), int32, ascending, says which stock expert each row of the weight is for.
    """

    weight: nn.Parameter
    top_k: int
    lr_kept: Tensor
    lr_experts: int
    lr_stock_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Map hidden states to logits, weights and numbers of the chosen experts, each with one row a token."""
        logits, weights, index = super().forward(*args, **kwargs)
        kept = self.lr_kept.long()
        whole = logits.new_full((*logits.shape[:-1], self.lr_experts), float("-inf"))
        return whole.index_copy(-1, kept, logits), weights, kept[index]

    def extra_repr(self) -> str:
        """Say how many experts are left, as ``print(model)`` shows it."""
        return f"experts={self.lr_experts}, kept={len(self.lr_kept)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class has no name that pickle could look up.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank_router, (self.lr_stock_class,), *state)


@functools.cache
def pruned_class(stock: type[nn.Module]) -> type[PrunedRouter]:
    """Make the subclass of a family's router class that knows fewer experts."""
    return type(f"Pruned{stock.__name__}", (PrunedRouter, stock), {"lr_stock_class": stock})


def _blank_router(stock: type[nn.Module]) -> PrunedRouter:
    """Make a router without any attribute, for ``pickle`` and ``copy`` to fill."""
    made = pruned_class(stock)
    return made.__new__(made)


def prune_router(module: Any, kept: Tensor) -> None:
    """Have a stock router choose among some experts only, in place; it stays the object that it is.

    Parameters
    ----------
    kept
        (n,): which ones, ascending.

    Raises
    ------
    ValueError
        It is no router whose experts are the rows of its weight, or fewer would be left than a token goes to.
    """
    weight, several = getattr(module, "weight", None), module.parameters()
    shaped = isinstance(weight, Tensor) and weight.ndim == 2 and all(len(each) == len(weight) for each in several)
    if not isinstance(weight, Tensor) or not shaped or not hasattr(module, "top_k"):
        raise ValueError(f"a {type(module).__name__} is no router with a row for each expert")
    if not module.top_k <= len(kept) <= len(weight):
        raise ValueError(
            f"{len(kept)} of {len(weight)} experts cannot be left where a token goes to {module.top_k} of them"
        )
    module.lr_experts = len(weight)
    for name, parameter in list(module.named_parameters()):
        rows = parameter.detach()[kept.long().to(parameter.device)]
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    module.__class__ = pruned_class(type(module))
    module.register_buffer("lr_kept", kept.to(weight.device, INDEX_DTYPE))


def restore_router(module: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Make it the stock router again, with the parameters that it had for all experts."""
    for name, parameter in parameters.items():
        setattr(module, name, parameter)
    module._buffers.pop("lr_kept")
    module.__dict__.pop("lr_experts")
    module.__class__ = module.lr_stock_class


def require_all_experts(model: nn.Module) -> None:
    """Refuse to make a model stock again where experts are gone.

    Raises
    ------
    ValueError
        They are: a stock router would choose them.
    """
    for name, module in model.named_modules():
        if isinstance(module, PrunedRouter):
            raise ValueError(
                f"{name} chooses among {len(module.lr_kept)} of {module.lr_experts} experts; the others are gone, and "
                "a stock router would choose them"
            )
