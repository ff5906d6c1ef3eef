"""`lrc`: compress Hugging Face checkpoints by low-rank factorization."""

from __future__ import annotations

from lowrank_compress.cli import making, reading, training  # noqa: F401  (in this order `lrc --help` lists the commands)
from lowrank_compress.cli.app import app

__all__ = ["app"]
