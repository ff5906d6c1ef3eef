"""The ``quantization_config`` of a compressed checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .formats.table import FORMATS
from .packed import checked_packing
from .traits import traits_problem

QUANT_METHOD = "lowrank"
# Of what a checkpoint holds; raised when code that knows only earlier ones could not load it. 2: indices are int32.
# 3: attentions may say their traits, and parts be svd-core. 4: experts may be compressed. 5: linear layers may be
# packed. 6: routers may know fewer experts. 7: attentions may cache latents. 8: packed layers may have something beside
# their codes. 9: experts may be merged. 10: attentions with narrower heads may cache latents. A checkpoint bears the
# first version that has all that is in it.
VERSION = 10
REMOTE_FILE = "modeling_lowrank.py"
IN_PACKAGE = __name__.startswith("lowrank_compress.")


class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: alone it says how to build the modules.

    Parameters
    ----------
    modules : mapping, optional
        Module path to ``{"in_features", "out_features", "bias", "heads", "parts"}`` (see `CompressedLinear`).
    dense_shapes : mapping, optional
        Module path to ``[out, in]`` of linear layers that stay dense but are smaller than the model's config says; or
        ``[out, in, parts]`` if each of so many equal parts of the rows is.
    attention : mapping, optional
        Path of an attention module to ``{"heads", "kv_heads", "size", "query_key", "value", "rotary", "interleaved",
        "projections", "traits", "latent"}``: numbers of query and key-value heads, dimensions of a stock head, those
        kept in q and k and in v, whether there is an ``lr_rotary`` (see `CompressedAttention`), whether the fused
        weight emits q, k, v head by head, and the paths of ``"q"``, ``"k"``, ``"v"`` (thrice the same if fused) and
        ``"o"``.
        Projections that are smaller than stock have entries in `dense_shapes`, those with factors in `modules`. The
        traits are those of `Traits` that are not as usual; where all are, and in what was written before version 3,
        the key is missing. So is ``"latent"``, ``{"rank", "window"}``, but where the attention caches latents (see
        `LatentAttention`).
    experts : mapping, optional
        Path of a block's experts to how many there are, where each has matrices of its own (see `SeparateExperts`), to
        which entries of `modules` and `dense_shapes` may lead. Where no experts have, the key is missing.
    routers : mapping, optional
        Path of a router to ``{"experts", "kept"}``: how many experts the stock model has, and how many the router still
        chooses among (see `PrunedRouter`). Where all know all, the key is missing.
    merged : mapping, optional
        Path of a block's experts to how many of them are left, where these stand for the others, too (see
        `SeparateExperts`); the path is one of `experts`. Where none are, the key is missing.
    version : int
        That of the checkpoint, up to `VERSION`; what is saved again has the first one that has all that is in it.
    factor_quantization : mapping, optional
        Which linear layers, those inside compressed modules among them, are packed: ``{"layout": "pack-quantized",
        "linears": {path: [bits, group, symmetric]}}`` (see `PackedLinear`); a fourth thing is what they have beside
        their codes, ``{"rank", "outliers", "smooth", "activation_bits"}`` or some of these (see `Beside`).

    Raises
    ------
    ValueError
        If the version, a format or any other value is not one this code knows how to load.
    """

    # Not an attribute of its own where there are none: everything else that checkpoints say stays as it was.
    experts: Mapping[str, int] = {}
    routers: Mapping[str, Mapping[str, int]] = {}
    merged: Mapping[str, int] = {}

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        dense_shapes: Mapping[str, Sequence[int]] | None = None,
        attention: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = VERSION,
        factor_quantization: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        experts: Mapping[str, int] | None = None,
        routers: Mapping[str, Mapping[str, int]] | None = None,
        merged: Mapping[str, int] | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"expected quant_method {QUANT_METHOD!r}, got {quant_method!r}")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(
                f"this checkpoint is of low-rank format version {version!r}, but this code reads versions 1 to "
                f"{VERSION}: update lowrank_compress, or install the version that wrote the checkpoint"
            )
        if unknown:
            what = ", ".join(sorted(unknown))
            raise ValueError(
                f"the low-rank quantization_config uses {what}, unknown to this code: update lowrank_compress"
            )
        self.quant_method: Any = QUANT_METHOD
        self.version = 2
        self.factor_quantization = checked_packing(factor_quantization)
        self.modules = {path: _checked(path, entry) for path, entry in (modules or {}).items()}
        self.dense_shapes = {path: [int(n) for n in shape] for path, shape in (dense_shapes or {}).items()}
        self.attention = {path: _checked_attention(path, entry) for path, entry in (attention or {}).items()}
        if experts:
            self.experts = {path: _checked_count(path, count) for path, count in experts.items()}
        if routers:
            self.routers = {path: _checked_router(path, entry) for path, entry in routers.items()}
        if merged:
            self.merged = {path: _checked_merged(path, count, self.experts) for path, count in merged.items()}
        needed = [3 for entry in self.attention.values() if "traits" in entry]
        needed += [4 for _ in self.experts] + [6 for _ in self.routers] + [9 for _ in self.merged]
        needed += [10 if _is_narrower(entry) else 7 for entry in self.attention.values() if "latent" in entry]
        needed += [FORMATS[part["format"]].since for entry in self.modules.values() for part in entry["parts"]]
        needed += [] if self.factor_quantization is None else [5]
        needed += [8 for entry in (self.factor_quantization or {}).get("linears", {}).values() if len(entry) > 3]
        self.version = max([self.version, *needed])


