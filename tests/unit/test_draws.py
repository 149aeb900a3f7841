"""Draws from the teacher: counted right, tokens of the right distribution, and a gradient that is unbiased."""

import numpy as np
import pytest
import torch

from ray_kd.head import Head
from ray_kd.losses import fused_linear_kd_loss
from ray_kd.teacher import draws
from ray_kd.teacher.sample import sample_tokens
from tests.reference.topk import full_logprobs

V, D, K = 40, 6, 8


def test_counts_distinct_ids_and_empty_slots() -> None:
    ids, logprobs = draws.count(np.array([[5, 2, 5, 9, 5, 2], [7, 7, 7, 7, 7, 7], [3, 1, 0, 4, 6, 8]]))
    assert ids.tolist() == [[5, 2, 9, -1, -1, -1], [7, -1, -1, -1, -1, -1], [0, 1, 3, 4, 6, 8]]
    empty = -np.inf
    expected = np.log([3 / 6, 2 / 6, 1 / 6]).tolist() + [empty] * 3, [0.0] + [empty] * 5, [np.log(1 / 6)] * 6
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)
    assert [array.shape for array in draws.count(np.zeros((0, 4), np.int64))] == [(0, 4), (0, 4)]


def test_numbers_depend_on_seed_row_and_position_alone() -> None:
    numbers = draws.uniforms(1, 2, 5, 3)
    np.testing.assert_array_equal(draws.uniforms(1, 2, 9, 3)[:5], numbers)
    for other in (draws.uniforms(2, 1, 5, 3), draws.uniforms(1, 3, 5, 3), draws.uniforms(0, 2, 5, 3)):
        assert not np.isin(other, numbers).any()


@pytest.mark.parametrize("chunk_size", [2, 512])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.5}], ids=str)
def test_a_number_draws_the_token_it_falls_on(chunk_size: int, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, D, generator=generator), torch.randn(V, D, generator=generator)
    uniforms = torch.rand(5, 200, generator=generator, dtype=torch.float64)
    uniforms[:, :2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ids = sample_tokens(hidden, Head(weight, **options), uniforms, 2.0, chunk_size)
    for row, q in enumerate(full_logprobs(hidden, weight, temperature=2.0, **options).exp()):
        for number, token in zip(uniforms[row], ids[row], strict=True):
            assert q[:token].sum() - 1e-6 <= number <= q[: token + 1].sum() + 1e-6


def test_impossible_tokens_are_never_drawn_and_broken_rows_are_told() -> None:
    hidden, bias = torch.zeros(3, D), torch.full((V,), -torch.inf)
    bias[[4, 30]] = 0.0
    hidden[1] = torch.nan
    uniforms = torch.tensor([[0.0, 0.4999, 0.5, 1 - 2**-53]], dtype=torch.float64).expand(3, -1).contiguous()
    ids = sample_tokens(hidden, Head(torch.ones(V, D), bias), uniforms)
    assert ids.tolist() == [[4, 4, 30, 30], [-1] * 4, [4, 4, 30, 30]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_converges_to_the_dense_one(temperature: float) -> None:
    """Over R rows of draws the error is noise alone: that of R draws of a row, so it falls like 1 / sqrt(R).

    The bias of the likeliest K tokens stays, whatever the tail.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, D, generator=generator), torch.randn(V, D, generator=generator)
    student = 0.5 * torch.randn(V, D, generator=generator)
    q = full_logprobs(hidden, weight, temperature=temperature).exp()[0]
    p = torch.softmax(student.double() @ hidden[0].double() / temperature, -1)
    dense = temperature * (p - q)  # by the logits: T^2 / T

    def gradient(ids: torch.Tensor, logprobs: torch.Tensor, tail: str) -> torch.Tensor:
        """By the student's logits, mean over the rows of ids [R, K]: those of a head that is one-hot."""
        logits = (hidden @ student.T).expand(len(ids), V).contiguous().requires_grad_()
        labels = torch.zeros(len(ids), dtype=torch.int64)
        fused_linear_kd_loss(
            logits, torch.eye(V), ids, logprobs, labels, "forward_kl", tail, temperature
        ).loss.backward()
        assert logits.grad is not None
        return logits.grad.double().sum(0)

    num_rows = 64 * 256
    numbers = torch.from_numpy(np.concatenate([draws.uniforms(0, row, 64, K) for row in range(num_rows // 64)]))
    drawn = sample_tokens(hidden.expand(num_rows, D), Head(weight), numbers, temperature)
    ids, logprobs = map(torch.from_numpy, draws.count(drawn.numpy()))
    assert (ids < 0).any()
    deviation = temperature * float(((q * (1 - q)).sum() / K).sqrt())  # of one row's gradient, in norm
    errors = []
    for rows in (64, 1024, num_rows):
        means = [gradient(i, lp, "drop") for i, lp in zip(ids.split(rows)[:16], logprobs.split(rows)[:16], strict=True)]
        per_group = [float((mean - dense).norm()) * rows**0.5 / deviation for mean in means]
        assert max(per_group) < 2.5
        errors.append(float(np.mean([error**2 for error in per_group]) ** 0.5))
    assert 0.8 < errors[0] < 1.2
    assert 0.8 < errors[1] < 1.2
    error = float((means[0] - dense).norm())
    assert error < 0.02 * float(dense.norm())

    best = full_logprobs(hidden, weight, temperature=temperature).topk(K)
    for tail in ("drop", "renormalize"):
        bias = float((gradient(best.indices, best.values.float(), tail) - dense).norm())
        assert bias > 4 * error
