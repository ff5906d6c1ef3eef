"""The options of a recipe are its fields: what is said of one there is what the commands take and say."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from lowrank_compress.cli.main import app
from lowrank_compress.cli.options import joined, takes_recipe
from lowrank_compress.recipe import Recipe
from tests.runs import refused

FIELDS = Recipe.model_fields


def parameters(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {each.name: each for each in group.commands[command].params}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_an_option_of_compress(name: str) -> None:
    field, option = FIELDS[name], parameters("compress")[name]
    assert option.default is None
    assert option.help.startswith(field.description)
    if not field.is_required():
        assert {"methods": "--for", "options": "--option"}.get(name, f"--{name.replace('_', '-')}") in option.opts
    if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
        said = option.help.removeprefix(field.description).removeprefix(" (default: ").removesuffix(")").split(",")[0]
        assert type(field.default)(said) == field.default


@pytest.mark.parametrize("command", ["calibrate", "score", "factorize"])
def test_stages_take_what_changes_their_result(command: str) -> None:
    own = [name for name in parameters(command) if name in FIELDS]
    extra = {name: field.json_schema_extra for name, field in FIELDS.items()}
    assert own == [name for name, said in extra.items() if isinstance(said, dict) and command in said["commands"]]


def test_every_field_but_the_dense_one_of_a_stage_is_taken_by_some_stage() -> None:
    taken = {name for command in ("calibrate", "score", "factorize") for name in parameters(command)}
    assert set(FIELDS) <= taken


def test_a_command_gets_what_was_given_and_its_own() -> None:
    heard: dict[str, Any] = {}
    small = typer.Typer()

    @small.command()
    @takes_recipe("compress")
    def command(given: dict[str, Any], twice: Annotated[int, typer.Option("--twice")] = 2) -> None:
        """Say nothing."""
        heard.update({name: value for name, value in given.items() if value is not None}, twice=twice)

    words = [
        "m",
        "--ratio",
        "0.5",
        "--text-column",
        "a",
        "--text-column",
        "b",
        "--no-trust-remote-code",
        "--twice",
        "3",
    ]
    assert CliRunner().invoke(small, words).exit_code == 0
    assert heard == {"model": "m", "ratio": 0.5, "text_column": "a,b", "trust_remote_code": False, "twice": 3}
    assert inspect.signature(command).parameters["twice"].default == 2
    assert command.__doc__ == "Say nothing."


def test_an_empty_value_of_an_option_that_may_be_repeated_is_no_absence() -> None:
    assert joined([]) is None
    assert joined([""]) == ""
    assert "expected printable text" in refused("eval", "model", "--perplexity", "t.json", "--text-column", "")


def test_values_of_parts_are_a_mapping() -> None:
    heard: list[Any] = []
    small = typer.Typer()

    @small.command()
    @takes_recipe("calibrate")
    def command(given: dict[str, Any]) -> None:
        heard.append(given["methods"])

    run = CliRunner().invoke
    assert run(small, ["--for", "mlp=kfac|nystrom", "--for", "*.0.* = dense"]).exit_code == 0
    assert run(small, []).exit_code == 0
    assert heard == [{"mlp": "kfac|nystrom", "*.0.*": "dense"}, None]
    for words in (["--for", "mlp"], ["--for", "=svd"], ["--for", "mlp=svd", "--for", "mlp=kfac"]):
        found = run(small, words)
        assert found.exit_code == 2
        assert "expected NAME=VALUE, each name once" in found.output
