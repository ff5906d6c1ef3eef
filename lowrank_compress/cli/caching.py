"""`lrc cache`: a smaller key-value cache for a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.hub import Hub, pushes
from lowrank_compress.cli.terminal import friendly, prepare_libraries, reported
from lowrank_compress.recipe import WHAT


@app.command()
@pushes
def cache(
    hub: Hub,
    target: Annotated[str, typer.Argument(help="A run directory or a compressed checkpoint.", show_default=False)],
    kv_ratio: Annotated[
        float,
        typer.Option(
            "--kv-ratio",
            help="Share of the dense model's key-value cache to remove, 0.5 for 50 %.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ],
    kv_window: Annotated[
        int,
        typer.Option(
            "--kv-window",
            min=0,
            help="Last tokens whose keys and values the cache keeps exactly besides, by matrices that are kept.",
            rich_help_panel=WHAT,
        ),
    ] = 0,
    round_to: Annotated[
        int, typer.Option("--round-to", min=1, help="Make latents multiples of this.", rich_help_panel=WHAT)
    ] = 1,
    calibration: Annotated[list[str] | None, o.of_recipe("calibration", "the run's own text")] = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    samples: o.Samples = None,
    seq_len: o.CalibrationLength = None,
    seed: o.ShuffleSeed = None,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    out: Annotated[Path | None, o.new_checkpoint("cache")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make the key-value cache of a compressed checkpoint smaller: of each token it keeps a latent.

    Keys and values are those of the compressed model; all else stays as it is. A dense model's cache becomes smaller by
    `lrc compress --method dense --kv-ratio`.

    [dim]lrc cache runs/my-run --kv-ratio 0.5[/]
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import printing, remembering

        data = {
            "source": calibration or None,
            "text_column": o.joined(text_column),
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
        }
        how = {"kv_ratio": kv_ratio, "kv_window": kv_window, "round_to": round_to}
        with reported() as reporter:
            hub.check()
            result = remembering.cache(target, data, how, device, out, overwrite, reporter)
            hub.push(result["model"], result, json, overwrite, reporter)
        printing.print_stage(result, json)
