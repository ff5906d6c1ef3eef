"""The supported architectures. One entry each; nothing else in the package names a model type."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowrank_compress.arch import traits
from lowrank_compress.arch.spec import BLOCK_GROUPS, EXPERTS, LATENT, MLP, Architecture, Projection
from lowrank_compress.errors import UnsupportedError
from lowrank_compress.registry import Registry, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTION = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.o_proj", ("o",), "context"),
)
_GATED = (
    *_ATTENTION,
    Projection("mlp.gate_proj", ("gate",), "mlp"),
    Projection("mlp.up_proj", ("up",), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
_PHI3 = (
    Projection("self_attn.qkv_proj", ("q", "k", "v"), "attn"),
    Projection("self_attn.o_proj", ("o",), "context"),
    Projection("mlp.gate_up_proj", ("gate", "up"), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
_GPT2 = (
    Projection("attn.c_attn", ("q", "k", "v"), "attn", conv1d=True),
    Projection("attn.c_proj", ("o",), "context", conv1d=True),
    Projection("mlp.c_fc", ("up",), "mlp", conv1d=True),
    Projection("mlp.c_proj", ("down",), "hidden", conv1d=True),
)
_PHI = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.dense", ("o",), "context"),
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.fc1", ("up",), "attn"),
    Projection("mlp.fc2", ("down",), "hidden"),
)
_STARCODER2 = (
    *_ATTENTION,
    Projection("mlp.c_fc", ("up",), "mlp"),
    Projection("mlp.c_proj", ("down",), "hidden"),
)
_COHERE = (
    *_ATTENTION,
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.gate_proj", ("gate",), "attn"),
    Projection("mlp.up_proj", ("up",), "attn"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
_GLM = (
    *_ATTENTION,
    Projection("mlp.gate_up_proj", ("gate", "up"), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
_GPTJ = (
    Projection("attn.q_proj", ("q",), "attn"),
    Projection("attn.k_proj", ("k",), "attn"),
    Projection("attn.v_proj", ("v",), "attn"),
    Projection("attn.out_proj", ("o",), "context"),
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.fc_in", ("up",), "attn"),
    Projection("mlp.fc_out", ("down",), "hidden"),
)
_MODERNBERT = (
    Projection("attn.Wqkv", ("q", "k", "v"), "attn"),
    Projection("attn.Wo", ("o",), "context"),
    # The first half goes through the activation.
    Projection("mlp.Wi", ("gate", "up"), "mlp"),
    Projection("mlp.Wo", ("down",), "hidden"),
)
_MPNET = (
    Projection("attention.attn.q", ("q",), "attn"),
    Projection("attention.attn.k", ("k",), "attn"),
    Projection("attention.attn.v", ("v",), "attn"),
    Projection("attention.attn.o", ("o",), "context"),
    Projection("intermediate.dense", ("up",), "mlp"),
    Projection("output.dense", ("down",), "hidden"),
)
_GPT_BIGCODE = (
    Projection("attn.c_attn", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("attn.c_proj", ("o",), "context"),
    Projection("mlp.c_fc", ("up",), "mlp"),
    Projection("mlp.c_proj", ("down",), "hidden"),
)
_GPT_NEOX = (
    Projection("attention.query_key_value", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("attention.dense", ("o",), "context"),
    Projection("mlp.dense_h_to_4h", ("up",), "mlp"),
    Projection("mlp.dense_4h_to_h", ("down",), "hidden"),
)
_OPT = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.out_proj", ("o",), "context"),
    Projection("fc1", ("up",), "mlp"),
    Projection("fc2", ("down",), "hidden"),
)
_BERT = (
    Projection("attention.self.query", ("q",), "attn"),
    Projection("attention.self.key", ("k",), "attn"),
    Projection("attention.self.value", ("v",), "attn"),
    Projection("attention.output.dense", ("o",), "context"),
    Projection("intermediate.dense", ("up",), "mlp"),
    Projection("output.dense", ("down",), "hidden"),
)
_DISTILBERT = (
    Projection("attention.q_lin", ("q",), "attn"),
    Projection("attention.k_lin", ("k",), "attn"),
    Projection("attention.v_lin", ("v",), "attn"),
    Projection("attention.out_lin", ("o",), "context"),
    Projection("ffn.lin1", ("up",), "mlp"),
    Projection("ffn.lin2", ("down",), "hidden"),
)

# Dense in some blocks; in the others there are experts, and where the names say so one that all tokens go to.
_MLP = (
    Projection("mlp.gate_proj", ("gate",), "mlp", optional=True),
    Projection("mlp.up_proj", ("up",), "mlp", optional=True),
    Projection("mlp.down_proj", ("down",), "hidden", optional=True),
)
_SHARED_EXPERT = tuple(replace(each, path=each.path.replace("mlp.", "mlp.shared_expert.")) for each in _MLP)
_SHARED_EXPERTS = tuple(replace(each, path=each.path.replace("mlp.", "mlp.shared_experts.")) for each in _MLP)
_LATENT = (
    Projection("self_attn.q_proj", ("q",), "attn", optional=True),
    Projection("self_attn.q_a_proj", ("q_a",), "attn", optional=True),
    Projection("self_attn.q_b_proj", ("q_b",), "q_latent", optional=True),
    Projection("self_attn.kv_a_proj_with_mqa", ("kv_a",), "attn"),
    Projection("self_attn.kv_b_proj", ("kv_b",), "kv_latent"),
    Projection("self_attn.o_proj", ("o",), "context"),
)
_ROUTER = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def _mixture(name: str, projections: tuple[Projection, ...], **others: Any) -> Architecture:
    """Describe a family of which some blocks, or all, have experts; their router stays as it is."""
    groups = (*others.pop("groups", BLOCK_GROUPS), EXPERTS)
    paths: Any = {"experts": "mlp.experts", "router": "mlp.gate"}
    return Architecture(name, (name,), "layers", "self_attn", projections, _ROUTER, groups=groups, **(paths | others))


_ENTRIES = (
    Architecture("llama", ("llama",), "layers", "self_attn", _GATED),
    Architecture("mistral", ("mistral",), "layers", "self_attn", _GATED, traits=traits.ALL_WINDOWED),
    Architecture("qwen2", ("qwen2",), "layers", "self_attn", _GATED, traits=traits.WINDOWED),
    Architecture("qwen3", ("qwen3",), "layers", "self_attn", _GATED, traits=traits.NORMED),
    Architecture("gemma2", ("gemma2",), "layers", "self_attn", _GATED, traits=traits.SOFT_CAPPED),
    Architecture("gemma3_text", ("gemma3_text",), "layers", "self_attn", _GATED, traits=traits.NORMED),
    Architecture("gemma", ("gemma",), "layers", "self_attn", _GATED),
    Architecture("granite", ("granite",), "layers", "self_attn", _GATED),
    Architecture("olmo2", ("olmo2",), "layers", "self_attn", _GATED, traits=traits.NORMED_AS_A_WHOLE),
    Architecture("smollm3", ("smollm3",), "layers", "self_attn", _GATED, traits=traits.UNROTATED_LAYERS),
    Architecture("phi", ("phi",), "layers", "self_attn", _PHI),
    Architecture("stablelm", ("stablelm",), "layers", "self_attn", _GATED),
    Architecture("gpt_bigcode", ("gpt_bigcode",), "h", "attn", _GPT_BIGCODE, traits=traits.GPT_BIGCODE),
    Architecture("starcoder2", ("starcoder2",), "layers", "self_attn", _STARCODER2, traits=traits.ALL_WINDOWED),
    # These turn dimensions 2i and 2i + 1 together: their heads keep all dimensions.
    Architecture("cohere", ("cohere",), "layers", "self_attn", _COHERE),
    Architecture("glm", ("glm",), "layers", "self_attn", _GLM),
    Architecture("glm4", ("glm4",), "layers", "self_attn", _GLM),
    Architecture("gptj", ("gptj",), "h", "attn", _GPTJ, values=2),
    Architecture("phi3", ("phi3",), "layers", "self_attn", _PHI3, traits=traits.ALL_WINDOWED),
    Architecture("gpt2", ("gpt2",), "h", "attn", _GPT2, traits=traits.GPT2),
    Architecture("gpt_neox", ("gpt_neox",), "layers", "attention", _GPT_NEOX),
    Architecture("opt", ("opt",), "decoder.layers", "self_attn", _OPT, traits=traits.DROPPING),
    Architecture("bert", ("bert",), "encoder.layer", "attention.self", _BERT, traits=traits.DROPPING, head=None),
    Architecture("roberta", ("roberta",), "encoder.layer", "attention.self", _BERT, traits=traits.DROPPING, head=None),
    Architecture("mpnet", ("mpnet",), "encoder.layer", "attention.attn", _MPNET, head=None, values=1),
    Architecture("modernbert", ("modernbert",), "layers", "attn", _MODERNBERT, traits=traits.WINDOWED, head=None),
    Architecture(
        "xlm-roberta", ("xlm-roberta",), "encoder.layer", "attention.self", _BERT, traits=traits.DROPPING, head=None
    ),
    Architecture(
        "camembert", ("camembert",), "encoder.layer", "attention.self", _BERT, traits=traits.DROPPING, head=None
    ),
    Architecture("electra", ("electra",), "encoder.layer", "attention.self", _BERT, traits=traits.DROPPING, head=None),
    Architecture(
        "distilbert",
        ("distilbert",),
        "transformer.layer",
        "attention",
        _DISTILBERT,
        traits=traits.DROPPING,
        head=None,
    ),
    _mixture("mixtral", _ATTENTION, traits=traits.ALL_WINDOWED),
    # Where a layer has a window, its mask alone says so.
    _mixture("qwen2_moe", (*_ATTENTION, *_MLP, *_SHARED_EXPERT)),
    _mixture("qwen3_moe", (*_ATTENTION, *_MLP), traits=traits.NORMED),
    _mixture("olmoe", _ATTENTION, traits=traits.NORMED_AS_A_WHOLE),
    _mixture("deepseek_v2", (*_LATENT, *_MLP, *_SHARED_EXPERTS), groups=(LATENT, MLP)),
    _mixture("deepseek_v3", (*_LATENT, *_MLP, *_SHARED_EXPERTS), groups=(LATENT, MLP)),
)

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture", "lowrank_compress.architectures", {entry.name: entry for entry in _ENTRIES}, Architecture
)

# The names under which the configurations of transformers keep the number of experts and the other modalities.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
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
    experts = next((key for key in _EXPERT_COUNTS if isinstance(text.get(key), int) and text[key] > 1), None)
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
