"""A teacher without a model: a known distribution that depends on the current token only; for tests and smoke runs.

logits[token, v] = sharpness * sin(1 + 12.9898 token + 78.233 v), for v < vocab_size; then log_softmax(logits / T).
So a row's answer can be computed by anyone who has its input_ids, and its entropy is set by `sharpness`.
"""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.payloads import TOPK_LOGPROBS
from ray_kd.payloads.topk_logprobs import TopKLogprobs
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
    rows_in,
)


@dataclass
class Config:
    """Options of `teacher.engine: {kind: fake}`."""

    vocab_size: int = 259
    """Ids the distribution covers: the student's vocabulary."""
    sharpness: float = 6.0
    """Scale of the logits; higher is more certain."""
    delay_s: float = 0.0
    """Seconds slept per row, to play a slow teacher."""
    nan_row_ids: list[int] = field(default_factory=list)
    """Rows (by row_id) answered with a RowError, as after a non-finite forward."""
    fail_row_ids: list[int] = field(default_factory=list)
    """Rows (by row_id) at which the whole call raises RuntimeError, as when an engine breaks."""


class Engine:
    """Needs nothing of `model`, `dtype` or `device`; takes them so that any engine is constructed alike."""

    provides = frozenset({TOPK_LOGPROBS})
    selections = frozenset(SELECTIONS)
    any_temperature = True
    is_local_model = False
    takes_batch_tokens = False

    def __init__(
        self,
        config: Config,
        *,
        model: str = "",
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int = 4,
    ) -> None:
        self.stats = Stats()
        self._config = config

    def annotate(self, rows: Rows, request: Request) -> list[TopKLogprobs | RowError]:
        """One payload per row, in order. Raises RuntimeError when a row of `fail_row_ids` is among them."""
        config = self._config
        check_request(request, self.provides, self.selections, config.vocab_size)
        targets = schema.target_positions(rows[schema.LABELS], rows[schema.POSITION_IDS])
        answers: list[TopKLogprobs | RowError] = []
        for row in range(rows_in(rows)):
            if config.delay_s:
                time.sleep(config.delay_s)
            row_id = int(rows[schema.ROW_ID][row]) if schema.ROW_ID in rows else -1
            if row_id in config.fail_row_ids:
                raise RuntimeError(f"fake teacher: told to fail at row {row_id}")
            if row_id in config.nan_row_ids:
                answers.append(RowError("the teacher's log-probabilities are not finite (fake teacher, told to)"))
                continue
            logprobs = self.logprobs(rows[schema.INPUT_IDS][row][targets[row]], request.temperature)
            if request.selection == SAMPLE:
                numbers = draws.uniforms(request.seed, row_id, len(logprobs), request.top_k)
                sums = np.exp(logprobs).cumsum(axis=-1)
                drawn = (sums[:, None, :] <= (numbers * sums[:, -1:])[:, :, None]).sum(axis=-1)
                ids, chosen = draws.count(drawn)
                answers.append(TopKLogprobs(ids, chosen, request.temperature, config.vocab_size, request.top_k))
                continue
            ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, : request.top_k]
            chosen = np.take_along_axis(logprobs, ids, axis=-1).astype(np.float32)
            answers.append(TopKLogprobs(ids, chosen, request.temperature, config.vocab_size))
        num_tokens = int(needed_lengths(targets).sum())
        self.stats.tokens += num_tokens
        self.stats.places += num_tokens
        return answers

    def logprobs(self, tokens: NDArray[np.integer], temperature: float = 1.0) -> NDArray[np.float64]:
        """The known distribution after each token: [M] ids -> log-probabilities [M, V]."""
        phase = 1.0 + 12.9898 * tokens.astype(np.float64)[:, None] + 78.233 * np.arange(self._config.vocab_size)
        scaled = self._config.sharpness * np.sin(phase) / temperature
        peak = scaled.max(axis=-1, keepdims=True)
        return scaled - peak - np.log(np.exp(scaled - peak).sum(axis=-1, keepdims=True))

    def close(self) -> None:
        """Nothing to free."""
