"""Tiny random models of every family with routed experts; and what these do, computed the ordinary way."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.ordinary import summed_loss, tokens
from tests.tiny import _COMMON, _LLAMA, random_model, tiny_tokenizer

_LATENT: dict[str, Any] = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "qwen2_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "deepseek_v2": {**_LATENT, "n_routed_experts": 4, "n_shared_experts": 2, "q_lora_rank": None},
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "n_group": 2,
        "topk_group": 1,
    },
    # Biases are not zero in what `random_model` makes; a small limit, so that it is reached.
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 0.5,
    },
}


def moe_model(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Return a tiny model."""
    config = CONFIG_MAPPING[model_type](**(_COMMON | MOE[model_type] | overrides))
    return random_model(config, dtype=dtype)


def save_moe(model_type: str, directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a complete checkpoint, model and tokenizer, and return its directory."""
    moe_model(model_type, dtype, **overrides).save_pretrained(directory)
    tiny_tokenizer(directory)
    return directory


def save_choosy(directory: Path) -> Path:
    """Write one whose router sends all tokens to two of eight experts, 1 and 2."""
    save_moe("deepseek_v3", directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[[1, 2]] += 100.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# What the matrices of an expert are called.
LEAVES = {"gate": "lr_gating", "up": "lr_up", "down": "lr_down"}


def plain_expert(experts: Any, number: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight (out, in) and bias of gate, up and down of one expert in a stock module."""
    both, down = experts.gate_up_proj[number], experts.down_proj[number]
    if not hasattr(experts, "limit"):
        gate, up = both.chunk(2)
        return {"gate": (gate, None), "up": (up, None), "down": (down, None)}
    width = both.shape[1] // 2  # as GPT-OSS has them: transposed, gate and up by turns, with biases
    even, odd = range(0, 2 * width, 2), range(1, 2 * width, 2)
    bias = experts.gate_up_proj_bias[number]
    return {
        "gate": (torch.stack([both[:, column] for column in even]), torch.stack([bias[column] for column in even])),
        "up": (torch.stack([both[:, column] for column in odd]), torch.stack([bias[column] for column in odd])),
        "down": (down.T, experts.down_proj_bias[number]),
    }


def plain_hidden(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    """What the family of a stock module makes of the outputs of gate and up."""
    if not hasattr(experts, "limit"):
        return experts.act_fn(gate) * up
    gate, limit = torch.minimum(gate, torch.full_like(gate, experts.limit)), experts.limit
    up = torch.minimum(torch.maximum(up, torch.full_like(up, -limit)), torch.full_like(up, limit))
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


class Watched:
    """Runs the stock model with a plain loop over experts in the place of theirs, and keeps what each one sees."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seen: dict[str, tuple[Tensor, ...]] = {}
        self.biases: dict[str, dict[str, Tensor | None]] = {}
        for path, module in model.named_modules():
            if path.endswith(".experts") and hasattr(module, "gate_up_proj"):
                module.forward = self._forward(path, module)

    def _forward(self, path: str, experts: Any) -> Any:
        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for number in range(len(experts.down_proj)):
                tokens, places = torch.where(index == number)
                parts = plain_expert(experts, number)

                def run(x: Tensor, role: str, parts: Any = parts) -> Tensor:
                    weight, bias = parts[role]
                    return x @ weight.T if bias is None else x @ weight.T + bias

                gate, up = run(x[tokens], "gate"), run(x[tokens], "up")
                hidden = plain_hidden(experts, gate, up)
                made = run(hidden, "down")
                self.biases[f"{path}.{number}"] = {role: bias for role, (_, bias) in parts.items()}
                self.seen[f"{path}.{number}"] = (x[tokens], gate, up, hidden, made, weights[tokens, places].double())
                out = out.index_add(0, tokens, made * weights[tokens, places, None].to(made))
            return out

        return forward

    def traces(self, sequences: Sequence[Tensor]) -> dict[str, list[tuple[Tensor, ...]]]:
        """Return x, z, g, the router's weights and the bias of each expert's matrices, by target, for each sequence."""
        found = defaultdict(list)
        for ids in sequences:
            loss, _ = summed_loss(self.model, ids, None)
            outputs = [part for seen in self.seen.values() for part in (seen[1], seen[2], seen[4])]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
            for path, (x, gate, up, hidden, made, weights) in self.seen.items():
                for role, inputs, y in (("gate", x, gate), ("up", x, up), ("down", hidden, made)):
                    g = next(gradients)
                    g = torch.zeros_like(y) if g is None else g
                    bias = self.biases[path][role]
                    bias = torch.zeros(y.shape[1], dtype=y.dtype) if bias is None else bias.detach()
                    found[f"{path}.{LEAVES[role]}"].append((inputs.detach(), y.detach(), g, weights.detach(), bias))
        return found


def expert_statistics(
    seen: Sequence[tuple[Tensor, ...]], weight: Tensor, role: str, tokens: int, losses: int
) -> dict[str, Tensor]:
    """Statistics of one expert's matrix, each by its definition; none where it saw nothing."""
    x, z, g, w = (torch.cat(part) for part in list(zip(*seen, strict=True))[:4])
    if not len(x):
        return {}
    y = z - seen[0][4]
    own, delta = losses * len(x) / tokens, g @ weight
    found = {
        "in_gram": x.T @ x / tokens,
        "in_mean": x.sum(0) / tokens,
        "in_abs": x.abs().sum(0) / tokens,
        "in_square": x.square().sum(0) / tokens,
        "out_gram": y.T @ y / tokens,
        "out_fisher": g.T @ g / own,
        "in_fisher": delta.T @ delta / own,
        "out_square": g.square().sum(0) / own,
        "row_fisher": sum((each[2].T @ each[0]).square().sum(1) for each in seen) / own,
    }
    if role == "down":
        norms = z.norm(dim=1)
        found |= {
            "routed": torch.tensor([len(x) / tokens], dtype=torch.float64),
            "router_weight": w.sum()[None] / tokens,
            "output_norm": norms.sum()[None] / tokens,
            "routed_norm": (w * norms).sum()[None] / tokens,
            "hidden_energy": (w[:, None] * x).square().sum(0) / tokens,
            "hidden_peak": (w[:, None] * x).square().amax(0) / tokens,
        }
    return found


def loads_by_its_own_code(model: Path, expected: Tensor, place: Path) -> None:
    """Make sure that a process without this package gets these logits by the checkpoint's own code, or no model.

    Parameters
    ----------
    expected
        Of two sequences of nine `tokens`.
    place
        An empty directory.
    """
    torch.save(expected, place / "expected.pt")
    torch.save(torch.stack(tokens(9, 9)), place / "ids.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['lowrank_compress'] = None\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        f"path, place = {str(model)!r}, {str(place)!r}\n"
        "try:\n    Auto.from_pretrained(path)\nexcept RuntimeError as problem:\n    assert 'mismatch' in str(problem)\n"
        "else:\n    raise SystemExit('loaded as something else')\n"
        "model = Auto.from_pretrained(path, trust_remote_code=True).eval()\n"
        "with torch.no_grad():\n    found = model(torch.load(place + '/ids.pt')).logits\n"
        "assert torch.equal(found, torch.load(place + '/expected.pt'))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
