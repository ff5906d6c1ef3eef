"""`lrc compare`: what it found, as people read it."""

from __future__ import annotations

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
    for kind in ("texts", "classification"):
        for name, values in found[kind].items():
            _predictions(Path(name).name, values)
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


def _predictions(name: str, values: Mapping[str, Any]) -> None:
    """Print what both make of a text or of labelled examples."""
    out = console()
    difference, ratio = values["difference"], values["ratio"]
    sure = f"{values['confidence'] * 100:.4g} %"
    if "perplexity" in values:
        measure, count = values["perplexity"], f"{values['tokens']:,} tokens in {values['windows']:,} windows"
        rows = [["perplexity", number(measure["a"]), number(measure["b"]), f"B is {_range(ratio, sure)} times A's"]]
        unit = "nats a token"
    else:
        measure, count, unit = values["accuracy"], f"{values['n']:,} examples", "nats an example"
        rows = [["accuracy", number(measure["a"]), number(measure["b"]), _words(values["test"])]]
    rows.append(["loss of B over A's", "", number(difference["value"]), f"{unit}; {_bounds(difference, sure)}"])
    rows.append(["divergence of B from A", "", number(values["divergence"]), unit])
    rows.append(["same prediction", "", f"{values['agreement']:.2%}", ""])
    out.print(table(f"{name} ({count})", ["", "A", "B", ""], rows))
    _states(values)


def _similarities(name: str, values: Mapping[str, Any]) -> None:
    """Print what both embedding models make of pairs of texts."""
    measure, difference, near = values["correlation"], values["difference"], values["cosine"]
    sure = f"{values['confidence'] * 100:.4g} %"
    rows = [
        ["Spearman's ρ", number(measure["a"]), number(measure["b"]), f"B has {_range(difference, sure)} more"],
        ["cosine of B's embedding to A's", "", f"{near['value']:.4f}", f"{_bounds(near, sure)}"],
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


def _range(found: Mapping[str, Any], sure: str) -> str:
    return f"{number(found['value'])} ({_bounds(found, sure)})"


def _bounds(found: Mapping[str, Any], sure: str) -> str:
    if found["low"] is None:
        return "one window: no interval"
    return f"{sure} interval: {number(found['low'])} to {number(found['high'])}"


def _words(test: Mapping[str, Any]) -> str:
    return f"only A right: {test['only_a']}, only B: {test['only_b']}; McNemar's p {test['p_value']:.3g}"


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
