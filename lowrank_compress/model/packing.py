"""Checkpoints in the format of compressed-tensors: what their config.json says of packed layers, written and read.

transformers and vLLM load them with the package of that name; this program reads them by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_compress.errors import UnsupportedError
from lowrank_compress.shipped.packed import LAYOUT

METHOD = "compressed-tensors"
# The release whose reader these configs were tried with.
_VERSION = "0.20.0"
_PACKED = ".weight_packed"
_NUMBERED = re.compile(r"(.*\.)(\d+)(\..*)")
Entry = tuple[int, int, bool]


def config_of(linears: Mapping[str, tuple[Entry, int]], others: Iterable[str], prefix: str) -> dict[str, Any]:
    """Make the ``quantization_config`` of a stock model with packed layers.

    Parameters
    ----------
    linears
        Path of each packed layer -> bits, group and symmetry, and how many columns it has.
    others
        Paths of the ``nn.Linear`` that are not packed.
    prefix
        The model's ``base_model_prefix``: paths are matched with and without it.
    """
    kinds = {path: (bits, None if group == n else group, same) for path, ((bits, group, same), n) in linears.items()}
    groups = {}
    for number, kind in enumerate(sorted(set(kinds.values()), key=str)):
        own = [path for path in kinds if kinds[path] == kind]
        targets = ["Linear"] if len(set(kinds.values())) == 1 else [*_patterns(own, prefix)]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(*kind),
            "input_activations": None,
            "output_activations": None,
            "format": LAYOUT,
        }
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": groups,
        "ignore": [*_patterns(others, prefix)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        "observer": "minmax",
    }


def _patterns(paths: Iterable[str], prefix: str) -> Iterable[str]:
    """Write paths as regular expressions, those that differ in the number of their block alone as one."""

    def parted(path: str) -> tuple[str, str, str]:
        found = _NUMBERED.fullmatch(path.removeprefix(f"{prefix}."))
        return ("", "", path.removeprefix(f"{prefix}.")) if found is None else (found[1], found[3], found[2])

    for (before, after), each in groupby(sorted(map(parted, paths)), key=lambda part: part[:2]):
        numbers = [number for *_, number in each]
        if not after:
            yield from (f"re:(.*\\.)?{re.escape(name)}$" for name in numbers)
        else:
            yield f"re:(.*\\.)?{re.escape(before)}({'|'.join(sorted(numbers, key=int))}){re.escape(after)}$"


def layout_of(
    path: Path, found: Mapping[str, Any], stored: Iterable[str], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Say in the terms of `LowRankConfig` which layers of such a checkpoint are packed.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    found
        Its ``quantization_config``.
    stored
        Names of all its tensors.
    read
        Reads one of them.

    Raises
    ------
    UnsupportedError
        It quantizes activations or the cache, or weights in another layout.
    """
    groups = found.get("config_groups") or {}
    plain = isinstance(groups, Mapping) and all(_readable(group, found.get("format")) for group in groups.values())
    if not groups or not plain or found.get("kv_cache_scheme") or found.get("transform_config"):
        raise UnsupportedError(
            f"{path} is quantized by {METHOD} in a way that this program does not read; expected weights alone, as "
            f"whole numbers in groups or by rows, packed ({LAYOUT}). Start from the dense checkpoint that it was made "
            "from."
        )
    linears = {}
    for name in sorted(stored):
        if name.endswith(_PACKED):
            layer = name.removesuffix(_PACKED)
            weights = next((each["weights"] for each in groups.values() if _matches(layer, each["targets"])), None)
            if weights is None:
                raise UnsupportedError(f"{path} stores {name}, of which its quantization_config says nothing.")
            columns = int(read(f"{layer}.weight_shape")[1])
            group = columns if weights["strategy"] == "channel" else int(weights["group_size"])
            linears[layer] = [int(weights["num_bits"]), group, bool(weights["symmetric"])]
    return {"factor_quantization": {"layout": LAYOUT, "linears": linears}}


def _readable(group: Any, form: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and isinstance(targets, list)
        and all(isinstance(target, str) for target in targets)
        and not group.get("input_activations")
        and not group.get("output_activations")
        and (group.get("format") or form) == LAYOUT
        and weights.get("type") == "int"
        and weights.get("strategy") in ("group", "channel")
        and not weights.get("actorder")
        and weights.get("num_bits") in range(2, 9)
        and (weights["strategy"] == "channel" or isinstance(weights.get("group_size"), int))
    )


def _matches(layer: str, targets: Iterable[str]) -> bool:
    return any(
        re.match(target[3:], layer) if target.startswith("re:") else target in ("Linear", layer) for target in targets
    )
