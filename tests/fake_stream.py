"""Rows as they leave the teacher stage, micro-batches of them, and a tiny student for feature terms; without Ray."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ray_kd import schema
from ray_kd.losses.features import Term
from ray_kd.losses.layer_map import ModelShape
from ray_kd.losses.terms import parse_terms, resolve
from ray_kd.payloads import FEATURES, Features, FeatureSpec, TopKLogprobs
from ray_kd.trainer.collate import MicroBatch, collate
from ray_kd.trainer.feed import Expected, ExpectedFeatures
from tests.reference import feature_rows

VOCAB, TOP_K = 30, 4
STUDENT, TEACHER = ModelShape(2, 12, 2), ModelShape(4, 5, 3)
TERMS: list[Any] = [
    {"kind": "kd", "weight": 1.5},
    {"kind": "ce", "weight": 0.5},
    {
        "kind": "hidden_state", "weight": 0.3, "layers": [1, -1], "projector": "linear",
        "projector_learning_rate": 3e-2,
    },
    {"kind": "attention", "weight": 2.0, "layers": [0], "heads": "mean", "mask": "attention"},
    {"kind": "hidden_state", "weight": 0.2, "layers": [0], "measure": "cosine", "projector": "linear"},
]  # fmt: skip


def table(weights: Sequence[int], rows: dict[str, np.ndarray], payloads: Sequence[bytes]) -> pa.Table:
    """Rows with their teacher answers; weight 0: refused."""
    length = rows[schema.INPUT_IDS].shape[1]
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(rows[name].reshape(-1)), length)
        for name in (schema.INPUT_IDS, schema.LABELS, schema.POSITION_IDS)
    }
    count = len(weights)
    return pa.table(
        {
            schema.ROW_ID: pa.array(np.arange(count) + 100),
            **lists,
            schema.SLOT: pa.array(np.arange(count)),
            schema.WEIGHT: pa.array(np.array(weights, np.float32)),
            schema.TEACHER_PAYLOAD: pa.array(payloads, type=pa.binary()),
            schema.TEACHER_BUSY_S: pa.array(np.full(count, 0.5, np.float32)),
            schema.TEACHER_ERROR: pa.array(["" if w else "refused" for w in weights]),
        }
    )


def terms() -> dict[str, Term]:
    """The feature terms of TERMS between STUDENT and TEACHER."""
    return resolve(parse_terms(TERMS), STUDENT, TEACHER, feature_rows.T)


def asked() -> FeatureSpec:
    """What they ask of the teacher together."""
    spec = FeatureSpec()
    for term in terms().values():
        spec = spec.union(term.asks)
    return spec


def student(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """A random Llama of shape STUDENT with eager attention, the same each time."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=STUDENT.width, intermediate_size=24, num_hidden_layers=STUDENT.num_layers,
        num_attention_heads=STUDENT.num_heads, num_key_value_heads=1, initializer_range=0.4, tie_word_embeddings=True,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def rows(seed: int) -> dict[str, np.ndarray]:
    """Three rows of `feature_rows` with tokens drawn by seed."""
    labels, positions = feature_rows.rows()
    ids = np.random.default_rng(seed).integers(3, VOCAB, labels.shape).astype(np.int32)
    return {
        schema.INPUT_IDS: ids,
        schema.LABELS: np.where(labels == schema.IGNORED_LABEL, labels, ids),
        schema.POSITION_IDS: positions,
    }


def teacher(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states [3, T, D] and attention [3, h, T, T] of the layers that `asked` names, as they are sent."""
    generator, spec = torch.Generator().manual_seed(seed), asked()
    hidden = feature_rows.states(generator, len(spec.hidden_layers), TEACHER.width)
    assert TEACHER.num_heads is not None
    return hidden, feature_rows.maps(generator, len(spec.attention_layers), TEACHER.num_heads)


def topk(num_targets: int, seed: int) -> TopKLogprobs:
    """Answers that hold most of their mass."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(VOCAB, TOP_K, replace=False) for _ in range(num_targets)]).astype(np.int32)
    logits = np.sort(rng.normal(size=(num_targets, TOP_K)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) + 0.5)
    return TopKLogprobs(ids, logprobs.astype(np.float16).astype(np.float32), 1.0, VOCAB)


def payloads(seed: int) -> list[Features]:
    """What the teacher sends of `rows(seed)`."""
    own = rows(seed)
    sent = feature_rows.payloads(asked(), *teacher(seed), own[schema.LABELS], own[schema.POSITION_IDS])
    counts = schema.target_positions(own[schema.LABELS], own[schema.POSITION_IDS]).sum(axis=1)
    return [
        replace(payload, topk=topk(int(count), seed + row))
        for row, (payload, count) in enumerate(zip(sent, counts, strict=True))
    ]


def micro_batch(seed: int, weights: Sequence[int] = (1, 1, 1), first_slot: int = 0) -> MicroBatch:
    """`rows(seed)` through the wire and `collate`; weight 0: a row whose answer was refused."""
    encoded = [payload.encode() if weight else b"" for payload, weight in zip(payloads(seed), weights, strict=True)]
    heads = TEACHER.num_heads or 0
    expected = Expected(FEATURES, TOP_K, 1.0, ExpectedFeatures(asked(), TEACHER.width, heads))
    batch = collate(table(weights, rows(seed), encoded), expected)
    return replace(batch, slots=batch.slots + first_slot)
