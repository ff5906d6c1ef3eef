"""Mutations of options and recipes: what is taken is written down as it was given, and does what it says."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import typer
import yaml

from lowrank_compress.cli.main import app
from mutations import damage
from mutations.place import FEW, HELDOUT, TABLE, TEXT, Check, Mutation, Place, Said, Step, json_of
from mutations.truth import every, load, same_logits, same_perplexity

NASTY = (
    "", " ", "0", "1", "-1", "2", "0.0", "0.5", "-0.5", "1.0", "1e-9", "1e9", "1e400", "nan", "inf", "-inf",
    str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000, "1_000", "0x10",
    "1,5", "٣", "True", "null", "~", "x", "auto", "a\nb", "\udcff", "é漢", "x" * 300, "x" * 5000, "[red]x[/]", "{}",
    "-", "--", "../outside", "nowhere/at/all", "0.3.1", "8GB", "-8GB", "8 parsecs", "0GB", "1e3GB", "cpu", "cuda",
    "cuda:99", "meta", "mps", "cpu:0", "CPU",
    "float32", "float64", "bfloat16", "int8", "torch.float32", "svd", "svd|kfac", "|", "svd|", "dense",
    "kfac|nystrom", "cr", "nystrom", "vo-svd", "modegpt", "welore", "uniform", "loss", "block-influence", "pair",
    "pivot", "blocks", "model", "gram", "SVD", "fwsvd", "asvd", "afm", "svd-llm",
)  # fmt: skip
LIKELY: dict[str, tuple[str, ...]] = {
    "ratio": ("0.01", "0.1", "0.3", "0.5", "0.8", "0.95", "0.999", "0", "1", "1e-12"),
    "method": ("auto", "svd", "svd-llm", "kfac", "fwsvd", "asvd", "afm", "modegpt", "nystrom", "cr", "vo-svd",
    "svd|kfac", "dense"),
    "attention": ("svd", "dense", "cr", "kfac", "nystrom"),
    "qk": ("svd", "dense", "cr", "vo-svd", "kfac|cr"),
    "vo": ("svd", "dense", "vo-svd", "cr", "kfac|vo-svd"),
    "mlp": ("svd", "dense", "nystrom", "kfac|nystrom"),
    "methods": ("mlp=svd", "down=dense", "*.0.*=dense", "qk=cr", "*.mlp.*=nystrom", "up=nystrom", "head=svd"),
    "metric": ("gram", "kfac"),
    "allocate": ("uniform", "loss", "welore", "block-influence"),
    "storage": ("pair", "pivot", "auto"),
    "ratio_of": ("blocks", "model"),
    "samples": ("1", "3", "100", "10000000"),
    "seq_len": ("8", "7", "17", "160", "161", "2048"),
    "seed": ("0", "1", "4294967296", "9223372036854775807", "18446744073709551615"),
    "micro_batch": ("1", "3", "100000"),
    "damping_fisher": ("0", "1e-4", "0.99", "1"),
    "damping_gram": ("0", "1e-6", "0.99", "1"),
    "alpha": ("0.5", "1", "2", "100", "1e-300"),
    "clip": ("1", "0.1", "1e-300", "1e300"),
    "floor": ("0", "0.5", "1"),
    "temperature": ("0.01", "1", "1e-300", "1e300"),
    "cap": ("0.1", "0.5", "1", "1e-300"),
    "round_to": ("1", "2", "8", "16", "32", "64", "1000"),
    "device": ("cpu", "auto"),
    "dtype": ("float32", "float16", "bfloat16", "float64"),
    "out": ("run2", "a/b/c", "run", ".", HELDOUT, "model", "link"),
    "memory_budget": ("1GB", "1", "64MiB", "1TB"),
    "text_column": ("text",),
    "label_column": ("label",),
    "revision": ("main",),
}  # fmt: skip
GROUP: Any = typer.main.get_command(app)


def parameters(command: str) -> dict[str, Any]:
    """Options of a command that take a value, by field name."""
    return {
        parameter.name: parameter
        for parameter in GROUP.commands[command].params
        if parameter.param_type_name == "option" and not parameter.is_flag
    }


def value_of(place: Place, name: str, likely: float = 0.55) -> str:
    """A value for an option: a likely one, or one of the pool."""
    return place.rng.choice(LIKELY[name]) if name in LIKELY and place.rng.random() < likely else place.rng.choice(NASTY)


def chosen(
    place: Place, command: str, count: int, without: tuple[str, ...] = (), likely: float = 0.55
) -> tuple[list[str], dict[str, str]]:
    """Some options with values, as words and by field name."""
    known = {name: parameter for name, parameter in parameters(command).items() if name not in ("config", *without)}
    words: list[str] = []
    given: dict[str, str] = {}
    for name in place.rng.sample(sorted(known), min(count, len(known))):
        value = value_of(place, name, likely)
        option = next(o for o in known[name].opts if o.startswith("--"))
        words += [f"{option}={value}"] if place.rng.random() < 0.5 else [option, value]
        given[name] = value
    return words, given


def written_down(run: Path, given: dict[str, Any]) -> Check:
    """Compare the run's recipe with what was given."""

    def check(said: Said) -> str | None:
        there = yaml.safe_load((run / "recipe.yaml").read_text())
        for name, value in given.items():
            if name in ("out", "memory_budget", "trust_remote_code", "config") or name not in there:
                continue
            kept = there[name]
            if isinstance(kept, bool | int | float) and not isinstance(value, bool):
                if not math.isclose(float(kept), float(value), rel_tol=1e-12, abs_tol=0.0):
                    return f"{name} was {value!r}, the recipe says {kept!r}"
            elif name in ("model", "calibration", "include_path"):
                if os.path.basename(str(kept)) != os.path.basename(str(value)) and str(kept) != str(value):
                    return f"{name} was {value!r}, the recipe says {kept!r}"
            elif name == "device" and value == "auto":
                continue
            elif (kept if not isinstance(kept, dict) else "".join(f"{n}={m}" for n, m in kept.items())) != value:
                return f"{name} was {value!r}, the recipe says {kept!r}"
        return None

    return check


