"""Losses on hidden states and attention maps straight from their definitions: loops over layers, rows, tokens, pairs
and channels, float64, autograd. No code is shared with ray_kd.

Everything is given whole: states [B, T, H], maps [B, h, T, T], labels and positions [B, T]; what does not count is
skipped here. Each returns (sum, count) of some rows: the loss is sum / count of the global batch.
"""

import itertools

import torch
from torch import Tensor


def documents(positions: list[int]) -> list[range]:
    """The documents of a row, padding among them."""
    starts = [t for t, position in enumerate(positions) if position == 0]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def counted(labels: list[int], positions: list[int], mask: str) -> list[list[int]]:
    """The positions that count, document by document."""
    found = []
    for document in documents(positions):
        if mask == "targets":
            found.append([t for t in document if t + 1 in document and labels[t + 1] != -100])
        elif any(labels[t] != -100 for t in document):
            found.append(list(document))
    return found


def hidden_state(
    student: list[Tensor], teacher: list[Tensor], labels: list[list[int]], positions: list[list[int]], mask: str,
    measure: str, projectors: list[Tensor] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """projectors: weights [D, H], one a layer."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, (states, targets) in enumerate(zip(student, teacher, strict=True)):
        for row, (row_labels, row_positions) in enumerate(zip(labels, positions, strict=True)):
            for t in itertools.chain(*counted(row_labels, row_positions, mask)):
                s, q = states[row, t], targets[row, t]
                if projectors is not None:
                    s = torch.stack([(line * s).sum() for line in projectors[index]])
                if measure == "mse":
                    value = sum((a - b) ** 2 for a, b in zip(s, q, strict=True)) / len(q)
                else:
                    value = 1 - sum(s * q) / (sum(s * s) ** 0.5 * sum(q * q) ** 0.5)
                total = total + value / len(student)
                count += index == 0
    return total, count


def attention(
    student: list[Tensor], teacher: list[Tensor], labels: list[list[int]], positions: list[list[int]], mask: str,
    measure: str, heads: str, normalize_rows: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, (maps, targets) in enumerate(zip(student, teacher, strict=True)):
        for row, (row_labels, row_positions) in enumerate(zip(labels, positions, strict=True)):
            for document in counted(row_labels, row_positions, mask):
                for place, query in enumerate(document):
                    keys = document[: place + 1]
                    a, b = ([[one[query, key] for key in keys] for one in side[row]] for side in (maps, targets))
                    if heads == "mean":
                        a, b = ([sum(column) / len(side) for column in zip(*side, strict=True)] for side in (a, b))
                        a, b = [a], [b]
                    for own, other in zip(a, b, strict=True):
                        if normalize_rows:
                            own, other = normalised(own), normalised(other)
                        if measure == "mse":
                            value = sum((x - y) ** 2 for x, y in zip(own, other, strict=True))
                        else:
                            value = sum(y * (y / x).log() for x, y in zip(own, other, strict=True))
                        total = total + value / (len(a) * len(student))
                    if index == 0:
                        count += len(keys) if measure == "mse" else 1
    return total, count


def normalised(row: list[Tensor]) -> list[Tensor]:
    floored = [value if value > 1e-7 else torch.tensor(1e-7, dtype=torch.float64) for value in row]
    return [value / sum(floored) for value in floored]
