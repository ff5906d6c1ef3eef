"""Results as people read them: the tables of the commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import filesize

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.cli.saying import hint
from lowrank_compress.cli.terminal import became, console, duration, number, print_json, share_of, table
from lowrank_compress.stages.card import beside_in_words, counted_in_words
from lowrank_compress.stages.naming import loss_unit


def print_dry_run(found: dict[str, Any], as_json: bool) -> None:
    """Print what a run would need."""
    if as_json:
        print_json(found)
        return
    out = console()
    budget = found["budget"]
    if "cache" in found:
        cache = found["cache"]
        out.print(
            f"Remove {cache['ratio']:.1%} of the key-value cache: of {cache['dense']:,} numbers a token it may keep "
            f"{cache['largest_kept']:,}"
            + (f", and exact keys and values of the last {cache['window']:,} tokens." if cache["window"] else ".")
        )
    if "bytes" in found:
        asked = found["bytes"]
        out.print(
            f"Store all weights inside the blocks in {asked['share']:.1%} of {filesize.decimal(asked['original'])}: at "
            f"most {asked['largest_stored']:,} bytes."
        )
        _print_needs(found)
        return
    out.print(
        f"Remove {budget['ratio']:.1%} of {share_of(budget['ratio_of'], budget['denominator'])}: the "
        f"{budget['claimed_elements']:,} weights inside the blocks may keep {budget['largest_stored']:,} stored "
        f"elements. In bytes, with uniform ranks: {became(budget['claimed_bytes'], budget['uniform_bytes'])}."
    )
    if "measured" in found:
        measured = found["measured"]
        out.print(
            f"Losses will be measured by running the model up to {measured['passes']:.0f} times over "
            f"{measured['tokens']:,} tokens ({measured['changes']:,} changes)."
        )
    note = " (uniform; the allocator asked for needs the scores)" if found["ranks_need_data"] else ""
    ranks = [[name, str(rank or "dense")] for name, rank in found["uniform_ranks"].items()]
    out.print(table(f"Ranks{note}", ["matrix", "rank"], ranks))
    _print_needs(found)


def _print_needs(found: Mapping[str, Any]) -> None:
    out, recipe = console(), found["recipe"]
    if (texts := recipe["calibration"]) is not None:
        named = texts if isinstance(texts, str) else ", ".join(f"{each['text']}:{each['weight']:g}" for each in texts)
        out.print(
            f"Text to calibrate on ({recipe['samples']:,} windows or examples, {recipe['seq_len']:,} tokens): {named}"
        )
    for title in ("memory", "disk"):
        rows = [[name, filesize.decimal(size)] for name, size in found[title].items()]
        rows.append(["together", filesize.decimal(sum(found[title].values()))])
        out.print(table(title.capitalize(), ["what", "size"], rows))
    for note in found["notes"]:
        out.print(note)
    out.print("Nothing was written.")


def print_stage(result: dict[str, Any], as_json: bool) -> None:
    """Print what a single stage reports."""
    if as_json:
        print_json(result)
        return
    plain = {name: value for name, value in result.items() if value is not None and not isinstance(value, Mapping)}
    if "loss_unit" in plain:
        plain["unit"] = plain.pop("loss_unit")
    rows = [[name.replace("_", " "), _plain(value)] for name, value in plain.items()]
    console().print(table(f"{result['stage']}: done", ["what", "value"], rows))
    if "refine" in result:
        console().print(refined(result["refine"], unit_of_result(result)))
    if result["stage"] == "cache" and "cache" in result:
        console().print(cached(result["cache"]))


def refined(found: Mapping[str, Any], unit: str) -> str:
    """Say what refining came to; `unit` is that of distances from the dense model."""
    taken = "taken" if found["taken"] else "not taken, as they are no better"
    said = (
        f"Refined weights ({taken}): {found['divergence_after']:.4g} {unit} from dense on held-out text, before "
        f"{found['divergence_before']:.4g}."
    )
    if "lambdas" not in found:
        return said
    counts = Counter(f"{value:g}" if isinstance(value, float) else value for value in found["lambdas"].values())
    return said + " λ by cross-validation: " + ", ".join(f"{name} ({n}×)" for name, n in sorted(counts.items())) + "."


def unit_of_result(result: Mapping[str, Any]) -> str:
    """Name what the losses of the checkpoint are measured in that a command has made."""
    from lowrank_compress.stages.report import REPORT

    return loss_unit(read_json(Path(result["model"]) / REPORT))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def less(share: float) -> str:
    """Write a share that is removed, or added if negative."""
    return f"{'−' if share >= 0 else '+'}{abs(share):.2%}"


def cached(found: Mapping[str, Any]) -> str:
    """Say what the cache keeps in the place of keys and values."""
    window = f", and exact keys and values of the last {found['window']:,} tokens" if found["window"] else ""
    return (
        f"Key-value cache: {found['dense']:,} numbers a token became {found['kept']:,} ({less(found['reached'])}; "
        f"asked: {less(found['asked'])}){window}."
    )


def quantized(said: Mapping[str, Any], unit: str) -> str:
    """Say in a sentence or two what was quantized, and what it takes; `unit` is that of the head's losses."""
    loss = said["predicted_loss"]
    beside = said.get("residual_bytes")
    loads = "compressed-tensors" if said["format"] == "compressed-tensors" else "lowrank_compress, or remote code"
    return (
        f"Quantized ({said['rounding']}): {said['weights']:,} weights in {said['bits_per_weight']:.3f} bits each, "
        f"scales included. {counted_in_words(said)} take {said['stored_bytes']:,} bytes, of the original's "
        f"{said['original_bytes']:,} ({said['stored_bytes'] / said['original_bytes']:.1%}). Loads with {loads}."
        + beside_in_words(said)
        + (f" The adapter of rank {said['residual_rank']} beside takes {beside:,} bytes." if beside else "")
        + ("" if loss is None else f" Predicted loss increase by rounding: {loss:.4g} {unit_of(said, unit)}.")
    )


