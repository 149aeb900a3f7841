"""The evaluation's breakdowns from full logits, token by token in float64; shares no code with ray_kd.eval."""

import math
from collections import defaultdict
from typing import Any

import numpy as np

POSITIONS = [1, 8, 16, 32, 64]
ENTROPIES = [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0]


def probabilities(logits: np.ndarray) -> list[float]:
    """[V] -> [V]."""
    peak = max(map(float, logits))
    weights = [math.exp(float(value) - peak) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def breakdown(
    labels: np.ndarray,
    position_ids: np.ndarray,
    teacher_logits: np.ndarray,
    student_logits: np.ndarray,
    ranks: list[int],
    top_k: int | None = None,
) -> dict[str, Any]:
    """labels, position_ids [n, T]; logits [n, T, V]; with top_k the teacher is known by k ids and one bucket."""
    where: dict[str, dict[int, list[tuple[float, bool]]]] = {
        "position": defaultdict(list),
        "entropy": defaultdict(list),
    }
    bins: dict[str, dict[int, list[tuple[float, bool]]]] = {"teacher": defaultdict(list), "student": defaultdict(list)}
    mass: dict[int, list[float]] = {rank: [] for rank in ranks}
    for row in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            label = labels[row, t + 1]
            if label == -100 or position_ids[row, t + 1] == 0:
                continue
            q, p = probabilities(teacher_logits[row, t]), probabilities(student_logits[row, t])
            by_rank = sorted(range(len(q)), key=lambda v: -q[v])
            if top_k is not None:
                kept = by_rank[:top_k]
                pairs = [(q[v], p[v]) for v in kept]
                pairs.append((1 - math.fsum(a for a, _ in pairs), 1 - math.fsum(b for _, b in pairs)))
            else:
                pairs = list(zip(q, p, strict=True))
            kl = math.fsum(a * math.log(a / b) for a, b in pairs)
            entropy = -math.fsum(a * math.log(a) for a, _ in pairs)
            student_best = max(range(len(p)), key=lambda v: p[v])
            entry = (kl, student_best == by_rank[0])
            where["position"][max(edge for edge in POSITIONS if edge <= position_ids[row, t + 1])].append(entry)
            where["entropy"][max(i for i, edge in enumerate(ENTROPIES) if edge <= entropy)].append(entry)
            for name, best, dist in (("teacher", by_rank[0], q), ("student", student_best, p)):
                bins[name][min(14, int(dist[best] * 15))].append((dist[best], best == label))
            for rank in ranks:
                mass[rank].append(math.fsum(q[v] for v in by_rank[:rank]))
    total = sum(map(len, where["position"].values()))
    mean = {
        kind: {key: (len(found), *np.mean(found, axis=0)) for key, found in sorted(groups.items())}
        for kind, groups in (where | bins).items()
    }
    return mean | {
        "mass": {rank: float(np.mean(found)) for rank, found in mass.items()},
        "ece": {
            name: sum(count * abs(confidence - accuracy) for count, confidence, accuracy in mean[name].values()) / total
            for name in bins
        },
    }
