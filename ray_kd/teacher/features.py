"""From a teacher's forward to the features of its rows: at chosen positions, in the dtypes of the wire.

B rows of T tokens, D width, h heads (1 for their mean), N positions and P pairs of a row, L layers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_kd import schema
from ray_kd.models import DecoderOutputs
from ray_kd.payloads import Features, FeatureSpec, TopKLogprobs
from ray_kd.payloads.features import ATTENTION, TARGETS
from ray_kd.teacher.engine import RowError, Rows

_POSITIONS = {TARGETS: schema.target_positions, ATTENTION: schema.real_positions}


def positions(rows: Rows, spec: FeatureSpec) -> dict[str, NDArray[np.bool_]]:
    """Mask -> its positions [B, T] in whole rows: of the targets, and of the masks that the spec names."""
    labels, position_ids = np.asarray(rows[schema.LABELS]), np.asarray(rows[schema.POSITION_IDS])
    masks = {TARGETS, spec.hidden_mask, spec.attention_mask}
    return {mask: find(labels, position_ids) for mask, find in _POSITIONS.items() if mask in masks}


def needed(is_in: Mapping[str, NDArray[np.bool_]], spec: FeatureSpec) -> NDArray[np.bool_]:
    """[B, T]: the positions that log-probabilities or features are of."""
    masks = {TARGETS} | ({spec.hidden_mask} if spec.hidden_layers else set())
    masks |= {spec.attention_mask} if spec.attention_layers else set()
    return np.logical_or.reduce([is_in[mask] for mask in sorted(masks)])


def features(
    outputs: DecoderOutputs,
    topk: Sequence[TopKLogprobs | RowError],
    position_ids: NDArray[np.integer],
    is_in: Mapping[str, NDArray[np.bool_]],
    spec: FeatureSpec,
) -> list[Features | RowError]:
    """The payload of each row, or why it has none: its log-probabilities have none, or a feature is not finite.

    outputs: with the layers of the spec, in its order; topk: of each row; position_ids and is_in [B, T], cut alike.
    """
    is_hidden = is_in[spec.hidden_mask]
    counts = is_hidden.sum(axis=1).tolist()
    states = [_bfloat16_bits(layer, is_hidden) for layer in outputs.hidden]
    found: list[Features | RowError] = []
    for row, (answer, end) in enumerate(zip(topk, np.cumsum(counts), strict=True)):
        width = outputs.last.shape[-1]
        own = np.stack([np.empty((counts[row], width), np.uint16), *(s[end - counts[row] : end] for s in states)])[1:]
        maps = _attention(outputs.attentions, row, is_in[spec.attention_mask][row], position_ids[row], spec)
        found.append(answer if isinstance(answer, RowError) else _checked(answer, spec, own, maps))
    return found


def _bfloat16_bits(states: Tensor, is_hidden: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """[sum of N, D] of states [B, T, D]."""
    chosen = states[torch.from_numpy(is_hidden).to(states.device)].to(torch.bfloat16)
    return chosen.cpu().view(torch.uint16).numpy()


def _attention(
    layers: Sequence[Tensor], row: int, is_chosen: NDArray[np.bool_], position_ids: NDArray[np.integer],
    spec: FeatureSpec,
) -> NDArray[np.float16]:  # fmt: skip
    """float16 [L, h, P] of one row; layers: [B, h, T, T] each."""
    if not layers:
        return np.empty((0, 1, 0), np.float16)
    pairs = [torch.from_numpy(places) for places in schema.causal_pairs(is_chosen, position_ids)]
    chosen = []
    for maps in layers:
        queries, keys = (places.to(maps.device) for places in pairs)
        own = maps[row].float().mean(dim=0, keepdim=True) if spec.mean_over_heads else maps[row]
        chosen.append(own[:, queries, keys].to(torch.float16).cpu().numpy())
    return np.stack(chosen)


def _checked(
    topk: TopKLogprobs, spec: FeatureSpec, hidden: NDArray[np.uint16], attention: NDArray[np.float16]
) -> Features | RowError:  # fmt: skip
    bits = torch.from_numpy(hidden).view(torch.bfloat16)
    is_finite = torch.isfinite(bits).all(dim=-1).all(dim=0)
    if not bool(is_finite.all()):
        num_bad, num_positions = int((~is_finite).sum()), hidden.shape[1]
        return RowError(f"the teacher's hidden states are not finite at {num_bad} of {num_positions} tokens")
    if not np.isfinite(attention).all():
        return RowError("the teacher's attention is not finite")
    return Features(topk, spec, hidden, attention)
