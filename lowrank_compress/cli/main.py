"""`lrc`: compress Hugging Face checkpoints by low-rank factorization."""

from __future__ import annotations

# In this order `lrc --help` lists the commands.
from lowrank_compress.cli import caching, making, quantizing, reading, training, weighing  # noqa: F401
from lowrank_compress.cli.app import app

__all__ = ["app"]