def keeps_budget(run: Path) -> Check:
    """At least what was asked is removed, by counting what is stored; and the checkpoint loads."""

    def check(said: Said) -> str | None:
        report = json.loads((run / "model/lowrank.json").read_text())
        if report["reached_ratio"] + 1e-12 < report["asked_ratio"]:
            return f"{report['reached_ratio']} removed, asked were {report['asked_ratio']}"
        model, _ = load(run / "model")
        stock, _ = load("model")
        blocks = sum(p.numel() for name, p in stock.named_parameters() if ".layers." in name and p.ndim >= 2)
        state = model.state_dict()
        kept = sum(t.numel() for name, t in state.items() if ".layers." in name and "norm" not in name)
        if report["ratio_of"] == "blocks" and 1 - kept / blocks + 1e-9 < report["asked_ratio"] - 0.02:
            return f"{1 - kept / blocks} is removed by counting, asked were {report['asked_ratio']}"
        return None

    return check


def compressing(place: Place) -> list[Step]:
    """Any options of `lrc compress`; in half of the cases only planned."""
    place.take("model")
    place.take(TEXT)
    place.take(HELDOUT)
    Path("link").symlink_to(place.outside)
    words, given = chosen(place, "compress", place.rng.choice([1, 1, 2, 3]))
    run = Path(given.get("out", "run"))
    fixed: list[str] = []
    for name, option, value in (
        ("method", "--method", "svd-llm"),
        ("calibration", "--calibration", TEXT),
        ("samples", "--samples", "4"),
        ("seq_len", "--seq-len", "16"),
        ("out", "--out", "run"),
        ("device", "--device", "cpu"),
    ):
        if name not in given:
            fixed += [option, value]
    command = ("compress", "model", *fixed, *words)
    if place.rng.random() < 0.3:
        return [
            Step((*command, "--dry-run", *place.rng.choice([(), ("--json",)]))),
            Step(command, every(written_down(run, given), keeps_budget(run))),
        ]
    return [
        Step(command, every(written_down(run, given), keeps_budget(run))),
        Step(("export", str(run), "--dense", "dense"), same_logits(run / "model", Path("dense"))),
    ]


