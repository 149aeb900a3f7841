"""The distillation loss straight from its definition: token by token, probabilities, float64, full logits, autograd.

    loss = (1/n) sum over valid tokens [ ce_weight CE(z, y) + kd_weight T^2 D(q, p) ]

p and q are plain vectors of probabilities on the support that `tail` names. No code is shared with ray_kd.losses.
"""

import functools

import torch
from torch import Tensor

REFERENCES = {}
"""kind -> D(q, p, its options) on probability vectors."""


def _reference(function):
    REFERENCES[function.__name__] = function
    return function


@_reference
def forward_kl(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q / p).log()).sum()


@_reference
def reverse_kl(q: Tensor, p: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


@_reference
def jsd(q: Tensor, p: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


@_reference
def gkd(q: Tensor, p: Tensor, beta: float = 0.5) -> Tensor:
    if beta == 0:
        return forward_kl(q, p)
    return reverse_kl(q, p) if beta == 1 else jsd(q, p, beta)


@_reference
def skew_forward_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    return forward_kl(q, alpha * q + (1 - alpha) * p)


@_reference
def skew_reverse_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    return reverse_kl((1 - alpha) * q + alpha * p, p)


@_reference
def adaptive_kl(q: Tensor, p: Tensor, mu: float = 0.5) -> Tensor:
    """The weights are floats: autograd does not see that they depend on p."""
    gaps = [0.0, 0.0]
    mass = 0.0
    for q_i, p_i in sorted(zip(q.tolist(), p.tolist(), strict=True), reverse=True):
        gaps[0 if mass < mu else 1] += abs(p_i - q_i)
        mass += q_i
    if sum(gaps) == 0:
        return forward_kl(q, p)
    return (gaps[0] * forward_kl(q, p) + gaps[1] * reverse_kl(q, p)) / sum(gaps)


@_reference
def total_variation(q: Tensor, p: Tensor) -> Tensor:
    return (p - q).abs().sum() / 2


@_reference
def alpha_divergence(q: Tensor, p: Tensor, alpha: float = 0.5) -> Tensor:
    """Of positive measures: the sums of q and p are 1 except with `drop`."""
    return (alpha * q.sum() + (1 - alpha) * p.sum() - (q**alpha * p ** (1 - alpha)).sum()) / (alpha * (1 - alpha))


def on_support(full: Tensor, kept: list[int], sent: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """Teacher and student probabilities on the support: full [V] the student's, sent the teacher's on `kept`."""
    p, q = full[kept], sent
    if tail == "renormalize" or len(kept) == len(full):
        return q / q.sum(), p / p.sum()
    if tail == "bucket":
        return torch.cat([q, 1 - q.sum()[None]]), torch.cat([p, 1 - p.sum()[None]])
    return q, p


def kd_loss(
    hidden,
    lm_head_weight,
    teacher_ids,
    teacher_logprobs,
    labels,
    divergence="forward_kl",
    tail="bucket",
    temperature=1.0,
    kd_weight=1.0,
    ce_weight=0.0,
    lm_head_bias=None,
    num_valid_tokens=None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss as an autograd graph over its inputs, and its metrics as floats.

    divergence: a kind, or a mapping with `kind` and options.
    """
    given = {"kind": divergence} if isinstance(divergence, str) else dict(divergence)
    divergence_of = functools.partial(REFERENCES[given.pop("kind")], **given)
    logits = hidden.double() @ lm_head_weight.double().T
    if lm_head_bias is not None:
        logits = logits + lm_head_bias.double()
    valid = [t for t in range(len(labels)) if labels[t] != -100]
    n = len(valid) if num_valid_tokens is None else num_valid_tokens
    kd_sum = ce_sum = logits.sum() * 0
    mass_sum, agree_sum = 0.0, 0.0
    for t in valid:
        slots = [
            (int(i), float(lp))
            for i, lp in zip(teacher_ids[t], teacher_logprobs[t].double(), strict=True)
            if i >= 0 and lp > -float("inf")
        ]
        ce_sum = ce_sum - logits[t].softmax(-1)[labels[t]].log()
        if not slots:
            # All of the mass is in the bucket, on both sides.
            continue
        kept = [i for i, _ in slots]
        sent = torch.tensor([lp for _, lp in slots], dtype=torch.float64).exp()
        q, p = on_support((logits[t] / temperature).softmax(-1), kept, sent, tail)
        kd_sum = kd_sum + temperature**2 * divergence_of(q, p)
        mass_sum += float(sent.sum())
        agree_sum += float(logits[t].argmax() == kept[int(sent.argmax())])
    n = max(n, 1)
    metrics = {
        "kd_loss": kd_sum.item() / n,
        "ce_loss": ce_sum.item() / n,
        "teacher_topk_mass": mass_sum / n,
        "top1_agreement": agree_sum / n,
        "num_valid_tokens": len(valid),
    }
    return (kd_weight * kd_sum + ce_weight * ce_sum) / n, metrics
