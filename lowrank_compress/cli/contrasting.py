"""`lrc compare`: what it found, as people read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.cli.saying import printable
from lowrank_compress.cli.terminal import console, number, print_json, table


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print a comparison."""
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(f"A: {printable(found['a'])}\nB: {printable(found['b'])}", soft_wrap=True)
    for name, values in found["texts"].items():
        _text(Path(name).name, values)
    for name, values in found["classification"].items():
        _examples(Path(name).name, values)
    for name, values in found["sts"].items():
        _similarities(Path(name).name, values)
    if found["tasks"]:
        rows = [
            [f"{task} · {metric}", number(values["a"]), number(values["b"]), *_test(values)]
            for task, metrics in found["tasks"].items()
            for metric, values in metrics.items()
        ]
        columns = ["task", "A", "B", "only A right", "only B right", "McNemar's p"]
        out.print(table("Tasks", columns, rows))
    for made in found["generations"]:
        _generation(made)


def _text(name: str, values: Mapping[str, Any]) -> None:
    """Print what both make of a text."""
    measure, sure = values["perplexity"], _sure(values)
    said = f"B is {_range(values['ratio'], sure, 'window')} times A's"
    rows = [["perplexity", number(measure["a"]), number(measure["b"]), said]]
    bounds = _bounds(values["difference"], sure, "window")
    rows.append(["loss of B over A's", "", number(values["difference"]["value"]), f"nats a token; {bounds}"])
    _predictions(f"{name} ({values['tokens']:,} tokens in {values['windows']:,} windows)", rows, values, "nats a token")


def _examples(name: str, values: Mapping[str, Any]) -> None:
    """Print what both make of labelled examples."""
    sure, unit, loss = _sure(values), values["loss_unit"], values["loss"]
    rows = []
    for measure, found in values["metrics"].items():
        said = f"B has {_range(found['difference'], sure, 'example')} more"
        rows.append([measure.replace("_", " "), number(found["a"]), number(found["b"]), said])
    for measure, found in values["metrics"].items():
        if test := found.get("test"):
            alone = [f"{test['only_a']:,}", f"{test['only_b']:,}"]
            rows.append([f"right by one alone ({measure.replace('_', ' ')})", *alone, _p_value(test)])
    bounds = _bounds(values["difference"], sure, "example")
    rows.append(["loss", number(loss["a"]), number(loss["b"]), unit])
    rows.append(["loss of B over A's", "", number(values["difference"]["value"]), bounds])
    count = f"{values['n']:,} {values['unit']}"
    count += f" in {values['examples']:,} examples" if values["unit"] != "examples" else ""
    _predictions(f"{name} ({count})", rows, values, unit)


def _predictions(title: str, rows: list[list[str]], values: Mapping[str, Any], unit: str) -> None:
    """Print a table of measures with how far predictions are apart, and the hidden states."""
    more = [["divergence of B from A", "", number(values["divergence"]), unit]]
    if values["agreement"] is not None:
        more.append(["same prediction", "", f"{values['agreement']:.2%}", ""])
    console().print(table(title, ["", "A", "B", ""], rows + more))
    _states(values)


def _similarities(name: str, values: Mapping[str, Any]) -> None:
    """Print what both embedding models make of pairs of texts."""
    measure, difference, near = values["correlation"], values["difference"], values["cosine"]
    sure = _sure(values)
    rows = [
        ["Spearman's ρ", number(measure["a"]), number(measure["b"]), f"B has {_range(difference, sure, 'pair')} more"],
        ["cosine of B's embedding to A's", "", f"{near['value']:.4f}", f"{_bounds(near, sure, 'text')}"],
        ["the lowest", "", f"{values['lowest_cosine']:.4f}", ""],
    ]
    console().print(table(f"{name} ({values['n']:,} pairs, {values['texts']:,} texts)", ["", "A", "B", ""], rows))
    _states(values)


def _states(values: Mapping[str, Any]) -> None:
    """Print how far the hidden states are apart, block by block."""
    entering = values["embedding"]
    rows = [["embedding", number(entering["error"]), "–", f"{entering['cosine']:.4f}"]] if entering["error"] else []
    rows += [
        [str(block["block"]), number(block["error"]), number(block["own_error"]), f"{block['cosine']:.4f}"]
        for block in values["blocks"]
    ]
    columns = ["block", "relative error", "of this block alone", "cosine"]
    console().print(table("Hidden states that leave each block", columns, rows))


def _sure(values: Mapping[str, Any]) -> str:
    return f"{values['confidence'] * 100:.4g} %"


def _range(found: Mapping[str, Any], sure: str, drawn: str) -> str:
    return f"{number(found['value'])} ({_bounds(found, sure, drawn)})"


def _bounds(found: Mapping[str, Any], sure: str, drawn: str) -> str:
    """Print an interval; what is drawn is the reason where there is none."""
    if found["low"] is None:
        return f"one {drawn}: no interval" if math.isfinite(found["value"]) else "no interval"
    return f"{sure} interval: {number(found['low'])} to {number(found['high'])}"


def _p_value(test: Mapping[str, Any]) -> str:
    return f"McNemar's p {test['p_value']:.3g}"


def _test(values: Mapping[str, Any]) -> list[str]:
    if "test" not in values:
        return ["–", "–", "–"]
    test = values["test"]
    return [str(test["only_a"]), str(test["only_b"]), f"{test['p_value']:.3g}"]


def _generation(made: Mapping[str, Any]) -> None:
    """Print what both wrote after a prompt, one below the other, where they part."""
    out = console()
    most = max(made["tokens"].values())
    same = "the same" if made["same_tokens"] == most else f"the same for {made['same_tokens']} of {most} tokens"
    out.print(f"\n{printable(made['prompt'])} … ({same})", soft_wrap=True)
    for side in ("a", "b"):
        out.print(f"  {side.upper()}: {printable(made[side])}", soft_wrap=True)
