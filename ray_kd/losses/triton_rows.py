"""The two passes over a chunk's logits as Triton kernels, one program a row, for CUDA.

`row_stats` reads the logits once and leaves them; `weigh_` reads them once more and overwrites them with the gradient,
in float32 registers, so there is no float32 copy of the chunk and no second exponential in memory. Nothing here waits
for the device. Not run on a GPU by this project's tests, which run the kernels in Triton's interpreter.

R rows, V vocab. z = logits, T = temperature.
"""

import shutil

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def is_usable(logits: Tensor) -> bool:
    """Whether the kernels can run there: on CUDA, in float32 or less, with a C compiler for Triton's launcher."""
    return logits.is_cuda and logits.dtype != torch.float64 and any(map(shutil.which, ("cc", "gcc", "clang")))


def row_stats(logits: Tensor, temperature: float, heats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """top (the largest z of a row), logsumexp of z and logsumexp of z / T, each float32 [R, 1].

    logits [R, V] with contiguous rows, -inf where a token is left out. heats False: the last is the second.
    """
    num_rows, vocab_size = logits.shape
    stats = torch.empty(3, num_rows, 1, dtype=torch.float32, device=logits.device)
    _stats_kernel[(num_rows,)](
        logits, stats, logits.stride(0), num_rows, vocab_size, 1.0 / temperature, HEATS=heats, BLOCK=_BLOCK
    )
    top, total, heated_total = stats.unbind(0)
    log_rest = total.log() + top
    return top, log_rest, heated_total.log() + top / temperature if heats else log_rest


def weigh_(logits: Tensor, top: Tensor, plain: Tensor, hot: Tensor, temperature: float, heats: bool) -> None:
    """logits become plain * exp(z - top) + hot * exp((z - top) / T); top, plain, hot [R, 1] float32."""
    num_rows, vocab_size = logits.shape
    grid = (num_rows, triton.cdiv(vocab_size, _BLOCK))
    rows = [values.float().contiguous() for values in (top, plain, hot)]
    _weigh_kernel[grid](logits, *rows, logits.stride(0), vocab_size, 1.0 / temperature, HEATS=heats, BLOCK=_BLOCK)


@triton.jit
def _stats_kernel(logits, stats, stride, num_rows, vocab_size, inverse, HEATS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    # Finite also where nothing is left of a row.
    top = tl.full((), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    heated = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = logits + row.to(tl.int64) * stride + column
        z = tl.load(place, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - larger) + tl.exp(z - larger)
        if HEATS:
            heated = heated * tl.exp((top - larger) * inverse) + tl.exp((z - larger) * inverse)
        top = larger
    tl.store(stats + row, top)
    tl.store(stats + num_rows + row, tl.sum(total, axis=0))
    tl.store(stats + 2 * num_rows + row, tl.sum(heated, axis=0))


@triton.jit
def _weigh_kernel(logits, top, plain, hot, stride, vocab_size, inverse, HEATS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * stride + column
    is_there = column < vocab_size
    z = tl.load(place, mask=is_there, other=float("-inf")).to(tl.float32) - tl.load(top + row)
    grad = tl.load(plain + row) * tl.exp(z)
    if HEATS:
        grad += tl.load(hot + row) * tl.exp(z * inverse)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=is_there)
