"""A checkpoint's model without its weights: modules on the meta device, targets, and where each tensor lies on disk.

Which name on disk a tensor has is for `names` to say; nothing else in this package sees one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from lowrank_compress.arch.resolve import resolve, separate_experts
from lowrank_compress.arch.table import architecture_of
from lowrank_compress.arch.targets import Resolved, Target
from lowrank_compress.errors import CheckpointError, LrcError
from lowrank_compress.model import contract, weights
from lowrank_compress.model.casting import cast
from lowrank_compress.model.checkpoint import Checkpoint, in_a_line
from lowrank_compress.model.names import Piece, in_memory, names_of
from lowrank_compress.model.tasks import AUTO, Task, task_of
from lowrank_compress.shipped.config import LowRankConfig
from lowrank_compress.shipped.swap import swap_modules


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model on the meta device and where its tensors are stored.

    Attributes
    ----------
    checkpoint
        The checkpoint it was made from.
    model
        All modules, with no memory for weights; compressed modules are in place where the checkpoint has such.
    resolved
        The blocks and the compressible matrices of the dense model.
    stored
        Tensor name in the model -> name on disk. Tied tensors appear once, under the name of the one that the others
        are tied to, whichever of them is stored.
    ties
        Further names on disk of tensors that are tied: name on disk -> that of the one they are tied to.
    warnings
        What the user should know about what is stored.
    pieces
        Tensor name in the model -> which piece of the stored one it is, where it is not all of it.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    resolved: Resolved
    stored: Mapping[str, str]
    ties: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    pieces: Mapping[str, Piece] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What the head is for."""
        return task_of(self.model.config)

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name in the model, in the dtype that `from_pretrained` gives it.

        Raises
        ------
        CheckpointError
            It is not stored, or not finite.
        NumericsError
            It has values beyond the dtype that config.json asks for.
        """
        on_disk, dtype = self.name_on_disk(name), self.kept_dtype(name, self.checkpoint.dtype)
        piece = self.pieces.get(name)
        return self._read(on_disk, dtype) if piece is None else piece.of(self._read(on_disk, dtype, piece.number))

    def _read(self, on_disk: str, dtype: torch.dtype | None = None, row: int | None = None) -> Tensor:
        found = self.checkpoint.read(on_disk, row)
        return cast(found, dtype or self.checkpoint.dtype, f"The tensor {on_disk} of {self.checkpoint.path}")

    def kept_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a tensor in a model of some dtype: that, or single precision if the family wants it."""
        kept: set[str] = set()
        if dtype in (torch.float16, torch.bfloat16):
            kept |= set(self.model._keep_in_fp32_modules_strict or ())
        # As transformers looks for them.
        return torch.float32 if any(re.search(each.replace("*", ".*"), name) for each in kept) else dtype

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read as `rounded` does what is stored for a tensor: that itself, or all of what it is a piece of."""
        found = self._read(self.name_on_disk(name), self.kept_dtype(name, self.checkpoint.dtype))
        return cast(found, self.kept_dtype(name, dtype), f"The tensor {name}")

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor as a checkpoint of some dtype stores it.

        Raises
        ------
        CheckpointError, NumericsError
            As `read`; or it has values beyond that dtype.
        """
        return cast(self.read(name), self.kept_dtype(name, dtype), f"The tensor {name}")

    def weight(self, target: Target) -> Tensor:
        """Read the matrix of a target, (out, in), as stored."""
        return weights.read(self.read(target.parameter), target)

    def bias(self, target: Target) -> Tensor:
        """Read the part of its module's bias that belongs to a target, (out,), as stored."""
        assert target.bias is not None
        return weights.bias(self.read(target.bias), target)

    def name_on_disk(self, name: str) -> str:
        """Look up where a tensor is stored.

        Raises
        ------
        CheckpointError
            It is not.
        """
        if name not in self.stored:
            raise CheckpointError(
                f"{self.checkpoint.path} has no tensor {name}, which its config asks for. The checkpoint is "
                "incomplete, or its config.json belongs to another one."
            )
        return self.stored[name]

    def outside(self) -> list[str]:
        """Names of the tensors outside the blocks, in the model's order, tied ones once."""
        inside = tuple(f"{path}." for path in self.resolved.blocks)
        return [
            name
            for name in self.model.state_dict()
            if not name.startswith(inside) and name not in self.model.all_tied_weights_keys
        ]

    def inside(self, block: int) -> list[str]:
        """Names of the tensors of a block, in the model's order; behind the last block, of those outside of all."""
        if block == len(self.resolved.blocks):
            return self.outside()
        prefix = f"{self.resolved.blocks[block]}."
        return [name for name in self.model.state_dict() if name.startswith(prefix)]

    def check_ties(self) -> None:
        """Make sure that tied tensors which are stored more than once agree.

        Raises
        ------
        CheckpointError
            They do not.
        """
        for other, one in self.ties.items():
            if not torch.equal(self._read(one), self._read(other)):
                raise CheckpointError(
                    f"{self.checkpoint.path} stores different values in {one} and {other}, which its config.json ties. "
                    "Set tie_word_embeddings to false there if the weights are right."
                )

    def longest_input(self) -> int:
        """Length of the longest sequence, special tokens included, that the model has positions for."""
        limit = int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 20)
        for name, module in self.model.named_modules():
            # RoBERTa counts positions from behind the padding index.
            if not isinstance(module, nn.Embedding) or not name.endswith("position_embeddings"):
                continue
            if module.padding_idx is not None:
                limit = min(limit, module.num_embeddings - module.padding_idx - 1)
        return limit