def planned(place: Place) -> list[Step]:
    """What a plan says can be done can be done."""
    place.take("model")
    place.take(TEXT)
    words, given = chosen(
        place,
        "compress",
        place.rng.choice([2, 3, 4]),
        ("out", "memory_budget", "model", "calibration", "text_column", "label_column", "revision", "device"),
        likely=0.95,
    )
    fixed = [
        word
        for name, option, value in (("samples", "--samples", "4"), ("seq_len", "--seq-len", "16"))
        if name not in given
        for word in (option, value)
    ]
    command = ("compress", "model", "--calibration", TEXT, "--out", "run", "--device", "cpu", *fixed, *words)
    run = Path("run")
    return [
        Step((*command, "--dry-run", "--json"), shows_nothing(run)),
        Step(command, every(written_down(run, given), keeps_budget(run)), must=_enough(given)),
    ]


def _enough(given: dict[str, str]) -> bool:
    """Whether nothing but a mistake of the plan's could make a run fail that was planned."""
    return not {"seq_len", "samples", "dtype", "clip", "alpha", "temperature"} & given.keys()


def shows_nothing(run: Path) -> Check:
    """A plan writes nothing."""
    return lambda said: f"{run} was made by a dry run" if run.exists() else None


def evaluating(place: Place) -> list[Step]:
    """Any options of `lrc eval`."""
    place.take("model")
    place.take(HELDOUT)
    place.take(TABLE)
    words, given = chosen(place, "eval", place.rng.choice([1, 2, 3]), ("perplexity",))
    text = (place.template / HELDOUT).read_text()

    def check(said: Said) -> str | None:
        if given.get("text_column") or not json_of(said)["perplexity"]:
            return None
        seq_len, limit = int(given.get("seq_len", 160)), given.get("limit")
        return same_perplexity("model", text, seq_len, None if limit is None else int(limit))(said)

    return [
        Step(
            (
                "eval",
                "model",
                "--perplexity",
                HELDOUT,
                *(() if "device" in given else ("--device", "cpu")),
                *words,
                "--json",
            ),
            check,
        )
    ]


def other_commands(place: Place) -> list[Step]:
    """Options of the other commands, on a run."""
    place.take("run-svd-llm", "run")
    place.take(HELDOUT)
    command = place.rng.choice(["score", "factorize", "calibrate", "export", "bench", "list", "show", "verify"])
    names = [name for name in parameters(command) if name != "config"]
    words, given = chosen(place, command, place.rng.choice([1, 2]), ("dense",)) if names else ([], {})
    first = {
        "calibrate": ("model", "--calibration", TEXT, *FEW, "--out", "run3"),
        "export": ("run", "--dense", value_of(place, "out")),
        "list": (value_of(place, "method"),),
        "bench": ("run", "--rounds", "1", "--new-tokens", "2", "--batch-size", "1", "--prompt-tokens", "4"),
    }.get(command, ("run",))
    more = place.rng.choice([(), (), ("--overwrite",)]) if command in ("score", "factorize", "calibrate") else ()
    if command == "calibrate":
        given.pop("out", None)
    found = [Step((command, *first, *words, *more))]
    if command in ("score", "factorize"):
        found += [
            Step(("factorize", "run", "--overwrite"), None),
            Step(("export", "run", "--dense", "dense"), same_logits(Path("run/model"), Path("dense"))),
        ]
    return found


def unknown_words(place: Place) -> list[Step]:
    """Words that are no command, no option, or too many."""
    place.take("model")
    names = sorted(GROUP.commands)
    choices: list[tuple[str, ...]] = [
        (place.rng.choice(NASTY),), (place.rng.choice(names),), (place.rng.choice(names), place.rng.choice(NASTY)),
        (place.rng.choice(names), "--nope"), (place.rng.choice(names), "model", "model", "model"),
        ("compress", "model", "--ratio"), ("compress", "--ratio", "0.3"), ("--help",), (place.rng.choice(names),
        "--help"), ("--version",), ("eval", "model", "--json"), ("compress", "model", "--json", "--dry-run",
        "--json"), ("demo", "--ratio", place.rng.choice(["2", "nan", "x", "-1"])),
    ]  # fmt: skip
    words = place.rng.choice(choices)
    return [] if words[:1] == ("demo",) and len(words) < 2 else [Step(tuple(words))]


# Each line holds the one before nine times.
BOMB = "\n".join(f"{name}: &{name} [{','.join([f'*{before}' if before else 'x'] * 9)}]" for before, name in zip(
    ("", *"abcde"), "abcdef", strict=True)) + "\nmodel: *f"  # fmt: skip
