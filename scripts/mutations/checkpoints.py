"""Mutations of a checkpoint: its files, its config, its tensors, its tokenizer, and what lies beside them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mutations import damage
from mutations.place import HELDOUT, TEXT, Mutation, Place, Step
from mutations.truth import best_factors, every, loads_with, same_logits, same_perplexity, whole

WEIGHTS = "model.safetensors"
LINEAR = "model.layers.0.self_attn.q_proj.weight"
BASES = ("model", "model", "model", "gpt2", "half", "tied", "sharded", "no-bos", "mixture")
Tensors = dict[str, Tensor]


def steps(place: Place, model: Path) -> list[Step]:
    """Either measure the checkpoint, or compress and export it, and compare with transformers."""
    text = (place.template / HELDOUT).read_text()
    place.take(HELDOUT)
    if place.rng.random() < 0.6:
        return [Step(place.eval(str(model)), same_perplexity(model, text), loads_with(model, text))]
    if place.rng.random() < 0.5:
        run, dense = Path("run"), Path("dense")
        check = every(best_factors(model, run, dense), same_logits(run / "model", dense))
        return [
            Step(("compress", str(model), "--method", "svd", "--out", "run", "--device", "cpu"), None, whole(model)),
            Step(("export", "run", "--dense", "dense"), check),
        ]
    place.take(TEXT)
    method = place.rng.choice(["svd-llm", "auto", "fwsvd", "modegpt", "asvd"])
    run, dense = Path("run"), Path("dense")
    return [
        Step(place.compress(str(model), method), None, whole(model)),
        Step(("export", "run", "--dense", "dense"), same_logits(run / "model", dense)),
    ]


def on_file(way: Callable[[Path, Random], None]) -> Mutation:
    """Damage one of a checkpoint's files."""

    def mutation(place: Place) -> list[Step]:
        model = place.take(place.rng.choice(BASES))
        files = sorted(model.iterdir())
        # The weights and the config matter most.
        heavy = [path for path in files if path.suffix == ".safetensors" or path.name == "config.json"]
        way(place.rng.choice(files + 2 * heavy), place.rng)
        return steps(place, model)

    return mutation


def on_json(name: str, times: int = 1) -> Mutation:
    """Edit a JSON file of a checkpoint at random."""

    def mutation(place: Place) -> list[Step]:
        model = place.take("sharded" if name.endswith("index.json") else place.rng.choice(BASES))
        damage.json_file(model / name, place.rng, times)
        return steps(place, model)

    return mutation


def fields(*choices: dict[str, Any], base: str | None = None) -> Mutation:
    """Set fields of config.json."""

    def mutation(place: Place) -> list[Step]:
        model = place.take(base or place.rng.choice(["model", "model", "half", "tied"]))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(damage.dump(config | place.rng.choice(choices)))
        return steps(place, model)

    return mutation


def without(*names: str) -> Mutation:
    """Leave fields of config.json out."""

    def mutation(place: Place) -> list[Step]:
        model = place.take(place.rng.choice(["model", "half", "tied"]))
        config = json.loads((model / "config.json").read_text())
        config.pop(place.rng.choice(names), None)
        (model / "config.json").write_text(damage.dump(config))
        return steps(place, model)

    return mutation


def on_tensors(
    change: Callable[[Tensors, Random], object], bases: tuple[str, ...] = ("model", "half", "tied", "no-bos")
) -> Mutation:
    """Change a checkpoint's tensors."""

    def mutation(place: Place) -> list[Step]:
        model = place.take(place.rng.choice(bases))
        tensors = load_file(model / WEIGHTS)
        change(tensors, place.rng)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / WEIGHTS, {"format": "pt"})
        return steps(place, model)

    return mutation


def some(tensors: Tensors, rng: Random) -> str:
    """Name a tensor."""
    return rng.choice(sorted(tensors))


