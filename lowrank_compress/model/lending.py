"""The weights of experts, in memory only while these are run, forwards and backwards: those of one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Lender:
    """Reads the weights of an expert when it is called, and once more when a gradient goes back through it.

    What is computed is the same: the graph of a gradient holds names in the place of weights.

    Parameters
    ----------
    read
        Reads a tensor by its name in the model.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._experts: dict[str, nn.Module] = {}
        # What was read last: where gradients go back, gate, up and down of one expert follow on one another.
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def take(self, path: str, expert: nn.Module) -> None:
        """Have the weights of an expert, which are on the meta device, only while it is run."""
        self._experts[path] = expert

        def forward(x: Tensor) -> Tensor:
            state = self._state(path)
            names = {tensor.untyped_storage().data_ptr(): name for name, tensor in state.items()}

            def pack(tensor: Tensor) -> Any:
                name = names.get(tensor.untyped_storage().data_ptr())
                return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

            def unpack(kept: Any) -> Tensor:
                if isinstance(kept, Tensor):
                    return kept
                name, *layout = kept
                return self._state(path)[name].as_strided(*layout)

            expert.load_state_dict(state, assign=True)
            expert.requires_grad_(False)
            try:
                with saved_tensors_hooks(pack, unpack):
                    return type(expert).forward(expert, x)
            finally:
                expert.to("meta")

        expert.forward = forward

    def close(self) -> None:
        """Let the experts be as they were."""
        self._held = ("", {})
        for expert in self._experts.values():
            del expert.forward

    def has(self, name: str) -> bool:
        """Whether a tensor, by its name in the model, is of an expert that was taken."""
        return name.rsplit(".", 2)[0] in self._experts

    def _state(self, path: str) -> dict[str, Tensor]:
        if self._held[0] != path:
            self._held = ("", {})  # before another one is read
            self._held = path, {name: self._read(f"{path}.{name}") for name in self._experts[path].state_dict()}
        return self._held[1]
