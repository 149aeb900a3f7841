"""The distillation loss and other ways to compute it, on the same random batch: calls, floor, memory, gradient error.

N tokens, H width, V vocabulary, K teacher tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ray_kd.head import Head
from ray_kd.losses import fused_linear_dense_kd_loss, fused_linear_kd_loss

CHUNK_SIZE = 256


@dataclass(frozen=True)
class Setting:
    """What is computed: forward KL with a bucket plus cross-entropy, unless told otherwise."""

    num_tokens: int
    width: int
    vocab_size: int
    dtype: str = "float32"
    top_k: int = 64
    temperature: float = 1.0
    ce_weight: float = 0.5
    tail: str = "bucket"
    is_head_frozen: bool = False
    sparse_weight_grad: bool = False

    @property
    def name(self) -> str:
        return f"{self.num_tokens}x{self.width}x{self.vocab_size}"


@dataclass
class Batch:
    """Leaves with gradients, and the targets."""

    hidden: Tensor
    weight: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    """[N, H], and the teacher's head: what the dense candidates are given instead of the top K."""
    teacher_weight: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


def draw(setting: Setting, seed: int = 0, with_teacher: bool = True) -> Batch:
    """Unit-scale logits; the teacher's ids follow a Zipf law, as real ones do: tokens of a text repeat.

    Real ones share more: 128 tokens of dialogue name 2,456 of 49,152 ids in SmolLM2's top 64, these 3,979. So the
    sparse path does better on a text than here.
    """
    s, generator = setting, torch.Generator().manual_seed(seed)
    dtype = getattr(torch, s.dtype)

    def normal(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, s.width, generator=generator) * scale).to(dtype)

    uniform = torch.rand(s.num_tokens, 4 * s.top_k, generator=generator, dtype=torch.float64)
    ids = torch.stack([_distinct(row, s.top_k, s.vocab_size) for row in (s.vocab_size**uniform).long() - 1])
    logprobs = torch.log_softmax(torch.randn(s.num_tokens, s.top_k + 1, generator=generator) * 3, -1)
    return Batch(
        hidden=normal(s.num_tokens, 1.0).requires_grad_(),
        weight=normal(s.vocab_size, s.width**-0.5).requires_grad_(not s.is_head_frozen),
        teacher_ids=ids,
        teacher_logprobs=logprobs[:, : s.top_k].sort(-1, descending=True).values,
        labels=torch.randint(0, s.vocab_size, (s.num_tokens,), generator=generator),
        teacher_hidden=normal(s.num_tokens if with_teacher else 0, 1.0),
        teacher_weight=normal(s.vocab_size if with_teacher else 0, s.width**-0.5),
    )


def _distinct(ids: Tensor, count: int, vocab_size: int) -> Tensor:
    """The first distinct ids; ids from the end of the vocabulary where there are too few."""
    kept = list(dict.fromkeys([*ids.tolist(), *range(vocab_size - 1, vocab_size - 1 - count, -1)]))
    return torch.tensor(kept[:count])


class Floor:
    """The products alone, in chunks, into buffers that are there: what no implementation can do without."""

    def __init__(self, setting: Setting, batch: Batch, chunk_size: int) -> None:
        self.batch, self.chunk_size = batch, chunk_size
        self.logits = torch.randn(min(chunk_size, setting.num_tokens), setting.vocab_size).to(batch.hidden.dtype)
        self.grad_hidden = torch.zeros_like(batch.hidden)
        self.grad_weight = None if setting.is_head_frozen else torch.zeros_like(batch.weight)

    @torch.no_grad()
    def __call__(self) -> None:
        hidden, weight = self.batch.hidden, self.batch.weight
        for start in range(0, len(hidden), self.chunk_size):
            rows = hidden[start : start + self.chunk_size]
            logits = self.logits[: len(rows)]
            torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits, weight, out=self.grad_hidden[start : start + len(rows)])
            if self.grad_weight is not None:
                self.grad_weight.addmm_(logits.t(), rows, beta=0 if start == 0 else 1)


def ours(setting: Setting, batch: Batch, chunk_size: int | None = None) -> Tensor:
    """The loss of this project."""
    more: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size}
    return fused_linear_kd_loss(
        batch.hidden, batch.weight, batch.teacher_ids, batch.teacher_logprobs, batch.labels,
        tail=setting.tail, temperature=setting.temperature, ce_weight=setting.ce_weight,
        sparse_weight_grad=setting.sparse_weight_grad, **more,
    ).loss  # fmt: skip


