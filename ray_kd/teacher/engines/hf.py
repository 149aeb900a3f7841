"""A transformers model in this process: the decoder forward, then the head at target positions only.

Attention is causal, so a row is cut after its last target: what follows, padding mostly, could change no answer.
For features what layers compute on the way is sent too. Attention needs a model that was loaded for it: eager attention
is slower than sdpa, and makes the maps of all layers in each forward; how many bytes is logged with the first one.
A model may be spread over several GPUs by accelerate, layer after layer, one GPU computing at a time. That was run with
layers on CPU and disk, not on several GPUs.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.errors import ConfigError
from ray_kd.head import Head
from ray_kd.models import (
    DecoderOutputs,
    attention_nbytes,
    check_architecture,
    check_attentions,
    decoder_outputs,
    head_of,
    load_causal_lm,
)
from ray_kd.payloads import FEATURES, HIDDEN_STATES, TOPK_LOGPROBS, Features, FeatureSpec, HiddenStates, TopKLogprobs
from ray_kd.payloads.features import TARGETS
from ray_kd.teacher import draws
from ray_kd.teacher import features as features_of
from ray_kd.teacher.engine import (
    SAMPLE,
    SELECTIONS,
    Request,
    RowError,
    Rows,
    Stats,
    check_request,
    needed_lengths,
    not_finite,
    rows_in,
)
from ray_kd.teacher.sample import sample_tokens
from ray_kd.teacher.topk import topk_logprobs

logger = logging.getLogger(__name__)

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

Answer = TopKLogprobs | HiddenStates | Features | RowError


@dataclass
class Config:
    """Options of `teacher.engine: {kind: hf}`."""

    chunk_size: int = 512
    """Target tokens per head product, which is made in tiles of the vocabulary of 16 MB."""
    device_map: Any = None
    """How accelerate spreads the model: auto | balanced | balanced_low_0 | sequential, or {module: device}. Default:
    auto when teacher.pool.num_gpus is above 1, else all on one device."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ConfigError(f"teacher.engine.chunk_size is {self.chunk_size}: allowed is 1 or more")
        chosen = self.device_map
        is_mapping = isinstance(chosen, dict) and chosen and all(map(_is_device, chosen.values()))
        if chosen is not None and chosen not in _DEVICE_MAPS and not is_mapping:
            raise ConfigError(
                f"teacher.engine.device_map is {chosen!r}: allowed is {' | '.join(_DEVICE_MAPS)} or {{module: device}}"
            )


