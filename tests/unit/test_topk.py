import pytest
import torch

from ray_kd.models import Head
from ray_kd.teacher.topk import topk_logprobs

N, V, D = 37, 101, 16


def head(dtype: torch.dtype = torch.float32, **options) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)
    bias = torch.randn(V, generator=generator) if options.pop("bias", False) else None
    return Head(weight.to(dtype), bias, **options)


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def reference(x: torch.Tensor, head: Head, temperature: float) -> torch.Tensor:
    """[N, V] float64 from the definitions."""
    logits = x.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 3.0}, {"scale": 0.25, "bias": True}], ids=str)
@pytest.mark.parametrize("chunk_size", [5, 256])
def test_equal_to_the_full_log_softmax(temperature: float, options: dict, chunk_size: int) -> None:
    ids, logprobs = topk_logprobs(hidden(), head(**options), 8, temperature, chunk_size)
    expected, expected_ids = reference(hidden(), head(**options), temperature).topk(8)
    assert ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-5, rtol=1e-5)


def test_the_whole_vocabulary_is_a_distribution() -> None:
    ids, logprobs = topk_logprobs(hidden(), head(), V, 1.0)
    assert torch.equal(ids.sort(dim=-1).values, torch.arange(V).expand(N, V))
    torch.testing.assert_close(logprobs.double().exp().sum(-1), torch.ones(N, dtype=torch.float64), atol=1e-5, rtol=0)


def test_half_precision_only_rounds_the_product() -> None:
    x, half = hidden(torch.bfloat16), head(torch.bfloat16)
    ids, logprobs = topk_logprobs(x, half, 8, 1.0)
    full = torch.log_softmax((x @ half.weight.T).double(), dim=-1)
    torch.testing.assert_close(logprobs.double(), full.gather(1, ids), atol=1e-5, rtol=1e-5)


def test_no_tokens_and_broken_tokens() -> None:
    ids, logprobs = topk_logprobs(hidden()[:0], head(), 8)
    assert ids.shape == logprobs.shape == (0, 8)
    broken = hidden()
    broken[3, 0] = torch.nan
    _, logprobs = topk_logprobs(broken, head(), 8, chunk_size=8)
    assert torch.isnan(logprobs).any(dim=-1).nonzero().flatten().tolist() == [3]
