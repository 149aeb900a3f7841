"""What to do with the probability mass outside the K tokens that the teacher sent.

In: log-probabilities and logits on those tokens, and the logsumexp of all other logits. Out: student and teacher on one
common support, and the way back from dD/d(log p) on that support to the gradient by every logit.

bucket        the support is the K tokens plus one outcome that holds the rest: a proper divergence
renormalize   the K tokens only, both sides renormalised: blind outside them, needs no sum over the vocabulary
drop          the K tokens only, nothing renormalised: for divergences that keep a usable optimum there (`Config.tails`)

Shapes: n tokens, K teacher tokens, S = K + 1 for bucket and K otherwise. u = logits / T.
"""

import math

import torch
from torch import Tensor

TAILS = ("bucket", "renormalize", "drop")

MIN_TAIL_MASS = 1e-7
"""Both tail masses are at least this: below it their ratio is the rounding of the float32 log-probabilities."""

EMPTY_LOGPROB = -80.0
"""Stands on both sides where a slot is empty: finite, so no NaN, and e^-80 adds nothing to a sum."""


def teacher_support(
    logprobs: Tensor, is_filled: Tensor, tail: str, vocab_size: int, rescale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The teacher on the support: log_q [n, S] and which outcomes exist, bool [n, S].

    logprobs [n, K] are full-vocabulary log-probabilities; is_filled [n, K] is False at empty slots.
    rescale is T_payload / T_loss; anything but 1 is exact for renormalize only.
    """
    masked = torch.where(is_filled, logprobs, -math.inf)
    if tail == "bucket":
        # A row whose K tokens are the whole vocabulary has no bucket: the mass left over there is wire noise.
        has_bucket = is_filled.sum(-1, keepdim=True) < vocab_size
        # In float64: what is left of one after a sum in float32 has no digits from a tail of 1e-7 on down.
        log_sum = torch.logsumexp(masked.double(), -1, keepdim=True).clamp(max=0.0)
        log_tail = torch.log(-torch.expm1(log_sum)).to(masked.dtype)
        log_tail = torch.where(has_bucket, log_tail.clamp(min=math.log(MIN_TAIL_MASS)), -math.inf)
        in_support = torch.cat([is_filled, has_bucket], -1)
        # Sums to one already, except where the wire's rounding pushed the K tokens above one.
        log_q = torch.log_softmax(torch.cat([masked, log_tail], -1), -1)
    else:
        in_support = is_filled
        log_q = torch.log_softmax(masked * rescale, -1) if tail == "renormalize" else masked
    return torch.where(in_support, log_q, EMPTY_LOGPROB), in_support


def student_support(logits: Tensor, log_rest: Tensor | None, in_support: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """The student on the support: log_p [n, S] and the log normaliser [n, 1] that was used.

    logits [n, K] are u on the K tokens, -inf at empty slots; log_rest [n, 1] is the logsumexp of u over all other
    tokens (-inf where there are none), never 1 minus a sum; renormalize takes None.
    """
    log_total = torch.logsumexp(logits, -1, keepdim=True)
    if log_rest is not None:
        log_total = torch.logaddexp(log_total, log_rest)
    log_p = logits - log_total
    if tail == "bucket":
        assert log_rest is not None
        log_p = torch.cat([log_p, (log_rest - log_total).clamp(min=math.log(MIN_TAIL_MASS))], -1)
    return torch.where(in_support, log_p, EMPTY_LOGPROB), log_total


def logit_gradient(score: Tensor, log_p: Tensor, in_support: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """dD/du from dD/d(log p): the entries of the K tokens [n, K], and the factor a [n, 1].

    Every other token j has the gradient a * p_j. The K entries are complete (not a correction to a * p), so that the
    caller rounds each of them once.
    """
    score = torch.where(in_support, score, 0.0)
    total = score.sum(-1, keepdim=True)
    num_tokens = score.shape[-1] - (tail == "bucket")
    grad = score[:, :num_tokens] - log_p[:, :num_tokens].exp() * total
    grad = torch.where(in_support[:, :num_tokens], grad, 0.0)
    if tail == "bucket":
        return grad, score[:, -1:] * torch.exp(-log_p[:, -1:]) - total
    if tail == "drop":
        return grad, -total
    return grad, torch.zeros_like(total)
