"""`lrc`: compress Hugging Face checkpoints by low-rank factorization."""

from __future__ import annotations

from lowrank_compress.cli import making, reading, training, weighing  # noqa: F401  (in this order `lrc --help` lists them)
from lowrank_compress.cli.app import app

__all__ = ["app"]
