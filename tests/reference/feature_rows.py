"""Packed rows with whole features on both sides, and the payloads that a teacher would send of them; loops alone."""

import itertools

import numpy as np
import torch
from torch import Tensor

from ray_kd.payloads import Features, FeatureSpec, topk_logprobs
from tests.reference.feature_losses import counted

LENGTHS = ((5, 4, 2), (7, 1, 3), (11,))
"""Documents of each row; the last ones of rows 0 and 1 are padding, row 2 has none."""
T = 11


def rows() -> tuple[np.ndarray, np.ndarray]:
    """labels and position_ids int32 [3, 11]: prompts of two tokens, rows 0 and 1 padded, one document of one token."""
    positions = np.array([[p for length in lengths for p in range(length)] for lengths in LENGTHS], np.int32)
    labels = np.where(positions < 2, -100, 7).astype(np.int32)
    labels[1, 7] = 7  # a document of one token, which predicts nothing and is no padding
    labels[0, 9:], labels[1, 8:] = -100, -100
    return labels, positions


def states(generator: torch.Generator, num_layers: int, width: int) -> list[Tensor]:
    """float64 [3, 11, width] a layer, of values that bfloat16 has."""
    shape = (len(LENGTHS), T, width)
    return [torch.randn(shape, generator=generator).bfloat16().double() for _ in range(num_layers)]


def maps(generator: torch.Generator, num_layers: int, num_heads: int) -> list[Tensor]:
    """float64 [3, heads, 11, 11] a layer, of values in (0, 1) that float16 has: also where no token may look."""
    shape = (len(LENGTHS), num_heads, T, T)
    return [torch.rand(shape, generator=generator).clamp(0.01, 0.99).half().double() for _ in range(num_layers)]


def payloads(
    spec: FeatureSpec, hidden: list[Tensor], attention: list[Tensor], labels: np.ndarray, positions: np.ndarray
) -> list[Features]:
    """What is sent of each row; hidden and attention: of the layers of the spec."""
    sent = []
    for row in range(len(labels)):
        own = labels[row].tolist(), positions[row].tolist()
        tokens = list(itertools.chain(*counted(*own, spec.hidden_mask)))
        pairs = [
            (query, key)
            for document in counted(*own, spec.attention_mask)
            for query in document
            for key in document
            if key <= query
        ]
        chosen = [[[one[row][t, d] for d in range(one.shape[-1])] for t in tokens] for one in hidden]
        shape = (len(hidden), len(tokens), hidden[0].shape[-1] if hidden else 1)
        bits = torch.tensor(chosen, dtype=torch.bfloat16).reshape(shape).view(torch.uint16).numpy()
        probabilities = []
        for one in attention:
            heads = one[row].mean(0, keepdim=True) if spec.mean_over_heads else one[row]
            probabilities.append([[head[pair] for pair in pairs] for head in heads])
        shape = (len(attention), len(probabilities[0]) if probabilities else 1, len(pairs) if probabilities else 0)
        topk = topk_logprobs.example(sum(map(len, counted(*own, "targets"))), np.random.default_rng(row), top_k=4)
        sent.append(Features(topk, spec, bits, np.array(probabilities, np.float16).reshape(shape)))
    return sent
