"""A model on the meta device whose blocks are materialised one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import Embedding, embedding_of
from lowrank_compress.model.lending import Lender, Read
from lowrank_compress.model.names import experts_of
from lowrank_compress.model.tasks import Task
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.packed import PackedLinear
from lowrank_compress.shipped.restore import restore_modules
from lowrank_compress.shipped.swap import check_indices


class Skeleton:
    """A model whose blocks are materialised one at a time, on demand.

    What lies outside the blocks is loaded at first, and may be dropped and loaded again. Peak memory is that, plus one
    block.

    Parameters
    ----------
    checkpoint
        A dense checkpoint, or one that this package compressed.
    device
        Where to compute.
    dtype
        Floating-point type to compute in; stored weights are cast to it.
    edit
        Called with the number of a block and the block each time that it is in memory, before it is run; it may put
        other weights into it, and so make another model of the same checkpoint. What it reads is not changed.
    beside
        A model that is in memory at the same time: what lies outside the blocks of both and is the same is so once.
    for_experts
        Bytes that the weights of a block's routed experts may take together in the dense model; where they are more,
        one expert at a time is in memory, while it is run. None for no bound. No result depends on it.

    Raises
    ------
    LrcError
        The checkpoint is not supported, or a tensor outside the blocks is missing or not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        edit: Callable[[int, nn.Module], None] | None = None,
        beside: Skeleton | None = None,
        for_experts: int | None = None,
    ) -> None:
        # The dtype matters: Gemma keeps the scale of its embeddings in it.
        self.blueprint = blueprint(checkpoint, dtype)
        self.device = device
        self.dtype = dtype
        self._edit = edit
        self._beside = beside
        self.for_experts = for_experts
        self._lender: Lender | None = None
        self.task: Task = self.blueprint.task
        self.model = self.blueprint.model
        self.resolved = self.blueprint.resolved
        self._outside = False
        self.blueprint.check_ties()
        self.load_outside()

    @cached_property
    def embedding(self) -> Embedding:
        """How the hidden states of a model without a head become an embedding.

        Raises
        ------
        LrcError
            That is not known.
        """
        return embedding_of(self.blueprint.checkpoint)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.model.config.vocab_size

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, on the meta device unless inside `block(i)`."""
        return [self.model.get_submodule(name) for name in self.resolved.blocks]

    def load_outside(self) -> None:
        """Materialise what lies outside the blocks (embeddings, final norm, head), unless it is."""
        if self._outside:
            return
        inside = tuple(f"{name}." for name in self.resolved.blocks)
        model = self.model
        state = {name: self._read_outside(name) for name in self.blueprint.outside()}
        model.load_state_dict(state, strict=False, assign=True)
        if model.all_tied_weights_keys:
            model.tie_weights()
        for name, module in model.named_modules():
            if not f"{name}.".startswith(inside):
                self._restore_buffers(module)
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and not name.startswith(inside):
                self._check(module, name)
        model.requires_grad_(False)
        self._outside = True

    def _check(self, module: nn.Module, path: str) -> None:
        try:
            check_indices(module)
        except ValueError as problem:
            what = f"{path}.{str(problem).lstrip('.')}"
            raise CheckpointError(
                f"{self.blueprint.checkpoint.path}: {what}. Compress the original checkpoint again."
            ) from None

    def restored_outside(self) -> dict[str, Tensor]:
        """Multiply out what is compressed outside the blocks: tensors of the dense model, in the factors' dtype."""
        self.load_outside()
        inside, found = tuple(f"{name}." for name in self.resolved.blocks), {}
        for path, module in self.model.named_modules():
            if isinstance(module, CompressedLinear | PackedLinear) and not path.startswith(inside):
                alone = nn.ModuleDict({"module": module})
                restore_modules(alone)
                found |= {f"{path}.{leaf}": tensor for leaf, tensor in alone["module"].state_dict().items()}
        return found

    def drop_outside(self) -> None:
        """Free the parameters outside the blocks, and packed weights, until they are loaded again."""
        inside = tuple(f"{path}." for path in self.resolved.blocks)
        for path, module in self.model.named_modules():
            if isinstance(module, PackedLinear) and not path.startswith(inside):
                module._buffers.update({name: each.to("meta") for name, each in module.named_buffers()})
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(inside):
                owner, _, leaf = name.rpartition(".")
                empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                setattr(self.model.get_submodule(owner), leaf, empty)
        if self.model.all_tied_weights_keys:
            self.model.tie_weights()
        self._outside = False

    def _read_outside(self, name: str) -> Tensor:
        """Read a tensor, or take that of the model beside this one, if it is the same."""
        tensor = self._read(name)
        if self._beside is not None and self._beside._outside:
            there = self._beside.model.state_dict().get(name)
            if there is not None and there.dtype == tensor.dtype and torch.equal(there, tensor):
                return there
        return tensor

    def _read(self, name: str) -> Tensor:
        return self._read_by(partial(self.blueprint.read, name))

    def _read_by(self, read: Read) -> Tensor:
        tensor = read()
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _restore_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no checkpoint holds (rotary tables, position ids), the way transformers does."""
        lost = {name: value for name, value in module._buffers.items() if value is not None and value.is_meta}
        if lost:
            for name, value in lost.items():
                module._buffers[name] = torch.empty_like(value, device=self.device)
            # Gemma's embedding has such a buffer beside its weight, which must not be initialised along with it.
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
            self.model._init_weights(module)

    @contextmanager
    def block(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """Materialise one block; on leaving it goes back to the meta device.

        Parameters
        ----------
        index
            Which.
        then
            The block that will follow, if there is such a one: it is read from the disk meanwhile.

        Raises
        ------
        CheckpointError
            One of its tensors is missing or not finite, or indices are damaged.
        """
        prefix = self.resolved.blocks[index]
        block = self.model.get_submodule(prefix)
        self._lender = lender = self._lending(index)
        names = [name for name in self.blueprint.inside(index) if lender.of(name) is None]
        state = {name.removeprefix(f"{prefix}."): self._read(name) for name in names}
        block.load_state_dict(state, assign=True, strict=len(names) == len(self.blueprint.inside(index)))
        for name, module in block.named_modules(prefix=prefix):
            if lender.of(f"{name}.") is None:
                self._restore_buffers(module)
        self._check(block, prefix)
        block.requires_grad_(False)
        if self._edit is not None:
            self._edit(index, block)
        if then is not None and 0 <= then < len(self.resolved.blocks):
            stored = self.blueprint.stored
            self.blueprint.checkpoint.read_ahead(stored[name] for name in self.blueprint.inside(then) if name in stored)
        try:
            yield block
        finally:
            lender.close()
            self._lender = None
            block.to("meta")

    def _lending(self, index: int) -> Lender:
        """Take the experts of a block whose weights would be too many."""
        lender, prefix = Lender(self._read, self._check), f"{self.resolved.blocks[index]}."
        elements = sum(target.elements for target in self.resolved.of_block(index) if target.expert is not None)
        if self.for_experts is not None and elements * self.dtype.itemsize > self.for_experts:
            for path, experts in experts_of(self.model).items():
                for number, expert in enumerate(experts) if path.startswith(prefix) else ():
                    lender.take(f"{path}.{number}", expert)
        return lender

    def lends(self, name: str) -> bool:
        """Whether a tensor of the block in memory, by its name in the model, is there only while it is used."""
        return self._lender is not None and self._lender.of(name) is not None

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the block in memory, as it is run with it; one that is lent is not to be changed."""
        if self._lender is not None and self.lends(name):
            return self._lender.tensor(name)
        return self.model.get_parameter(name).detach()

    def lend(self, name: str, read: Read | None) -> Read | None:
        """Have a lent tensor read from elsewhere as long as the block is in memory, or from the checkpoint again.

        Returns
        -------
        callable or None
            From where it was read before, in the same sense.
        """
        assert self._lender is not None
        return self._lender.put(name, None if read is None else partial(self._read_by, read))

    @contextmanager
    def having(self, path: str) -> Iterator[None]:
        """Have the weights of a module in memory while inside, if they are lent."""
        if self._lender is not None and (expert := self._lender.of(f"{path}.")) is not None:
            with self._lender.having(expert):
                yield
        else:
            yield
