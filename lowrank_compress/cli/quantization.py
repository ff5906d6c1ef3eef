"""Body of `lrc quantize`, and what is printed of its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import filesize

from lowrank_compress.cli.commands import device_name, followed, recipe_beside
from lowrank_compress.cli.printing import quantized, unit_of, unit_of_result
from lowrank_compress.cli.terminal import TerminalReporter, console, number, print_json, table
from lowrank_compress.model.kinds import few
from lowrank_compress.stages.quantizeconfig import QuantizeConfig, options_of
from lowrank_compress.strict import COMMAND_LINE, stage_config


def quantize(
    target: str,
    data: dict[str, Any],
    how: dict[str, Any],
    device: str | None,
    out: Path | None,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Quantize a checkpoint; what is not said of the data is as the run's recipe has it."""
    recipe = recipe_beside(target)
    options = options_of(data, recipe, how, device_name(device)) | how
    config = stage_config(QuantizeConfig, COMMAND_LINE, options)
    return followed("quantize", target, config, out, overwrite, reporter)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a quantization came to."""
    if as_json:
        print_json(result)
        return
    console().print(f"{quantized(result['quantize'], unit_of_result(result))}\nCheckpoint: {result['model']}")


def print_layers(target: str, said: Mapping[str, Any], unit: str) -> None:
    """Print how each layer is stored; `unit` is that of the head's losses."""
    rows = []
    for name, layer in said["layers"].items():
        grid = "as it was"
        if layer["bits"] is not None:
            grid = f"{layer['group']}, {'symmetric' if layer['symmetric'] else 'asymmetric'}"
            grid += "".join(f", {name} {layer[name]}" for name in ("rank", "outliers") if name in layer)
        rows.append(
            [
                name,
                "×".join(map(str, layer["shape"])),
                "–" if layer["bits"] is None else str(layer["bits"]),
                grid,
                filesize.decimal(layer["bytes"]),
                f"{number(layer['share'])} of it" if "share" in layer else number(layer.get("loss", 0.0)),
            ]
        )
    loss = "loss, share" if said["unit"] == "share" else f"loss, {unit_of(said, unit)}"
    out = console()
    out.print(table(f"{target}: quantized", ["layer", "shape", "bits", "group", "bytes", loss], rows, left=1))
    counts = Counter(layer["bits"] for layer in said["layers"].values())
    spread = ", ".join(f"{n} with {bits or 'all their'} bits" for bits, n in sorted(counts.items(), key=str))
    left = Counter(said["left"].values())
    stay = "".join(f" Not quantized: {n} ({why})." for why, n in sorted(left.items()))
    out.print(f"{quantized(said, unit)}\nLayers: {spread}. Embeddings, norms and biases stay as they were.{stay}")
    if (experts := said.get("experts")) is not None and experts["thin"]:
        tokens = Counter(experts["thin"].values())
        out.print(
            f"Experts that saw fewer tokens than their matrices have columns: {len(experts['thin'])} of "
            f"{experts['count']}, {tokens[0]} of them none ({few(list(experts['thin']))}); rounded almost to the "
            "nearest point."
        )
