"""`lrc recover`: short training of a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.hub import Hub, pushes
from lowrank_compress.cli.terminal import friendly, prepare_libraries, reported
from lowrank_compress.errors import InputError
from lowrank_compress.recipe import DATA, WHAT


@app.command()
@pushes
def recover(
    hub: Hub,
    target: Annotated[str, typer.Argument(help="A run directory or a compressed checkpoint.", show_default=False)],
    block: Annotated[
        bool,
        typer.Option(
            "--block",
            help="Before, train each block by itself to give what the dense block gives, with one of each in memory: "
            "with --steps 0, for models that are too large to train as a whole.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    block_steps: Annotated[
        int, typer.Option("--block-steps", min=1, help="Steps for each block", rich_help_panel=WHAT)
    ] = 60,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=0, help="Steps for the whole model (default: 200)", rich_help_panel=WHAT),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            help="Train for about so long instead: the number of steps follows from the time of the first, so that "
            "another machine, or a busy one, gives another result. --steps repeats.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Highest learning rate of the whole model (default: the best of a few that are tried)",
            rich_help_panel=WHAT,
        ),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            "--train",
            help="all: everything in the blocks, and norms; low-rank: low-rank matrices alone (WeLore)",
            rich_help_panel=WHAT,
        ),
    ] = "all",
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora",
            min=1,
            help="Train LoRA adapters of this rank on the factors instead (peft), merged at the same rank in the end.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows or examples a step", rich_help_panel=WHAT)] = 8,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Fine-tune on a text of your own: next tokens (a classifier: labels) and no teacher.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help="Text that the dense model teaches on, all of it; may be repeated, and then as much of each as their "
            "weights allow (default, for a run: that of its recipe)",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    label_column: Annotated[str | None, o.of_recipe("label_column")] = None,
    seq_len: o.CalibrationLength = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of all orders", rich_help_panel=DATA)] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            "--dense", help="The dense model, where the target is no run.", rich_help_panel=DATA, show_default=False
        ),
    ] = None,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    out: Annotated[Path | None, o.new_checkpoint("recover")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train a compressed checkpoint for a short time, with the dense model as its teacher.

    What is held out of the text decides: the result is never worse there than what it was made from. In a run it
    becomes the final checkpoint. After any interruption the same command continues where it stopped.

    [dim]lrc recover runs/my-run --steps 400[/]

    [dim]lrc recover ./compressed --text mine.txt --out ./tuned      fine-tuning, without the dense model[/]
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import printing, recovering

        if text is not None and calibration:
            raise InputError("--text and --calibration both name what to train on; pass one of them.")
        data = {
            "source": text or calibration or None,
            "text_column": o.joined(text_column),
            "label_column": label_column,
            "seq_len": seq_len,
            "seed": seed,
        }
        how: dict[str, Any] = {"steps": steps, "seconds": seconds, "lr": lr, "train": train, "batch": batch}
        how |= {"block": block_steps if block else None, "lora": lora, "towards": "dense" if text is None else "text"}
        with reported() as reporter:
            hub.check()
            result = recovering.recover(target, data, how, device, dense, out, overwrite, reporter)
            hub.push(result["model"], result, json, overwrite, reporter)
        printing.print_stage(result, json)
