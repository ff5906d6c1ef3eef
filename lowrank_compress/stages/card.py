"""The model card of a compressed checkpoint, made of its lowrank.json; nothing in it depends on when or where."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lowrank_compress.stages.naming import collective, place_of, shortened

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModel": "feature-extraction",
}
PEFT_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModel": "FEATURE_EXTRACTION",
}


def model_card(report: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> str:
    """Make the README.md of a checkpoint.

    Parameters
    ----------
    report
        Its lowrank.json.
    metrics
        What was measured of it: metrics.json of all evaluations of a run; None for nothing.
    """
    about = report.get("about", {})
    measured = list(measurements(metrics)) if metrics else []
    if "reached_ratio" not in report:
        return _of_dense(report, about)
    header = _metadata(report, about, measured)
    parts = [
        f"---\n{header}\n---\n",
        f"# {_title(about)}\n",
        _summary(report, about),
        _loading(about),
        _sizes(report),
        _quantized(report),
        _table(measured),
        _recipe(report),
        _limits(about, bool(measured)),
    ]
    return "\n".join(part for part in parts if part)


def _of_dense(report: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Make the card of a dense checkpoint whose weights are quantized, and nothing else of it is changed."""
    title = f"{about['base_model']}, quantized" if "base_model" in about else "A quantized checkpoint"
    header = _metadata(report, about, [], ("quantized",))
    loading = f"## Use\n\n{_snippet(about, report['quantize']['format'] == 'lowrank')}"
    return "\n".join([f"---\n{header}\n---\n", f"# {title}\n", _quantized(report), loading, _limits(about, False)])


def beside_in_words(said: Mapping[str, Any]) -> str:
    """Say what quantized layers have beside their codes, from the report of the quantization; nothing where nothing."""
    if (beside := said.get("beside")) is None:
        return ""
    parts = ["scales that shift outliers of activations to weights"] if beside["smooth"] else []
    if beside["rank"]:
        some = f" of {beside['products']:,} layers" if "products" in beside else ""
        parts.append(f"a product of rank {beside['rank']}{some}")
    if beside["outliers"] is not None:
        parts.append(f"{beside['outlier_columns']:,} of {beside['columns']:,} input columns in two bytes a number")
    held = f" Beside the codes there are {', and '.join(parts)}; they count." if parts else ""
    bits = beside["activation_bits"]
    return held + (f" What enters a layer is rounded to {bits} bits, token by token." if bits else "")


def counted_in_words(said: Mapping[str, Any]) -> str:
    """Say what a quantization counts, from its report."""
    head = said.get("head")
    return "All weights inside the blocks" + (
        "" if head is None else f" and those of the head, in {head['bits']} bits,"
    )


def _quantized(report: Mapping[str, Any]) -> str:
    """Say how many bits the weights have, where they are quantized."""
    if (said := report.get("quantize")) is None:
        return ""
    return f"""## Quantized

The {said["weights"]:,} weights of its linear layers take {said["bits_per_weight"]:.2f} bits each, scales included
(`lrc quantize`, rounding `{said["rounding"]}`). {counted_in_words(said)} take {said["stored_bytes"]:,} bytes, of
the original's {said["original_bytes"]:,}.{beside_in_words(said)}
"""


def _title(about: Mapping[str, Any]) -> str:
    return f"{about['base_model']}, low-rank" if "base_model" in about else "A low-rank compressed checkpoint"


def _metadata(
    report: Mapping[str, Any],
    about: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]],
    tags: Sequence[str] = ("low-rank", "lowrank_compress"),
) -> str:
    """Return the card's header in YAML, as the hub reads it."""
    pipeline = (
        "sentence-similarity" if about.get("sentence_transformers") else PIPELINES.get(about.get("auto_class", ""))
    )
    results = [
        EvalResult(
            task_type=pipeline or "text-generation",
            dataset_type=row["kind"],
            dataset_name=row["name"],
            metric_type=row["metric"],
            metric_value=row["compressed"],
        )
        for row in measured
    ]
    base = about.get("base_model")
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        datasets=about.get("datasets"),
        language=about.get("language"),
        library_name="sentence-transformers" if about.get("sentence_transformers") else "transformers",
        pipeline_tag=pipeline,
        tags=list(tags),
        model_name=(f"{base} {report['method']}" if base else f"low-rank {report['method']}") if results else None,
        eval_results=results or None,
        **about.get("licence", {}),
    )
    return data.to_yaml().strip()