def retyped(tensors: Tensors, rng: Random) -> None:
    """Store some tensors, or all, in another dtype."""
    names = [
        "float64",
        "float16",
        "bfloat16",
        "int8",
        "uint8",
        "int64",
        "int32",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
        "complex64",
        "uint16",
    ]
    dtype = getattr(torch, rng.choice(names))
    for name in [some(tensors, rng)] if rng.random() < 0.6 else sorted(tensors):
        tensors[name] = tensors[name].to(dtype)


def reshaped(tensors: Tensors, rng: Random) -> None:
    """Give a tensor another shape."""
    name = some(tensors, rng)
    tensor = tensors[name]
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor.T if tensor.ndim == 2 else tensor[None],
        lambda: tensor[:-1],
        lambda: torch.cat([tensor, tensor[:1]]),
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor[:0],
        lambda: tensor.reshape(-1)[0],
        lambda: tensor[..., :-1],
    ]
    tensors[name] = rng.choice(ways)()


def renamed(tensors: Tensors, rng: Random) -> None:
    """Rename one tensor, or all."""
    way = rng.choice(["prefix", "strip", "one", "legacy", "swap", "suffix"])
    if way == "one":
        name = some(tensors, rng)
        tensors[rng.choice([f"{name}x", name.upper(), name.replace(".", "/"), f" {name}", "\n"])] = tensors.pop(name)
    elif way == "swap":
        one, other = some(tensors, rng), some(tensors, rng)
        tensors[one], tensors[other] = tensors[other], tensors[one].clone()
    else:
        for name in sorted(tensors):
            changed = {
                "prefix": f"{'module' if rng.random() < 2 else ''}.{name}",
                "strip": name.removeprefix("model.").removeprefix("transformer."),
                "legacy": name.replace("layernorm.weight", "layernorm.gamma"),
                "suffix": f"{name}_v2",
            }[way]
            tensors[changed] = tensors.pop(name)


