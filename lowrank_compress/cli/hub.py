"""What commands do with the Hugging Face hub: read with a token, and push what they have made."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lowrank_compress.cli.terminal import TerminalReporter, console
from lowrank_compress.errors import InputError

HUB = "Hugging Face hub"
TOKEN = "HF_TOKEN"

Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="Token for the hub; it is kept nowhere. Unlike this option, HF_TOKEN is in no list of processes (default: "
        "HF_TOKEN, or that of `hf auth login`)",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
Subfolder = Annotated[
    str | None,
    typer.Option(
        "--subfolder",
        help="Folder of MODEL that the checkpoint lies in; the same as hf://OWNER/NAME/FOLDER.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="NAME",
        help="Put the finished checkpoint, and nothing else, into this repository of the hub, which is made if there "
        "is none.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make that repository a private one, if it is new.", rich_help_panel=HUB)
]


def use_token(token: str | None) -> None:
    """Let everything that reads from the hub in this process use a token."""
    if token is not None:
        os.environ[TOKEN] = token


@dataclass(frozen=True)
class Hub:
    """Where a command is to push its result, if it is.

    Attributes
    ----------
    repo
        OWNER/NAME, or NAME alone; None for nowhere.
    private
        Whether a new repository is to be.
    token
        None for that of the environment.
    """

    repo: str | None
    private: bool = False
    token: str | None = field(default=None, repr=False)

    def check(self, *, made: bool = True) -> None:
        """Refuse before any work what could not be pushed in the end.

        Parameters
        ----------
        made
            Whether the command makes a checkpoint that stays.

        Raises
        ------
        InputError
            Nothing is made, there is no token, or the hub does not take it.
        """
        if self.repo is None:
            if self.private:
                raise InputError("--private goes with --push-to-hub.")
            return
        if not made:
            raise InputError("--push-to-hub goes with a checkpoint that is kept: not with --dry-run or --check.")
        from lowrank_compress.stages.publishing import check_account

        check_account(self.repo, self.token)

    def push(
        self, target: str | Path, result: dict[str, Any], as_json: bool, overwrite: bool, reporter: TerminalReporter
    ) -> None:
        """Push what a command has made, and say where to: on the screen, or as ``hub`` of its result."""
        if self.repo is None:
            return
        from lowrank_compress.stages.publishing import publish

        reporter.advance("push", 0, 1)
        result["hub"] = publish(Path(target), self.repo, token=self.token, private=self.private, overwrite=overwrite)
        reporter.advance("push", 1, 1)
        if not as_json:
            console().print(f"On the hub: {result['hub']}", soft_wrap=True)


def pushes(body: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Hub`, which it is called with as `hub`."""
    hints = get_type_hints(body, include_extras=True)
    parameters = [
        each.replace(annotation=hints[each.name])
        for each in inspect.signature(body).parameters.values()
        if each.name != "hub"
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    for name, annotation, default in (
        ("push_to_hub", PushToHub, None),
        ("private", Private, False),
        ("token", Token, None),
    ):
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))

    def run(*first: Any, push_to_hub: str | None, private: bool, token: str | None, **values: Any) -> None:
        use_token(token)
        body(*first, hub=Hub(push_to_hub, private, token), **values)

    run.__name__, run.__doc__ = body.__name__, body.__doc__
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
