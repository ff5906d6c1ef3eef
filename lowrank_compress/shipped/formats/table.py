"""The storage formats by the names that they have in a checkpoint's config."""

from __future__ import annotations

from .base import Part
from .dense import Dense
from .latent import Rebuilt
from .pair import Pair
from .pivot import Pivot
from .svd_core import Core

FORMATS: dict[str, type[Part]] = {part.format: part for part in (Pair, Pivot, Core, Dense, Rebuilt)}
