"""The kernels against torch, and under the whole loss. Run by test_triton_rows.py, in Triton's interpreter."""

import pytest
import torch

from ray_kd.losses import fused_linear_kd_loss, topk_chunk, triton_rows
from tests.reference.kd_batch import draw, grads_of, with_grads
from tests.reference.kd_loss import kd_loss


@pytest.fixture
def kernels(monkeypatch):
    """With blocks that a small vocabulary does not fill evenly."""
    monkeypatch.setattr(triton_rows, "_BLOCK", 8)
    return triton_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kernels_equal_torch(kernels, dtype, temperature):
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 19)).to(dtype)
    logits[0, 3] = -torch.inf
    logits[1] = -torch.inf  # all of a row is taken out
    z = logits.float()
    heats = temperature != 1
    top, log_rest, log_rest_heated = kernels.row_stats(logits, temperature, heats)
    torch.testing.assert_close(top[2:], z.amax(-1, keepdim=True)[2:])
    torch.testing.assert_close(log_rest, z.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(log_rest_heated, (z / temperature).logsumexp(-1, keepdim=True))
    plain, hot = torch.randn(2, 5, 1).unbind(0)
    expected = plain * torch.exp(z - top) + (hot * torch.exp((z - top) / temperature) if heats else 0)
    kernels.weigh_(logits, top, plain, hot, temperature, heats)
    torch.testing.assert_close(logits, expected.to(dtype))


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_loss_through_the_kernels_equals_its_twin(kernels, monkeypatch, divergence, temperature, ce_weight):
    monkeypatch.setattr(topk_chunk, "_kernels", lambda weight: kernels)
    start = topk_chunk.TopKHead.__init__

    def as_on_a_device(self, *arguments):
        start(self, *arguments)
        self.takes_factor_out = False

    monkeypatch.setattr(topk_chunk.TopKHead, "__init__", as_on_a_device)
    batch = draw(temperature=temperature, with_bias=True, with_empty=True, with_ignored=True, dtype=torch.float32)
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_kd_loss(
        **fast, divergence=divergence, temperature=temperature, ce_weight=ce_weight, chunk_size=3
    )
    loss, _ = kd_loss(**slow, divergence=divergence, temperature=temperature, ce_weight=ce_weight)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads_of(fast).items():
        torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-4, atol=1e-6)
