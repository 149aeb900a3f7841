"""Evaluation metrics from full logits, token by token in float64: slow, and sharing no code with ray_kd.eval."""

import math

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[V] -> [V]."""
    logits = logits.astype(np.float64)
    peak = max(logits)
    return logits - peak - math.log(sum(math.exp(value - peak) for value in logits))


def metrics(
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: np.ndarray,
    teacher_logits: np.ndarray,
    student_logits: np.ndarray,
    num_target_bytes: np.ndarray,
    skipped_rows: tuple[int, ...] = (),
    top_k: int | None = None,
) -> dict[str, float]:
    """input_ids, labels, position_ids [n, T]; logits [n, T, V]; with top_k the KL over k ids and one bucket."""
    divergence = nll = 0.0
    agreements = tokens = nbytes = rows = 0
    for row in range(len(input_ids)):
        if row in skipped_rows:
            continue
        counted = 0
        for t in range(input_ids.shape[1] - 1):
            starts_document = position_ids[row, t + 1] == 0
            if starts_document or labels[row, t + 1] == -100:
                continue
            q, p = log_softmax(teacher_logits[row, t]), log_softmax(student_logits[row, t])
            if top_k is None:
                divergence += sum(math.exp(a) * (a - b) for a, b in zip(q, p, strict=False))
            else:
                chosen = sorted(range(len(q)), key=lambda v: -q[v])[:top_k]
                q_in, p_in = [math.exp(q[v]) for v in chosen], [math.exp(p[v]) for v in chosen]
                q_rest = sum(math.exp(q[v]) for v in range(len(q)) if v not in chosen)
                p_rest = sum(math.exp(p[v]) for v in range(len(p)) if v not in chosen)
                divergence += sum(a * math.log(a / b) for a, b in zip(q_in, p_in, strict=True))
                divergence += q_rest * math.log(q_rest / p_rest)
            nll -= p[labels[row, t + 1]]
            agreements += int(np.argmax(q) == np.argmax(p))
            counted += 1
        tokens += counted
        rows += counted > 0
        nbytes += num_target_bytes[row] if counted else 0
    return {
        "kl" if top_k is None else "topk_bucket_kl": divergence / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / nbytes,
        "top1_agreement": agreements / tokens,
        "num_tokens": tokens,
        "num_rows": rows,
    }
