"""Options of the commands: those of a recipe, made of its fields, and what is no part of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from lowrank_compress.recipe import DATA, WHERE, Recipe

CHECK = "Making a run again and comparing"


def a_path(text: str | Path) -> Path:
    """Read a path, or pass a default on; nothing is none, though Python takes it for the working directory."""
    if not str(text).strip() or "\0" in str(text):
        raise typer.BadParameter(f"expected a path, got {text!r}")
    return Path(text)


PATH: dict[str, Any] = {"parser": a_path, "metavar": "PATH"}

RunDir = Annotated[
    Path, typer.Argument(parser=a_path, metavar="RUN", help="Run directory (what --out named).", show_default=False)
]
Target = Annotated[
    str,
    typer.Argument(
        help="A run directory, a compressed checkpoint, or one on the hub: OWNER/NAME, or "
        "hf://OWNER/NAME@REVISION/FOLDER.",
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
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Windows (default: the recipe's, or 128)", rich_help_panel=DATA)
]
CalibrationLength = Annotated[
    int | None,
    typer.Option("--seq-len", min=8, help="Tokens a window (default: the recipe's, or 512)", rich_help_panel=DATA),
]
ShuffleSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the shuffle", rich_help_panel=DATA)]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Recipe: a YAML file with these options. Options given here win.",
        rich_help_panel=WHERE,
        **PATH,
    ),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--sts",
        help="Table of two texts and how similar they are, for embedding models: rank correlation with the cosine, and "
        "how near the embeddings of one model are to the other's (the dense one's). Columns sentence1, sentence2 and "
        "score, or --text-column twice and --label-column; may be repeated.",
    ),
]
Tasks = Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include-path", help="Directory of lm-eval task YAML files of your own.", **PATH),
]
WindowLength = Annotated[
    int | None, typer.Option("--seq-len", min=2, help="Tokens a window (default: 2048, or the model's longest)")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Windows or examples a text or task.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows or examples at once.")]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Solved examples before each (default: the task's own)")
]
ChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
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


def takes_recipe(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a recipe, before its own.

    Its function is called with what was given, by field name (None where not given), and with its own options.

    Parameters
    ----------
    command
        "compress" takes all; others those that the recipe says they take.
    """
    names = [name for name, field in Recipe.model_fields.items() if command in ("compress", *_extra(field)["commands"])]

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(body, include_extras=True)
        _, *own = inspect.signature(body).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword, default=None, annotation=_annotation(name)) for name in names]
        parameters += [each.replace(kind=keyword, annotation=hints[each.name]) for each in own]

        def run(**values: Any) -> None:
            body({name: _given(name, values.pop(name)) for name in names}, **values)

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def of_recipe(name: str, default: str | None = None) -> Any:
    """Make the option, or argument, that a field of the recipe is; with another default, in words, where it has one."""
    field = Recipe.model_fields[name]
    if field.is_required():
        return typer.Argument(help=field.description, show_default=False)
    words = _extra(field)["flag"] or name.replace("_", "-")
    flags = [f"--{words}", *([f"no-{words}"] if _type_of(field) is bool else [])]
    return typer.Option(
        "/--".join(flags), help=_help(field, default), rich_help_panel=_extra(field)["panel"], show_default=False
    )


def new_checkpoint(directory: str) -> Any:
    """Describe --out of a command that makes a checkpoint from a checkpoint, in a run in a directory of that name."""
    return typer.Option(
        "--out",
        help=f"New directory for the checkpoint (default, for a run: RUN/{directory}, from then on its final one)",
        **PATH,
    )


def joined(value: Any) -> Any:
    """Put the values of an option that may be given several times together as a recipe has them."""
    return (",".join(value) if value else None) if isinstance(value, list) else value


def _given(name: str, value: Any) -> Any:
    """What was given for a field, as the recipe has it."""
    kind = Recipe.model_fields[name].annotation
    if isinstance(value, list) and any(get_origin(each) is tuple for each in get_args(kind)):
        return value or None
    if not isinstance(value, list) or get_origin(kind) is not dict:
        return joined(value)
    found: dict[str, str] = {}
    for each in value:
        part, equals, rest = (piece.strip() for piece in each.partition("="))
        if not (part and equals and rest) or found.setdefault(part, rest) != rest:
            raise typer.BadParameter(f"expected NAME=VALUE, each name once, got {each!r}")
    return found or None


def _annotation(name: str) -> Any:
    field = Recipe.model_fields[name]
    kind = _type_of(field)
    return Annotated[(list[kind] if _extra(field).get("many") else kind) | None, of_recipe(name)]


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _type_of(field: FieldInfo) -> Any:
    """The type that a word of the command line is read as; which words it may be, the recipe says."""
    kinds = [each for each in get_args(field.annotation) if each is not type(None)]
    optional = type(None) in get_args(field.annotation)
    kind = kinds[0] if optional else field.annotation
    if get_origin(kind) is dict:
        return list[str]
    return str if get_origin(kind) is Literal else kind


def _help(field: FieldInfo, default: str | None) -> str:
    if default is not None:
        return f"{field.description} (default: {default})"
    hint = _extra(field)["hint"] or (
        "{}" if isinstance(field.default, str | int | float) and field.default is not False else ""
    )
    said = _number(field.default) if isinstance(field.default, float) else str(field.default)
    return f"{field.description} (default: {hint.format(said)})" if hint else str(field.description)


def _number(value: float) -> str:
    """Write a number as people do: 0.3, and 1e-4."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:g}"
    digits, power = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(power)}"
