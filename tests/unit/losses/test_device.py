"""On a device nothing in the loss may wait for it or take a shape from its values.

Without a GPU: meta tensors, which have shapes and no numbers, so that reading one raises. They take the path of a GPU
without Triton.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ray_kd.head import Head
from ray_kd.losses import fused_linear_dense_kd_loss, fused_linear_kd_loss
from tests.reference.kd_batch import kinds

N, H, V, K, D = 12, 8, 40, 4, 6
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch):
    """Which knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.fixture(autouse=True)
def _no_tensors_of_numbers(monkeypatch):
    """They are made on the host, out of sight of the dispatcher, and copied."""

    def refuse(*_, **__):
        raise AssertionError("a tensor was made on the host")

    monkeypatch.setattr(torch.Tensor, "new_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)


class _NothingComesFromTheHost(TorchDispatchMode):
    """A copy to a device waits for it, as a read does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            assert source.device == result.device, f"{func} from {source.device} to {result.device}"
        return result


def on_device(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def student(dtype, with_bias):
    return {
        "hidden": on_device(N, H, dtype=dtype).requires_grad_(),
        "lm_head_weight": on_device(V, H, dtype=dtype).requires_grad_(),
        "lm_head_bias": on_device(V, dtype=dtype).requires_grad_() if with_bias else None,
        "labels": on_device(N, dtype=torch.long),
        "num_valid_tokens": N,
        "chunk_size": 5,
    }


@every_dtype
@pytest.mark.parametrize(("temperature", "with_bias"), [(1.0, False), (2.0, True)], ids=["T1", "T2_bias"])
@pytest.mark.parametrize(("tail", "ce_weight"), [("bucket", 0.5), ("renormalize", 0.0), ("renormalize", 0.5)])
@pytest.mark.parametrize("divergence", kinds())
def test_the_top_k_loss_reads_nothing(divergence, tail, ce_weight, temperature, with_bias, dtype):
    batch = student(dtype, with_bias)
    said = {"teacher_ids": on_device(N, K, dtype=torch.long), "teacher_logprobs": on_device(N, K)}
    options = {"divergence": divergence, "tail": tail, "ce_weight": ce_weight, "temperature": temperature}
    with _NothingComesFromTheHost():
        out = fused_linear_kd_loss(**batch, **said, **options)
        out.loss.backward()
    assert_on_device(out, batch)


@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [*kinds(), *kinds(of_logits=True)])
def test_the_dense_loss_reads_nothing(divergence, temperature, dtype):
    batch = student(dtype, with_bias=True)
    head = Head(on_device(V - 1, D, dtype=torch.bfloat16), softcap=30.0)
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": temperature}
    said = {"teacher_hidden": on_device(N, D, dtype=torch.bfloat16), "teacher_head": head}
    with _NothingComesFromTheHost():
        out = fused_linear_dense_kd_loss(**batch, **said, **options)
        out.loss.backward()
    assert_on_device(out, batch)


def assert_on_device(out, batch):
    assert out.loss.device.type == "meta"
    assert {metric.device.type for metric in out.metrics.values()} == {"meta"}
    for name in ("hidden", "lm_head_weight", "lm_head_bias"):
        if batch[name] is not None:
            assert (batch[name].grad.shape, batch[name].grad.device.type) == (batch[name].shape, "meta")


def test_a_read_would_be_seen():
    for read in (lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(on_device(3))
    with pytest.raises(AssertionError, match="from cpu to meta"), _NothingComesFromTheHost():
        torch.ones(3).to("meta")
    with pytest.raises(AssertionError, match="made on the host"):
        on_device(3).new_tensor(1.0)