def _summary(report: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    where = "inside the blocks" if report["ratio_of"] == "blocks" else "of the model"
    base = about.get("base_model")
    of = f"[{base}](https://huggingface.co/{base}) compressed. " if base else ""
    change = report["reached_ratio"]
    what = f"of the parameters {where} were removed" if change >= 0 else f"more parameters {where} are stored"
    text = f"{of}Method `{report['method']}`: {abs(change):.2%} {what}\n"
    text += f"({report['claimed_elements']:,} weights inside the blocks became {report['stored_elements']:,} stored "
    text += "elements)"
    if "reached_ratio_bytes" in report:
        text += f", and\n{abs(report['reached_ratio_bytes']):.2%} {'of their' if change >= 0 else 'more'} bytes "
        text += f"({report['claimed_bytes']:,} became {report['stored_bytes']:,})"
    text += ".\n"
    if cache := report.get("cache"):
        text += f"\nThe key-value cache keeps {cache['kept']:,} numbers a token in the place of {cache['dense']:,}"
        text += f", and exact keys\nand values of the last {cache['window']:,} tokens.\n" if cache["window"] else ".\n"
    return text


def _snippet(about: Mapping[str, Any], ours: bool = True) -> str:
    """Show how a checkpoint is loaded: one of `ours`, or a stock one of quantized weights."""
    auto, place = about.get("auto_class", "AutoModelForCausalLM"), '"path/to/this/checkpoint"'
    lines = [] if ours else ["# pip install compressed-tensors"]
    if about.get("sentence_transformers"):
        lines += ["from sentence_transformers import SentenceTransformer", ""]
        lines += [f"model = SentenceTransformer({place}{', trust_remote_code=True' if ours else ''})"]
    else:
        lines += ["import lowrank_compress  # or pass trust_remote_code=True below"] if ours else []
        lines += [f"from transformers import {auto}", "", f"model = {auto}.from_pretrained({place})"]
    return "\n".join(["```python", *lines, "```\n"])


def _loading(about: Mapping[str, Any]) -> str:
    auto = about.get("auto_class", "AutoModelForCausalLM")
    task = f', task_type="{PEFT_TASKS[auto]}"' if auto in PEFT_TASKS else ""
    return f"""## Use

{_snippet(about)}
`config.json` says how each layer is stored; `lowrank.json` is a report for people. Adapters of
[peft](https://huggingface.co/docs/peft) go onto the factors: `LoraConfig(target_modules="all-linear"{task})`.
"""


def _sizes(report: Mapping[str, Any]) -> str:
    """Say what each kind of matrix, or module, keeps over all blocks."""
    found = {name: collective(place_of(name)[1]) for name in report["matrices"]}
    names, kinds = shortened(found.values()), dict[str, list[Mapping[str, Any]]]()
    for name, matrix in report["matrices"].items():
        kinds.setdefault(names[found[name]], []).append(matrix)
    lines = ["| matrix or module | number | kept | stored as |", "|---|---:|---:|---|"]
    for kind, matrices in kinds.items():
        stored, dense = (sum(each[what] for each in matrices) for what in ("stored", "dense"))
        kept = f"{stored / dense:.1%}" if dense else f"{stored:,} more"
        counts = Counter(each["format"] for each in matrices)
        formats = ", ".join(f"{name} ({n}×)" for name, n in sorted(counts.items()))
        lines.append(f"| `{kind}` | {len(matrices)} | {kept} | {formats} |")
    return "## What is stored\n\n" + "\n".join(lines) + "\n"


def measurements(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what was measured: once for each text, table or metric of a task, in a fixed order.

    Parameters
    ----------
    metrics
        ``evaluations``, by id: what `lrc eval --json` prints of each.

    Yields
    ------
    dict
        ``metric``, ``name``, ``amount``, ``kind`` (the name as the hub takes it), and the values of ``compressed`` and
        ``dense``, the latter where it was measured.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for _, found in sorted(metrics["evaluations"].items()):
        for kind, metric in (("perplexity", "perplexity"), ("classification", "accuracy")):
            for name, values in found[kind].items():
                short = name.removeprefix("hf:") if name.startswith("hf:") else Path(name).name
                for each, measured in values.get("metrics", {metric: values}).items():
                    row = {"kind": _slug(short), "name": short, "metric": each}
                    rows[each, short, _amount(values)] = row | measured
        for name, values in found.get("sts", {}).items():
            row = {"kind": _slug(Path(name).name), "name": Path(name).name, "metric": "spearmanr"}
            rows[row["metric"], row["name"], _amount(values)] = row | values
            if values["cosine"] is not None:
                near = row | {"metric": "cosine to dense", "compressed": values["cosine"]}
                rows[near["metric"], near["name"], _amount(values)] = near
        for task, values in found["tasks"].items():
            for metric in values.get("compressed", {}):
                if "stderr" not in metric:
                    both = {role: measured.get(metric) for role, measured in values.items()}
                    rows[metric, task, ""] = {"kind": _slug(task), "name": task, "metric": metric, **both}
    for key in sorted(rows):
        if isinstance(rows[key].get("compressed"), int | float):
            yield rows[key] | {"amount": key[2]}


def _amount(values: Mapping[str, Any]) -> str:
    return f"{values['tokens']:,} tokens" if "tokens" in values else f"{values.get('n', 0):,} examples"


def _slug(name: str) -> str:
    return re.sub(r"[^\w./-]+", "-", name)


def _table(measured: Sequence[Mapping[str, Any]]) -> str:
    if not measured:
        return ""
    lines = ["| | | this checkpoint | dense original |", "|---|---|---:|---:|"]
    for row in measured:
        cells = [
            f"{row[role]:.4g}" if isinstance(row.get(role), int | float) else "–" for role in ("compressed", "dense")
        ]
        name = row["name"].replace("|", "\\|")
        lines.append(f"| {row['metric']} | {name} {row['amount']} | {cells[0]} | {cells[1]} |")
    return "## Measured\n\n" + "\n".join(lines) + "\n"


def _recipe(report: Mapping[str, Any]) -> str:
    lines = {
        "method": report["method"],
        "ratio asked": f"{report['asked_ratio']:.2%} of the {'blocks' if report['ratio_of'] == 'blocks' else 'model'}",
        "plan": report.get("plan"),
        "dtype": report["dtype"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)
    return f"## Recipe\n\n| | |\n|---|---|\n{rows}\n\nMade with lowrank_compress, `lrc compress`.\n"


def _limits(about: Mapping[str, Any], measured: bool) -> str:
    licence = "The licence of the original holds for it. " if about.get("licence") or about.get("licence_files") else ""
    untold = "" if measured else "Nothing was measured of this copy when the card was written. "
    return f"""## Limits

A compressed model is worse than its original, and most so on text that is unlike what it was calibrated on: measure it
on your own. {untold}What holds for the original, its biases too, holds for it. {licence}
""".replace(" \n", "\n")
