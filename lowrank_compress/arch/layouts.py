"""Where the matrices of a block are, in the layouts that families share."""

from __future__ import annotations

from dataclasses import replace

from lowrank_compress.arch.spec import Projection

ATTENTION = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.o_proj", ("o",), "context"),
)
GATED = (
    *ATTENTION,
    Projection("mlp.gate_proj", ("gate",), "mlp"),
    Projection("mlp.up_proj", ("up",), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
PHI3 = (
    Projection("self_attn.qkv_proj", ("q", "k", "v"), "attn"),
    Projection("self_attn.o_proj", ("o",), "context"),
    Projection("mlp.gate_up_proj", ("gate", "up"), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
GPT2 = (
    Projection("attn.c_attn", ("q", "k", "v"), "attn", conv1d=True),
    Projection("attn.c_proj", ("o",), "context", conv1d=True),
    Projection("mlp.c_fc", ("up",), "mlp", conv1d=True),
    Projection("mlp.c_proj", ("down",), "hidden", conv1d=True),
)
PHI = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.dense", ("o",), "context"),
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.fc1", ("up",), "attn"),
    Projection("mlp.fc2", ("down",), "hidden"),
)
STARCODER2 = (
    *ATTENTION,
    Projection("mlp.c_fc", ("up",), "mlp"),
    Projection("mlp.c_proj", ("down",), "hidden"),
)
COHERE = (
    *ATTENTION,
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.gate_proj", ("gate",), "attn"),
    Projection("mlp.up_proj", ("up",), "attn"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
GLM = (
    *ATTENTION,
    Projection("mlp.gate_up_proj", ("gate", "up"), "mlp"),
    Projection("mlp.down_proj", ("down",), "hidden"),
)
GPTJ = (
    Projection("attn.q_proj", ("q",), "attn"),
    Projection("attn.k_proj", ("k",), "attn"),
    Projection("attn.v_proj", ("v",), "attn"),
    Projection("attn.out_proj", ("o",), "context"),
    # Attention and MLP lie side by side behind one norm.
    Projection("mlp.fc_in", ("up",), "attn"),
    Projection("mlp.fc_out", ("down",), "hidden"),
)
MODERNBERT = (
    Projection("attn.Wqkv", ("q", "k", "v"), "attn"),
    Projection("attn.Wo", ("o",), "context"),
    # The first half goes through the activation.
    Projection("mlp.Wi", ("gate", "up"), "mlp"),
    Projection("mlp.Wo", ("down",), "hidden"),
)
MPNET = (
    Projection("attention.attn.q", ("q",), "attn"),
    Projection("attention.attn.k", ("k",), "attn"),
    Projection("attention.attn.v", ("v",), "attn"),
    Projection("attention.attn.o", ("o",), "context"),
    Projection("intermediate.dense", ("up",), "mlp"),
    Projection("output.dense", ("down",), "hidden"),
)
GPT_BIGCODE = (
    Projection("attn.c_attn", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("attn.c_proj", ("o",), "context"),
    Projection("mlp.c_fc", ("up",), "mlp"),
    Projection("mlp.c_proj", ("down",), "hidden"),
)
GPT_NEOX = (
    Projection("attention.query_key_value", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("attention.dense", ("o",), "context"),
    Projection("mlp.dense_h_to_4h", ("up",), "mlp"),
    Projection("mlp.dense_4h_to_h", ("down",), "hidden"),
)
OPT = (
    Projection("self_attn.q_proj", ("q",), "attn"),
    Projection("self_attn.k_proj", ("k",), "attn"),
    Projection("self_attn.v_proj", ("v",), "attn"),
    Projection("self_attn.out_proj", ("o",), "context"),
    Projection("fc1", ("up",), "mlp"),
    Projection("fc2", ("down",), "hidden"),
)
BERT = (
    Projection("attention.self.query", ("q",), "attn"),
    Projection("attention.self.key", ("k",), "attn"),
    Projection("attention.self.value", ("v",), "attn"),
    Projection("attention.output.dense", ("o",), "context"),
    Projection("intermediate.dense", ("up",), "mlp"),
    Projection("output.dense", ("down",), "hidden"),
)
DISTILBERT = (
    Projection("attention.q_lin", ("q",), "attn"),
    Projection("attention.k_lin", ("k",), "attn"),
    Projection("attention.v_lin", ("v",), "attn"),
    Projection("attention.out_lin", ("o",), "context"),
    Projection("ffn.lin1", ("up",), "mlp"),
    Projection("ffn.lin2", ("down",), "hidden"),
)

UNGATED = (*ATTENTION, Projection("mlp.up_proj", ("up",), "mlp"), Projection("mlp.down_proj", ("down",), "hidden"))
FALCON = (
    # A group of heads after the other, each with its key and its value; or all heads, and one key and value.
    Projection("self_attention.query_key_value", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("self_attention.dense", ("o",), "context"),
    Projection("mlp.dense_h_to_4h", ("up",), "mlp"),
    Projection("mlp.dense_4h_to_h", ("down",), "hidden"),
)
PERSIMMON = (
    Projection("self_attn.query_key_value", ("q", "k", "v"), "attn", layout="interleaved"),
    Projection("self_attn.dense", ("o",), "context"),
    *FALCON[2:],
)
MPT = (
    Projection("attn.Wqkv", ("q", "k", "v"), "attn"),
    Projection("attn.out_proj", ("o",), "context"),
    Projection("ffn.up_proj", ("up",), "mlp"),
    Projection("ffn.down_proj", ("down",), "hidden"),
)
GPT_NEO = (
    Projection("attn.attention.q_proj", ("q",), "attn"),
    Projection("attn.attention.k_proj", ("k",), "attn"),
    Projection("attn.attention.v_proj", ("v",), "attn"),
    Projection("attn.attention.out_proj", ("o",), "context"),
    Projection("mlp.c_fc", ("up",), "mlp"),
    Projection("mlp.c_proj", ("down",), "hidden"),
)
# Queries and keys are made of relative positions too, by the same matrices or by others: they stay.
DEBERTA_V2 = (
    Projection("attention.self.value_proj", ("v",), "attn"),
    Projection("attention.output.dense", ("o",), "context"),
    Projection("intermediate.dense", ("up",), "mlp"),
    Projection("output.dense", ("down",), "hidden"),
)
DEBERTA_V2_STAYS = tuple(f"attention.self.{name}_proj.weight" for name in ("query", "key", "pos_query", "pos_key"))

# Dense in some blocks; in the others there are experts, and where the names say so one that all tokens go to.
MLP = (
    Projection("mlp.gate_proj", ("gate",), "mlp", optional=True),
    Projection("mlp.up_proj", ("up",), "mlp", optional=True),
    Projection("mlp.down_proj", ("down",), "hidden", optional=True),
)
SHARED_EXPERT = tuple(replace(each, path=each.path.replace("mlp.", "mlp.shared_expert.")) for each in MLP)
SHARED_EXPERTS = tuple(replace(each, path=each.path.replace("mlp.", "mlp.shared_experts.")) for each in MLP)
LATENT = (
    Projection("self_attn.q_proj", ("q",), "attn", optional=True),
    Projection("self_attn.q_a_proj", ("q_a",), "attn", optional=True),
    Projection("self_attn.q_b_proj", ("q_b",), "q_latent", optional=True),
    Projection("self_attn.kv_a_proj_with_mqa", ("kv_a",), "attn"),
    Projection("self_attn.kv_b_proj", ("kv_b",), "kv_latent"),
    Projection("self_attn.o_proj", ("o",), "context"),
)
ROUTER = ("mlp.gate.weight", "mlp.router.weight", "mlp.shared_expert_gate.weight")
