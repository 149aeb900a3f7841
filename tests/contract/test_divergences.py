"""Every divergence on disk: its score is the derivative of its value, and it is a divergence on every tail it names."""

import dataclasses
import math

import pytest
import torch

from ray_kd import plugins
from ray_kd.losses import fused_linear_kd_loss
from tests.reference.kd_batch import draw, grads_of, kinds, with_grads
from tests.reference.kd_loss import REFERENCES, kd_loss

GROUP = "losses.divergences"
TAILS = ("bucket", "renormalize", "drop")


def numeric_options(module):
    return [field.name for field in dataclasses.fields(module.Config) if isinstance(field.default, float)]


def configs():
    """Every kind with its default Config, and with other values of every numeric option that takes them."""
    for kind in kinds():
        module = plugins.load(GROUP, kind)
        yield pytest.param(module, module.Config(), id=kind)
        for name in numeric_options(module):
            for value in (0.0, 0.05, 0.2, 0.7, 0.9, 1.0):
                try:
                    config = module.Config(**{name: value})
                except ValueError:
                    continue
                yield pytest.param(module, config, id=f"{kind}-{name}{value}")


every_config = pytest.mark.parametrize(("module", "config"), list(configs()))


def tails_of(config):
    return getattr(config, "tails", ("bucket", "renormalize"))


def test_the_divergences_of_the_design_are_found():
    kinds = {"forward_kl", "reverse_kl", "jsd", "gkd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl"}
    assert kinds | {"total_variation", "alpha_divergence"} <= set(plugins.available(GROUP))


def test_every_numeric_option_was_tried_at_several_values():
    tried = [(param.values[0].__name__, dataclasses.asdict(param.values[1])) for param in configs()]
    for kind in kinds():
        module = plugins.load(GROUP, kind)
        for name in numeric_options(module):
            values = {options[name] for tried_kind, options in tried if tried_kind == module.__name__}
            assert len(values) >= 4, f"{kind}: {name} was tried at {values}"


@every_config
def test_the_score_is_the_derivative_of_the_value_by_the_logits(module, config):
    """Through the softmax, where terms proportional to p vanish: what the shared machinery makes of the score.

    A factor that a divergence takes from log_p.detach() is a constant here too.
    """
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
    options = {"tail": tail, "ce_weight": 0.4}
    out = fused_linear_kd_loss(**fast, **options, divergence=config, chunk_size=3)
    loss, _ = kd_loss(**slow, **options, divergence={"kind": kind, **dataclasses.asdict(config)})
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
    for name, grad in grads_of(fast).items():
        torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-9, atol=1e-11)


@every_config
def test_it_stays_finite_far_apart_and_on_an_empty_row(module, config):
    log_p = torch.tensor([[0.0, -200.0], [-80.0, -80.0]])
    log_q = torch.tensor([[-1e4, 0.0], [-80.0, -80.0]])
    for dtype in (torch.float32, torch.float64):
        value, score = module.divergence(log_p.to(dtype), log_q.to(dtype), config)
        assert value.dtype == score.dtype == dtype
        assert torch.isfinite(value).all()
        assert torch.isfinite(score).all()
        assert abs(float(value[1])) < 1e-30
        assert float(score[1].abs().max()) < 1e-30


@every_config
def test_empty_slots_add_nothing(module, config):
    torch.manual_seed(2)
    log_p, log_q = torch.log_softmax(2 * torch.randn(2, 50, 5, dtype=torch.float64), -1)
    empty = torch.full((50, 3), -80.0, dtype=torch.float64)
    value, score = module.divergence(log_p, log_q, config)
    padded_value, padded_score = module.divergence(torch.cat([log_p, empty], -1), torch.cat([log_q, empty], -1), config)
    torch.testing.assert_close(padded_value, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded_score[:, :5], score, rtol=1e-12, atol=1e-14)
    assert float(padded_score[:, 5:].abs().max()) < 1e-30


