"""Mutations of a compressed checkpoint that came without its run: it loads as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mutations import damage
from mutations.checkpoints import Tensors, added, dropped, renamed, reshaped, retyped, values
from mutations.place import HELDOUT, RUNS, Check, Mutation, Place, Said, Step, json_of
from mutations.truth import far, load, loads_with, logits, same_logits, same_perplexity, unlike

MIXTURES = sorted(name for name, made in RUNS.items() if made.model == "mixture")


def taken(place: Place, runs: Sequence[str] = sorted(RUNS)) -> tuple[str, Path]:
    """Copy the checkpoint of one of some runs, without the manifest."""
    name = place.rng.choice(runs)
    model = place.take(f"{name}/model", "compressed")
    (model / "manifest.json").unlink()
    place.take(HELDOUT)
    return name, model


def pristine(place: Place, name: str) -> Check:
    """Compare a perplexity with that of the run as it was: the layout was changed, not the weights."""

    def check(said: Said) -> str | None:
        expected = json.loads((place.template / f"{name}.metrics.json").read_text())["perplexity"][HELDOUT][
            "compressed"
        ]
        (values,) = json_of(said)["perplexity"].values()
        return unlike("perplexity", values.get("compressed"), expected)

    return check


def stock_is_pristine(place: Place, name: str, model: Path) -> Check:
    """Transformers gives the same model as before, or none."""

    def check(said: Said) -> str | None:
        try:
            found = logits(model)
        except Exception:
            return None
        expected = logits(place.template / name / "model")
        return "transformers loads another model than before" if far(found, expected, 1e-4) else None

    return check


def steps(place: Place, name: str, model: Path, *, layout: bool) -> list[Step]:
    """Measure, show or export it.

    Parameters
    ----------
    layout
        Only the quantization_config was changed, so that whatever loads must be the model as it was.
    """
    text = (place.template / HELDOUT).read_text()
    measured = pristine(place, name) if layout else same_perplexity(model, text)
    also = [Step(("list", "methods"), stock_is_pristine(place, name, model))] if layout else []
    return also + place.rng.choice(
        [
            [Step(place.eval("compressed"), measured, loads_with(model, text))],
            [Step(place.eval("compressed"), measured, loads_with(model, text))],
            [
                Step(
                    ("export", "compressed", "--dense", "dense"), same_logits(model, Path("dense")), lambda: load(model)
                )
            ],
            [Step(("show", "compressed", "--json"))],
            [Step(place.compress("compressed", "svd"))],
        ]
    )


def layout(*within: str, runs: Sequence[str] = sorted(RUNS)) -> Mutation:
    """Edit the quantization_config at random."""

    def mutation(place: Place) -> list[Step]:
        name, model = taken(place, runs)
        path = model / "config.json"
        config = json.loads(path.read_text())
        damage.edit(config, place.rng, ("quantization_config", *within))
        path.write_text(damage.dump(config))
        return steps(place, name, model, layout=True)

    return mutation


def known(change: Callable[[dict[str, Any], Place], None]) -> Mutation:
    """Edit the quantization_config on purpose."""

    def mutation(place: Place) -> list[Step]:
        name, model = taken(place)
        path = model / "config.json"
        config = json.loads(path.read_text())
        change(config, place)
        path.write_text(damage.dump(config))
        return steps(place, name, model, layout=True)

    return mutation


def whole(config: dict[str, Any], place: Place) -> None:
    """Replace or remove it, or claim a future version."""
    found = config["quantization_config"]
    choices: list[Any] = [
        None,
        [],
        {},
        "lowrank",
        3,
        {"quant_method": "lowrank"},
        found | {"version": 2},
        found | {"version": "1"},
        found | {"version": None},
        found | {"quant_method": "fp8"},
        found | {"factor_quantization": {"bits": 8}},
        found | {"new": 1},
        found | {"modules": None},
        found | {"modules": []},
        found | {"attention": 3},
        found | {"dense_shapes": {"x": [1, 2]}},
    ]
    config["quantization_config"] = place.rng.choice(choices)
    if place.rng.random() < 0.2:
        del config["quantization_config"]


def parts(config: dict[str, Any], place: Place) -> None:
    """Edit one module's parts."""
    modules = config["quantization_config"]["modules"]
    if not modules:
        return whole(config, place)
    entry = modules[place.rng.choice(sorted(modules))]
    part = place.rng.choice(entry["parts"])
    ways: list[Callable[[], Any]] = [
        lambda: part.update(format=place.rng.choice(["pair", "pivot", "dense", "x", None])),
        lambda: part.update(
            rank=place.rng.choice([1, part["rank"] + 1, part["rank"] - 1, 0, -1, 10**9, 1.0, "3", None, True])
        ),
        lambda: part.update(rows=place.rng.choice([1, part["rows"] + 1, 0, None])),
        lambda: entry.update(heads=place.rng.choice([2, 4, 0, -1, "1"])),
        lambda: entry.update(bias=place.rng.choice([not entry["bias"], None, 1, "no"])),
        lambda: entry["parts"].append(dict(part)),
        lambda: entry.update(parts=[]),
        lambda: entry.update(in_features=entry["in_features"] + 1),
        lambda: modules.update({"model.layers.9.x": entry}),
        lambda: modules.update({"model.norm": entry}),
        lambda: modules.pop(place.rng.choice(sorted(modules))),
    ]
    place.rng.choice(ways)()


