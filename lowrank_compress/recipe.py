"""What a user can set: the recipe of a run.

A recipe is the command line in a file: every field is an option of the same name, and says here, once, what the help
says of it, its default, and which commands besides `lrc compress` take it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from lowrank_compress.config import DTYPES, Mix, ModuleMetric, RatioOf, SecondBy
from lowrank_compress.errors import InputError
from lowrank_compress.options import (
    ALPHA,
    CAP,
    DATA,
    FLOOR,
    TEMPERATURE,
    TUNING,
    WHAT,
    WHERE,
    declared,
    setting,
)
from lowrank_compress.recipefile import read_recipe_file
from lowrank_compress.strict import COMMAND_LINE, MANY, Strict, explain, option_of
from lowrank_compress.texts import Texts

RATIO, METHOD = 0.3, "auto"
# Options that are short for an entry of `methods`.
PART_OPTIONS = ("attention", "qk", "vo", "mlp", "experts")


class Recipe(Strict):
    """Everything that `lrc compress` can be told; the names are those of the options."""

    model_config = ConfigDict(strict=True)

    model: str = Field(
        description="Checkpoint directory or hub name. May come from --config instead.",
        json_schema_extra={"commands": ["calibrate"]},
    )

    ratio: float = setting(RATIO, "Share of parameters to remove, between 0 and 1", WHAT, "score")
    bytes: float | None = setting(
        None,
        "In place of --ratio: the share of the original's bytes that may be stored, of all weights in the blocks, in "
        "few bits each; how many, and where low rank or narrower modules serve better, is chosen with it",
        WHAT,
        "score",
        hint="none",
        gt=0,
        lt=1,
    )
    mix: Mix | None = setting(
        None,
        "What is chosen with --bytes: auto, the best on held-out text; or quantized (bits alone), low-rank (ranks for "
        "equal bits), or mixed (both, part by part)",
        WHAT,
        "score",
        hint="auto",
    )
    residual_rank: int = setting(
        0,
        "With --bytes: rank of a product that makes up for rounding in the matrices where it pays",
        WHAT,
        "score",
        ge=0,
        le=MANY,
    )
    rounding: str | None = setting(
        None, "With --bytes: how weights are rounded; see `lrc quantize`", WHAT, "score", hint="kfac"
    )
    ratio_of: RatioOf = setting("blocks", "What the ratio is a share of: blocks or model", WHAT, "score")
    method: str = setting(METHOD, "See `lrc list methods`", WHAT, "calibrate", hint="{}, the recommendation")
    attention: str | None = setting(None, "Method for q, k, v and o instead of --method's", WHAT, "calibrate")
    qk: str | None = setting(None, "Method for queries and keys alone (cr, a linear one, or dense)", WHAT, "calibrate")
    vo: str | None = setting(
        None, "Method for values and output alone (vo-svd, a linear one, or dense)", WHAT, "calibrate"
    )
    mlp: str | None = setting(None, "Method for the MLP (nystrom, a linear one, or dense)", WHAT, "calibrate")
    experts: str | None = setting(
        None,
        "Method for routed experts (reap, reap-sum, frequency, merge, camera, nystrom, a linear one, auto, or dense)",
        WHAT,
        "calibrate",
    )
    methods: dict[str, str] = setting(
        {},
        "Method for a part alone, such as mlp=nystrom, down=dense or '*.0.*=svd': a group, a role, or a shell pattern "
        "over names of matrices; may be repeated.",
        WHAT,
        "calibrate",
        flag="for",
    )
    metric: ModuleMetric | None = setting(
        None,
        "Of module methods: gram (least output error) or kfac (least loss increase)",
        WHAT,
        "calibrate",
        hint="kfac beside linear methods in nats, else gram",
    )
    allocate: str | None = setting(
        None, "How ranks are chosen; see `lrc list allocators`", WHAT, "score", hint="the method's"
    )
    storage: str | None = setting(None, "pair, pivot or auto", WHAT, "score", "factorize", hint="the method's")

    kv_ratio: float | None = setting(
        None,
        "Share of the key-value cache to remove: of each token the cache keeps a latent, of which keys and values are "
        "rebuilt. With --method dense or --ratio 0 nothing else is compressed",
        WHAT,
        "calibrate",
        "score",
        hint="none",
        gt=0,
        lt=1,
    )
    kv_window: int = setting(
        0,
        "Last tokens whose keys and values the cache keeps exactly besides, by matrices that are kept; with --kv-ratio",
        WHAT,
        "calibrate",
        ge=0,
        le=MANY,
    )

    second: bool | None = setting(
        None,
        "Choose ranks a second time, with the gradients at the first result; the better plan on held-out text is taken",
        WHAT,
        "score",
        hint="with --method auto from a ratio of 0.25 on",
    )
    second_by: SecondBy | None = setting(
        None,
        "What is made anew with those gradients: full, all decompositions; or scales, the sizes of predicted losses "
        "alone, which costs little",
        WHAT,
        "score",
        hint="full, in models of more than 512 dimensions scales",
    )

    refine: bool | None = setting(
        None,
        "Fit all matrices anew to what the dense model does, once they are compressed; see `lrc refine`",
        WHAT,
        "factorize",
        hint="with --method auto",
    )

    calibration: Texts = setting(
        None,
        "Text file; .jsonl, .json, .csv, .tsv or .parquet with --text-column; either also compressed; or "
        "hf:NAME[:CONFIG[:SPLIT]], where the split may be a slice, train[:1000]; or self, what the model writes itself "
        "(the whole model must fit in memory; a file of that name is ./self). May be repeated: windows are drawn in "
        "proportion to weights, wiki.txt:2 code.txt:1 (a number is a weight behind a file that is there, or behind "
        "hf:NAME:CONFIG:SPLIT, of which parts may be empty).",
        DATA,
        "calibrate",
        hint="hf:Salesforce/wikitext:wikitext-2-raw-v1:train, with as much of self, if half the memory holds it",
        many=True,
    )
    text_column: str | None = setting(
        None,
        "Column of a table with the text or the conversation; dots lead into nested values. Given twice: pairs of "
        "sentences for a classifier, question and context, chosen and rejected.",
        DATA,
        "calibrate",
        many=True,
    )
    label_column: str | None = setting(
        None,
        "Column with the label: of a text, of each of its words, or the answer to a question; a number, or labels that "
        "apply (a list, or a;b). Several with commas between them: one for each label or score.",
        DATA,
        "calibrate",
    )
    samples: int = setting(128, "Windows of text, or labelled examples", DATA, "calibrate", ge=1, le=MANY)
    seq_len: int | None = setting(
        None, "Tokens a window, bos included", DATA, "calibrate", hint="2048, or the model's longest", ge=8, le=MANY
    )
    seed: int = setting(0, "Seed of the shuffle", DATA, "calibrate", ge=0, lt=2**63)
    micro_batch: int | None = setting(
        None, "Windows computed at once", TUNING, "calibrate", hint="1024 tokens, on a GPU 8192", ge=1, le=MANY
    )

    damping_fisher: float = setting(1e-4, "Relative shrinkage of a Fisher matrix", TUNING, "score", ge=0, lt=1)
    damping_gram: float = setting(1e-6, "Relative shrinkage of a Gram matrix", TUNING, "score", ge=0, lt=1)
    alpha: float = declared(ALPHA, "score")
    clip: float | None = setting(
        None, "Clip token gradients at this multiple of their mean norm", TUNING, "calibrate", hint="no clipping", gt=0
    )
    floor: float = declared(FLOOR, "score")
    temperature: float | None = declared(TEMPERATURE, "score")
    cap: float = declared(CAP, "score")
    options: dict[str, bool | int | float | str] = setting(
        {},
        "NAME=VALUE, of an allocator or a method of another package; may be repeated. `lrc list` names them.",
        TUNING,
        "score",
        flag="option",
    )
    round_to: int | None = setting(
        None, "Ranks and widths are multiples of this", TUNING, "score", hint="8 on a GPU, else 1", ge=1, le=MANY
    )

    device: str = setting("auto", "auto, cpu, cuda or cuda:N", WHERE, "calibrate")
    dtype: str | None = setting(
        None, "Output dtype: float32, bfloat16, float16", WHERE, "factorize", hint="the checkpoint's"
    )
    revision: str | None = setting(None, "Revision of a hub model.", WHERE, "calibrate")
    trust_remote_code: bool = setting(
        False, "Allow code shipped with a checkpoint to run.", WHERE, "calibrate", "score", "factorize"
    )

    @model_validator(mode="after")
    def _known_dtype(self) -> Recipe:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        return self

    def to_yaml(self) -> str:
        """Render as a file that `--config` reads back; whether to trust code is no part of it."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)

    def settings(self) -> dict[str, Any]:
        """Everything that may stand in a file: mappings where they hold something, budgets where they are."""
        found = self.model_dump(mode="json", exclude={"trust_remote_code"})
        stock = {"kv_ratio", "kv_window"} if self.kv_ratio is None else set()
        stock |= {"bytes", "mix", "residual_rank", "rounding"} if self.bytes is None else set()
        return {name: value for name, value in found.items() if value != {} and name not in stock}


