"""The weights of experts, in memory only while these are run, forwards and backwards: those of one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Read = Callable[[], Tensor]
# By what an expert is called.
CALLED = ("forward", "hidden")


class Lender:
    """Reads the weights of an expert when it is called, and once more when a gradient goes back through it.

    What is computed is the same: the graph of a gradient holds names in the place of weights.

    Parameters
    ----------
    read
        Reads a tensor by its name in the model.
    check
        Called with an expert, and its path, when its weights are in memory for the first time.
    """

    def __init__(
        self, read: Callable[[str], Tensor], check: Callable[[nn.Module, str], None] = lambda expert, path: None
    ) -> None:
        self._read, self._check = read, check
        self._experts: dict[str, nn.Module] = {}
        self._instead: dict[str, Read] = {}
        self._there, self._checked = set[str](), set[str]()
        # What was read last: where gradients go back, gate, up and down of one expert follow on one another.
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def take(self, path: str, expert: nn.Module) -> None:
        """Have the weights of an expert, which are on the meta device, only while it is run."""
        self._experts[path] = expert
        for name in CALLED:
            setattr(expert, name, partial(self._called, path, name))

    def _called(self, path: str, name: str, x: Tensor) -> Tensor:
        expert = self._experts[path]
        call = getattr(type(expert), name)
        if path in self._there:
            return call(expert, x)

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            name, *layout = kept
            return self._state(path)[name].as_strided(*layout)

        with self.having(path):
            # Empty tensors have no place in memory that would tell them.
            places = {tensor.untyped_storage().data_ptr(): name for name, tensor in self._state(path).items()}
            places.pop(0, None)

            def pack(tensor: Tensor) -> Any:
                found = places.get(tensor.untyped_storage().data_ptr())
                return tensor if found is None else (found, tensor.size(), tensor.stride(), tensor.storage_offset())

            with saved_tensors_hooks(pack, unpack):
                return call(expert, x)

    @contextmanager
    def having(self, path: str) -> Iterator[None]:
        """Have the weights of an expert in memory while inside, also where it is not called."""
        expert = self._experts[path]
        if path in self._there:
            yield
            return
        expert.load_state_dict(self._state(path), assign=True)
        expert.requires_grad_(False)
        if path not in self._checked:
            self._check(expert, path)
            self._checked.add(path)
        self._there.add(path)
        try:
            yield
        finally:
            self._there.remove(path)
            expert.to("meta")

    def close(self) -> None:
        """Let the experts be as they were."""
        self._held = ("", {})
        self._instead.clear()
        for expert in self._experts.values():
            for name in CALLED:
                delattr(expert, name)

    def of(self, name: str) -> str | None:
        """Return the path of the expert that a tensor, by its name in the model, is of; None if none was taken."""
        return next((path for path in _above(name) if path in self._experts), None)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor of an expert that was taken, as the expert is run with it."""
        path = self.of(name)
        assert path is not None
        return self._state(path)[name.removeprefix(f"{path}.")]

    def put(self, name: str, read: Read | None) -> Read | None:
        """Have a tensor read from elsewhere, or from where it was at first; return from where it was read before."""
        if self._held[0] == self.of(name):
            self._held = ("", {})
        before = self._instead.pop(name, None)
        if read is not None:
            self._instead[name] = read
        return before

    def _state(self, path: str) -> dict[str, Tensor]:
        if self._held[0] != path:
            self._held = ("", {})  # before another one is read
            self._held = path, {name: self._found(f"{path}.{name}") for name in self._experts[path].state_dict()}
        return self._held[1]

    def _found(self, name: str) -> Tensor:
        return self._instead[name]() if name in self._instead else self._read(name)


def _above(name: str) -> Iterator[str]:
    """Return the paths of all modules that a tensor is in, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name
