"""A transformers model in this process: the decoder forward, then the head at target positions only.

Attention is causal, so a row is cut after its last target: what follows, padding mostly, could change no answer.
A model may be spread over several GPUs by accelerate, layer after layer, one GPU computing at a time. That was run with
layers on CPU and disk, not on several GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.errors import ConfigError
from ray_kd.models import check_architecture, decoder_hidden, head_of, load_causal_lm
from ray_kd.payloads import HIDDEN_STATES, TOPK_LOGPROBS, HiddenStates, TopKLogprobs
from ray_kd.teacher import draws
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

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

Answer = TopKLogprobs | HiddenStates | RowError


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

    provides = frozenset({TOPK_LOGPROBS, HIDDEN_STATES})
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
    ) -> None:
        """batch_tokens: rows x longest of a forward, at most (or one row); rows are then sorted by their lengths.

        is_spread: over all GPUs that this process sees, where device_map says nothing else.

        Raises ConfigError when the model cannot be loaded or does not keep packed documents apart.
        """
        self.stats = Stats()
        device_map = config.device_map or ("auto" if is_spread else None)
        self._model = load_causal_lm(model, revision, dtype, device, device_map)
        check_architecture(self._model)
        self._head = head_of(self._model)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._chunk_size = config.chunk_size

    def annotate(self, rows: Rows, request: Request) -> list[Answer]:
        """One payload per row, in order; a row with a non-finite value anywhere is a RowError of its own.

        Of hidden states only they are looked at: a head that overflows on them is seen by the loss.
        """
        check_request(request, self.provides, self.selections, self._head.vocab_size)
        targets = schema.target_positions(rows[schema.LABELS], rows[schema.POSITION_IDS])
        lengths = needed_lengths(targets)
        answers: dict[int, Answer] = {}
        for places in _batches(lengths, self._batch_size, self._batch_tokens):
            length = int(lengths[places].max())
            found = self._annotate_batch(_cut(rows, places, length), targets[places, :length], request)
            answers.update(zip(places.tolist(), found, strict=True))
        return [answers[place] for place in range(rows_in(rows))]

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_head", None)

    @torch.inference_mode()
    def _annotate_batch(self, rows: Rows, targets: NDArray[np.bool_], request: Request) -> list[Answer]:
        """The answers to rows that are cut; targets are those of the whole rows: a label is one place further on."""
        counts = targets.sum(axis=1)
        hidden = self._target_hidden(rows, targets)
        if request.kind == HIDDEN_STATES:
            return [_hidden_states(own) for own in hidden.split(counts.tolist())]
        ids_MK, logprobs_MK = self._select(hidden, rows, counts, request)
        num_draws = request.top_k if request.selection == SAMPLE else 0
        answers: list[Answer] = []
        for start, end in zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True):
            own = logprobs_MK[start:end]
            ids, vocab_size = ids_MK[start:end], self._head.vocab_size
            answers.append(not_finite(own) or TopKLogprobs(ids, own, request.temperature, vocab_size, num_draws))
        return answers

    def _select(
        self, hidden: torch.Tensor, rows: Rows, counts: NDArray[np.integer], request: Request
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids and log-probabilities [M, K] of the target positions; a broken position has NaN."""
        if request.selection != SAMPLE:
            ids, logprobs = topk_logprobs(hidden, self._head, request.top_k, request.temperature, self._chunk_size)
            return ids.cpu().numpy(), logprobs.cpu().numpy()
        numbers = [
            draws.uniforms(request.seed, int(row_id), int(count), request.top_k)
            for row_id, count in zip(rows[schema.ROW_ID], counts, strict=True)
        ]
        uniforms = torch.from_numpy(np.concatenate(numbers)).to(hidden.device)
        drawn = sample_tokens(hidden, self._head, uniforms, request.temperature, self._chunk_size).cpu().numpy()
        ids_MK, logprobs_MK = draws.count(drawn)
        logprobs_MK[(drawn < 0).any(axis=1)] = np.nan
        return ids_MK, logprobs_MK

    def _target_hidden(self, rows: Rows, targets: NDArray[np.bool_]) -> torch.Tensor:
        """[M, D] at the target positions of all rows, in row-major order; no forward when there is none."""
        weight = self._head.weight
        if not targets.any():
            return torch.empty(0, weight.shape[1], dtype=weight.dtype, device=weight.device)
        first: Any = self._model.get_input_embeddings().weight
        hidden = decoder_hidden(
            self._model,
            torch.tensor(rows[schema.INPUT_IDS], device=first.device),
            torch.tensor(rows[schema.POSITION_IDS], device=first.device),
        )
        self.stats.tokens += int(needed_lengths(targets).sum())
        self.stats.places += targets.size
        return hidden[torch.from_numpy(targets).to(hidden.device)].to(weight.device)


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