def blueprint(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Blueprint:
    """Build a checkpoint's model on the meta device, resolve its targets and look up its tensors; reads headers only.

    Without a dtype it is built once for each `Checkpoint` object, to be read and not changed.

    Parameters
    ----------
    checkpoint
        Dense, or compressed by this package.
    dtype
        Of a model of one's own; None for what config.json says, and one that all share.

    Raises
    ------
    UnsupportedError
        The family or the head is not supported, or the weights are quantized.
    CheckpointError
        The files are not a whole checkpoint.
    """
    if dtype is not None:
        return _built(checkpoint, dtype)
    kept = vars(checkpoint)  # where its config and headers are kept too, once they are read
    if "blueprint" not in kept:
        kept["blueprint"] = _built(checkpoint, None)
    return kept["blueprint"]


def _built(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Blueprint:
    config = copy.deepcopy(checkpoint.config)
    config.use_cache = False
    # What a config may ask for beside: none of it changes what is computed, only in what form it is handed over.
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    try:
        architecture_of(config)
        auto = AUTO[task_of(config)]
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                config,
                dtype=checkpoint.dtype if dtype is None else dtype,
                trust_remote_code=checkpoint.trust_remote_code and config.model_type not in CONFIG_MAPPING,
            )
        separate_experts(model)
        resolved = resolve(model)
        if checkpoint.quantization is not None:
            swap_modules(model, LowRankConfig(**in_memory(model, checkpoint.quantization)))
    except LrcError:
        raise
    except Exception as problem:  # whatever sizes that do not fit together run into
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} describes a model that cannot be built: {in_a_line(problem)}. It is "
            "damaged, or was edited."
        ) from problem
    model.eval().requires_grad_(False)
    names = names_of(checkpoint.path, checkpoint.files, model)
    wholes = {name: piece.whole for name, piece in names.pieces.items()}
    contract.check(checkpoint.path, model, checkpoint.tensors, names.stored, names.ties, wholes)
    warnings = contract.dropped(checkpoint.path, contract.unexpected(model, names.unknown))
    return Blueprint(checkpoint, model, resolved, names.stored, names.ties, warnings, names.pieces)
