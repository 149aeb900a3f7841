"""The fused loss against its slow twin in float64: value, metrics and every gradient, over the grid of its options."""

import math

import pytest
import torch

from ray_kd import plugins
from ray_kd.losses import fused_linear_kd_loss
from tests.reference.kd_batch import draw, grads_of, with_grads
from tests.reference.kd_loss import REFERENCES, kd_loss

GROUP = "losses.divergences"

POSED = [
    (kind, tail)
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for tail in ("bucket", "renormalize", "drop")
    if tail != "drop" or kind == "forward_kl"
]
"""What the shared machinery is tried with, over all of its own options."""

ON_DISK = [
    (kind, tail)
    for kind in plugins.available(GROUP)
    if kind in REFERENCES
    for tail in getattr(plugins.load(GROUP, kind).Config(), "tails", ("bucket", "renormalize"))
]


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("with_empty", [False, True], ids=["full", "empty_slots"])
@pytest.mark.parametrize("chunk_size", [256, 2], ids=["one_chunk", "many_chunks"])
@pytest.mark.parametrize("with_ignored", [False, True], ids=["all_valid", "ignored_rows"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7], ids=["kd_only", "kd_and_ce"])
@pytest.mark.parametrize("temperature", [1.0, 1.7, 2.0], ids=["T1", "T1.7", "T2"])
@pytest.mark.parametrize(("divergence", "tail"), POSED, ids=[f"{kind}-{tail}" for kind, tail in POSED])
def test_value_metrics_and_gradients_equal_the_definition(
    divergence, tail, temperature, ce_weight, with_bias, with_ignored, chunk_size, with_empty, frozen_head
):
    batch = draw(
        temperature=temperature, with_bias=with_bias, with_ignored=with_ignored, with_empty=with_empty, seed=chunk_size
    )
    if divergence == "jsd":
        divergence = {"kind": "jsd", "beta": 0.3}
    options = {"divergence": divergence, "tail": tail, "temperature": temperature, "ce_weight": ce_weight}
    assert_equals_the_definition(batch, options, chunk_size, frozen_head)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["full", "ignored_rows_and_empty_slots"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4], ids=["kd_only", "kd_and_ce"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0], ids=["T1", "T3", "T4"])
@pytest.mark.parametrize(("divergence", "tail"), ON_DISK, ids=[f"{kind}-{tail}" for kind, tail in ON_DISK])
def test_every_divergence_on_disk_equals_its_definition(divergence, tail, temperature, ce_weight, is_masked, with_bias):
    """With its default options on every tail it names; other options are tried by the contract tests."""
    batch = draw(temperature=temperature, with_bias=with_bias, with_ignored=is_masked, with_empty=is_masked, seed=11)
    options = {"divergence": divergence, "tail": tail, "temperature": temperature, "ce_weight": ce_weight}
    assert_equals_the_definition(batch, options, chunk_size=3)


def assert_equals_the_definition(batch, options, chunk_size, frozen_head=False):
    """Value, metrics and every gradient of the fused loss and of its twin."""
    options = options | {"kd_weight": 1.3}
    fast, slow = with_grads(batch, frozen_head), with_grads(batch, frozen_head)
    out = fused_linear_kd_loss(**fast, **options, chunk_size=chunk_size)
    loss, metrics = kd_loss(**slow, **options)
    out.loss.backward()
    loss.backward()

    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
    is_sparse = options["tail"] == "renormalize" and options["ce_weight"] == 0
    for name, expected in metrics.items():
        if is_sparse and name in ("ce_loss", "top1_agreement"):
            assert math.isnan(out.metrics[name])
        else:
            assert float(out.metrics[name]) == pytest.approx(expected, rel=1e-9, abs=1e-11), name
    expected_grads = grads_of(slow)
    for name, grad in grads_of(fast).items():
        if expected_grads[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
