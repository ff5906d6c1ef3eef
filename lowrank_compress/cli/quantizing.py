"""`lrc quantize`: the matrices of a checkpoint in a few bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_compress.cli import options as o
from lowrank_compress.cli.app import app
from lowrank_compress.cli.terminal import friendly, prepare_libraries, reported
from lowrank_compress.recipe import WHAT


@app.command()
def quantize(
    target: Annotated[
        str, typer.Argument(help="A run directory, a checkpoint of ours, or a dense one.", show_default=False)
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help="Bits of every weight: 2, 3, 4, 5, 6 or 8 (default: 4). A fraction, say 3.3, is what a weight may "
            "take on average, scales included: then the bits of each matrix are chosen by what they lose.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            "--bytes",
            help="In place of --bits: the share of the original's bytes that may be stored, of all weights that a run "
            "compresses; 0.2 for 20 %.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        int,
        typer.Option(
            "--group",
            help="Columns of a row that share a scale; all of a row do where it does not divide them, or is 0.",
            rich_help_panel=WHAT,
        ),
    ] = 64,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Zero points take some bits more and lose less; with them a dense checkpoint becomes one of ours.",
            rich_help_panel=WHAT,
        ),
    ] = True,
    residual_rank: Annotated[
        int,
        typer.Option(
            "--residual-rank",
            min=0,
            help="Of a dense checkpoint: write beside it, in OUT/adapter, a LoRA adapter (peft) of this rank that "
            "makes up for the rounding, from which to fine-tune, too (LQ-LoRA).",
            rich_help_panel=WHAT,
        ),
    ] = 0,
    inside: Annotated[
        bool,
        typer.Option(
            "--residual-inside",
            help="Keep that product in the checkpoint, beside the codes, where it counts; under a budget each matrix "
            "has one if it pays. Of a run, too.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth",
            help="Shift outliers of activations to the weights, by a scale for each input; with --residual-rank the "
            "product, in two bytes a number, is part of the checkpoint (SVDQuant).",
            rich_help_panel=WHAT,
        ),
    ] = False,
    outliers: Annotated[
        float | None,
        typer.Option(
            "--outliers",
            help="Leave columns of weights in two bytes a number that inputs larger than this meet on the calibration "
            "text; 6 in the paper (LLM.int8()).",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(
            "--activation-bits",
            help="Round what enters a layer to so many bits, too, token by token, 2 to 8 (default: not at all).",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            "--head",
            help="Bits of the output head, which else stays as it is: 2, 3, 4, 5, 6 or 8. Then --bytes counts it, too; "
            "--bits counts the blocks alone. A head that is the table of tokens cannot be packed.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            help="How: rtn (to the nearest; needs no text), gptq, quantease, or kfac, in the metric of the loss.",
            rich_help_panel=WHAT,
        ),
    ] = "kfac",
    damping: Annotated[
        float,
        typer.Option("--damping", help="Share of its mean diagonal added to the inputs' metric", rich_help_panel=WHAT),
    ] = 0.01,
    damping_fisher: Annotated[
        float,
        typer.Option("--damping-fisher", help="The same for the metric of the outputs, of kfac", rich_help_panel=WHAT),
    ] = 0.1,
    calibration: Annotated[list[str] | None, o.of_recipe("calibration", "the run's own text")] = None,
    text_column: Annotated[list[str] | None, o.of_recipe("text_column")] = None,
    label_column: Annotated[str | None, o.of_recipe("label_column")] = None,
    samples: o.Samples = None,
    seq_len: o.CalibrationLength = None,
    seed: o.ShuffleSeed = None,
    device: Annotated[str | None, o.of_recipe("device")] = None,
    out: Annotated[Path | None, o.new_checkpoint("quantize")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Store the linear layers of a checkpoint in a few bits a weight: it comes last.

    Of a dense checkpoint the result is one in the format of compressed-tensors, which stock transformers loads. Of a
    run or a compressed checkpoint the factors are quantized; it loads as before. Matrices of routed experts are rounded
    by what each expert sees. Embeddings, norms and biases stay, and the head does without --head.

    [dim]lrc quantize ./my-model --bits 4 --calibration my-text.txt --out ./my-model-4bit[/]

    [dim]lrc quantize runs/my-run --bits 3.3        bits chosen matrix by matrix; the run's own text[/]
    """
    with friendly(debug):
        prepare_libraries()
        from lowrank_compress.cli import quantization

        data = {
            "source": calibration or None,
            "text_column": o.joined(text_column),
            "label_column": label_column,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
        }
        how = {
            "bits": 4.0 if bits is None and share is None else bits,
            "bytes": share,
            "group": group,
            "symmetric": symmetric,
            "residual_rank": residual_rank,
            "inside": inside,
            "smooth": smooth,
            "outliers": outliers,
            "activation_bits": activation_bits,
            "head": head,
            "rounding": rounding,
            "damping": damping,
            "damping_fisher": damping_fisher,
        }
        with reported() as reporter:
            result = quantization.quantize(target, data, how, device, out, overwrite, reporter)
        quantization.print_result(result, json)
