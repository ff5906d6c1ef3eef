"""Whether a file of a run that people may edit still fits the rest."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.manifest import Manifest
from lowrank_compress.config import Scheme
from lowrank_compress.errors import LrcError
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.recipe import load_recipe
from lowrank_compress.stages.decompose import bases_of
from lowrank_compress.stages.ranks import read_ranks, require_kept
from lowrank_compress.stages.run import Run


def ranks_fit(run: Run, ranks: Path, scores: Manifest) -> bool:
    """Whether edited ranks parse, and fit the model and what was kept of its decompositions."""
    try:
        recipe = load_recipe(run.recipe, {})
        resolved = blueprint(Checkpoint(locate(recipe.model, recipe.revision))).resolved
        candidates = candidates_of(resolved, Scheme(**scores.report["scheme"]))
        choices = read_ranks(ranks, candidates)
        groups = [group for group in all_groups(candidates) if group.name in choices]
        require_kept(ranks, groups, choices, bases_of(ranks.parent, scores))
    except LrcError:
        return False
    return True
