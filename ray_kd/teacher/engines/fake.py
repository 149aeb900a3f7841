"""A teacher without a model: a known distribution that depends on the current token only; for tests and smoke runs.

logits[token, v] = sharpness * sin(1 + 12.9898 token + 78.233 v), for v < vocab_size; then log_softmax(logits / T).
So a row's answer can be computed by anyone who has its input_ids, and its entropy is set by `sharpness`. Features are
known likewise: `hidden_states` and `attention` say which.
"""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.payloads import FEATURES, TOPK_LOGPROBS, Features, FeatureSpec, TopKLogprobs
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
    width: int = 16
    """Of its hidden states."""
    num_heads: int = 2
    """Of its attention."""
    delay_s: float = 0.0
    """Seconds slept per row, to play a slow teacher."""
    nan_row_ids: list[int] = field(default_factory=list)
    """Rows (by row_id) answered with a RowError, as after a non-finite forward."""
    fail_row_ids: list[int] = field(default_factory=list)
    """Rows (by row_id) at which the whole call raises RuntimeError, as when an engine breaks."""


class Engine:
    """Needs nothing of `model`, `dtype` or `device`; takes them so that any engine is constructed alike."""

    provides = frozenset({TOPK_LOGPROBS, FEATURES})
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
        returns_attention: bool = False,
    ) -> None:
        self.stats = Stats()
        self._config = config

    def annotate(self, rows: Rows, request: Request) -> list[TopKLogprobs | Features | RowError]:
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
            if request.vocab_size is not None:
                logprobs = logprobs[:, : request.vocab_size]
                logprobs = logprobs - np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
            vocab_size = logprobs.shape[1]
            if request.selection == SAMPLE:
                numbers = draws.uniforms(request.seed, row_id, len(logprobs), request.top_k)
                sums = np.exp(logprobs).cumsum(axis=-1)
                drawn = (sums[:, None, :] <= (numbers * sums[:, -1:])[:, :, None]).sum(axis=-1)
                ids, chosen = draws.count(drawn)
                answers.append(TopKLogprobs(ids, chosen, request.temperature, vocab_size, request.top_k))
                continue
            ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, : request.top_k]
            chosen = np.take_along_axis(logprobs, ids, axis=-1).astype(np.float32)
            answers.append(TopKLogprobs(ids, chosen, request.temperature, vocab_size))
        num_tokens = int(needed_lengths(targets).sum())
        self.stats.tokens += num_tokens
        self.stats.places += num_tokens
        if request.features is not None:
            return list(self._with_features(rows, answers, request.features))
        return list(answers)

    def hidden_states(self, tokens: NDArray[np.integer], layer: int) -> NDArray[np.float64]:
        """The known states after each token: [T] ids -> sin(1 + 0.731 token + 1.37 layer + 0.917 channel) [T, D]."""
        return np.sin(1 + 0.731 * tokens[:, None] + 1.37 * layer + 0.917 * np.arange(self._config.width))

    def attention(
        self, tokens: NDArray[np.integer], position_ids: NDArray[np.integer], layer: int
    ) -> NDArray[np.float64]:  # fmt: skip
        """The known maps of one row, [h, T, T]: 2 + sin(key's token + layer + 2 head), over its sum for each query."""
        documents = np.cumsum(position_ids == 0)
        heads = np.arange(self._config.num_heads)[:, None, None]
        sees = np.tril(documents[:, None] == documents[None, :])
        weights = (2 + np.sin(tokens + layer + 2 * heads)) * sees
        shares: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
        return shares

    def _with_features(
        self, rows: Rows, answers: list[TopKLogprobs | RowError], spec: FeatureSpec
    ) -> list[Features | RowError]:
        import torch

        from ray_kd.models import DecoderOutputs
        from ray_kd.teacher import features

        all_ids, all_positions = np.asarray(rows[schema.INPUT_IDS]), np.asarray(rows[schema.POSITION_IDS])
        states = [np.stack([self.hidden_states(ids, layer) for ids in all_ids]) for layer in spec.hidden_layers]
        maps = [
            np.stack([self.attention(*row, layer) for row in zip(all_ids, all_positions, strict=True)])
            for layer in spec.attention_layers
        ]
        outputs = DecoderOutputs(
            torch.empty(*all_ids.shape, self._config.width), list(map(torch.from_numpy, states)),
            list(map(torch.from_numpy, maps)),
        )  # fmt: skip
        return features.features(outputs, answers, all_positions, features.positions(rows, spec), spec)

    def logprobs(self, tokens: NDArray[np.integer], temperature: float = 1.0) -> NDArray[np.float64]:
        """The known distribution after each token: [M] ids -> log-probabilities [M, V]."""
        phase = 1.0 + 12.9898 * tokens.astype(np.float64)[:, None] + 78.233 * np.arange(self._config.vocab_size)
        scaled = self._config.sharpness * np.sin(phase) / temperature
        peak = scaled.max(axis=-1, keepdims=True)
        return scaled - peak - np.log(np.exp(scaled - peak).sum(axis=-1, keepdims=True))

    def close(self) -> None:
        """Nothing to free."""
