"""Fewer combinations than the whole product, with a stated strength: every two values of two parameters meet.

A fault that needs two particular values (a stage and a number of ranks, a stage and a dtype) is met by some
combination; one that needs three may be met by the rest of the product alone, which is marked `matrix`.
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each factor, in which all pairs of values meet. The same ones every time."""

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(combinations(enumerate(row), 2))

    whole = list(product(*factors))
    missing = set().union(*map(pairs, whole))
    chosen = []
    while missing:
        row = max(whole, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(row)
        chosen.append(row)
    return chosen


def matrix(*factors: Sequence[Any], chosen: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
    """The whole product for `parametrize`; what is not chosen (default: pairwise) is left to `make test-matrix`."""
    kept = pairwise(*factors) if chosen is None else chosen
    return [row if row in kept else pytest.param(*row, marks=pytest.mark.matrix) for row in product(*factors)]