def attention(config: dict[str, Any], place: Place) -> None:
    """Edit one attention's entry."""
    found = config["quantization_config"].get("attention") or {}
    if not found:
        return whole(config, place)
    entry = found[place.rng.choice(sorted(found))]
    field = place.rng.choice(sorted(entry))
    value: Any = entry[field]
    choices: list[Any] = [None, "x", [], not value, 0, -1]
    if field == "projections":
        choices = [{}, value | {"q": value["k"]}, value | {"k": value["v"], "v": value["k"]}, value | {"o": "x"}]
    elif isinstance(value, int):
        choices = [value + 1, value - 1, value * 2, value + 2, 0, not value, None, float(value)]
    entry[field] = place.rng.choice(choices)
    return None


def outside_layout(place: Place) -> list[Step]:
    """Edit config.json outside of the quantization_config."""
    name, model = taken(place)
    path = model / "config.json"
    config = json.loads(path.read_text())
    kept = config.pop("quantization_config")
    damage.edit(config, place.rng)
    path.write_text(damage.dump(config | {"quantization_config": kept}))
    return steps(place, name, model, layout=False)


def on_tensors(change: Callable[..., object], runs: Sequence[str] = sorted(RUNS)) -> Mutation:
    """Change the tensors."""

    def mutation(place: Place) -> list[Step]:
        name, model = taken(place, runs)
        tensors: Tensors = load_file(model / "model.safetensors")
        change(tensors, place.rng)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"}
        )
        return steps(place, name, model, layout=False)

    return mutation


def indices(tensors: Tensors, rng: Any) -> None:
    """Change pivot indices."""
    names = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()) or sorted(tensors)
    name = rng.choice(names)
    tensor = tensors[name].clone().reshape(-1)
    if tensor.is_floating_point():
        return values(tensors, rng)
    tensor[rng.randrange(len(tensor))] = rng.choice([0, 1, -1, 31, 32, 10**6, 2**31 - 1])
    tensors[name] = tensor.reshape(tensors[name].shape)
    return None


def on_file(way: Callable[..., None]) -> Mutation:
    """Damage a file."""

    def mutation(place: Place) -> list[Step]:
        name, model = taken(place)
        way(place.rng.choice(sorted(model.iterdir())), place.rng)
        return steps(place, name, model, layout=False)

    return mutation


MUTATIONS: dict[str, Mutation] = {
    "layout: any": layout(),
    "layout: any again": layout(),
    "layout: modules": layout("modules"),
    "layout: attention": layout("attention"),
    "layout: dense shapes": layout("dense_shapes"),
    "layout: whole": known(whole),
    "layout: parts": known(parts),
    "layout: parts again": known(parts),
    "layout: heads": known(attention),
    "layout: heads again": known(attention),
    "config": outside_layout,
    "config again": outside_layout,
    "tensors: dtype": on_tensors(retyped),
    "tensors: shape": on_tensors(reshaped),
    "tensors: names": on_tensors(renamed),
    "tensors: missing": on_tensors(dropped),
    "tensors: extra": on_tensors(added),
    "tensors: values": on_tensors(values),
    "tensors: indices": on_tensors(indices),
    **{f"file: {name}": on_file(way) for name, way in damage.FILE.items()},
    "layout: experts": layout("experts", runs=MIXTURES),
    "layout: routers": layout("routers", runs=["run-pruned"]),
    "layout: merged": layout("merged", runs=["run-merged"]),
    "experts: missing": on_tensors(dropped, MIXTURES),
    "experts: shape": on_tensors(reshaped, MIXTURES),
    "experts: indices": on_tensors(indices, ["run-pruned", "run-merged"]),
}
