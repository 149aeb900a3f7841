"""Top-k log-probabilities, and beside them what some of the teacher's layers said: hidden states and attention maps.

plain     little-endian: a header of 32 bytes a row, the indices of the layers, the payload of top-k log-probabilities
          as it is, then bfloat16 [L, N, D] hidden states and float16 [L, h, P] attention probabilities.
compact   the same with compact log-probabilities. Features stand as they are: their mantissas are noise to a coder.

N positions: the targets of the row, or all that are not padding. P pairs of such positions: a query and a key of one
document that is not after it (`schema.causal_pairs`). h heads, or 1 for their mean. Layers count as Hugging Face's do:
hidden state 0 is the embeddings' output and the last one comes after the final norm; attention 0 is the first layer's.

Costs: 2 D bytes a position and layer of hidden states (1.2 kB at a width of 576), and of attention about h n bytes for
documents of n positions (0.5 kB at n = 512 for a mean over heads). float16 has 11 bits of mantissa for a probability.
"""

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_kd.errors import DataError
from ray_kd.payloads import hidden_states, topk_logprobs
from ray_kd.payloads._frame import NBYTES as HEADER_NBYTES
from ray_kd.payloads._frame import seal, unseal
from ray_kd.payloads.topk_logprobs import TopKLogprobs

TARGETS, ATTENTION = "targets", "attention"
MASKS = (TARGETS, ATTENTION)
"""Positions that a feature is of: those that predict a label, or all that are not padding."""

WIRES = ("plain", "compact")
_MAGICS = {"plain": b"RKFP", "compact": b"RKFC"}
_VERSIONS = dict.fromkeys(_MAGICS.values(), 1)
_FIELDS = struct.Struct("<IIIIBBHBx")
_NUM_FLAGS = 3
_MOST_LAYERS, _MOST_HEADS, _MOST_INDEX = 255, 2**16 - 1, 2**16 - 1
_FP16_ONE = 0x3C00


