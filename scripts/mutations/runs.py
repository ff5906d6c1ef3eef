"""Mutations of a run: what was edited, damaged, taken away or planted in it is refused, or ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mutations import damage
from mutations.place import HELDOUT, NOT_DENSE, RUNS, TEXT, Check, Mutation, Place, Said, Step, json_of
from mutations.truth import every, same_logits, unlike

JSONS = ("scores/manifest.json", "stats/manifest.json", "model/manifest.json", "run.json", "scores/ranks.json",
"model/lowrank.json", "model/config.json", "eval/metrics.json", "eval/*/manifest.json",
"eval/*/metrics.json")  # fmt: skip
# What is made anew from the rest, so that a damaged one may go.
REPLACEABLE = ("stats/", "scores/", "eval/", "run.json", "cost.json", ".lock", "model/")


def taken(place: Place) -> tuple[str, Path]:
    """Copy a finished run, with what it was made from; its name and its path."""
    name = place.rng.choice(sorted(RUNS))
    run = place.take(name, "run")
    place.take(HELDOUT)
    for parent, folders, files in os.walk(run):
        for file in (*files, *folders):
            path = os.path.join(parent, file)
            relative = os.path.relpath(path, run)
            edited = relative not in ("scores/ranks.json", "recipe.yaml")
            if edited and relative.startswith(REPLACEABLE):
                place.loose.add(path)
    return name, run


def pristine_bytes(
    place: Place, name: str, parts: Sequence[str] = ("scores", "model"), *, ranks: bool = False
) -> Check:
    """Compare parts of a run with what they were, but for ranks that were edited."""

    def check(said: Said) -> str | None:
        for part in parts:
            for path in sorted((place.template / name / part).rglob("*")):
                relative = path.relative_to(place.template / name)
                here = Path("run") / relative
                if relative.name in ("ranks.json", "manifest.json") or (ranks and part == "model"):
                    continue
                if not here.is_file() or here.read_bytes() != path.read_bytes():
                    return f"{said_ok(said)}, but {relative} is not what it was"
        return None

    return check


def said_ok(said: Said) -> str:
    """The last line that a command printed."""
    return f"it succeeded ({(said.out.strip().splitlines() or [''])[-1][:80]})"


def same_metrics(place: Place, name: str) -> Check:
    """Compare an evaluation with that of the run as it was."""

    def check(said: Said) -> str | None:
        expected = json.loads((place.template / f"{name}.metrics.json").read_text())["perplexity"][HELDOUT]
        (got,) = json_of(said)["perplexity"].values()
        for role in ("compressed", "dense"):
            if role in got and (wrong := unlike(f"{role} perplexity", got[role], expected[role])):
                return wrong
        return None

    return check


def same_report(place: Place, name: str) -> Check:
    """Compare `lrc show --json` with that of the run as it was."""

    def check(said: Said) -> str | None:
        expected = json.loads((place.template / f"{name}.show.json").read_text())
        got = json_of(said)
        # The spectra of bases that are gone or damaged are left out.
        expected["spectra"] = {name: expected["spectra"].get(name) for name in got["spectra"]}
        return None if got == expected else "it shows something else than before"

    return check


def same_export(place: Place, name: str) -> Check:
    """Compare a dense export with that of the run as it was."""

    def check(said: Said) -> str | None:
        if name in NOT_DENSE:
            return "it was exported, though no dense model computes the same"
        got = load_file("dense/model.safetensors")
        expected = load_file(place.template / f"{name}.dense/model.safetensors")
        wrong = [key for key in expected if key not in got or not torch.equal(got[key], expected[key])]
        return f"the dense export is another: {wrong[:3]}" if wrong or got.keys() != expected.keys() else None

    return check


def is_cast(said: Said) -> str | None:
    """Make sure that the final checkpoint of a run is the one that was cast last."""
    dtype = json_of(said)["dtype"]
    return None if dtype == "bfloat16" else f"the final checkpoint is {dtype}"


def again(place: Place, name: str, *more: str) -> tuple[str, ...]:
    """The command that made the run."""
    return place.again(name, "run", *more)


def steps(place: Place, name: str, *, ranks: bool = False, base: bool = False) -> list[Step]:
    """One or two commands on the run.

    Parameters
    ----------
    ranks
        The ranks were edited, so that another checkpoint may come out of them.
    base
        What the run was made from was edited, so that another run may be right with --overwrite.
    """
    rng = place.rng
    whole = pristine_bytes(place, name, ranks=ranks)
    model = pristine_bytes(place, name, ("model",))  # all that is read of a run to cast it
    consistent = same_logits(Path("run/model"), Path("dense"))
    intact = every(whole, same_export(place, name)) if not (ranks or base) else consistent
    looks: list[Step] = [
        Step(place.eval("run"), None if ranks else same_metrics(place, name)),
        Step(("verify", "run"), None if base else whole),
        Step(("verify", "run", "--json"), None if base else whole),
        Step(("show", "run", "--json"), None if ranks else same_report(place, name)),
        Step(("export", "run", "--dense", "dense"), None if ranks else same_export(place, name)),
        Step(place.eval("run/model"), None),
    ]
    works: list[list[Step]] = [
        [Step(again(place, name), None if base else whole), Step(("export", "run", "--dense", "dense"), intact)],
        [Step(again(place, name, "--overwrite"), None if base or ranks else whole), Step(("export", "run", "--dense",
        "dense"), consistent if base or ranks else intact)],
        [Step(("score", "run")), Step(("factorize", "run")), Step(("export", "run", "--dense", "dense"), intact)],
        [Step(("factorize", "run"), None if base else whole), Step(("verify", "run"))],
        [Step(("factorize", "run", "--overwrite")), Step(("export", "run", "--dense", "dense"), consistent)],
        [Step(("score", "run", "--overwrite")), Step(("factorize", "run", "--overwrite")), Step(("verify", "run"))],
        [Step(("calibrate", *again(place, name)[1:]))],
        [Step(("cast", "run", "--dtype", "bfloat16"), None if base or ranks else model), Step(("show", "run", "--json"),
        is_cast), Step(("factorize", "run", "--overwrite")), Step(("cast", "run", "--dtype", "bfloat16")),
        Step(("show", "run", "--json"), is_cast)],
        [Step(("cast", "run/model", "--dtype", "float64", "--out", "cast")), Step(place.eval("cast"))],
    ]  # fmt: skip
    return [rng.choice(looks)] if rng.random() < 0.5 else rng.choice(works)


def damaged(way: Callable[..., None]) -> Mutation:
    """Damage any file of the run."""

    def mutation(place: Place) -> list[Step]:
        name, run = taken(place)
        files = sorted(path for path in run.rglob("*") if path.is_file())
        path = place.rng.choice(files)
        way(path, place.rng)
        return steps(place, name, ranks=path.name == "ranks.json")

    return mutation


def edited(place: Place) -> list[Step]:
    """Edit a JSON file of the run, or one in it by name."""
    name, run = taken(place)
    path = place.rng.choice(sorted(run.glob(place.rng.choice(JSONS))))
    within = {"manifest.json": place.rng.choice([(), ("report",), ("environment",), ("key",), ("outputs",)])}.get(
        path.name, ()
    )
    damage.json_file(path, place.rng, place.rng.choice([1, 1, 2]), within)
    return steps(place, name, ranks=path.name == "ranks.json")


def pretended(place: Place) -> list[Step]:
    """Edit a result, and make the manifest's hashes agree with it."""
    name, run = taken(place)
    part = place.rng.choice(["scores", "model"])
    manifest = json.loads((run / part / "manifest.json").read_text())
    damage.edit(manifest, place.rng)
    (run / part / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return steps(place, name)


def ranks(place: Place) -> list[Step]:
    """Edit ranks.json as a user would: other ranks, dense ones, other formats; also ones that cannot be."""
    name, run = taken(place)
    path = run / "scores/ranks.json"
    found = json.loads(path.read_text())
    for _ in range(place.rng.choice([1, 1, 3])):
        entry = found["matrices"][place.rng.choice(sorted(found["matrices"]))]
        field = place.rng.choice(["rank", "rank", "rank", "format", "shape", "extra"])
        if field == "rank":
            entry["rank"] = place.rng.choice([1, 2, 4, 8, 15, 16, 31, 32, 33, 72, 0, -1, 1.5, "4", None, True, 10**12])
        elif field == "format":
            entry["format"] = place.rng.choice(["pair", "pivot", "auto", "dense", "width", "nope", None, 3])
        elif field == "shape":
            entry["shape"] = place.rng.choice([[32], [32, 32], [16, 32], [], None, "x", [72]])
        else:
            entry["x"] = 1
    path.write_text(json.dumps(found, indent=2))
    if place.rng.random() < 0.5:
        return [
            Step(("factorize", "run")), Step(("export", "run", "--dense", "dense"),
            every(same_logits(Path("run/model"), Path("dense")), follows(found))),
            Step(("verify", "run"), must=True),
        ]  # fmt: skip
    return steps(place, name, ranks=True)


def follows(wanted: dict[str, Any]) -> Check:
    """Compare the report of a checkpoint with the ranks that were asked for."""

    def check(said: Said) -> str | None:
        report = json.loads(Path("run/model/lowrank.json").read_text())["matrices"]
        for name, entry in wanted["matrices"].items():
            if entry["rank"] is not None and entry["format"] != "dense" and report[name]["rank"] != entry["rank"]:
                return f"{name} has rank {report[name]['rank']}, asked was {entry['rank']}"
        return None

    return check


def weights(place: Place) -> list[Step]:
    """Change one number in a basis or in the checkpoint; size and time of the file stay."""
    name, run = taken(place)
    files = sorted(path for path in run.rglob("*.safetensors"))
    path = place.rng.choice(files)
    times = os.stat(path)
    tensors = load_file(path)
    key = place.rng.choice(sorted(tensors))
    flat = tensors[key].reshape(-1).clone()
    if len(flat):
        flat[place.rng.randrange(len(flat))] += 1
    tensors[key] = flat.reshape(tensors[key].shape)
    if place.rng.random() < 0.5:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\x80\x3f")
    else:
        save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return steps(place, name)


def recipe(place: Place) -> list[Step]:
    """Edit the run's recipe."""
    name, run = taken(place)
    path = run / "recipe.yaml"
    text = path.read_text()
    edits = [
        text + "# my notes\n", "# mine\n" + text, text.replace("ratio: 0.3", "ratio: 0.5"), text.replace("seed: 0",
        "seed: 1"), text.replace("method: ", "method: x"),
        text + "trust_remote_code: true\n", text.replace("trust_remote_code: false", "trust_remote_code: true"),
        text + "unknown: 1\n", "model: x\n", "", "[]\n", "my own file\n",
        text.replace("model: model", "model: ../outside"), text.replace("model: model", "model: 3"),
        text.replace("samples: 4", "samples: 5"), text.replace("device: cpu", "device: cuda"),
        "a: &a [x, x]\nb: &b [*a, *a]\n" + text, text + "? [a]\n: b\n", text.replace("\n", "\r\n"), "\ufeff" + text,
        text + "ratio: 0.4\n", text + "ratio_of: !!python/object/apply:os.system ['true']\n",
        text.replace("cap: 0.8", "cap: .nan"),
        text.replace("dtype: float32", "dtype: float16"), text.replace("calibration: calibration.txt",
        "calibration: heldout.txt"),
    ]  # fmt: skip
    path.write_text(place.rng.choice(edits))
    return steps(place, name, ranks=True, base=True)


def planted(place: Place) -> list[Step]:
    """Put files of the user's into the run; they must all be there afterwards."""
    name, run = taken(place)
    spots = [
        "",
        "model",
        "scores",
        "stats",
        "eval",
        "work",
        "model/work",
        "scores/work",
        "model/sub",
        "..",
        "eval/mine",
    ]
    names = [
        "notes.txt",
        ".git",
        "thesis.tex",
        "config.json.bak",
        "recipe.yaml.bak",
        "ranks.json.bak",
        "model.partial",
        "manifest.json.partial",
        "basis-0007.safetensors",
        "draft-00000.safetensors",
        ".lrc-notes",
        "work",
        "run.json.partial",
        "manifest.json.tmp",
        "model.safetensors.partial",
        ".lrc-abcdefgh.txt",
    ]
    for _ in range(place.rng.choice([1, 3])):
        path = run / place.rng.choice(spots) / place.rng.choice(names)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in (".git", "work"):
            path.mkdir()
            path = path / "HEAD"
        path.write_text(f"mine, in {path}")
    if place.rng.random() < 0.5:
        (
            run / place.rng.choice(["model/manifest.json", "scores/manifest.json", "run.json", "model/config.json"])
        ).unlink()
    return steps(place, name)


def links(place: Place) -> list[Step]:
    """Put links to files outside at names that are written."""
    name, run = taken(place)
    spots = [
        ".lock",
        "run.json",
        "run.json.partial",
        "recipe.yaml.partial",
        "model/manifest.json",
        "scores/ranks.json",
        "scores/manifest.json",
        "recipe.yaml",
        "model",
        "scores",
        "eval",
        "stats",
        "eval/metrics.json",
        "model/config.json",
        "model.partial",
        "work",
        "scores/basis-0000.safetensors",
        ".lrc-lock",
        "holder",
    ]
    path = run / place.rng.choice(spots)
    target = place.rng.choice(
        [place.outside / "notes.txt", place.outside / "new.txt", place.outside, Path("calibration.txt").absolute()]
    )
    if path.is_dir():
        if place.rng.random() < 0.5:
            moved = place.outside / path.name
            shutil.move(path, moved)
            target = moved
        else:
            shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    place.loose.add(str(path))
    return steps(place, name, ranks=path.name in ("ranks.json", "scores"), base=path.name == "recipe.yaml")


def part_gone(place: Place) -> list[Step]:
    """Take whole parts of the run away, as an interrupted copy would."""
    name, run = taken(place)
    spots = [
        "model",
        "scores",
        "stats",
        "eval",
        "run.json",
        "model/manifest.json",
        "scores/manifest.json",
        "stats/manifest.json",
        "recipe.yaml",
        "scores/ranks.json",
        "model/model.safetensors",
        ".lock",
    ]
    for spot in place.rng.sample(spots, place.rng.choice([1, 1, 2, 4])):
        path = run / spot
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # What is not there is no damage: the run may not have got that far.
    gone = not (run / "model" / "manifest.json").exists() or not (run / "scores" / "manifest.json").exists()
    found = steps(place, name)
    return [Step(one.words) if gone and one.words[0] == "verify" else one for one in found]


def of_another(place: Place) -> list[Step]:
    """Replace part of the run by that of another run."""
    name, run = taken(place)
    other = place.rng.choice(sorted(set(RUNS) - {name}))
    spot = place.rng.choice(
        [
            "model",
            "scores",
            "stats",
            "run.json",
            "recipe.yaml",
            "model/manifest.json",
            "scores/manifest.json",
            "scores/ranks.json",
            "scores/basis-*",
            "model/model.safetensors",
            "model/config.json",
            "eval",
        ]
    )
    for source in sorted((place.template / other).glob(spot)):
        target = run / source.relative_to(place.template / other)
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    edited_ranks = spot in ("scores", "scores/ranks.json", "model", "recipe.yaml")
    return steps(place, name, ranks=edited_ranks, base=spot == "recipe.yaml")


def base_changed(place: Place) -> list[Step]:
    """Change the checkpoint or the text that the run was made from, or take it away."""
    name, run = taken(place)
    place.loose.add(str(run / "scores" / "ranks.json"))  # nobody edited them
    rng, model = place.rng, Path(RUNS[name].model)
    way = rng.choice(["weight", "config", "tokenizer", "text", "gone", "text gone", "moved", "code"])
    path = model / "model.safetensors"
    if way == "weight":
        times = os.stat(path)
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\x80\x3f")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif way == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif way == "tokenizer":
        damage.flip(model / "tokenizer.json", rng)
    elif way == "text":
        Path(TEXT).write_text("other " * 500)
    elif way == "gone":
        shutil.rmtree(model)
    elif way == "text gone":
        Path(TEXT).unlink()
    elif way == "moved":
        os.rename(model, "elsewhere")
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "own.py").write_text(f"open({str(place.outside.resolve() / 'ran')!r}, 'w')\n")
        (model / "config.json").write_text(
            json.dumps(
                config
                | {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
            )
        )
        recipe_path = Path("run/recipe.yaml")
        recipe_path.write_text(recipe_path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    return steps(place, name, base=True, ranks=True)


def memo(place: Place) -> list[Step]:
    """Damage the memory of hashes in the user's cache."""
    name, _ = taken(place)
    home = Path(os.environ["XDG_CACHE_HOME"]) / "lowrank_compress"
    home.mkdir(parents=True)
    path = home / "hashes.json"
    values: list[Any] = [{}, [], None, {"x": 1}, {"x": "y"}, 3]
    path.write_text(json.dumps(place.rng.choice(values)))
    if place.rng.random() < 0.7:
        damage.any_file(path, place.rng)
    return steps(place, name)


def exports(place: Place) -> list[Step]:
    """Export over something that must not be lost."""
    name, _ = taken(place)
    rng, base = place.rng, RUNS[name].model
    more = ("--overwrite",) if rng.random() < 0.7 else ()
    for target in ("theirs", "theirs/.git", "dense.partial"):
        Path(target).mkdir()
        (Path(target) / "thesis.tex").write_text("mine")
    if rng.random() < 0.7:
        shutil.copyfile(f"{base}/config.json", "theirs/config.json")
    if rng.random() < 0.3:
        shutil.copyfile(f"{base}/config.json", "config.json")
    Path("link").symlink_to(place.outside)
    goals = [
        "theirs",
        base,
        "run",
        "run/model",
        "run/dense",
        "",
        ".",
        "..",
        "link",
        "dense",
        HELDOUT,
        "run/..",
        "x/y/z",
        "../outside",
        "run/scores",
        "new\nline",
        "a" * 300,
        "/proc/x",
        "\udcff",
        "theirs/.git",
        "dense.partial",
        "../home",
    ]
    source = rng.choice(["run", "run/model", base])
    target = rng.choice(goals)
    found = [Step(("export", source, "--dense", target, *more))]
    if target == "dense" and source != base:
        found = [
            Step(found[0].words, same_export(place, name)),
            Step(
                ("export", source, "--dense", target, "--overwrite"),
                same_export(place, name),
                must=name not in NOT_DENSE,
            ),
        ]
    return found


def expectations(place: Place) -> list[Step]:
    """Edit what a run is expected to come out as, or what it is made from: the check sees it."""
    name, _ = taken(place)
    rng = place.rng
    expected = place.take(f"{name}.expected.json", "expected.json")
    way = rng.choice(["none", "file", "json", "json", "weight", "text", "write", "write"])
    command = (*place.again(name, "again"), "--check", "expected.json")
    if way == "write":
        goals = [
            *(
                HELDOUT,
                "run/recipe.yaml",
                "run/model/config.json",
                f"{RUNS[name].model}/config.json",
                "new/e.json",
                "run",
                "link",
            ),
            *("expected.json", "/dev/null", "", ".", "a" * 300),
        ]
        Path("link").symlink_to(place.outside / "notes.txt")
        place.loose |= {"link", "expected.json"}
        return [Step(("verify", "run", "--write", rng.choice(goals), *rng.choice([(), ("--overwrite",)])))]
    if way == "none":
        return [Step(command, must=True)]
    if way == "file":
        damage.any_file(expected, rng)
    elif way == "json":
        damage.json_file(expected, rng)
    elif way == "weight":
        with (Path(RUNS[name].model) / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\x80\x3f")
    else:
        Path(TEXT).write_text(Path(TEXT).read_text()[:-500])
    pristine = (place.template / f"{name}.expected.json").read_bytes()
    more = rng.choice([(), ("--tolerance", "1e-4"), ("--tolerance", "inf"), ("--tolerance", "-1")])

    def check(said: Said) -> str | None:
        same = expected.is_file() and expected.read_bytes() == pristine and way in ("file", "json")
        unread = way == "text" and name == "run-svd"
        return None if same or unread else "it comes out as expected, though something was changed"

    return [Step((*command, *more), check)]


def renewed(place: Place) -> list[Step]:
    """Renew a checkpoint's own code, whatever is in its place."""
    name, run = taken(place)
    code = run / "model/modeling_lowrank.py"
    original = code.read_bytes()
    if place.rng.random() < 0.7:
        damage.any_file(code, place.rng)
    target = place.rng.choice(["run", "run", "run/model", RUNS[name].model, "nowhere", HELDOUT])

    def check(said: Said) -> str | None:
        return None if code.is_file() and code.read_bytes() == original else "the code is not this version's"

    return [Step(("refresh", target), check), Step(("verify", "run"), must=True)]


MUTATIONS: dict[str, Mutation] = {
    **{f"file: {name}": damaged(way) for name, way in damage.FILE.items()},
    "edited": edited,
    "edited again": edited,
    "edited again again": edited,
    "manifest": pretended,
    "ranks": ranks,
    "ranks again": ranks,
    "weights": weights,
    "recipe": recipe,
    "recipe again": recipe,
    "planted": planted,
    "planted again": planted,
    "links": links,
    "links again": links,
    "part gone": part_gone,
    "of another": of_another,
    "base changed": base_changed,
    "memo": memo,
    "expectations": expectations,
    "expectations again": expectations,
    "renewed": renewed,
    "exports": exports,
    "exports again": exports,
}