def _checked_count(path: str, count: Any) -> int:
    if type(count) is not int or count < 1:
        raise ValueError(f"quantization_config.experts[{path!r}]: expected how many there are, got {count!r}")
    return count


def _checked_merged(path: str, count: Any, experts: Mapping[str, int]) -> int:
    most = experts.get(path, 0)
    if type(count) is not int or not 1 <= count < most:
        raise ValueError(
            f"quantization_config.merged[{path!r}]: expected how many of its {most} separate experts are left, got "
            f"{count!r}"
        )
    return count


def _checked_router(path: str, entry: Mapping[str, Any]) -> dict[str, int]:
    entry = dict(entry)
    known = set(entry) == {"experts", "kept"} and all(type(count) is int for count in entry.values())
    if not known or not 1 <= entry["kept"] <= entry["experts"]:
        raise ValueError(
            f"quantization_config.routers[{path!r}]: expected the number of experts, and how many of them are kept, "
            f"got {entry}"
        )
    return entry


def _checked(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copy one module's entry, if it is one that `CompressedLinear` can be built from."""

    def refuse(problem: str) -> ValueError:
        return ValueError(f"quantization_config.modules[{path!r}]: {problem}")

    entry = {"heads": 1, **copy.deepcopy(dict(entry))}
    expected = {"in_features", "out_features", "bias", "heads", "parts"}
    if set(entry) != expected:
        raise refuse(f"expected the keys {sorted(expected)}, got {sorted(entry)}")
    for part in entry["parts"]:
        if part.get("format") not in FORMATS:
            raise refuse(f"unknown format {part.get('format')!r}, expected one of {', '.join(FORMATS)}")
        form = FORMATS[part["format"]]
        keys = ["rows", "format", *form.keys]
        if set(part) != set(keys):
            raise refuse(f"expected a part to have the keys {', '.join(keys[:-1])} and {keys[-1]}, got {part}")
        if problem := form.problem(part):
            raise refuse(problem)
        if part["rows"] % entry["heads"]:
            raise refuse(f"{part['rows']} rows cannot be shared by {entry['heads']} heads")
    rows = sum(part["rows"] for part in entry["parts"])
    if rows != entry["out_features"]:
        raise refuse(f"its parts have {rows} rows in all, out_features is {entry['out_features']}")
    return entry


def _checked_attention(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copy one attention's entry, if it is one that `CompressedAttention` can compute with."""

    def refuse(problem: str) -> ValueError:
        return ValueError(f"quantization_config.attention[{path!r}]: {problem}")

    entry = copy.deepcopy(dict(entry))
    expected = {"heads", "kv_heads", "size", "query_key", "value", "rotary", "interleaved", "projections"}
    if set(entry) - {"traits", "latent"} != expected:
        raise refuse(f"expected the keys {sorted(expected)}, and perhaps traits and latent, got {sorted(entry)}")
    if problem := traits_problem(entry.get("traits", {})):
        raise refuse(problem)
    places = entry["projections"] = dict(entry["projections"])
    if set(places) != {"q", "k", "v", "o"}:
        raise refuse(f"expected the projections q, k, v and o, got {sorted(places)}")
    heads, kv_heads, size = entry["heads"], entry["kv_heads"], entry["size"]
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        raise refuse(f"{heads} query heads cannot share {kv_heads} key-value heads")
    for name in ("query_key", "value"):
        if not 1 <= entry[name] <= size:
            raise refuse(f"{name} is from 1 to {size}, the size of a stock head, got {entry[name]}")
    if entry["rotary"] and entry["query_key"] % 2:
        raise refuse(f"rotary embeddings turn pairs of dimensions; query_key is {entry['query_key']}")
    fused = len({places["q"], places["k"], places["v"]})
    if fused == 2:
        raise refuse(f"q, k and v must have one path each, or the same, got {places}")
    if entry["interleaved"] and (fused == 3 or heads != kv_heads):
        raise refuse("only a fused weight with as many key-value heads as query heads can be interleaved")
    if entry["interleaved"] and entry.get("traits", {}).get("whole_norms"):
        raise refuse("queries that a fused weight emits head by head cannot be normalised as a whole")
    for role in "qkv":
        parent, _, leaf = places[role].rpartition(".")
        if parent != path or not leaf:
            raise refuse(f"{role} is at {places[role]}, expected it to be a child of {path}")
    if "latent" in entry and (problem := _latent_problem(entry)):
        raise refuse(problem)
    if places["o"].startswith(f"{path}.") and "." in places["o"].removeprefix(f"{path}."):
        raise refuse(f"o is at {places['o']}, expected it to be a child of {path} or outside of it")
    return entry


def _latent_problem(entry: Mapping[str, Any]) -> str:
    """Say why an attention's entry is not one that caches latents, or nothing."""
    latent = entry["latent"]
    named = isinstance(latent, dict) and set(latent) == {"rank", "window"}
    if not named or any(type(number) is not int for number in latent.values()):
        return f"latent is a rank and a window, two whole numbers, got {latent!r}"
    most = entry["kv_heads"] * (entry["query_key"] + entry["value"])
    if not 1 <= latent["rank"] <= most or latent["window"] < 0:
        return f"a latent has from 1 to {most} numbers, and a window none or more, got {latent}"
    return ""


def _is_narrower(entry: Mapping[str, Any]) -> bool:
    """Whether an attention's heads are narrower than stock."""
    return entry["query_key"] < entry["size"] or entry["value"] < entry["size"]
