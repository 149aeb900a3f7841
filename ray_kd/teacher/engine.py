"""What a teacher engine is: rows in, one answer per row out, in order. It knows neither Ray nor the trainer.

An engine file holds a dataclass `Config` with its options and a class `Engine`, constructed as

    Engine(config, model=..., revision=..., dtype=..., device="cpu" | "cuda", batch_size=...)

with batch_tokens=... as well where it `takes_batch_tokens`, and with returns_attention=True where it provides features
and requests will ask for attention. It shifts and masks at its own edge: a payload has one
entry per `schema.target_positions`, in order. Rows of weight 0 (dummies) never reach an engine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_kd.payloads import FEATURES, HIDDEN_STATES, TOPK_LOGPROBS, FeatureSpec

TOPK, SAMPLE = "topk", "sample"
SELECTIONS = (TOPK, SAMPLE)

Rows = Mapping[str, NDArray[Any]]
"""The prepared columns of B rows: row_id [B] int64; input_ids, labels, position_ids [B, T] int32."""


@dataclass(frozen=True)
class Request:
    """What is asked of the teacher for every target position."""

    kind: str = TOPK_LOGPROBS
    """Payload kind, one of the engine's `provides`."""
    top_k: int = 64
    """Entries per position, at most the vocabulary size; with selection `sample` the number of draws. This and what
    follows is for top-k log-probabilities alone."""
    temperature: float = 1.0
    """Log-probabilities are log_softmax(logits / temperature) over the full vocabulary."""
    selection: str = TOPK
    """topk: the most likely tokens | sample: tokens drawn from the distribution (`draws.py`)."""
    seed: int = 0
    """Of the draws. They depend on it, the row_id and the position, on nothing else."""
    vocab_size: int | None = None
    """Of the distribution that is answered: that over the ids below, given that it is one of them. None: all ids of
    the model. A server that knows no such thing is taken at its word for the likeliest K (`documents.payloads`)."""
    features: FeatureSpec | None = None
    """For features alone: which, beside top-k log-probabilities, which all of the above is of then."""

    @property
    def needs_attention(self) -> bool:
        """Whether an engine has to be built for it."""
        return self.kind == FEATURES and self.features is not None and bool(self.features.attention_layers)


@dataclass(frozen=True)
class RowError:
    """In place of a payload: this row has no usable answer, the others do. Never padding."""

    reason: str
    """One line, for quarantine.jsonl."""


@dataclass
class Stats:
    """What an engine has done since it was built; it only grows. tokens / places is how full its batches were."""

    tokens: int = 0
    """Tokens that the model had to read: of each row with a target those up to and including its last one, of an engine
    that asks document by document those of its prompts."""
    places: int = 0
    """Token places of the forwards that were made, padding included. As many as tokens where a server or vLLM packs its
    own batches and does not say how."""
    retries: int = 0
    """Requests made again."""


class Engine(Protocol):
    """The teacher's side of the contract; `tests/contract/test_engines.py` runs over every engine on disk."""

    provides: frozenset[str]
    """Payload kinds it can answer with; hidden states only where `is_local_model`: their head comes from there."""
    selections: frozenset[str]
    """Which of `SELECTIONS` it can make."""
    any_temperature: bool
    """Whether it answers at any temperature, or at 1 alone."""
    is_local_model: bool
    """Whether its answers are those of the model folder itself, so that evaluation may load it for the exact KL."""
    takes_batch_tokens: bool
    """Whether it makes batches of at most `teacher.batch_tokens` token places, when that is set."""
    stats: Stats
    """Counted when a call of `annotate` has its answers; retries as they happen."""

    def annotate(self, rows: Rows, request: Request) -> list[Any]:
        """One payload (`ray_kd.payloads`) or RowError per row, in order.

        Raises ValueError for a request it cannot serve (kind, selection, top_k, temperature); other failures
        travel as they are.
        """
        ...

    def close(self) -> None:
        """Free the model. Calling it twice is harmless."""
        ...


def rows_in(rows: Rows) -> int:
    """The number of rows B."""
    return len(np.asarray(rows["input_ids"]))


def batches(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """The rows in order, at most batch_size at a time."""
    for start in range(0, rows_in(rows), batch_size):
        yield {name: np.asarray(column)[start : start + batch_size] for name, column in rows.items()}


def needed_lengths(targets: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tokens of each row [B] that its targets [B, T] can depend on: up to and including the last of them, else 0."""
    return (targets * np.arange(1, targets.shape[1] + 1)).max(axis=1, initial=0)


def not_finite(logprobs: NDArray[np.floating]) -> RowError | None:
    """The error of a row whose log-probabilities [M, K] have NaN or +inf, which is a broken forward; else None.

    -inf is a probability of zero, as of a head that masks tokens.
    """
    is_bad = np.isnan(logprobs) | np.isposinf(logprobs)
    if num_bad := int(is_bad.any(axis=-1).sum()):
        return RowError(f"the teacher's log-probabilities are not finite at {num_bad} of {len(logprobs)} tokens")
    return None


def check_request(
    request: Request, provides: frozenset[str], selections: frozenset[str], vocab_size: int,
    any_temperature: bool = True,
) -> None:  # fmt: skip
    """Refuse what no engine over this vocabulary could answer. Raises ValueError with the values allowed."""
    if request.kind not in provides:
        raise ValueError(f"the engine provides {', '.join(sorted(provides))}, not '{request.kind}'")
    if request.kind == HIDDEN_STATES:
        return
    if (request.kind == FEATURES) != (request.features is not None):
        raise ValueError(
            f"features are {request.features} with kind '{request.kind}'; allowed: with '{FEATURES}' alone"
        )
    if request.selection not in selections:
        raise ValueError(f"the engine selects by {', '.join(sorted(selections))}, not '{request.selection}'")
    if request.vocab_size is not None:
        if not 1 <= request.vocab_size <= vocab_size:
            raise ValueError(f"vocab_size is {request.vocab_size}; allowed: 1 to the model's {vocab_size}")
        vocab_size = request.vocab_size
    if not 1 <= request.top_k <= vocab_size:
        raise ValueError(f"top_k is {request.top_k}; allowed: 1 to the vocabulary size {vocab_size}")
    if not request.temperature > 0:
        raise ValueError(f"temperature is {request.temperature}; allowed: above 0")
    if request.temperature != 1 and not any_temperature:
        raise ValueError(f"temperature is {request.temperature}; the engine answers at 1 alone")