RECIPES: tuple[str, ...] = (
    "", "# nothing", "[]", "3", "null", "model", "- model: model", "model: model\nmodel: other",
    "model: model\nunknown: 1", "model: model\nratio: &a 0.3\nseed: *a",
    BOMB,
    "model: model\n<<: {ratio: 0.4}", "? [a, b]\n: c", "? {a: b}\n: c", "1: 2", "null: 2", "true: 2",
    "model: !!python/object/apply:os.system [true]", "model: !!python/name:os.system", "model: !x y",
    "model: model\n\tratio: 0.3", "model: model\nratio: 0.3\n---\nratio: 0.4", "%YAML 9.9\n---\nmodel: model",
    "model: 2020-01-01", "model: [model]", "model: {a: b}", "model: 3", "model: true", "model: null", "model: ''",
    'model: "a\\0b"', 'model: "\\ud800"', "model: model\nratio: yes", "model: model\nratio: '0.3'",
    "model: model\nratio: .nan", "model: model\nratio: .inf", "model: model\nratio: 1e400",
    "model: model\nratio: [0.3]", "model: model\nratio: 0.3x",
    "model: model\nsamples: 1.5", "model: model\nsamples: 4.0", "model: model\nsamples: '4'",
    "model: model\nsamples: true", "model: model\nsamples: 1e1", "model: model\nsamples: 1_0",
    "model: model\nsamples: 0o17", "model: model\nsamples: 1:30", "model: model\nseed: " + "9" * 5000,
    "model: model\nseed: 18446744073709551616", "model: model\nseed: -1", "model: model\nseq_len: 2020-01-01",
    "model: model\nclip: .inf", "model: model\ntrust_remote_code: true", "model: model\ntrust_remote_code: 'yes'",
    "model: model\nmethod: null", "model: model\nmethod: [svd]", "model: model\nmethod: svd\nMethod: svd",
    "model: model\nratio-of: blocks", "model: model\nratio_of: all", "model: model\ndevice: null",
    "model: model\ndtype: float8", "model: model\nround_to: 1.0",
    "{model: model, ratio: 0.3", "model: model: model", "'" * 3, "model: |\n  model\n", "model: >-\n  model\n",
    "model:    model   # mine", "\ufeffmodel: model", "model: model\x07", "model: model\x85ratio: 0.3", "{" * 3000,
    "[" * 100_000, "a: " * 1000, "model: model\ncalibration: [calibration.txt]", "model: model\nout: run",
    "model: model\nconfig: x.yaml", "model: model\njson: true", "!!set {model}", "!!omap [model: model]",
    "!!binary aGk=", "model: !!binary bW9kZWw=", "model: !!str 3", "model: !!int '3'",
    "model: model\nratio: !!float '0.3'",
)  # fmt: skip


def recipes(place: Place) -> list[Step]:
    """Recipes of every kind."""
    place.take("model")
    place.take(TEXT)
    rng = place.rng
    text = rng.choice(RECIPES)
    usual = f"\nmethod: svd-llm\ncalibration: {TEXT}\nsamples: 4\nseq_len: 16\ndevice: cpu\n"
    if text.startswith("model: model\n") and rng.random() < 0.8:
        text = text + "".join(
            f"{line}\n" if text.endswith("\n") else f"\n{line}"
            for line in usual.split("\n")
            if line and line.split(":")[0] not in text
        )
    path = Path("r.yaml")
    path.write_bytes(
        text.encode("utf-8", "surrogatepass") if rng.random() < 0.9 else text.encode("utf-16", "surrogatepass")
    )
    if rng.random() < 0.1:
        damage.any_file(path, rng)

    def check(said: Said) -> str | None:
        try:
            given = yaml.safe_load(path.read_bytes())
        except Exception as problem:
            return f"took a recipe that YAML cannot read: {problem}"
        return every(written_down(Path("run"), given), keeps_budget(Path("run")))(said)

    command = ("compress", "--config", "r.yaml", "--out", "run")
    if rng.random() < 0.3:
        return [Step((*command, "--dry-run"))]
    return [Step(command, check), Step(("verify", "run"), must=True)]


