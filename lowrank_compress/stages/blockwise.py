"""The blocks of a checkpoint, each trained to give what the dense block gives, in a file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import Workers
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.training.blockwise import reconstruct
from lowrank_compress.training.student import Train
from lowrank_compress.training.trainer import Data, joined

# Sequences whose hidden states are kept while blocks are trained on them.
SEQUENCES = 128


@dataclass(frozen=True, eq=False)
class Blocks:
    """Reconstructed blocks of a checkpoint.

    Parameters
    ----------
    dense, compressed
        The checkpoints.
    device
        Where to compute, in float32.
    files
        Where finished blocks lie.
    workers
        The first writes them.
    """

    dense: Checkpoint
    compressed: Checkpoint
    device: torch.device
    files: BlockFiles
    workers: Workers

    def make(
        self, data: Data, held: Sequence[Batch], steps: int, lr: float, train: Train, reporter: Reporter
    ) -> tuple[float, float]:
        """Reconstruct all blocks that are not finished; return the divergence from the dense model before and after."""
        dense = Skeleton(self.dense, self.device, torch.float32)
        compressed = Skeleton(self.compressed, self.device, torch.float32, beside=dense)
        batches = joined(data.items[:SEQUENCES], data.micro)
        finished = self.workers.once(
            lambda: [self.files.finished(index) for index in range(len(dense.resolved.blocks))]
        )
        reconstruct(
            (dense, compressed),
            (self.compressed.quantization or {})["modules"],
            batches,
            held,
            steps,
            batches_a_step=max(1, data.size // data.micro),
            lr=lr,
            train=train,
            dtype=self.compressed.dtype,
            found=lambda index: self.files.read(index) if finished[index] else None,
            keep=lambda index, tensors: self.files.write(index, tensors) if self.workers.is_first else None,
            workers=self.workers,
            advance=reporter.advance,
        )
        # What others read, the first must have written.
        self.workers.once(lambda: None)
        made = Skeleton(self.compressed, self.device, torch.float32, self._put, beside=dense)
        before, after = divergences([dense, compressed, made], held)
        return before, after

    def tensors(self) -> dict[str, Tensor]:
        """Read all of them, by name in the model."""
        return {name: tensor for index in range(self.count) for name, tensor in self.of_block(index).items()}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._paths)

    @property
    def _paths(self) -> Sequence[str]:
        return blueprint(self.compressed).resolved.blocks  # built once

    def of_block(self, index: int) -> Mapping[str, Tensor]:
        """Read one, by name in the model."""
        return {f"{self._paths[index]}.{name}": tensor for name, tensor in self.files.read(index).items()}

    def _put(self, index: int, block: nn.Module) -> None:
        block.load_state_dict(self.files.read(index), strict=False)