@dataclass(frozen=True)
class FeatureSpec:
    """Which features are asked of the teacher."""

    hidden_layers: tuple[int, ...] = ()
    """Indices of hidden states, ascending, none negative."""
    hidden_mask: str = TARGETS
    """Their positions, one of `MASKS`."""
    attention_layers: tuple[int, ...] = ()
    """Indices of layers whose attention is sent, ascending, none negative."""
    attention_mask: str = TARGETS
    """The positions whose pairs are sent, one of `MASKS`."""
    mean_over_heads: bool = False
    """Whether one map a layer is sent, the mean over its heads, in place of all."""

    def __post_init__(self) -> None:
        for name in ("hidden_layers", "attention_layers"):
            layers = getattr(self, name)
            is_ascending = all(a < b for a, b in zip((-1, *layers), layers, strict=False))
            if not is_ascending or len(layers) > _MOST_LAYERS or max(layers, default=0) > _MOST_INDEX:
                raise ValueError(f"{name} is {layers}; allowed: at most {_MOST_LAYERS} ascending indices from 0 on")
        for name in ("hidden_mask", "attention_mask"):
            if getattr(self, name) not in MASKS:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(MASKS)}")

    def union(self, other: "FeatureSpec") -> "FeatureSpec":
        """The least that holds what both ask for: the targets are among all positions, a mean is of all heads."""
        hidden = [spec.hidden_mask for spec in (self, other) if spec.hidden_layers]
        attending = [spec for spec in (self, other) if spec.attention_layers]
        return FeatureSpec(
            tuple(sorted({*self.hidden_layers, *other.hidden_layers})),
            ATTENTION if ATTENTION in hidden else TARGETS,
            tuple(sorted({*self.attention_layers, *other.attention_layers})),
            ATTENTION if ATTENTION in [spec.attention_mask for spec in attending] else TARGETS,
            bool(attending) and all(spec.mean_over_heads for spec in attending),
        )

    def to_json(self) -> str:
        """For a manifest; equal for equal ones."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """What `to_json` wrote."""
        known: dict[str, Any] = json.loads(text)
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)


@dataclass(frozen=True, eq=False)
class Features:
    """What the teacher said of one row. L layers, N positions, D width, h heads (1 for their mean), P pairs."""

    topk: TopKLogprobs
    """Of the row's target positions."""
    spec: FeatureSpec
    """What the arrays are of: their first axes are its layers, in its order."""
    hidden: np.ndarray
    """uint16 [L, N, D]: bfloat16 by its bits, as in `HiddenStates`."""
    attention: np.ndarray
    """float16 [L, h, P]: attention probabilities of the pairs, each in [0, 1]."""

    def __post_init__(self) -> None:
        for name, array, dtype in (("hidden", self.hidden, np.uint16), ("attention", self.attention, np.float16)):
            num_layers = len(getattr(self.spec, f"{name}_layers"))
            if array.ndim != 3 or array.dtype != dtype or array.shape[0] != num_layers:
                raise DataError(
                    f"features payload: {name} is {array.dtype} {list(array.shape)}, must be {np.dtype(dtype)} with 3 "
                    f"axes, the first of {num_layers} layers"
                )
        if self.spec.mean_over_heads and self.attention.shape[1] != 1:
            raise DataError(f"features payload: a mean over heads has 1 map a layer, not {self.attention.shape[1]}")

    def encode(self, wire: str = "plain") -> bytes:
        """The wire form. Raises DataError for what `TopKLogprobs.encode` refuses, for hidden states that are NaN or
        infinite, and for attention that is NaN or outside 0 to 1."""
        if wire not in WIRES:
            raise ValueError(f"wire is {wire!r}; allowed: {', '.join(WIRES)}")
        spec, topk = self.spec, self.topk.encode(wire)
        hidden_states.check_finite(self.hidden)
        _check_probabilities(self.attention)
        (_, num_positions, width), (_, num_heads, num_pairs) = self.hidden.shape, self.attention.shape
        if num_heads > _MOST_HEADS:
            raise DataError(f"features payload: {num_heads} heads are more than {_MOST_HEADS}")
        is_of = (spec.hidden_mask == ATTENTION, spec.attention_mask == ATTENTION, spec.mean_over_heads)
        flags = sum(bit << place for place, bit in enumerate(is_of))
        counts = (len(spec.hidden_layers), len(spec.attention_layers), num_heads)
        fields = _FIELDS.pack(num_positions, width, num_pairs, len(topk), *counts, flags)
        parts = [np.array([*spec.hidden_layers, *spec.attention_layers], "<u2").data, topk]
        arrays = [np.ascontiguousarray(self.hidden, "<u2"), np.ascontiguousarray(self.attention, "<f2")]
        parts = [part for part in parts if len(part)] + [array.data for array in arrays if array.size]
        return seal(_MAGICS[wire], _VERSIONS[_MAGICS[wire]], fields, parts)

    @classmethod
    def decode(cls, blob: bytes) -> "Features":
        """The same; the arrays share the memory of blob and cannot be written.

        Raises DataError for another magic or version, bytes that changed, sizes that do not add up, layers out of
        order, and values that `encode` refuses.
        """
        _, fields, body = unseal(blob, _VERSIONS, "features")
        num_positions, width, num_pairs, topk_nbytes, *counts, flags = _FIELDS.unpack(fields)
        num_hidden, num_attention, num_heads = counts
        sizes = (2 * (num_hidden + num_attention), topk_nbytes, 2 * num_hidden * num_positions * width,
                 2 * num_attention * num_heads * num_pairs)  # fmt: skip
        if flags >= 1 << _NUM_FLAGS:
            raise DataError(f"features payload: flags {flags:#x} are unknown")
        if len(body) != sum(sizes):
            raise DataError(
                f"features payload of {len(blob)} bytes; N={num_positions} D={width} P={num_pairs} heads={num_heads} "
                f"with {num_hidden} and {num_attention} layers need {HEADER_NBYTES + sum(sizes)}"
            )
        ends = np.cumsum(sizes).tolist()
        layers = tuple(np.frombuffer(body[: ends[0]], "<u2").tolist())
        masks = [ATTENTION if flags >> place & 1 else TARGETS for place in range(2)]
        try:
            spec = FeatureSpec(layers[:num_hidden], masks[0], layers[num_hidden:], masks[1], bool(flags >> 2 & 1))
        except ValueError as error:
            raise DataError(f"features payload: {error}") from error
        hidden = np.frombuffer(body[ends[1] : ends[2]], "<u2").astype(np.uint16, copy=False)
        attention = np.frombuffer(body[ends[2] :], "<f2").astype(np.float16, copy=False)
        hidden_states.check_finite(hidden)
        _check_probabilities(attention)
        return cls(
            TopKLogprobs.decode(bytes(body[ends[0] : ends[1]])), spec,
            hidden.reshape(num_hidden, num_positions, width), attention.reshape(num_attention, num_heads, num_pairs),
        )  # fmt: skip


def nbytes_per_token(
    spec: FeatureSpec, *, top_k: int, vocab_size: int, width: int, num_heads: int, sequence_length: int
) -> int:
    """The most bytes that a token which is not padding takes on the plain wire, without the headers of the row.

    width, num_heads: of the teacher. Attention is most where one document fills the row of `sequence_length` T: a query
    then has (T + 1) / 2 keys on average. A row of n such tokens takes at most n times this.
    """
    of_hidden = hidden_states.nbytes_per_token(width) * len(spec.hidden_layers)
    num_maps = len(spec.attention_layers) * (1 if spec.mean_over_heads else num_heads)
    return topk_logprobs.nbytes_per_token(top_k, vocab_size) + of_hidden + num_maps * (sequence_length + 1)


def example(num_tokens: int, rng: np.random.Generator, width: int = 12, num_heads: int = 2) -> Features:
    """A payload of two layers of hidden states and one of attention, in documents of at most 8 targets."""
    spec = FeatureSpec((1, 3), TARGETS, (2,), TARGETS)
    hidden = np.stack([hidden_states.example(num_tokens, rng, width).bits for _ in spec.hidden_layers])
    lengths = [min(8, num_tokens - start) for start in range(0, num_tokens, 8)]
    rows = [rng.dirichlet(np.ones(keys), size=num_heads) for length in lengths for keys in range(1, length + 1)]
    attention = np.concatenate([np.empty((num_heads, 0)), *rows], axis=1)[None].astype(np.float16)
    return Features(topk_logprobs.example(num_tokens, rng), spec, hidden, attention)


def _check_probabilities(attention: np.ndarray) -> None:
    # By their bits floats from 0 on are in order, and below negative ones, infinity and NaN.
    if attention.size and int(attention.view(np.uint16).max()) > _FP16_ONE:
        raise DataError("features payload: attention contains NaN or a value outside 0 to 1")