def recipe_values(place: Place) -> list[Step]:
    """A recipe with fields of any type."""
    place.take("model")
    place.take(TEXT)
    rng = place.rng
    fields: dict[str, Any] = {
        "model": "model",
        "method": "svd-llm",
        "calibration": TEXT,
        "samples": 4,
        "seq_len": 16,
        "device": "cpu",
    }
    for name in rng.sample(
        sorted({*LIKELY, "model", "calibration", "trust_remote_code"} - {"out", "memory_budget"}), rng.choice([1, 2])
    ):
        fields[name] = rng.choice(damage.NASTY) if rng.random() < 0.7 else rng.choice(LIKELY.get(name, ("x",)))
    Path("r.yaml").write_text(json.dumps(fields))

    def check(said: Said) -> str | None:
        read = yaml.safe_load(Path("r.yaml").read_text())  # no number is infinite there
        given = {name: value for name, value in read.items() if value is not None}
        return every(written_down(Path("run"), given), keeps_budget(Path("run")))(said)

    return [Step(("compress", "--config", "r.yaml", "--out", "run"), check), Step(("verify", "run"), must=True)]


def remote_code(place: Place) -> list[Step]:
    """A recipe that grants what only the command line may: the code must not run."""
    model = place.take("model")
    config = json.loads((model / "config.json").read_text())
    Path("model/own.py").write_text(f"open({str(place.outside.resolve() / 'ran')!r}, 'w')\n")
    Path("model/config.json").write_text(
        json.dumps(
            config
            | {
                "auto_map": {
                    "AutoConfig": "own.Config",
                    "AutoModelForCausalLM": "own.Model",
                    "AutoTokenizer": ["own.T", None],
                },
                "model_type": place.rng.choice(["own", "llama"]),
            }
        )
    )
    place.take(TEXT)
    granted = place.rng.choice(["true", "yes", "1", "True"])
    Path("r.yaml").write_text(
        f"model: model\ncalibration: {TEXT}\nsamples: 4\nseq_len: 16\ntrust_remote_code: {granted}\n"
    )
    return [
        Step(
            (
                "compress",
                "--config",
                "r.yaml",
                "--out",
                "run",
                *place.rng.choice([(), ("--dry-run",), ("--no-trust-remote-code",)]),
            )
        )
    ]


def surroundings(place: Place) -> list[Step]:
    """No home, a cache that is a file, places that cannot be written."""
    place.take("model")
    place.take(TEXT)
    rng = place.rng
    way = rng.choice(
        ["no home", "home is a file", "cache is a file", "no cache", "odd threads", "out is odd", "deep out"]
    )
    out = "run"
    if way == "no home":
        os.environ.pop("HOME")
        os.environ["XDG_CACHE_HOME"] = (
            rng.choice(["relative/cache", "/proc/nowhere", ""]) if rng.random() < 0.5 else "/dev/null/x"
        )
    elif way == "home is a file":
        Path("homefile").write_text("x")
        os.environ["HOME"] = os.path.abspath("homefile")
        os.environ["XDG_CACHE_HOME"] = os.path.abspath("homefile")
    elif way == "cache is a file":
        (Path(os.environ["XDG_CACHE_HOME"]) / "lowrank_compress").write_text("x")
    elif way == "no cache":
        os.rmdir(os.environ["XDG_CACHE_HOME"])
    elif way == "odd threads":
        os.environ["OMP_NUM_THREADS"] = rng.choice(["", "x", "0", "-1", "1,2"])
    elif way == "out is odd":
        Path("file").write_text("mine")
        os.mkfifo("pipe")
        Path("loop").symlink_to("loop")
        Path("gone").symlink_to("nowhere")
        out = rng.choice(
            [
                "file",
                "file/x",
                "pipe",
                "pipe/x",
                "loop",
                "loop/x",
                "gone",
                "gone/x",
                "/proc/self/x",
                "/sys/x",
                "/dev/null",
                "/dev/null/x",
                "a" * 256,
                "a/" * 2100 + "x",
                "é" * 130,
            ]
        )
    else:
        out = "/".join(["d" * 100] * rng.choice([5, 30, 45]))
    return [Step(place.compress("model", "svd-llm", out)), Step(("verify", out), must=True)]


MUTATIONS: dict[str, Mutation] = {
    "compress": compressing,
    "compress again": compressing,
    "compress again again": compressing,
    "planned": planned,
    "planned again": planned,
    "eval": evaluating,
    "eval again": evaluating,
    "other commands": other_commands,
    "other commands again": other_commands,
    "unknown words": unknown_words,
    "recipe": recipes,
    "recipe again": recipes,
    "recipe values": recipe_values,
    "recipe values again": recipe_values,
    "remote code": remote_code,
    "surroundings": surroundings,
}
