"""Every divergence on disk: its score is the derivative of its value, and it is a divergence on every tail it names."""

import dataclasses

import pytest
import torch

from ray_kd import plugins
from ray_kd.losses import fused_linear_kd_loss
from tests.reference.kd_batch import draw, grads_of, with_grads
from tests.reference.kd_loss import REFERENCES, kd_loss

GROUP = "losses.divergences"
TAILS = ("bucket", "renormalize", "drop")


def configs():
    """Every kind with its default Config, and with other values of beta where it has one."""
    for kind in plugins.available(GROUP):
        module = plugins.load(GROUP, kind)
        yield pytest.param(module, module.Config(), id=kind)
        if any(field.name == "beta" for field in dataclasses.fields(module.Config)):
            for beta in (0.0, 0.2, 0.9, 1.0):
                try:
                    config = module.Config(beta=beta)
                except ValueError:
                    continue
                yield pytest.param(module, config, id=f"{kind}-beta{beta}")


every_config = pytest.mark.parametrize(("module", "config"), list(configs()))


def tails_of(config):
    return getattr(config, "tails", ("bucket", "renormalize"))


def test_the_divergences_of_the_design_are_found():
    assert {"forward_kl", "reverse_kl", "jsd", "gkd"} <= set(plugins.available(GROUP))


@every_config
def test_the_score_is_the_derivative_of_the_value_by_the_logits(module, config):
    """Through the softmax, where terms proportional to p vanish: what the shared machinery makes of the score."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(torch.randn(6, 5, dtype=torch.float64), -1)
    log_p = torch.log_softmax(logits, -1)
    value, _ = module.divergence(log_p, log_q, config)
    (expected,) = torch.autograd.grad(value.sum(), logits)
    with torch.no_grad():
        _, score = module.divergence(log_p, log_q, config)
        actual = score - log_p.exp() * score.sum(-1, keepdim=True)
    assert value.shape == (6,)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@every_config
def test_it_is_nonnegative_and_zero_where_the_two_agree(module, config):
    torch.manual_seed(1)
    log_p, log_q = torch.log_softmax(4 * torch.randn(2, 200, 9, dtype=torch.float64), -1)
    assert (module.divergence(log_p, log_q, config)[0] > 0).all()
    value, score = module.divergence(log_q, log_q, config)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        score - log_q.exp() * score.sum(-1, keepdim=True), torch.zeros_like(score), atol=1e-12, rtol=0
    )


@every_config
@pytest.mark.parametrize("tail", TAILS)
def test_the_loss_equals_its_twin_or_the_tail_is_refused_by_name(module, config, tail):
    batch = draw(with_bias=True, with_empty=True, with_ignored=True)
    if tail not in tails_of(config):
        with pytest.raises(ValueError, match=f"'{tail}' is ill-posed"):
            fused_linear_kd_loss(**batch, divergence=config, tail=tail)
        return
    kind = module.__name__.rsplit(".", 1)[-1]
    if kind not in REFERENCES:
        pytest.skip(f"tests/reference/kd_loss.py has no {kind}: the derivative of its own value stands for it")
    fast, slow = with_grads(batch), with_grads(batch)
    options = {"tail": tail, "ce_weight": 0.4, "beta": getattr(config, "beta", 0.5)}
    out = fused_linear_kd_loss(**fast, **options, divergence=config, chunk_size=3)
    loss, _ = kd_loss(**slow, **options, divergence=kind)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
    for name, grad in grads_of(fast).items():
        torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-9, atol=1e-11)


@every_config
def test_it_stays_finite_far_apart_and_on_an_empty_row(module, config):
    log_p = torch.tensor([[0.0, -200.0], [-80.0, -80.0]])
    log_q = torch.tensor([[-1e4, 0.0], [-80.0, -80.0]])
    value, score = module.divergence(log_p, log_q, config)
    assert torch.isfinite(value).all()
    assert torch.isfinite(score).all()
    assert abs(float(value[1])) < 1e-30


def test_beta_selects_the_three_divergences_in_one_kind():
    batch = draw()
    for beta, kind in ((0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")):
        expected = fused_linear_kd_loss(**batch, divergence=kind, beta=beta).loss
        torch.testing.assert_close(fused_linear_kd_loss(**batch, divergence="gkd", beta=beta).loss, expected)
