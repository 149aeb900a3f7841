"""A teacher whose head has rows that no token uses, against a student with other such rows: float64, by definition.

The teacher is asked what it thinks of the tokens, so its distribution is conditioned on being one of them. The student
is asked about everything it can say: what it gives to its own padding is missing from the tokens.
"""

import torch
from torch import Tensor


def teacher_probabilities(logits: Tensor, num_tokens: int, temperature: float = 1.0) -> Tensor:
    """[V'] -> [num_tokens]: P(token | it is a token)."""
    weights = torch.exp((logits.double() - logits.double().max()) / temperature)
    return torch.stack([weight / sum(weights[:num_tokens]) for weight in weights[:num_tokens]])


def kl(teacher_logits: Tensor, student_logits: Tensor, num_tokens: int, temperature: float = 1.0) -> Tensor:
    """[N, V'], [N, V] -> the mean of T^2 sum over tokens v of q_v (log q_v - log p_v), an autograd graph."""
    total = student_logits.sum() * 0
    for theirs, ours in zip(teacher_logits, student_logits, strict=True):
        q, p = teacher_probabilities(theirs, num_tokens, temperature), torch.softmax(ours / temperature, -1)
        for token in range(num_tokens):
            total = total + temperature**2 * q[token] * (q[token].log() - p[token].log())
    return total / len(teacher_logits)


def bucket_kl(
    teacher_logits: Tensor, student_logits: Tensor, num_tokens: int, top_k: int, temperature: float = 1.0
) -> Tensor:
    """The same over the teacher's top_k tokens and one outcome for the rest, which the student's padding is part of."""
    total = student_logits.sum() * 0
    for theirs, ours in zip(teacher_logits, student_logits, strict=True):
        q, p = teacher_probabilities(theirs, num_tokens, temperature), torch.softmax(ours / temperature, -1)
        best = sorted(range(num_tokens), key=lambda token: -float(q[token]))[:top_k]
        q_rest = 1 - sum(q[token] for token in best)
        p_rest = sum(p[token] for token in range(len(p)) if token not in best)
        parts = [q[token] * (q[token] / p[token]).log() for token in best]
        total = total + temperature**2 * (sum(parts) + q_rest * (q_rest / p_rest).log())
    return total / len(teacher_logits)