def naive(setting: Setting, batch: Batch) -> Tensor:
    """Whole logits and autograd: forward KL in float32, plus cross-entropy."""
    return _autograd_loss(setting, batch.hidden, batch.weight, batch, slice(None)) / len(batch.labels)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, batch, setting):  # type: ignore[no-untyped-def]
        grads = [torch.empty_like(hidden), torch.zeros_like(weight)]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            by = (0, 1) if weight.requires_grad else (0,)
            chunk_grads, value = torch.func.grad_and_value(
                lambda h, w, rows=rows: _autograd_loss(setting, h, w, batch, rows), argnums=by
            )(hidden[rows], weight)
            grads[0][rows] = chunk_grads[0]
            if len(by) == 2:
                grads[1] += chunk_grads[1]
            total += value
        ctx.save_for_backward(*grads)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        return *(grad * (grad_loss / ctx.count) for grad in ctx.saved_tensors), None, None


def autograd_in_forward(setting: Setting, batch: Batch) -> Tensor:
    """The pattern of Liger's chunked losses: torch.func.grad_and_value of a chunk, gradients summed in forward."""
    loss: Tensor = _InForward.apply(batch.hidden, batch.weight, batch, setting)
    return loss


def liger_jsd(setting: Setting, batch: Batch) -> Tensor:
    """Liger's fused JSD between whole distributions (a dense teacher, no top K), not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=setting.ce_weight, weight_soft_loss=1.0, temperature=setting.temperature, compiled=False,
        chunk_size=CHUNK_SIZE,
    )  # fmt: skip
    value: Tensor = loss(batch.hidden, batch.weight, batch.teacher_hidden, batch.teacher_weight, batch.labels)
    return value


def ours_dense(setting: Setting, batch: Batch) -> Tensor:
    """The loss of this project against a dense teacher: T^2 times the JSD that Liger's computes."""
    return fused_linear_dense_kd_loss(
        batch.hidden, batch.weight, batch.teacher_hidden, Head(batch.teacher_weight), batch.labels,
        divergence="jsd", temperature=setting.temperature, ce_weight=setting.ce_weight,
    ).loss  # fmt: skip


CANDIDATES: dict[str, Callable[[Setting, Batch], Tensor]] = {
    "ours": ours,
    "naive autograd": naive,
    "autograd in forward": autograd_in_forward,
    "ours, JSD (dense)": ours_dense,
    "Liger JSD (dense)": liger_jsd,
}


def step(setting: Setting, batch: Batch, candidate: Callable[[Setting, Batch], Tensor]) -> Callable[[], None]:
    """Forward and backward once, from no gradients."""

    def call() -> None:
        for leaf in batch.leaves():
            leaf.grad = None
        candidate(setting, batch).backward()

    return call


def gradient_errors(setting: Setting, candidate: str) -> dict[str, float]:
    """Largest error by input, relative to its largest entry, against the naive way in float64 on the same numbers."""
    batch = draw(setting)
    step(setting, batch, CANDIDATES[candidate])()
    exact = Batch(**{name: _double(value) for name, value in vars(batch).items()})
    step(setting, exact, naive)()
    named = {"hidden": (batch.hidden, exact.hidden), "weight": (batch.weight, exact.weight)}
    return {
        name: float((got.grad.to_dense().double() - want.grad).abs().max() / want.grad.abs().max())
        for name, (got, want) in named.items()
        if got.grad is not None and want.grad is not None
    }


def peak_over_inputs(setting: Setting, candidate: str) -> tuple[int, int, int]:
    """(bytes of inputs, bytes of gradients, peak bytes above the inputs) of one step. To be called in a new process.

    The peak is of resident memory, so it has what the libraries take for themselves as well. Linux only.
    """
    # The libraries' own start-up is not the candidate's.
    small = Setting(64, 64, 512, setting.dtype, 8, setting.temperature, setting.ce_weight, setting.tail)
    step(small, draw(small), CANDIDATES[candidate])()
    batch = draw(setting, with_teacher="dense" in candidate)
    inputs = sum(value.nbytes for value in vars(batch).values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident("VmRSS")
    step(setting, batch, CANDIDATES[candidate])()
    peak = _resident("VmHWM") - before
    return inputs, sum(leaf.nbytes for leaf in batch.leaves()), peak


def _autograd_loss(setting: Setting, hidden: Tensor, weight: Tensor, batch: Batch, rows: slice) -> Tensor:
    """Sum over rows of ce_weight CE + T^2 (forward KL on the top K by the tail of the setting), by torch alone."""
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    temperature = setting.temperature
    log_p = torch.log_softmax(logits / temperature, -1).gather(-1, batch.teacher_ids[rows])
    log_q = batch.teacher_logprobs[rows].to(logits.dtype)
    if setting.tail == "renormalize":
        log_p, log_q = torch.log_softmax(log_p, -1), torch.log_softmax(log_q, -1)
    kd = (log_q.exp() * (log_q - log_p)).sum(-1)
    if setting.tail == "bucket":
        rest_p = torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-7))
        rest_q = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
        kd = kd + rest_q.exp() * (rest_q - rest_p)
    ce = functional.cross_entropy(logits, batch.labels[rows], reduction="sum")
    return temperature**2 * kd.sum() + setting.ce_weight * ce


def _double(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
