"""Several teachers, one answer: which teacher answers which row, and the average of their probabilities.

A row's teachers are those that take its route (the value of `data.route_by`). Their probabilities are averaged by
weight, over the union of the tokens that they name:

    p(v) = sum_i w_i p_i(v) [v in S_i],   1 - sum_v p(v) = sum_i w_i (1 - sum_{v in S_i} p_i(v))

S_i is the support of teacher i and the w_i of the row's teachers sum to one. So the tail has exactly the mass that the
teachers leave out; a token that only some of them name has at most w_i min_{S_i} p_i less than the full mixture would
give it, for each i that does not. One teacher a row: its answer as it is.

The teachers stand one behind the other in the stream, and each adds its part to what those before it said.

M target positions, K tokens of a teacher's answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError, DataError
from ray_kd.payloads import TopKLogprobs


@dataclass(frozen=True, eq=False)
class Part:
    """One teacher's part in the answers."""

    name: str
    shares: NDArray[np.float64]
    """[number of routes]: its normalised weight w_i in rows of each route; 0 = not its rows."""
    width: int
    """Tokens a position in the mixed answers, the same for all rows."""
    is_last: NDArray[np.bool_]
    """[number of routes]: no teacher behind it adds to rows of this route."""

    def takes(self, routes: NDArray[np.integer]) -> NDArray[np.bool_]:
        """bool, as routes: the rows that it answers."""
        return self.shares[routes] > 0

    def add(self, route: int, so_far: TopKLogprobs | None, answer: TopKLogprobs) -> TopKLogprobs:
        """The sum of what the row's teachers before this one said and of this one's part.

        Raises DataError where the two answers are not of the same positions, vocabulary and temperature.
        """
        own = answer.logprobs + np.log(self.shares[route]).astype(np.float32)
        ids, logprobs = answer.ids, own
        if so_far is not None:
            for name in ("vocab_size", "temperature"):
                seen, wanted = getattr(answer, name), getattr(so_far, name)
                if seen != wanted:
                    raise DataError(f"teacher '{self.name}' answers with {name} {seen}, those before it with {wanted}")
            if len(so_far.ids) != len(ids):
                raise DataError(f"teacher '{self.name}' answers {len(ids)} positions, not {len(so_far.ids)}")
            ids = np.concatenate([so_far.ids, ids], axis=1)
            logprobs = _merged(ids, np.concatenate([so_far.logprobs, own], axis=1))
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, : self.width]
        ids, logprobs = (np.take_along_axis(values, order, axis=1) for values in (ids, logprobs))
        missing = self.width - ids.shape[1]
        ids = np.pad(np.where(np.isneginf(logprobs), -1, ids), ((0, 0), (0, missing)), constant_values=-1)
        logprobs = np.pad(logprobs, ((0, 0), (0, missing)), constant_values=-np.inf)
        return TopKLogprobs(ids, logprobs, answer.temperature, answer.vocab_size)


def parts(
    names: Sequence[str], weights: Sequence[float], rows: Sequence[Sequence[str] | None], routes: Sequence[str],
    top_k: int, vocab_size: int,
) -> list[Part]:  # fmt: skip
    """The part of each teacher.

    rows: the routes that each takes, None for all. routes: those of the prepared data; none where it has no column.
    Raises ConfigError for a route that no teacher takes, naming it.
    """
    found = list(routes) or [""]
    weight = np.array(
        [
            [own * (of_one is None or route in of_one) for route in found]
            for own, of_one in zip(weights, rows, strict=True)
        ]
    )
    total = weight.sum(axis=0)
    if (total == 0).any():
        alone = [repr(route) for route, sum_ in zip(found, total, strict=True) if sum_ == 0]
        raise ConfigError(f"teachers: none has the rows of {', '.join(alone[:5])}; they take {_in_words(names, rows)}")
    width = _width(int((weight > 0).sum(axis=0).max()), top_k, vocab_size)
    return [
        Part(name, weight[place] / total, width, is_last=weight[place + 1 :].sum(axis=0) == 0)
        for place, name in enumerate(names)
    ]


def mixed_width(rows: Sequence[Sequence[str] | None], top_k: int, vocab_size: int) -> int:
    """The most tokens a position in the mixed answers, whatever routes the data has; rows: as of `parts`."""
    named = {route for own in rows for route in own or []}
    most = [sum(own is None or route in own for own in rows) for route in named]
    return _width(max([1, sum(own is None for own in rows), *most]), top_k, vocab_size)


def _width(most: int, top_k: int, vocab_size: int) -> int:
    # One less than the vocabulary: with all of it there would be no tail, which the teachers may well have.
    return top_k if most == 1 or top_k == vocab_size else min(most * top_k, vocab_size - 1)


def parts_of(config: RunConfig, routes: Sequence[str], vocab_size: int) -> "list[Part | None]":
    """The part of each teacher of a config, [None] for a single one; routes: those of its prepared data.

    Raises ConfigError for a route that no teacher takes.
    """
    if not config.teachers:
        return [None]
    names = [str(one.name) for one in config.teachers]
    weights, rows = [one.weight for one in config.teachers], [one.rows for one in config.teachers]
    return [*parts(names, weights, rows, routes, config.teacher.top_k, vocab_size)]


def _in_words(names: Sequence[str], rows: Sequence[Sequence[str] | None]) -> str:
    return "; ".join(
        f"'{name}' {'all rows' if own is None else ', '.join(map(repr, own)) or 'none'}"
        for name, own in zip(names, rows, strict=True)
    )


def _merged(ids: NDArray[np.integer], logprobs: NDArray[np.floating]) -> NDArray[np.float32]:
    """Log-probabilities [M, n] with those of one id (at most two) summed in its first place and -inf in the other."""
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids, values = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    is_second = np.zeros(ids.shape, dtype=np.bool_)
    is_second[:, 1:] = (np.diff(sorted_ids, axis=1) == 0) & (sorted_ids[:, 1:] >= 0)
    rows, places = np.nonzero(is_second)
    values[rows, places - 1] = np.logaddexp(values[rows, places - 1], values[rows, places])
    values[rows, places] = -np.inf
    summed = np.empty_like(values)
    np.put_along_axis(summed, order, values, axis=1)
    return summed
