"""The budgets of a recipe: a share of elements to remove, of the cache to remove, or of bytes to keep."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_compress.config import ByteBudget
from lowrank_compress.errors import InputError
from lowrank_compress.methods.groups import TargetGroup
from lowrank_compress.methods.parts import own_methods
from lowrank_compress.methods.rounding import ROUNDINGS
from lowrank_compress.methods.scheme import DENSE
from lowrank_compress.recipe import RATIO, Recipe

ROUNDING = "kfac"


def with_budgets(recipe: Recipe) -> Recipe:
    """Check the budgets of a recipe, and decide what follows from them alone.

    Where nothing is asked of the first one, nothing but the cache is compressed. One in bytes stands in its place.

    Raises
    ------
    InputError
        A budget is none, or what belongs to another one is given without it.
    """
    if recipe.bytes is not None:
        return _in_bytes(recipe)
    for name in ("mix", "residual_rank", "rounding"):
        if getattr(recipe, name):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} says how weights are stored under a budget in bytes: pass --bytes, too.")
    if recipe.kv_ratio is None and recipe.kv_window:
        raise InputError("--kv-window keeps exact positions beside a cache of latents: pass --kv-ratio, too.")
    if recipe.kv_ratio is not None and recipe.ratio == 0:
        if own_methods(recipe):
            raise InputError("--ratio 0 compresses nothing but the cache: leave the methods of single parts out.")
        return recipe.model_copy(update={"method": DENSE})
    if not 0 < recipe.ratio < 1:
        raise InputError(
            f"--ratio {recipe.ratio} is not between 0 and 1: it is the share of parameters to remove, 0.3 for 30 %."
        )
    return recipe


def _in_bytes(recipe: Recipe) -> Recipe:
    if recipe.ratio not in (0, RATIO):
        raise InputError(f"--ratio {recipe.ratio} and --bytes {recipe.bytes} are two budgets: pass one of them.")
    if recipe.ratio_of != "blocks":
        raise InputError("--bytes is a share of the blocks' bytes: leave --ratio-of out.")
    if recipe.kv_ratio is not None:
        raise InputError(
            "--kv-ratio does not go with --bytes, which ends in packed weights. Compress by --ratio with it, and then "
            "`lrc quantize --bytes`."
        )
    if recipe.second or recipe.refine:
        raise InputError(
            "--second and --refine do not go with --bytes. Compress by --ratio with them, and then `lrc quantize`."
        )
    if (name := recipe.rounding) is not None:
        ROUNDINGS[name]  # refuses an unknown one
    decided = {"ratio": 0.0, "refine": False, "second": False, "mix": recipe.mix or "auto"}
    return recipe.model_copy(update={**decided, "rounding": recipe.rounding or ROUNDING})


def byte_budget(recipe: Recipe, dtype: str) -> ByteBudget | None:
    """Make the budget in bytes of a recipe with all decided, if it has one; `dtype` is that of its output."""
    if recipe.bytes is None:
        return None
    return ByteBudget(share=recipe.bytes, mix=recipe.mix or "auto", dtype=dtype)


def require_nats(allocate: str, groups: Sequence[TargetGroup]) -> None:
    """Make sure that losses of bits and ranks compare.

    Raises
    ------
    InputError
        They do not.
    """
    if allocate != "loss" or not all(group.nats for group in groups):
        raise InputError(
            "--bytes compares ranks and bits by predicted losses in nats a token: it goes with --method auto or kfac, "
            "and --allocate loss. Leave the others out, or compress by --ratio and then `lrc quantize`."
        )
