"""Numbers that each divergence must have by its own definition: hand-computed values, limits, bounds, refusals."""

import math

import pytest
import torch

from ray_kd.losses.divergences import (
    adaptive_kl,
    alpha_divergence,
    forward_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def value_of(module, log_p, log_q, **options):
    return module.divergence(log_p, log_q, module.Config(**options))[0]


def random_pair(num_rows=50, num_outcomes=9):
    torch.manual_seed(0)
    return torch.log_softmax(2 * torch.randn(2, num_rows, num_outcomes, dtype=torch.float64), -1)


@pytest.mark.parametrize(("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_a_skewed_kl_is_the_kl_at_alpha_0_and_at_most_minus_log_alpha(skewed, plain):
    log_p, log_q = random_pair()
    torch.testing.assert_close(value_of(skewed, log_p, log_q, alpha=0.0), value_of(plain, log_p, log_q))
    apart = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    assert float(value_of(skewed, apart, apart.flip(-1), alpha=0.1)) == pytest.approx(-math.log(0.1))


def test_skewed_kls_of_two_outcomes():
    """q = (.8, .2), p = (.4, .6), alpha = .25: m is (.5, .5) for the forward and (.7, .3) for the reverse."""
    log_p, log_q = logs((0.4, 0.6)), logs((0.8, 0.2))
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    reverse = 0.4 * math.log(0.4 / 0.7) + 0.6 * math.log(0.6 / 0.3)
    assert float(value_of(skew_forward_kl, log_p, log_q, alpha=0.25)) == pytest.approx(forward, rel=1e-12)
    assert float(value_of(skew_reverse_kl, log_p, log_q, alpha=0.25)) == pytest.approx(reverse, rel=1e-12)


@pytest.mark.parametrize(("mu", "w"), [(0.5, 1 / 6), (0.65, 1 / 2), (0.89, 1 / 2), (0.95, 1.0)])
def test_the_head_of_adaptive_kl_is_the_fewest_outcomes_that_reach_mu(mu, w):
    """q = (.1, .6, .3): the gaps in the teacher's order are .1, .2 and .3, the masses .6, .9 and 1."""
    log_p, log_q = logs((0.4, 0.5, 0.1)), logs((0.1, 0.6, 0.3))
    expected = w * value_of(forward_kl, log_p, log_q) + (1 - w) * value_of(reverse_kl, log_p, log_q)
    torch.testing.assert_close(value_of(adaptive_kl, log_p, log_q, mu=mu), expected, rtol=1e-12, atol=0)


def test_the_score_of_adaptive_kl_is_its_derivative_at_fixed_weights_only():
    """w = .59 / (.59 + .09 + .68): by the last outcome, the moving w would take a third off the derivative."""
    log_p, log_q, w = logs((0.01, 0.01, 0.98)), logs((0.1, 0.6, 0.3)), 0.59 / 1.36
    _, score = adaptive_kl.divergence(log_p, log_q, adaptive_kl.Config())
    step = torch.tensor([[0.0, 0.0, 1e-6]], dtype=torch.float64)

    def slope(function):
        return float((function(log_p + step) - function(log_p - step)) / 2e-6)

    def at_fixed_weights(log_p):
        return w * value_of(forward_kl, log_p, log_q) + (1 - w) * value_of(reverse_kl, log_p, log_q)

    # The score of reverse KL leaves p out, which the softmax cancels.
    actual = float(score[0, 2]) + (1 - w) * 0.98
    assert actual == pytest.approx(slope(at_fixed_weights), rel=1e-8)
    assert slope(lambda log_p: value_of(adaptive_kl, log_p, log_q)) / actual == pytest.approx(0.643, abs=0.005)


def test_total_variation_is_half_the_sum_of_gaps_and_flat_where_they_vanish():
    log_p, log_q = logs((0.2, 0.3, 0.5)), logs((0.5, 0.3, 0.2))
    value, score = total_variation.divergence(log_p, log_q, total_variation.Config())
    assert float(value) == pytest.approx(0.3)
    torch.testing.assert_close(score, torch.tensor([[-0.1, 0.0, 0.25]], dtype=torch.float64))
    apart = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    assert float(value_of(total_variation, apart, apart.flip(-1))) == 1


def test_alpha_divergence_is_hellinger_at_one_half_and_tends_to_the_kls():
    log_p, log_q = random_pair()
    hellinger = ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)
    torch.testing.assert_close(value_of(alpha_divergence, log_p, log_q, alpha=0.5), 2 * hellinger)
    for alpha, kl in ((1 - 1e-6, forward_kl), (1e-6, reverse_kl)):
        limit = value_of(kl, log_p, log_q)
        torch.testing.assert_close(value_of(alpha_divergence, log_p, log_q, alpha=alpha), limit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "option", "refused", "allowed"),
    [
        (skew_forward_kl, "alpha", (-0.1, 1.0, math.nan), "[0, 1)"),
        (skew_reverse_kl, "alpha", (-0.1, 1.0, math.nan), "[0, 1)"),
        (adaptive_kl, "mu", (0.0, 1.0, math.nan), "(0, 1)"),
        (alpha_divergence, "alpha", (0.0, 1.0, math.nan), "(0, 1)"),
    ],
)
def test_an_option_out_of_range_is_refused_with_the_range(module, option, refused, allowed):
    for value in refused:
        with pytest.raises(ValueError, match=f"{option}={value} is outside") as error:
            module.Config(**{option: value})
        assert allowed in str(error.value)