def unit_of(said: Mapping[str, Any], unit: str) -> str:
    """Name the unit of the losses of a quantization, as people read it; `unit` is that of the head's."""
    return unit if said["unit"] == "nats" else said["unit"]


def removed(report: Mapping[str, Any]) -> str:
    """Say what share of the parameters is gone; it is what was asked for only where there was a ratio."""
    asked, reached = report["asked_ratio"], report["reached_ratio"]
    return f"Removed {reached:.2%} of {share_of(report['ratio_of'])} (asked: {asked:.2%})"


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a finished run reached."""
    if as_json:
        print_json(result)
        return
    gone = f"{removed(result)}: " if result["asked_ratio"] else ""
    console().print(
        f"{gone}{result['claimed_elements']:,} weights became {result['stored_elements']:,} stored elements, "
        f"{became(result['claimed_bytes'], result['stored_bytes'])}.\n"
        + (f"{cached(result['cache'])}\n" if "cache" in result else "")
        + (f"{refined(result['refine'], unit_of_result(result))}\n" if "refine" in result else "")
        + (f"{quantized(result['quantize'], unit_of_result(result))}\n" if "quantize" in result else "")
        + f"Checkpoint: {result['model']}"
    )
    if "cost" in result:
        hint(_cost(result["cost"]))
    how = "--perplexity YOUR_TEXT.txt (a classifier: --classification TABLE.tsv, an embedding model: --sts PAIRS.tsv)"
    hint(f"Next: lrc eval {result['run']} {how}")


def _cost(cost: dict[str, Any]) -> str:
    seconds = ", ".join(f"{step} {duration(taken)}" for step, taken in cost["seconds"].items() if taken >= 0.05)
    device = f", {filesize.decimal(cost['peak_device_bytes'])} on the GPU" if "peak_device_bytes" in cost else ""
    return (
        f"Peak memory: {filesize.decimal(cost['peak_bytes'])} (in {cost['peak_step']}; "
        f"{filesize.decimal(cost['start_bytes'])} at the start){device}. Time: {seconds or 'none'}."
    )


def print_metrics(target: str, metrics: dict[str, Any]) -> None:
    """Print an evaluation, compressed and dense side by side."""
    rows: list[list[str]] = []
    for kind, title, unit in (("perplexity", "perplexity", "tokens"), ("classification", "accuracy", "n")):
        for name, values in metrics[kind].items():
            note = f"{values[unit]:,} {'tokens' if unit == 'tokens' else 'examples'}"
            for metric, measured in values.get("metrics", {title: values}).items():
                rows.append(_row(f"{metric} · {Path(name).name}", measured, number, note))
                note = ""
            for part, measured in values.get("positions", {}).items():
                rows.append(_row(f"  of tokens {part} of a window", measured, number, f"{measured['tokens']:,} tokens"))
    for name, values in metrics.get("sts", {}).items():
        near = "" if values["cosine"] is None else f", cosine to dense {values['cosine']:.4f}"
        rows.append(_row(f"Spearman's ρ · {Path(name).name}", values, number, f"{values['n']:,} pairs{near}"))
    for name, values in metrics["tasks"].items():
        some = next(iter(values.values()))
        for metric in some:
            if "stderr" not in metric:
                error = some.get(f"{metric}_stderr")
                by_role = {role: measured.get(metric) for role, measured in values.items()}
                rows.append(_row(f"{name} · {metric}", by_role, number, "" if error is None else f"± {error:.3g}"))
    size = metrics["size"]
    for scope, title, shown in (
        ("blocks", "parameters in blocks", "{:,}".format),
        ("block_bytes", "bytes of these", filesize.decimal),
        ("model", "parameters in all", "{:,}".format),
        ("bytes", "bytes of these", filesize.decimal),
        ("kv_bytes_per_token", "KV cache bytes a token", "{:,}".format),
        ("kv_bytes_4096", "KV cache at 4,096 tokens", filesize.decimal),
    ):
        values = size.get(scope, {})
        if any(values.values()):
            removed = values.get("ratio")
            rows.append(_row(title, values, shown, less(removed) if removed else ""))
    out = console()
    out.print(table(target, ["", "compressed", "dense", ""], rows))
    if "asked_ratio" in size:
        out.print(
            f"Asked: {size['asked_ratio']:.2%} of {share_of(size['ratio_of'])}; reached: {size['reached_ratio']:.2%}."
        )


def _row(title: str, values: Mapping[str, Any], shown: Callable[[Any], str], note: str) -> list[str]:
    cells = [shown(values[role]) if values.get(role) is not None else "–" for role in ("compressed", "dense")]
    return [title, *cells, note]


def print_demo(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the demo's table."""
    if as_json:
        print_json({"demo": rows})
        return
    size = rows[0]["size"]
    body = [
        [
            "dense",
            number(rows[0]["perplexity"]["dense"]),
            f"{size['blocks']['dense']:,}",
            filesize.decimal(size["block_bytes"]["dense"]),
            "0 %",
        ]
    ]
    body += [
        [
            row["method"],
            number(row["perplexity"]["compressed"]),
            f"{row['size']['blocks']['compressed']:,}",
            filesize.decimal(row["size"]["block_bytes"]["compressed"]),
            f"{row['reached_ratio']:.2%}",
        ]
        for row in rows
    ]
    console().print(f"Perplexity on held-out Python documentation ({rows[0]['perplexity']['tokens']:,} tokens)")
    console().print(table("", ["method", "perplexity", "parameters in blocks", "bytes", "removed"], body))
    console().print(
        f"The checkpoints are in {Path(rows[0]['run']).parent}; look into one with: lrc show {rows[-1]['run']}"
    )


def print_refreshed(found: dict[str, Any], as_json: bool) -> None:
    """Say what became of a checkpoint's model code."""
    if as_json:
        print_json(found)
        return
    state = "is now that of this version" if found["refreshed"] else "is that of this version already"
    console().print(f"{found['file']} {state}.")
    if found["kept"]:
        console().print(f"What was there is kept as {found['kept']}.")