@every_config
def test_float32_keeps_the_value_and_the_gradient(module, config):
    torch.manual_seed(3)
    log_p, log_q = torch.log_softmax(3 * torch.randn(2, 500, 33), -1)
    exact_p, exact_q = log_p.double(), log_q.double()
    value, score = module.divergence(log_p, log_q, config)
    exact, exact_score = module.divergence(exact_p, exact_q, config)
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=2e-6)
    grad = score - log_p.exp() * score.sum(-1, keepdim=True)
    exact_grad = exact_score - exact_p.exp() * exact_score.sum(-1, keepdim=True)
    assert float((grad - exact_grad).norm() / exact_grad.norm()) < 1e-5


@every_config
def test_the_host_reads_no_value(module, config):
    """Tensors without values: an .item() or a branch on one raises, as it would wait for the device on CUDA."""
    meta = torch.empty(4, 7, device="meta")
    value, score = module.divergence(meta, meta, config)
    assert (value.shape, score.shape) == ((4,), (4, 7))


@every_config
def test_where_drop_is_named_the_best_student_has_the_teachers_proportions_and_at_least_its_mass(module, config):
    """The K tokens hold 0.8 of the teacher. Ill-posed there is a divergence whose best student moves mass away."""
    if "drop" not in tails_of(config):
        return
    torch.manual_seed(4)
    log_q = torch.log_softmax(torch.randn(6, dtype=torch.float64), -1) + math.log(0.8)
    masses = torch.arange(1, 101, dtype=torch.float64) / 100
    same_proportions = log_q - math.log(0.8) + masses.log()[:, None]
    value, _ = module.divergence(same_proportions, log_q.expand_as(same_proportions), config)
    assert float(masses[value.argmin()]) >= 0.8
    others = torch.log_softmax(torch.randn(20_000, 7, dtype=torch.float64), -1)[:, :6]
    near = same_proportions[value.argmin()] - 0.01 * torch.rand(20_000, 6, dtype=torch.float64)
    for student in (others, near):
        assert (module.divergence(student, log_q.expand_as(student), config)[0] > value.min()).all()


every_logit_kind = pytest.mark.parametrize("kind", kinds(of_logits=True))


@every_logit_kind
def test_of_logits_the_score_is_the_derivative_by_them(kind):
    module = plugins.load(GROUP, kind)
    torch.manual_seed(0)
    u, v = torch.randn(2, 6, 5, dtype=torch.float64)
    u.requires_grad_()
    value, score = module.divergence(u, v, module.Config())
    (expected,) = torch.autograd.grad(value.sum(), u)
    assert value.shape == (6,)
    torch.testing.assert_close(score.detach(), expected, rtol=1e-9, atol=1e-12)
    assert (value > 0).all()
    agreed, no_score = module.divergence(v, v, module.Config())
    torch.testing.assert_close(agreed, torch.zeros_like(agreed), rtol=0, atol=1e-12)
    torch.testing.assert_close(no_score, torch.zeros_like(v), rtol=0, atol=1e-12)


@every_logit_kind
def test_of_logits_it_stays_finite_reads_nothing_and_is_refused_on_the_top_k(kind):
    module = plugins.load(GROUP, kind)
    for u, v in ((torch.zeros(2, 5), torch.ones(2, 5)), (torch.full((2, 5), 1e4), torch.full((2, 5), -1e4))):
        value, score = module.divergence(u, v, module.Config())
        assert torch.isfinite(value).all()
        assert torch.isfinite(score).all()
    meta = torch.empty(4, 7, device="meta")
    value, score = module.divergence(meta, meta, module.Config())
    assert (value.shape, score.shape) == ((4,), (4, 7))
    for tail in TAILS:
        with pytest.raises(ValueError, match=f"'{kind}' compares whole logits"):
            fused_linear_kd_loss(**draw(), divergence=kind, tail=tail)


def test_beta_selects_the_three_divergences_in_one_kind():
    batch = draw()
    for beta, kind in ((0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")):
        expected = fused_linear_kd_loss(**batch, divergence=kind, beta=beta).loss
        torch.testing.assert_close(fused_linear_kd_loss(**batch, divergence="gkd", beta=beta).loss, expected)
