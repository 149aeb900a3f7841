"""The top-k of a head, in groups and not, against all log-probabilities in float64."""

import pytest
import torch

from ray_kd.head import Head
from ray_kd.teacher import topk
from ray_kd.teacher.topk import topk_logprobs
from tests.reference.topk import full_logprobs

N, D, V = 11, 16, 1003  # V is no multiple of the group size
OPTIONS = [{}, {"bias": True}, {"softcap": 3.0}, {"scale": 0.25, "bias": True}, {"softcap": 2.0, "scale": 0.5}]


@pytest.fixture(autouse=True, params=["groups", "all"])
def small_tiles(request, monkeypatch):
    """Groups of 4 and many tiles, so that a small vocabulary takes every path; or no groups at all."""
    if request.param == "groups":
        monkeypatch.setattr(topk, "GROUP_SIZE", 4)
        monkeypatch.setattr(topk, "TILE_NBYTES", 2**12)
        monkeypatch.setattr(topk, "_CPU_BLOCK", 2**7)
    return request.param


def head(dtype: torch.dtype = torch.float32, **options) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)
    bias = torch.randn(V, generator=generator).to(dtype) if options.pop("bias", False) else None
    return Head(weight.to(dtype), bias, **options)


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def reference(x: torch.Tensor, of: Head, temperature: float = 1.0) -> torch.Tensor:
    return full_logprobs(x, of.weight, of.bias, of.softcap, of.scale, temperature)


def assert_best(ids: torch.Tensor, logprobs: torch.Tensor, full: torch.Tensor, atol: float = 2e-5) -> None:
    """Distinct ids whose log-probabilities are the largest, in order; which of equals they are is free."""
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert (logprobs.diff(dim=-1) <= 0).all()
    best = full.topk(ids.shape[1]).values
    torch.testing.assert_close(logprobs.double(), best, atol=atol, rtol=1e-5)
    torch.testing.assert_close(full.gather(1, ids), best, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_size", [5, 512])
def test_equal_to_the_full_log_softmax(temperature: float, options: dict, chunk_size: int) -> None:
    ids, logprobs = topk_logprobs(hidden(), head(**options), 8, temperature, chunk_size)
    assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    assert_best(ids, logprobs, reference(hidden(), head(**options), temperature))


def test_the_groups_are_really_used(small_tiles, monkeypatch) -> None:
    if small_tiles == "groups":
        monkeypatch.setattr(topk, "_select_from_all", None)
    topk_logprobs(hidden(), head(), 8)


@pytest.mark.parametrize("top_k", [1, 2, 62, 63, 250, 1000, V])
def test_any_k_up_to_the_vocabulary(top_k: int) -> None:
    ids, logprobs = topk_logprobs(hidden(), head(), top_k)
    assert_best(ids, logprobs, reference(hidden(), head()))
    if top_k == V:
        total = logprobs.double().exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab_size", range(992, 1003))
def test_any_vocabulary(vocab_size: int) -> None:
    of = Head(head().weight[:vocab_size])
    assert_best(*topk_logprobs(hidden(), of, 8), reference(hidden(), of))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
def test_half_precision_only_rounds_the_product(options: dict) -> None:
    x, half = hidden(torch.bfloat16), head(torch.bfloat16, **options)
    ids, logprobs = topk_logprobs(x, half, 8)
    assert_best(ids, logprobs, torch.log_softmax(half.logits(x).double(), dim=-1), atol=1e-5)
    # The product may round the other way here and there, by one of 8 bits.
    torch.testing.assert_close(logprobs.double(), reference(x, half).topk(8).values, atol=0.1, rtol=0)


def test_ties_are_distinct_ids() -> None:
    of = Head(torch.ones(V, D).mul_(torch.arange(V)[:, None] % 3))  # three values
    ids, logprobs = topk_logprobs(hidden(), of, 8)
    assert_best(ids, logprobs, reference(hidden(), of))


def test_the_best_in_one_group_and_one_in_each() -> None:
    for best in (range(400, 408), range(3, 900, 113), range(V - 8, V)):
        of = Head(torch.zeros(V, D), torch.zeros(V))
        of.bias[list(best)] = torch.arange(1.0, 9.0)
        ids, _ = topk_logprobs(hidden(), of, 8)
        assert ids.tolist() == [list(best)[::-1]] * N


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_masked_tokens_have_probability_zero(softcap: float | None) -> None:
    of = Head(head().weight, torch.zeros(V), softcap)
    of.bias[:900] = -torch.inf  # whole tiles of it
    ids, logprobs = topk_logprobs(hidden(), of, 8)
    assert_best(ids, logprobs, torch.log_softmax(of.logits(hidden()).double(), -1))
    of.bias[:] = -torch.inf
    of.bias[[5, 700, 1002]] = 0.0
    ids, logprobs = topk_logprobs(hidden(), of, 8)
    if softcap is None:
        assert ids[:, :3].sort().values.tolist() == [[5, 700, 1002]] * N
        assert (logprobs[:, 3:] == -torch.inf).all()
    assert int(ids.min()) >= 0
    assert int(ids.max()) < V


def test_large_logits_do_not_overflow() -> None:
    of = Head(1000 * head().weight)
    assert_best(*topk_logprobs(hidden(), of, 8), reference(hidden(), of), atol=1e-2)


def test_no_tokens_and_broken_tokens() -> None:
    ids, logprobs = topk_logprobs(hidden()[:0], head(), 8)
    assert ids.shape == logprobs.shape == (0, 8)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = hidden()
        broken[3, 0] = value
        _, logprobs = topk_logprobs(broken, head(), 8, chunk_size=8)
        is_broken = torch.isnan(logprobs) | torch.isposinf(logprobs)
        assert is_broken.any(dim=-1).nonzero().flatten().tolist() == [3]
