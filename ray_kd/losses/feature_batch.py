"""What the teacher sent of its layers for one micro-batch, and where it belongs in the student's forward.

B rows of T tokens; N positions and P pairs that the teacher sent, L layers, h heads, D width of the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_kd import schema
from ray_kd.payloads import Features, FeatureSpec
from ray_kd.payloads.features import ATTENTION, TARGETS


@dataclass(frozen=True)
class Places:
    """The entries of one mask, on both sides: n positions, or n pairs of them."""

    student: Tensor
    """int64 [n] ascending: positions in [B T] flattened, or pairs in [B T T] flattened."""
    sent: Tensor
    """int64 [n]: their places among those that the teacher sent."""

    def to(self, device: torch.device | str) -> "Places":
        """The same on another device."""
        return Places(self.student.to(device), self.sent.to(device))


@dataclass(frozen=True)
class FeatureBatch:
    """The features of a micro-batch; `of` makes it of what came over the wire."""

    spec: FeatureSpec
    hidden: Tensor
    """bfloat16 [L, N, D]."""
    attention: Tensor
    """float16 [L, h, P], h = 1 for a mean over heads."""
    tokens: Mapping[str, Places]
    """Mask -> its positions; of the masks that the spec covers, and none without hidden states."""
    pairs: Mapping[str, Places]
    """Mask -> its pairs, likewise."""
    num_queries: Mapping[str, int]
    """Mask -> how many positions have a pair: as many rows of attention."""

    def hidden_of(self, layer: int, mask: str) -> Tensor:
        """[n, D] of a teacher layer."""
        return self.hidden[self.spec.hidden_layers.index(layer)][self.tokens[mask].sent]

    def attention_of(self, layer: int, mask: str) -> Tensor:
        """[h, n] of a teacher layer."""
        return self.attention[self.spec.attention_layers.index(layer)][:, self.pairs[mask].sent]

    @classmethod
    def of(
        cls, spec: FeatureSpec, payloads: Sequence[Features], labels: NDArray[np.integer],
        position_ids: NDArray[np.integer], used: NDArray[np.integer], *, width: int, num_heads: int,
    ) -> "FeatureBatch":  # fmt: skip
        """On the CPU. payloads: of the rows `used` [U], in their order; labels and position_ids [B, T] of all rows.

        width, num_heads: of the teacher. A payload that is not of the positions that its row has, or of other features,
        is a bug, and an AssertionError.
        """
        is_used = np.isin(np.arange(len(labels)), used)[:, None]
        is_in = {
            TARGETS: schema.target_positions(labels, position_ids) & is_used,
            ATTENTION: schema.real_positions(labels, position_ids) & is_used,
        }
        tokens = _tokens(is_in, spec.hidden_mask) if spec.hidden_layers else {}
        pairs = _pairs(is_in, spec.attention_mask, position_ids) if spec.attention_layers else {}
        hidden = [np.empty((len(spec.hidden_layers), 0, width), np.uint16)]
        attention = [np.empty((len(spec.attention_layers), 1 if spec.mean_over_heads else num_heads, 0), np.float16)]
        for payload in payloads:
            assert payload.spec == spec, f"payload of {payload.spec} for {spec}"
            hidden += [payload.hidden] if spec.hidden_layers else []
            attention += [payload.attention] if spec.attention_layers else []
        hidden_LND, attention_LhP = np.concatenate(hidden, axis=1), np.concatenate(attention, axis=2)
        for places, found in ((tokens, hidden_LND.shape[1]), (pairs, attention_LhP.shape[2])):
            expected = max((len(one.student) for one in places.values()), default=0)
            assert found == expected, f"features of {found} for {expected}: alignment is broken"
        return cls(
            spec,
            torch.from_numpy(hidden_LND).view(torch.bfloat16),
            torch.from_numpy(attention_LhP),
            tokens,
            pairs,
            {mask: int(is_in[mask].sum()) for mask in pairs},
        )

    def to(self, device: torch.device | str) -> "FeatureBatch":
        """The same on another device."""
        return replace(
            self,
            hidden=self.hidden.to(device),
            attention=self.attention.to(device),
            tokens={mask: places.to(device) for mask, places in self.tokens.items()},
            pairs={mask: places.to(device) for mask, places in self.pairs.items()},
        )


def _sent(mask: str) -> Sequence[str]:
    """The masks whose positions were sent: targets are among those that are not padding."""
    return (TARGETS,) if mask == TARGETS else (ATTENTION, TARGETS)


def _tokens(is_in: Mapping[str, NDArray[np.bool_]], sent: str) -> dict[str, Places]:
    places = np.flatnonzero(is_in[sent])
    return {mask: _places(places, is_in[mask].reshape(-1)[places]) for mask in _sent(sent)}


def _pairs(
    is_in: Mapping[str, NDArray[np.bool_]], sent: str, position_ids: NDArray[np.integer]
) -> dict[str, Places]:  # fmt: skip
    length = position_ids.shape[1]
    places, is_of_targets = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
    for row, positions in enumerate(position_ids):
        queries, keys = schema.causal_pairs(is_in[sent][row], positions)
        places.append((row * length + queries) * length + keys)
        is_of_targets.append(is_in[TARGETS][row][queries] & is_in[TARGETS][row][keys])
    flat, of_targets = np.concatenate(places), np.concatenate(is_of_targets)
    return {mask: _places(flat, of_targets if mask == TARGETS else np.ones_like(of_targets)) for mask in _sent(sent)}


def _places(places: NDArray[np.int64], is_of_mask: NDArray[np.bool_]) -> Places:
    """places [n]: all that were sent, in their order; is_of_mask [n]: which of them the mask has."""
    sent = np.flatnonzero(is_of_mask)
    return Places(torch.from_numpy(places[sent]), torch.from_numpy(sent))