class Engine:
    """Loads the model once; at most `batch_size` rows, or `batch_tokens` places, go through the decoder together."""

    provides = frozenset({TOPK_LOGPROBS, HIDDEN_STATES, FEATURES})
    selections = frozenset(SELECTIONS)
    any_temperature = True
    is_local_model = True
    takes_batch_tokens = True
    spreads = True

    def __init__(
        self,
        config: Config,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int = 4,
        batch_tokens: int | None = None,
        is_spread: bool = False,
        returns_attention: bool = False,
    ) -> None:
        """batch_tokens: rows x longest of a forward, at most (or one row); rows are then sorted by their lengths.

        is_spread: over all GPUs that this process sees, where device_map says nothing else. returns_attention: load it
        with eager attention, for requests of attention maps.

        Raises ConfigError when the model cannot be loaded, does not keep packed documents apart, or does not return the
        attention of each of its layers.
        """
        self.stats = Stats()
        device_map = config.device_map or ("auto" if is_spread else None)
        implementation = "eager" if returns_attention else None
        self._model = load_causal_lm(model, revision, dtype, device, device_map, implementation)
        check_architecture(self._model)
        if returns_attention:
            check_attentions(self._model)
        self._returns_attention, self._is_memory_said = returns_attention, not returns_attention
        self._head = head_of(self._model)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._chunk_size = config.chunk_size

    def annotate(self, rows: Rows, request: Request) -> list[Answer]:
        """One payload per row, in order; a row with a non-finite value anywhere is a RowError of its own.

        Of hidden states only they are looked at: a head that overflows on them is seen by the loss.
        """
        check_request(request, self.provides, self.selections, self._head.vocab_size)
        spec = request.features if request.kind == FEATURES and request.features is not None else FeatureSpec()
        if spec.attention_layers and not self._returns_attention:
            raise ValueError("the engine was built without eager attention: allowed are requests of no attention maps")
        is_in = features_of.positions(rows, spec)
        lengths = needed_lengths(features_of.needed(is_in, spec))
        answers: dict[int, Answer] = {}
        for places in _batches(lengths, self._batch_size, self._batch_tokens):
            length = int(lengths[places].max())
            cut = {mask: chosen[places, :length] for mask, chosen in is_in.items()}
            found = self._annotate_batch(_cut(rows, places, length), cut, int(lengths[places].sum()), request, spec)
            answers.update(zip(places.tolist(), found, strict=True))
        return [answers[place] for place in range(rows_in(rows))]

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_head", None)

    @torch.inference_mode()
    def _annotate_batch(
        self, rows: Rows, is_in: Mapping[str, NDArray[np.bool_]], num_tokens: int, request: Request, spec: FeatureSpec
    ) -> list[Answer]:
        """The answers to rows that are cut to what num_tokens of them need. is_in: mask -> positions [B, T], those of
        the whole rows: a label is one place further on."""
        targets = is_in[TARGETS]
        counts = targets.sum(axis=1)
        outputs = self._forward(rows, num_tokens, spec)
        hidden = outputs.last[torch.from_numpy(targets).to(outputs.last.device)].to(self._head.weight.device)
        if request.kind == HIDDEN_STATES:
            return [_hidden_states(own) for own in hidden.split(counts.tolist())]
        head = self._head.over(request.vocab_size)
        ids_MK, logprobs_MK = self._select(head, hidden, rows, counts, request)
        num_draws = request.top_k if request.selection == SAMPLE else 0
        answers: list[TopKLogprobs | RowError] = []
        for start, end in zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True):
            own = logprobs_MK[start:end]
            ids = ids_MK[start:end]
            answers.append(not_finite(own) or TopKLogprobs(ids, own, request.temperature, head.vocab_size, num_draws))
        if request.kind != FEATURES:
            return list(answers)
        return list(features_of.features(outputs, answers, np.asarray(rows[schema.POSITION_IDS]), is_in, spec))

    def _select(
        self, head: Head, hidden: torch.Tensor, rows: Rows, counts: NDArray[np.integer], request: Request
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids and log-probabilities [M, K] of the target positions; a broken position has NaN."""
        if request.selection != SAMPLE:
            ids, logprobs = topk_logprobs(hidden, head, request.top_k, request.temperature, self._chunk_size)
            return ids.cpu().numpy(), logprobs.cpu().numpy()
        numbers = [
            draws.uniforms(request.seed, int(row_id), int(count), request.top_k)
            for row_id, count in zip(rows[schema.ROW_ID], counts, strict=True)
        ]
        uniforms = torch.from_numpy(np.concatenate(numbers)).to(hidden.device)
        drawn = sample_tokens(hidden, head, uniforms, request.temperature, self._chunk_size).cpu().numpy()
        ids_MK, logprobs_MK = draws.count(drawn)
        logprobs_MK[(drawn < 0).any(axis=1)] = np.nan
        return ids_MK, logprobs_MK

    def _forward(self, rows: Rows, num_tokens: int, spec: FeatureSpec) -> DecoderOutputs:
        """What the decoder computes of these rows [B, T]; no forward when T is 0, since none of them is needed."""
        num_rows, length = rows[schema.INPUT_IDS].shape
        if not length:
            return self._nothing(num_rows, spec)
        if spec.attention_layers and not self._is_memory_said:
            nbytes = attention_nbytes(self._model.config, num_rows, length, self._model.dtype.itemsize)
            logger.info("eager attention makes %.1f MB of maps in a forward of %d x %d tokens", nbytes / 1e6, num_rows,
                        length)  # fmt: skip
            self._is_memory_said = True
        first: Any = self._model.get_input_embeddings().weight
        self.stats.tokens += num_tokens
        self.stats.places += num_rows * length
        return decoder_outputs(
            self._model,
            torch.tensor(rows[schema.INPUT_IDS], device=first.device),
            torch.tensor(rows[schema.POSITION_IDS], device=first.device),
            spec.hidden_layers,
            spec.attention_layers,
        )

    def _nothing(self, num_rows: int, spec: FeatureSpec) -> DecoderOutputs:
        """The outputs of rows without a token."""
        states = self._head.weight.new_empty(num_rows, 0, self._head.width)
        num_heads = self._model.config.get_text_config().num_attention_heads if spec.attention_layers else 0
        maps = states.new_empty(num_rows, num_heads, 0, 0)
        return DecoderOutputs(states, [states] * len(spec.hidden_layers), [maps] * len(spec.attention_layers))


def _is_device(value: Any) -> bool:
    """Whether accelerate would take it: the number of a GPU, the name of a device, or disk."""
    if not isinstance(value, str):
        return isinstance(value, int) and value >= 0
    try:
        torch.device(value)
    except RuntimeError:
        return value == "disk"
    return True


def _batches(lengths: NDArray[np.integer], batch_size: int, batch_tokens: int | None) -> Iterator[NDArray[np.intp]]:
    """Places of the rows that go through the decoder together; those of length 0, which need not, are a batch too."""
    idle, left = np.flatnonzero(lengths == 0), np.flatnonzero(lengths)
    if len(idle):
        yield idle
    if batch_tokens is not None:
        left = left[np.argsort(-lengths[left], kind="stable")]
    while len(left):
        size = batch_size if batch_tokens is None else max(1, batch_tokens // int(lengths[left[0]]))
        yield left[:size]
        left = left[size:]


def _cut(rows: Rows, places: NDArray[np.intp], length: int) -> Rows:
    """Some of the rows, and of them the first `length` tokens."""
    chosen = {name: np.asarray(column)[places] for name, column in rows.items()}
    return {name: column[:, :length] if column.ndim == 2 else column for name, column in chosen.items()}


def _hidden_states(hidden: torch.Tensor) -> HiddenStates | RowError:
    """[M, D] of one row, rounded to bfloat16."""
    rounded = hidden.to(torch.bfloat16)
    is_finite = torch.isfinite(rounded).all(dim=-1)
    if not bool(is_finite.all()):
        bad = int((~is_finite).sum())
        return RowError(f"the teacher's hidden states are not finite at {bad} of {len(hidden)} tokens")
    return HiddenStates(rounded.cpu().view(torch.uint16).numpy())
