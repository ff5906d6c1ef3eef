"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DATA = "Calibration data"
WHAT = "What to compress, and how"
WHERE = "Where and how to run"
TUNING = "Fine tuning"
CHECK = "Making a run again and comparing"


def a_path(text: str | Path) -> Path:
    """Read a path, or pass a default on; nothing is none, though Python takes it for the working directory."""
    if not str(text).strip() or "\0" in str(text):
        raise typer.BadParameter(f"expected a path, got {text!r}")
    return Path(text)


PATH: dict[str, Any] = {"parser": a_path, "metavar": "PATH"}

Model = Annotated[
    str | None,
    typer.Argument(help="Checkpoint directory or hub name. May come from --config instead.", show_default=False),
]
RunDir = Annotated[
    Path, typer.Argument(parser=a_path, metavar="RUN", help="Run directory (what --out named).", show_default=False)
]
Ratio = Annotated[
    float | None,
    typer.Option("--ratio", help="Share of parameters to remove, between 0 and 1 (default: 0.3)", rich_help_panel=WHAT),
]
RatioOf = Annotated[
    str | None,
    typer.Option(
        "--ratio-of", help="What the ratio is a share of: blocks or model (default: blocks)", rich_help_panel=WHAT
    ),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="See `lrc list methods` (default: auto, the recommendation)", rich_help_panel=WHAT),
]
Attention = Annotated[
    str | None,
    typer.Option("--attention", help="Method for q, k, v and o instead of --method's", rich_help_panel=WHAT),
]
QueryKey = Annotated[
    str | None,
    typer.Option("--qk", help="Method for queries and keys alone (cr, a linear one, or dense)", rich_help_panel=WHAT),
]
ValueOutput = Annotated[
    str | None,
    typer.Option(
        "--vo", help="Method for values and output alone (vo-svd, a linear one, or dense)", rich_help_panel=WHAT
    ),
]
Mlp = Annotated[
    str | None,
    typer.Option("--mlp", help="Method for the MLP (nystrom, a linear one, or dense)", rich_help_panel=WHAT),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="Of module methods: gram (least output error) or kfac (least loss increase) "
        "(default: kfac beside linear methods in nats, else gram)",
        rich_help_panel=WHAT,
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        "--allocate",
        help="How ranks are chosen; see `lrc list allocators` (default: the method's)",
        rich_help_panel=WHAT,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", help="pair, pivot or auto (default: the method's)", rich_help_panel=WHAT),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text file; .jsonl, .json, .csv, .tsv or .parquet with --text-column; either also compressed; or "
        "hf:NAME[:CONFIG[:SPLIT]], where the split may be a slice, train[:1000]. "
        "(default: hf:Salesforce/wikitext:wikitext-2-raw-v1:train)",
        rich_help_panel=DATA,
    ),
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--text-column",
        help="Column of a table with the text or the conversation; dots lead into nested values. Given twice: pairs of "
        "sentences, for a classifier.",
        rich_help_panel=DATA,
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column with the class label (classifiers).", rich_help_panel=DATA)
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Windows of text, or labelled examples (default: 128)", rich_help_panel=DATA),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len", help="Tokens a window, bos included (default: 2048, or the model's longest)", rich_help_panel=DATA
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the shuffle (default: 0)", rich_help_panel=DATA)]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch", help="Windows computed at once (default: 1024 tokens, on a GPU 8192)", rich_help_panel=TUNING
    ),
]
DampingFisher = Annotated[
    float | None,
    typer.Option(
        "--damping-fisher", help="Relative shrinkage of a Fisher matrix (default: 1e-4)", rich_help_panel=TUNING
    ),
]
DampingGram = Annotated[
    float | None,
    typer.Option("--damping-gram", help="Relative shrinkage of a Gram matrix (default: 1e-6)", rich_help_panel=TUNING),
]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Exponent of asvd (default: 0.5)", rich_help_panel=TUNING)]
Clip = Annotated[
    float | None,
    typer.Option(
        "--clip",
        help="Clip token gradients at this multiple of their mean norm (default: no clipping)",
        rich_help_panel=TUNING,
    ),
]
Floor = Annotated[
    float | None,
    typer.Option(
        "--floor",
        help="Share of its uniform budget that `loss` leaves every matrix (default: 0)",
        rich_help_panel=TUNING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="Of `block-influence`: the lower, the more unequal the blocks (default: the mean influence)",
        rich_help_panel=TUNING,
    ),
]
Cap = Annotated[
    float | None,
    typer.Option(
        "--cap",
        help="The largest share that `block-influence` takes from a block (default: 0.8)",
        rich_help_panel=TUNING,
    ),
]
RoundTo = Annotated[
    int | None,
    typer.Option(
        "--round-to",
        help="Ranks and widths are multiples of this (default: 8 on a GPU, else 1)",
        rich_help_panel=TUNING,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N (default: auto)", rich_help_panel=WHERE)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Output dtype: float32, bfloat16, float16 (default: the checkpoint's)", rich_help_panel=WHERE
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.", rich_help_panel=WHERE)]
Trust = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Allow code shipped with a checkpoint to run.",
        rich_help_panel=WHERE,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Run directory (default: runs/<model>-<method>-<ratio>)",
        rich_help_panel=WHERE,
        **PATH,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Recipe: a YAML file with these options. Options given here win.",
        rich_help_panel=WHERE,
        **PATH,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        help="Memory to get by with, such as 8GB: hidden states go to disk where they would take more than half of it, "
        "and as many matrices are decomposed at a time as the other half holds; where it is not ample, freed memory is "
        "given back at once, which costs some speed (default: what is free). Changes no result.",
        rich_help_panel=WHERE,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of another recipe.", rich_help_panel=WHERE)
]
Check = Annotated[
    Path | None,
    typer.Option(
        "--check",
        parser=a_path,
        metavar="EXPECTED.json",
        help="Make the run again from nothing (in --out, or in a temporary directory) and compare every byte with what "
        "`lrc verify RUN --write EXPECTED.json` wrote.",
        rich_help_panel=CHECK,
        show_default=False,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        help="Where bytes differ, accept weights (multiplied out) within this distance of the expected, relative to "
        "their norm, such as 1e-4.",
        rich_help_panel=CHECK,
        show_default=False,
    ),
]
ExpectedRun = Annotated[
    Path | None,
    typer.Option(
        "--against",
        parser=a_path,
        metavar="PATH",
        help="The expected run, or its model/, to compare single elements with (default: the one that EXPECTED.json "
        "names, if it is there)",
        rich_help_panel=CHECK,
        show_default=False,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        parser=a_path,
        metavar="PATH",
        help="Write what was found to a file, .json or else Markdown.",
        rich_help_panel=CHECK,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
