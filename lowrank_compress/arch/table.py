"""The supported architectures. One entry each; nothing else in the package names a model type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_compress.arch import layouts, traits
from lowrank_compress.arch.spec import BLOCK_GROUPS, EXPERTS, LATENT, MLP, VALUE_OUTPUT, Architecture, Projection
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.registry import Registry, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _mixture(name: str, projections: tuple[Projection, ...], **others: Any) -> Architecture:
    """Describe a family of which some blocks, or all, have experts; their router stays as it is."""
    groups = (*others.pop("groups", BLOCK_GROUPS), EXPERTS)
    paths: Any = {"experts": "mlp.experts", "router": "mlp.gate"}
    return Architecture(
        name, (name,), "layers", "self_attn", projections, layouts.ROUTER, groups=groups, **(paths | others)
    )


def _bert(name: str, **others: Any) -> Architecture:
    """Describe a family whose blocks are those of BERT."""
    paths = ("encoder.layer", "attention.self")
    return Architecture(name, (name,), *paths, layouts.BERT, traits=traits.DROPPING, head=None, **others)


# Why heads keep all dimensions, where trying one block on a sample may not show it.
_BY_POSITION = "its queries are scaled by their position"
_BY_LAYER = "which of its layers rotate or have a window depends on others"

_ENTRIES = (
    Architecture("llama", ("llama",), "layers", "self_attn", layouts.GATED),
    Architecture("mistral", ("mistral",), "layers", "self_attn", layouts.GATED, traits=traits.ALL_WINDOWED),
    Architecture("qwen2", ("qwen2",), "layers", "self_attn", layouts.GATED, traits=traits.WINDOWED),
    Architecture("qwen3", ("qwen3",), "layers", "self_attn", layouts.GATED, traits=traits.NORMED),
    Architecture("gemma2", ("gemma2",), "layers", "self_attn", layouts.GATED, traits=traits.SOFT_CAPPED),
    Architecture("gemma3_text", ("gemma3_text",), "layers", "self_attn", layouts.GATED, traits=traits.NORMED),
    Architecture("gemma", ("gemma",), "layers", "self_attn", layouts.GATED),
    Architecture("granite", ("granite",), "layers", "self_attn", layouts.GATED),
    Architecture("olmo2", ("olmo2",), "layers", "self_attn", layouts.GATED, traits=traits.NORMED_AS_A_WHOLE),
    Architecture("smollm3", ("smollm3",), "layers", "self_attn", layouts.GATED, traits=traits.UNROTATED_LAYERS),
    Architecture("phi", ("phi",), "layers", "self_attn", layouts.PHI),
    Architecture("stablelm", ("stablelm",), "layers", "self_attn", layouts.GATED),
    Architecture("gpt_bigcode", ("gpt_bigcode",), "h", "attn", layouts.GPT_BIGCODE, traits=traits.GPT_BIGCODE),
    Architecture("starcoder2", ("starcoder2",), "layers", "self_attn", layouts.STARCODER2, traits=traits.ALL_WINDOWED),
    # These turn dimensions 2i and 2i + 1 together: their heads keep all dimensions.
    Architecture("cohere", ("cohere",), "layers", "self_attn", layouts.COHERE),
    Architecture("glm", ("glm",), "layers", "self_attn", layouts.GLM),
    Architecture("glm4", ("glm4",), "layers", "self_attn", layouts.GLM),
    Architecture("gptj", ("gptj",), "h", "attn", layouts.GPTJ, values=2),
    Architecture("cohere2", ("cohere2",), "layers", "self_attn", layouts.COHERE),
    Architecture("ernie4_5", ("ernie4_5",), "layers", "self_attn", layouts.GATED),
    Architecture("nemotron", ("nemotron",), "layers", "self_attn", layouts.UNGATED),
    Architecture("arcee", ("arcee",), "layers", "self_attn", layouts.UNGATED),
    Architecture("apertus", ("apertus",), "layers", "self_attn", layouts.UNGATED, traits=traits.NORMED_HEADS),
    Architecture("olmo", ("olmo",), "layers", "self_attn", layouts.GATED),
    Architecture("olmo3", ("olmo3",), "layers", "self_attn", layouts.GATED, traits=traits.WINDOWED_NORMED_AS_A_WHOLE),
    Architecture("exaone4", ("exaone4",), "layers", "self_attn", layouts.GATED, whole=_BY_LAYER),
    Architecture("ministral", ("ministral",), "layers", "self_attn", layouts.GATED, traits=traits.WINDOWED),
    Architecture("ministral3", ("ministral3",), "layers", "self_attn", layouts.GATED, whole=_BY_POSITION),
    Architecture("seed_oss", ("seed_oss",), "layers", "self_attn", layouts.GATED),
    Architecture("internlm3", ("internlm3",), "layers", "self_attn", layouts.GATED),
    Architecture("hunyuan_v1_dense", ("hunyuan_v1_dense",), "layers", "self_attn", layouts.GATED),
    Architecture("persimmon", ("persimmon",), "layers", "self_attn", layouts.PERSIMMON),
    Architecture("falcon", ("falcon",), "h", "self_attention", layouts.FALCON, values=2),
    Architecture("bloom", ("bloom",), "h", "self_attention", layouts.FALCON, values=2),
    Architecture("mpt", ("mpt",), "blocks", "attn", layouts.MPT, values=2),
    Architecture("gpt_neo", ("gpt_neo",), "h", "attn.attention", layouts.GPT_NEO, values=2),
    Architecture("phi3", ("phi3",), "layers", "self_attn", layouts.PHI3, traits=traits.ALL_WINDOWED),
    Architecture("gpt2", ("gpt2",), "h", "attn", layouts.GPT2, traits=traits.GPT2),
    Architecture("gpt_neox", ("gpt_neox",), "layers", "attention", layouts.GPT_NEOX),
    Architecture("opt", ("opt",), "decoder.layers", "self_attn", layouts.OPT, traits=traits.DROPPING),
    _bert("bert"),
    _bert("roberta"),
    Architecture("mpnet", ("mpnet",), "encoder.layer", "attention.attn", layouts.MPNET, head=None, values=1),
    Architecture(
        "modernbert", ("modernbert",), "layers", "attn", layouts.MODERNBERT, traits=traits.WINDOWED, head=None
    ),
    Architecture(
        "deberta-v2",
        ("deberta-v2",),
        "encoder.layer",
        "attention.self",
        layouts.DEBERTA_V2,
        layouts.DEBERTA_V2_STAYS,
        groups=(VALUE_OUTPUT, MLP),
        head=None,
        values=2,
        whole="its queries and keys are made of positions, too",
    ),
    Architecture("eurobert", ("eurobert",), "layers", "self_attn", layouts.GATED, head=None),
    _bert("xlm-roberta"),
    _bert("xlm-roberta-xl"),
    _bert("camembert"),
    _bert("electra"),
    _bert("ernie"),
    _bert("esm"),
    Architecture(
        "distilbert",
        ("distilbert",),
        "transformer.layer",
        "attention",
        layouts.DISTILBERT,
        traits=traits.DROPPING,
        head=None,
    ),
    _mixture("mixtral", layouts.ATTENTION, traits=traits.ALL_WINDOWED),
    # Where a layer has a window, its mask alone says so.
    _mixture("qwen2_moe", (*layouts.ATTENTION, *layouts.MLP, *layouts.SHARED_EXPERT)),
    _mixture("qwen3_moe", (*layouts.ATTENTION, *layouts.MLP), traits=traits.NORMED),
    _mixture("olmoe", layouts.ATTENTION, traits=traits.NORMED_AS_A_WHOLE),
    _mixture("deepseek_v2", (*layouts.LATENT, *layouts.MLP, *layouts.SHARED_EXPERTS), groups=(LATENT, MLP)),
    _mixture("deepseek_v3", (*layouts.LATENT, *layouts.MLP, *layouts.SHARED_EXPERTS), groups=(LATENT, MLP)),
    _mixture("gpt_oss", layouts.ATTENTION, traits=traits.SINKING, router="mlp.router"),
)

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture", "lowrank_compress.architectures", {entry.name: entry for entry in _ENTRIES}, Architecture
)

# The names under which the configurations of transformers keep the number of experts and the other modalities.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MODALITIES = ("vision_config", "audio_config")
# Families whose layers are one block, run several times.
_SHARED_BLOCKS = ("albert",)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the table entry that describes models of this configuration.

    Only ``config.model_type`` chooses the entry; nothing is guessed from module names.

    Raises
    ------
    UnsupportedError
        Other mixtures of experts, multimodal, encoder-decoder and cross-attention models, families that run one block
        several times, and model types that no entry lists (the message names all that are).
    """
    declared: dict[str, Any] = config.to_dict()
    text: dict[str, Any] = declared | (declared.get("text_config") or {})
    name = config.model_type
    experts = next((key for key in EXPERT_COUNTS if isinstance(text.get(key), int) and text[key] > 1), None)
    known = _by_model_type()
    if experts and not (name in known and known[name].experts):
        raise UnsupportedError(
            f"Mixture-of-experts models of this kind are not supported: model type {name!r} has "
            f"{experts}={text[experts]}. Supported are {', '.join(n for n, entry in known.items() if entry.experts)}; "
            "or choose a dense checkpoint."
        )
    modality = next((key for key in _MODALITIES if declared.get(key)), None)
    if modality:
        raise UnsupportedError(
            f"Multimodal models are not supported: model type {name!r} has a {modality}. Extract the language model "
            "into a checkpoint of its own (for gemma3, one of model type 'gemma3_text') and compress that."
        )
    if name not in known and declared.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"Encoder-decoder models are not supported: model type {name!r} has two stacks of blocks. Choose a "
            "checkpoint that is only a decoder or only an encoder; supported model types are "
            f"{', '.join(sorted(known))}."
        )
    if name in _SHARED_BLOCKS:
        raise UnsupportedError(
            f"Model type {name!r} runs the same block several times, so that its matrices have no inputs of their own. "
            f"Choose a checkpoint of another family; supported model types are {', '.join(sorted(known))}."
        )
    if name not in known:
        raise UnsupportedError(unknown_model_type(name))
    if declared.get("is_encoder_decoder") or declared.get("add_cross_attention"):
        raise UnsupportedError(
            f"Models with cross-attention are not supported: this {name!r} configuration sets "
            "is_encoder_decoder or add_cross_attention. Choose a checkpoint that is only a decoder or only an encoder."
        )
    return known[name]


def unknown_model_type(name: str) -> str:
    """Compose the message for a model type that no entry lists, with all that are known."""
    return unknown("model type", name, _by_model_type(), guess=False)


def _by_model_type() -> dict[str, Architecture]:
    return {model_type: entry for entry in ARCHITECTURES.values() for model_type in entry.model_types}