def load_recipe(path: Path | None, options: Mapping[str, Any]) -> Recipe:
    """Combine a recipe file and command-line options; an option that was given wins.

    Parameters
    ----------
    path
        A YAML file with recipe fields, or None.
    options
        Options by field name; None where not given.

    Raises
    ------
    InputError
        The file cannot be read, a field is unknown, a value is out of range, or the file would have a checkpoint's code
        run: only the command line may say that, each time.
    """
    fields = {} if path is None else read_recipe_file(path)
    given = {name: value for name, value in options.items() if value is not None}
    if fields.pop("trust_remote_code", False) and not given.get("trust_remote_code"):
        raise InputError(
            f"The recipe {path} says trust_remote_code, which would run the checkpoint's own code. Only the command "
            "line may say so, each time: pass --trust-remote-code if you trust the checkpoint, or remove the line."
        )
    for name, value in given.items():
        mappings = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = {**fields[name], **value} if mappings else value
    where = f"The recipe {path}" if path is not None else COMMAND_LINE
    if "model" not in fields:
        raise InputError(f"{where} names no model. Pass a checkpoint directory or a hub name.")
    return make_recipe(fields, where, given)


def make_recipe(fields: Mapping[str, Any], where: str, given: Container[str] = ()) -> Recipe:
    """Make a recipe of values by field name.

    Parameters
    ----------
    where
        Where the values are from, for messages.
    given
        Names of fields whose values are from the command line instead.

    Raises
    ------
    InputError
        A field is unknown, or a value is out of range.
    """
    try:
        return Recipe(**fields)
    except ValidationError as problem:
        where = COMMAND_LINE if all(option_of(error) in given for error in problem.errors()) else where
        raise InputError(f"{where}: {explain(problem, Recipe)}") from None
