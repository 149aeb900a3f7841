"""The scores of width pruning from the formulas: a decoder written out in numpy, float64, one document at a time.

Reads the weights of a Llama, Mistral, Qwen2 or Qwen3 by name; shares no code with ray_kd or transformers.
"""

import math

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding of [t, D] from position 0 on, halves rotated against each other."""
    length, dim = x.shape
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def document_activations(weights: dict[str, np.ndarray], config: dict, ids: list[int]) -> dict[str, list[np.ndarray]]:
    """What is scored, per token of one document: neurons [L][t, I], heads [L][t, Q], channels [L + 1][t, H]."""
    eps, base, num_heads, num_groups, dim = (
        config[name]
        for name in ("rms_norm_eps", "rope_theta", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    found: dict[str, list[np.ndarray]] = {"neurons": [], "heads": [], "channels": []}
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def linear(name: str, value: np.ndarray, prefix: str = prefix) -> np.ndarray:
            return value @ weights[f"{prefix}{name}.weight"].T + weights.get(f"{prefix}{name}.bias", 0.0)

        before = rms_norm(x, weights[f"{prefix}input_layernorm.weight"], eps)
        q, k, v = (linear(f"self_attn.{name}_proj", before) for name in "qkv")
        mixed, sizes = [], []
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            query, key, value = (m[:, i * dim : (i + 1) * dim] for m, i in ((q, head), (k, group), (v, group)))
            if f"{prefix}self_attn.q_norm.weight" in weights:
                query = rms_norm(query, weights[f"{prefix}self_attn.q_norm.weight"], eps)
                key = rms_norm(key, weights[f"{prefix}self_attn.k_norm.weight"], eps)
            scores = rotated(query, base) @ rotated(key, base).T / math.sqrt(dim)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            probabilities = np.exp(scores - scores.max(-1, keepdims=True))
            out = probabilities / probabilities.sum(-1, keepdims=True) @ value
            mixed.append(out)
            sizes.append(np.sqrt((out**2).sum(-1)))
        x = x + linear("self_attn.o_proj", np.concatenate(mixed, -1))
        after = rms_norm(x, weights[f"{prefix}post_attention_layernorm.weight"], eps)
        gate = linear("mlp.gate_proj", after)
        neurons = gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", after)
        x = x + linear("mlp.down_proj", neurons)
        found["neurons"].append(np.abs(neurons))
        found["heads"].append(np.stack(sizes, -1))
        found["channels"].append(np.abs(before))
        found["channels"].append(np.abs(after))
    found["channels"].append(np.abs(rms_norm(x, weights["model.norm.weight"], eps)))
    return found


def scores(weights: dict[str, np.ndarray], config: dict, rows: list[list[list[int]]]) -> dict[str, np.ndarray]:
    """rows: the documents of each, as ids, no padding. neurons [L, I], heads [L, Q], channels [L + 1, H]."""
    squares: dict[str, list[np.ndarray]] = {}
    for documents in rows:
        activations = [document_activations(weights, config, ids) for ids in documents]
        for kind in ("neurons", "heads", "channels"):
            for place in range(len(activations[0][kind])):
                means = np.concatenate([one[kind][place] for one in activations]).mean(0)
                held = squares.setdefault(kind, [])
                if place == len(held):
                    held.append(np.zeros_like(means))
                held[place] += means**2
    roots = {kind: [np.sqrt(total) for total in held] for kind, held in squares.items()}
    both = [a + b for a, b in zip(roots["channels"][:-1:2], roots["channels"][1::2], strict=True)]
    return {"neurons": np.stack(roots["neurons"]), "heads": np.stack(roots["heads"]),
            "channels": np.stack([*both, roots["channels"][-1]])}  # fmt: skip