def dropped(tensors: Tensors, rng: Random) -> None:
    """Leave tensors out."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        tensors.pop(some(tensors, rng))


def added(tensors: Tensors, rng: Random) -> None:
    """Add tensors that the model does not know."""
    names = [
        "v_head.weight", "lm_head.bias", "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_norm.weight", "score.weight",
        "model.layers.0.self_attn.q_proj.weight_scale", "model.embed_tokens.lora_A.weight", "x", "model.norm.bias",
        "model.layers.0.mlp.experts.0.down_proj.weight", "transformer.h.0.attn.masked_bias", "lm_head.weight",
    ]  # fmt: skip
    tensors[rng.choice(names)] = torch.randn(rng.choice([(), (1,), (32,), (32, 32), (0,)]))


def values(tensors: Tensors, rng: Random) -> None:
    """Put strange numbers into a tensor."""
    name = rng.choice([name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].numel()])
    flat = tensors[name].clone().reshape(-1)
    flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), float("-inf"), 1e30, 3e38, -0.0, 1e-45])
    tensors[name] = flat.reshape(tensors[name].shape)


def zeros(tensors: Tensors, rng: Random) -> None:
    """Make a tensor, or all, zero or of one value."""
    for name in [some(tensors, rng)] if rng.random() < 0.7 else sorted(tensors):
        tensors[name] = torch.full_like(tensors[name], rng.choice([0.0, 1.0]))


def scaled(tensors: Tensors, rng: Random) -> None:
    """Make a tensor much larger or smaller."""
    name = some(tensors, rng)
    tensors[name] = tensors[name] * rng.choice([1e4, 1e6, 1e-6, 1e-30, -1.0])


def untied(tensors: Tensors, rng: Random) -> None:
    """Store a head that differs from the embedding that it is tied to, or an equal one."""
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = rng.choice([embedding.clone(), torch.randn_like(embedding), embedding[:-1].clone()])


def header(place: Place) -> list[Step]:
    """Edit the header of a safetensors file."""
    rng = place.rng
    model = place.take(rng.choice(["model", "half"]))
    data = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    way = rng.choice(["edit", "edit", "length", "dtype", "offsets", "shape", "metadata", "twice", "hole", "overlap"])
    name = rng.choice(sorted(set(entries) - {"__metadata__"}))
    text = None
    if way == "edit":
        damage.edit(entries, rng)
    elif way == "length":
        length = rng.choice([0, 1, 2**63, 2**64 - 1, 100_000_001, length + 8])
        (model / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
        return steps(place, model)
    elif way == "dtype":
        entries[name]["dtype"] = rng.choice(["F8_E4M3", "F4", "F8_E8M0", "I16", "f32", "BF16", "C64", "", None, "F32 "])
    elif way == "offsets":
        start, stop = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = rng.choice(
            [[stop, start], [start, stop + 4], [-1, stop], [start], [start, 2**63]]
        )
    elif way == "shape":
        entries[name]["shape"] = rng.choice(
            [[], [0], [-1], [2**62, 2**62], entries[name]["shape"][::-1], [1, *entries[name]["shape"]]]
        )
    elif way == "metadata":
        entries["__metadata__"] = rng.choice(
            [{"format": "tf"}, {"format": "mlx"}, {"format": 1}, {}, [], None, {"format": "pt", "x": "y" * 100_000}]
        )
        if rng.random() < 0.2:
            del entries["__metadata__"]
    elif way == "overlap":
        other = rng.choice(sorted(set(entries) - {"__metadata__"}))
        entries[name]["data_offsets"] = entries[other]["data_offsets"]
    elif way == "hole":
        body += b"\0" * 16
    text = json.dumps(entries)
    if way == "twice":
        text = f'{{"{name}": {json.dumps(entries[name])}, {text[1:]}'
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return steps(place, model)


def two_answers(place: Place) -> list[Step]:
    """A single file beside an index, or shards beside a single file, that say different things."""
    model = place.take("sharded")
    other = load_file(place.template / "model" / WEIGHTS)
    scale = place.rng.choice([1.0, 1.5])
    name = place.rng.choice(
        [
            WEIGHTS,
            "model-00009-of-00009.safetensors",
            "consolidated.safetensors",
            "adapter_model.safetensors",
            "model.fp16.safetensors",
        ]
    )
    save_file({key: tensor * scale for key, tensor in other.items()}, model / name, {"format": "pt"})
    if place.rng.random() < 0.3:
        (model / "model.safetensors.index.json").unlink()
    return steps(place, model)


def index_points(place: Place) -> list[Step]:
    """An index that names files elsewhere, missing ones, or the wrong ones."""
    model = place.take("sharded")
    index = model / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    names = sorted(found["weight_map"])
    name = place.rng.choice(names)
    (Path("..") / "outside").mkdir(exist_ok=True)
    (Path("elsewhere.safetensors")).write_bytes((model / found["weight_map"][name]).read_bytes())
    targets = [
        "../elsewhere.safetensors", os.path.abspath("elsewhere.safetensors"), "nowhere.safetensors", "", ".",
        "config.json",
        found["weight_map"][place.rng.choice(names)], 7, None, ["x"], {}, "model.safetensors.index.json",
        "a/../" + found["weight_map"][name], "./" + found["weight_map"][name],
    ]  # fmt: skip
    way = place.rng.choice(["point", "point", "drop", "all", "extra"])
    if way == "point":
        found["weight_map"][name] = place.rng.choice(targets)
    elif way == "drop":
        del found["weight_map"][name]
    elif way == "extra":
        found["weight_map"]["x.weight"] = found["weight_map"][name]
    else:
        found["weight_map"] = place.rng.choice([{}, [], None, "x", {name: found["weight_map"][name]}])
    index.write_text(json.dumps(found))
    return steps(place, model)


def other_weights(place: Place) -> list[Step]:
    """Weights in another format, beside the safetensors or instead of them."""
    rng = place.rng
    model = place.take("model")
    name = rng.choice(
        [
            "pytorch_model.bin",
            "model.gguf",
            "tf_model.h5",
            "flax_model.msgpack",
            "model.ckpt",
            "pytorch_model.bin.index.json",
            "consolidated.00.pth",
        ]
    )
    if name.endswith(".bin") and rng.random() < 0.7:
        torch.save(load_file(model / WEIGHTS), model / name)
    else:
        (model / name).write_bytes(b"GGUF\x03\0\0\0" + rng.randbytes(64))
    if rng.random() < 0.7:
        (model / WEIGHTS).unlink()
    if rng.random() < 0.3:
        return [Step(place.eval(str(model / name)))] if place.take(HELDOUT) else []
    return steps(place, model)


def adapter(place: Place) -> list[Step]:
    """A PEFT adapter beside the weights, or alone."""
    rng = place.rng
    model = place.take("model")
    alone = rng.random() < 0.5
    home = Path("adapter") if alone else model
    home.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    way = rng.choice(
        ["good", "good", "dora", "nobase", "wrong", "edit", "missing", "rank", "prompt", "rslora", "modules"]
    )
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(shape) * 0.3
        for layer in range(2)
        for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    if way == "nobase":
        config["base_model_name_or_path"] = rng.choice(["nowhere", "", None, 3, "../outside", "adapter"])
    elif way == "dora":
        config["use_dora"] = True
        tensors |= {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector": torch.rand(32) + 0.5
            for layer in range(2)
        }
    elif way == "wrong":
        config["peft_type"] = rng.choice(["IA3", "NOPE", None, 3])
    elif way == "rank":
        config["r"] = rng.choice([8, 0, -1, "4", 1e9])
    elif way == "prompt":
        config["peft_type"] = "PROMPT_TUNING"
        config["num_virtual_tokens"] = 4
    elif way == "rslora":
        config["use_rslora"] = True
    elif way == "modules":
        config["target_modules"] = rng.choice(
            ["all-linear", "q_proj", ["nope"], [], None, ".*q_proj", ["q_proj", "v_proj"]]
        )
    elif way == "edit":
        damage.edit(config, rng)
    (home / "adapter_config.json").write_text(damage.dump(config))
    if way != "missing":
        save_file(tensors, home / "adapter_model.safetensors", {"format": "pt"})
        if rng.random() < 0.1:
            damage.any_file(home / "adapter_model.safetensors", rng)
    if alone and rng.random() < 0.5:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (home / name).write_bytes((model / name).read_bytes())
    return steps(place, home)


def remote_code(place: Place) -> list[Step]:
    """Code in the checkpoint, which must not run unless it was asked for."""
    rng = place.rng
    model = place.take("model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    if rng.random() < 0.5:
        config["model_type"] = "hostile"
    text = f"open({str(place.outside.resolve() / 'ran')!r}, 'w')\n"
    (model / "hostile.py").write_text(text)
    if rng.random() < 0.5:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": ["hostile.Slow", "hostile.Fast"]}, "tokenizer_class": "Hostile"}
        (model / "tokenizer_config.json").write_text(damage.dump(settings))
    (model / "config.json").write_text(damage.dump(config))
    return steps(place, model)


def own_model_class(place: Place) -> list[Step]:
    """A checkpoint with harmless code of its own, and the permission to run it."""
    model = place.take("model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnLlama"}
    (model / "own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass OwnLlama(LlamaForCausalLM):\n    pass\n"
    )
    (model / "config.json").write_text(damage.dump(config))
    return [
        Step((*step.words, "--trust-remote-code"), None) if step.words[0] != "export" else Step(step.words)
        for step in steps(place, model)
    ]


def odd_place(place: Place) -> list[Step]:
    """A checkpoint in a directory with an odd name, behind a link, or one that is something else."""
    rng = place.rng
    names = [
        "a b",
        "a\nb",
        "é漢",
        "x" * 200,
        "-",
        "--model",
        "a'b\"c",
        "[red]x[/]",
        "a%20b",
        "\udcff",
        "m.safetensors",
        "a:b",
        ".hidden",
        "runs",
        "#",
        "~",
        "hf:x",
    ]
    name = rng.choice(names)
    model = place.take("model", name)
    way = rng.choice(["plain", "link", "dot", "slash", "absolute"])
    if way == "link":
        model = Path("link")
        model.symlink_to(os.path.abspath(name))
    elif way == "absolute":
        model = Path(os.path.abspath(name))
    shown = {"dot": f"./{name}", "slash": f"./{name}/"}.get(way, str(model))
    text = (place.template / HELDOUT).read_text()
    place.take(HELDOUT)
    place.take(TEXT)
    if rng.random() < 0.5 and way != "plain":
        return [Step(place.eval(shown), same_perplexity(os.path.abspath(model), text), must=True)]
    if way == "plain":
        return [Step(place.eval(shown), same_perplexity(os.path.abspath(model), text))]
    return [
        Step(place.compress(shown, "svd-llm"), must=True),
        Step(("verify", "run"), must=True),
        Step(("show", "run"), must=True),
    ]


def not_a_checkpoint(place: Place) -> list[Step]:
    """Things that are no checkpoint, given as one."""
    rng = place.rng
    place.take(HELDOUT)
    place.take(TEXT)
    Path("empty").mkdir()
    Path("file").write_text("x")
    os.mkfifo("pipe")
    things = [
        "empty",
        "file",
        "pipe",
        "",
        ".",
        "..",
        "nowhere",
        "/dev/null",
        "/proc/self",
        "a/b/c/d",
        "hf:x",
        "http://localhost/x",
        HELDOUT,
        "x" * 5000,
        "a\nb",
        "\udc80",
        "../outside",
        "none/such",
        "~nobody/x",
    ]
    target = rng.choice(things)
    return [
        rng.choice(
            [
                Step(place.eval(target)),
                Step(place.compress(target, "svd")),
                Step(("show", target)),
                Step(("export", target, "--dense", "dense")),
                Step(("verify", target)),
                Step(("score", target)),
                Step(("bench", target)),
            ]
        )
    ]


TOKENIZER: dict[str, Any] = {
    "padding_side": ["left", "right", "top", 3],
    "model_max_length": [4, 0, -1, 1e30, "x", None],
    "bos_token": ["</s>", "<nope>", None, "", 3, {"content": "<s>", "__type": "AddedToken"}],
    "pad_token": ["<s>", None, "<nope>"],
    "add_bos_token": [True, False, "x"],
    "tokenizer_class": ["LlamaTokenizer", "BertTokenizer", "Nope", "GPT2Tokenizer", None, 3],
    "clean_up_tokenization_spaces": [True, "x"],
    "chat_template": ["{{ nope(", "{% for m in messages %}{{ m.content }}{% endfor %}", 3],
    "added_tokens_decoder": [
        {"96": {"content": "the", "special": True}},
        {"5": {"content": " of"}},
        {"x": {}},
        [],
        {"-1": {"content": "y"}},
    ],
    "auto_map": [{"AutoTokenizer": ["x.Y", None]}],
}


def tokenizer_settings(place: Place) -> list[Step]:
    """Change tokenizer_config.json."""
    model = place.take(place.rng.choice(["model", "no-bos", "gpt2"]))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    name = place.rng.choice(sorted(TOKENIZER))
    settings[name] = place.rng.choice(TOKENIZER[name])
    path.write_text(damage.dump(settings))
    return steps(place, model)


def tokenizer_vocabulary(place: Place) -> list[Step]:
    """Change tokenizer.json: tokens beyond the embedding, fewer tokens, another processor."""
    rng = place.rng
    model = place.take(rng.choice(["model", "no-bos"]))
    path = model / "tokenizer.json"
    settings = json.loads(path.read_text())
    way = rng.choice(
        ["beyond", "holes", "fewer", "processor", "normalizer", "truncation", "padding", "decoder", "added", "split"]
    )
    vocabulary = settings["model"]["vocab"]
    if way == "beyond":
        token = rng.choice(sorted(vocabulary, key=vocabulary.get)[4:])
        vocabulary[token] = rng.choice([96, 97, 10**6, 2**31, 2**32 - 1])
    elif way == "holes":
        token = rng.choice(sorted(vocabulary))
        vocabulary[token] = 0
    elif way == "fewer":
        settings["model"]["merges"] = []
    elif way == "processor":
        settings["post_processor"] = rng.choice([None, {"type": "Nope"}, 3])
    elif way == "normalizer":
        settings["normalizer"] = rng.choice(
            [{"type": "Lowercase"}, {"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]
        )
    elif way == "truncation":
        settings["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    elif way == "padding":
        settings["padding"] = {
            "strategy": {"Fixed": 40},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    elif way == "added":
        settings["added_tokens"].append(
            {
                "id": rng.choice([96, 200, 5]),
                "content": rng.choice(["the", " of", "e"]),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": rng.random() < 0.5,
            }
        )
    elif way == "split":
        settings["pre_tokenizer"] = rng.choice(
            [
                None,
                {"type": "Whitespace"},
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            ]
        )
    else:
        settings["decoder"] = None
    path.write_text(json.dumps(settings))
    return steps(place, model)


def classifier(place: Place) -> list[Step]:
    """A language model as a classifier, or a classifier as a language model."""
    model = place.take(place.rng.choice(["bert", "classifier", "model"]))
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = place.rng.choice(
        [
            ["LlamaForSequenceClassification"],
            ["LlamaForCausalLM"],
            ["LlamaModel"],
            [],
            None,
            ["Nope"],
            ["BertForMaskedLM"],
            ["BertForTokenClassification"],
            "LlamaForCausalLM",
            ["LlamaForCausalLM", "x"],
        ]
    )
    (model / "config.json").write_text(damage.dump(config))
    return steps(place, model)


MUTATIONS: dict[str, Mutation] = {
    **{f"file: {name}": on_file(way) for name, way in damage.FILE.items()},
    "config: any": on_json("config.json"),
    "config: several": on_json("config.json", 3),
    "config: any again": on_json("config.json"),
    "index: any": on_json("model.safetensors.index.json"),
    "tokenizer.json: any": on_json("tokenizer.json"),
    "tokenizer_config: any": on_json("tokenizer_config.json", 2),
    "generation_config: any": on_json("generation_config.json"),
    "config: layers": fields(*({"num_hidden_layers": count} for count in (0, 1, 3, 100, 10**9, -1, 2.0, "2", None))),
    "config: heads": fields(*({"num_attention_heads": count} for count in (0, 1, 2, 3, 8, 64, -4, 4.0, "4")),
    {"num_key_value_heads": 3}, {"num_key_value_heads": 4}, {"num_key_value_heads": 0},
    {"num_key_value_heads": None}, {"head_dim": 16}, {"head_dim": 0}, {"head_dim": None}),
    "config: sizes": fields(*({name: value} for name in ("hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings") for value in (0, 1, 8, 31, 33, 64, 97, 10**7, 2**63, -1, 32.0, None))),
    "config: rope": fields(*({"rope_theta": value} for value in (1.0, 10000.0, 0, -1, "x")),
    {"rope_parameters": None}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "nope"}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}),
    "config: biases": fields({"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": None},
    {"attention_bias": "no"}, {"attention_bias": 1}),
    "config: ties": fields({"tie_word_embeddings": True}, {"tie_word_embeddings": False},
    {"tie_word_embeddings": None}, {"tie_word_embeddings": "false"}),
    "config: kind": fields(*({"model_type": name} for name in ("mistral", "qwen2", "gpt2", "bert", "gemma", "gemma2",
    "nope", "", None, 3, "LLAMA", "llama ", "mixtral", "llama4", "lowrank", "t5", "phi3"))),
    "config: activation": fields(*({"hidden_act": name} for name in ("gelu", "relu", "silu ", "nope", None, 3,
    "gelu_new", ["silu"]))),
    "config: norms": fields(*({"rms_norm_eps": value} for value in (0, 1.0, -1, 1e-45, "1e-6", None, float("nan"),
    1e30))),
    "config: dtype": fields(*({name: value} for name in ("dtype", "torch_dtype") for value in ("float16", "bfloat16",
    "float64", "int8", "float8_e4m3fn", "nope", "auto", None, 3, "torch.float32", {}))),
    "config: labels": fields({"num_labels": 2**63}, {"num_labels": 10**9}, {"num_labels": -1}, {"num_labels": "x"},
    {"id2label": {"0": "a", "0.5": "b"}}, {"id2label": []}, {"id2label": {str(n): "x" for n in range(10000)}},
    {"label2id": {"a": "b"}}, {"problem_type": "regression"}),
    "config: quantized": fields(*({"quantization_config": value} for value in ({"quant_method": "bitsandbytes",
    "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "nope"},
    {}, [], None, "lowrank", {"quant_method": "lowrank"}, {"quant_method": "lowrank", "version": 99},
    {"quant_method": None}, {"quant_method": ["lowrank"]}, {"quant_method": "compressed-tensors",
    "config_groups": {}}, {"quant_method": "awq"}, {"quant_method": "mxfp4"}))),
    "config: attention": fields({"attn_implementation": "flash_attention_2"}, {"_attn_implementation": "eager"},
    {"attn_implementation": "nope"}, {"sliding_window": 4}, {"use_cache": False}, {"attention_dropout": 0.5},
    {"pretraining_tp": 2}, {"is_decoder": True}, {"add_cross_attention": True}, {"pruned_heads": {"0": [1]}},
    {"layer_types": ["full_attention"]}, {"chunk_size_feed_forward": 2}),
    "config: subconfig": fields({"text_config": {"hidden_size": 64}}, {"vision_config": {}},
    {"transformers_version": "99.0"}, {"transformers_version": 3}, {"architectures": None}, {"pad_token_id": 500},
    {"pad_token_id": -1}, {"bos_token_id": [1, 2]}, {"eos_token_id": "x"}, {"name_or_path": "../outside"},
    {"base_model_tp_plan": {}}, {"torchscript": True}, {"output_hidden_states": True}, {"output_attentions": True},
    {"return_dict": False}),
    "config: without": without("model_type", "architectures", "vocab_size", "hidden_size", "rope_parameters",
    "head_dim", "dtype", "tie_word_embeddings", "num_key_value_heads", "rms_norm_eps", "hidden_act"),
    "tensors: dtype": on_tensors(retyped),
    "tensors: dtype again": on_tensors(retyped),
    "tensors: shape": on_tensors(reshaped),
    "tensors: shape again": on_tensors(reshaped, ("model", "gpt2", "tied")),
    "tensors: names": on_tensors(renamed, ("model", "gpt2", "tied")),
    "tensors: missing": on_tensors(dropped),
    "tensors: extra": on_tensors(added, ("model", "gpt2", "tied", "half")),
    "tensors: values": on_tensors(values),
    "experts: names": on_tensors(renamed, ("mixture",)),
    "experts: missing": on_tensors(dropped, ("mixture",)),
    "experts: shape": on_tensors(reshaped, ("mixture",)),
    "experts: values": on_tensors(values, ("mixture",)),
    "experts: config": fields(*({"num_local_experts": count} for count in (0, 1, 2, 4, 100, 10**9, -1, 3.0, "3", None)),
    *({"num_experts_per_tok": count} for count in (0, 1, 3, 4, -1, 2.0, None)), {"model_type": "qwen2_moe"},
    {"model_type": "llama"}, {"output_router_logits": True}, {"router_jitter_noise": 0.5}, base="mixture"),
    "tensors: zeros": on_tensors(zeros),
    "tensors: scale": on_tensors(scaled),
    "tensors: tied": on_tensors(untied, ("tied",)),
    "header": header,
    "header again": header,
    "two answers": two_answers,
    "index: points": index_points,
    "other weights": other_weights,
    "adapter": adapter,
    "adapter again": adapter,
    "remote code": remote_code,
    "own class": own_model_class,
    "odd place": odd_place,
    "no checkpoint": not_a_checkpoint,
    "tokenizer settings": tokenizer_settings,
    "tokenizer vocabulary": tokenizer_vocabulary,
    "classifier": classifier,
}  # fmt: skip
