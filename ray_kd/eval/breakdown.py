"""Where a student is far from its teacher, and how far both can trust themselves: sums over one pass, at T = 1.

by_position           divergence and agreement by the number of tokens before the predicted one in its document (a long
                      document that was split counts from where its piece begins)
by_teacher_entropy    the same by the entropy of the teacher's distribution there, in nats
calibration           of teacher and student, as predictors of the labels: tokens whose most likely id has about the
                      same probability (confidence), and how often that id is the label (accuracy). ece: their mean
                      difference over the tokens, in ECE_BINS bins of equal width (https://arxiv.org/abs/1706.04599)
teacher_mass_by_rank  mean probability of the teacher's 1, 2, 4, ... most likely ids together

Of a teacher that is known by its top k alone, the entropy is that of these k and one bucket: at most the whole one.
N tokens of a chunk, V vocabulary. Host memory: the sums. Time: a top-k of the teacher's chunk.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_kd.eval.targets import Compared

POSITION_EDGES = tuple(2**power for power in range(3, 20))
"""Tokens of context; a bucket holds its lower edge."""
ENTROPY_EDGES = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Nats; a bucket holds its lower edge."""
ECE_BINS = 15


class Breakdown:
    """Filled chunk by chunk by `Evaluator.evaluate`, with the rows of this rank alone."""

    def __init__(self, metric: str, max_rank: int) -> None:
        """metric: name of the divergence; max_rank: how many of the teacher's most likely ids are looked at, at most.

        See `TeacherTargets` for both.
        """
        self._metric = metric
        self._by_position = _Buckets((1, *POSITION_EDGES), len(_DIVERGENCE))
        self._by_entropy = _Buckets((0.0, *ENTROPY_EDGES), len(_DIVERGENCE))
        edges = np.linspace(0, 1, ECE_BINS + 1)[:-1].tolist()
        self._reliability = {name: _Buckets(edges, len(_RELIABILITY)) for name in ("teacher", "student")}
        self._ranks = sorted({max_rank, *(2**power for power in range(max_rank.bit_length()))})
        self._mass = np.zeros(len(self._ranks))
        self._num_tokens = 0

    def add(self, compared: Compared, student_logprobs: Tensor, labels: Tensor, context: Tensor) -> None:
        """student_logprobs: [N, V] float32; labels: int64 [N]; context: int64 [N], tokens before the predicted one."""
        student_top1_logprobs, student_top1 = student_logprobs.max(dim=-1)
        agrees = student_top1 == compared.teacher_top1
        outcomes = compared.outcomes
        probabilities = outcomes.exp()
        entropy = -torch.where(torch.isneginf(outcomes), 0.0, probabilities * outcomes).sum(dim=-1)
        self._by_position.add(context, compared.divergence, agrees)
        self._by_entropy.add(entropy, compared.divergence, agrees)

        ranked = probabilities[:, : compared.num_ids].topk(self._ranks[-1], dim=-1).values
        mass = ranked.double().cumsum(dim=-1).sum(dim=0)
        self._mass += mass.cpu().numpy()[np.array(self._ranks) - 1]
        confidences = {"teacher": ranked[:, 0], "student": student_top1_logprobs.exp()}
        hits = {"teacher": compared.teacher_top1 == labels, "student": student_top1 == labels}
        for name, reliability in self._reliability.items():
            reliability.add(confidences[name], confidences[name], hits[name])
        self._num_tokens += len(labels)

    def result(self) -> dict[str, Any]:
        """What the module's docstring names, as JSON has it: empty buckets left out, `to` null where there is no end.

        The caller has counted at least one token.
        """
        assert self._num_tokens > 0
        divergence = (self._metric, *_DIVERGENCE[1:])
        return {
            "by_position": self._by_position.means(divergence),
            "by_teacher_entropy": self._by_entropy.means(divergence),
            "calibration": {name: self._calibration(buckets) for name, buckets in self._reliability.items()},
            "teacher_mass_by_rank": [
                {"rank": rank, "mass": mass / self._num_tokens}
                for rank, mass in zip(self._ranks, self._mass.tolist(), strict=True)
            ],
        }

    def _calibration(self, buckets: "_Buckets") -> dict[str, Any]:
        bins = buckets.means(_RELIABILITY, end=1.0)
        gaps = [entry["num_tokens"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins]
        return {"ece": sum(gaps) / self._num_tokens, "bins": bins}


_DIVERGENCE = ("divergence", "top1_agreement")
_RELIABILITY = ("confidence", "accuracy")


class _Buckets:
    """Float64 sums of some values of each token, by the bucket that a further value falls into."""

    def __init__(self, lower_edges: Sequence[float], num_values: int) -> None:
        self._edges = lower_edges
        self._counts: NDArray[np.int64] = np.zeros(len(lower_edges), dtype=np.int64)
        self._sums = np.zeros((num_values, len(lower_edges)))

    def add(self, where: Tensor, *values: Tensor) -> None:
        """All [N]; what is below the first edge counts in the first bucket (an entropy of 0 may come out as -1e-9)."""
        inner = torch.tensor(self._edges[1:], dtype=torch.float64, device=where.device)
        bucket = torch.bucketize(where.double(), inner, right=True).cpu().numpy()
        size = len(self._edges)
        self._counts += np.bincount(bucket, minlength=size)
        for sums, value in zip(self._sums, values, strict=True):
            sums += np.bincount(bucket, weights=value.double().cpu().numpy(), minlength=size)

    def means(self, names: Sequence[str], end: float | None = None) -> list[dict[str, Any]]:
        """One entry a bucket with tokens: from, to, num_tokens and the mean of each value by its name."""
        ends = [*self._edges[1:], end]
        return [
            {"from": self._edges[index], "to": ends[index], "num_tokens": int(self._counts[index])}
            | {name: float(self._sums[place, index] / self._counts[index]) for place, name in enumerate(names)}
            for index in np.flatnonzero(self._counts).tolist()
        ]
