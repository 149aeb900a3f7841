"""What the teacher's top-k costs beside the head product it needs: time, extra memory, equality with the plain way.

    jobs/benchmark_topk.py [--shapes NxDxV ...] [--dtypes bfloat16 float32] [--threads 1 2] [--out FILE.json]

The floor is one product `hidden @ weight.T` into a buffer that exists; everything is timed in turns within one run,
and a ratio is the median over the rounds of a time by the floor's of the same round. extra MB: the peak of torch's own
allocations (its profiler on CPU), without what oneDNN or MKL take inside a product. same ids: as the plain way's, but
for ties. max diff: of a log-probability from the plain way's.

With several threads on a machine that is not idle set OMP_WAIT_POLICY=passive: by default threads that wait for each
other spin, and hold the core that the one waited for needs (seen: 14 times the floor, and 2.2 with it).
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ray_kd.benchmarks.options import Help, add_common, shape, whole
from ray_kd.benchmarks.plot import Bar, grouped_bars
from ray_kd.benchmarks.timing import in_turns
from ray_kd.cli import Parser
from ray_kd.head import Head
from ray_kd.teacher.topk import topk_logprobs

SHAPES = [(512, 576, 49152), (512, 1024, 151936), (512, 2048, 32000)]
SHARPNESS = 3.0
"""Standard deviation of the logits. Far more than a model's would time the exponential's underflow."""


def naive(hidden: Tensor, head: Head, top_k: int) -> tuple[Tensor, Tensor]:
    """All logits, their log_softmax, its top k."""
    values, ids = torch.log_softmax(head.logits(hidden), dim=-1).topk(top_k, dim=-1)
    return ids, values


def peak_nbytes(call: Callable[[], Any]) -> int:
    """The most that torch had allocated at a time during the call, over what it had before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    kineto: Any = trace.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def agreement(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], full: Tensor) -> tuple[bool, float]:
    """Whether the same ids were found but for ties, and the largest difference of a log-probability.

    full [N, V]: the log-probabilities that `expected` was chosen from. Ids are the same where distinct ids have
    expected's log-probabilities there, exactly.
    """
    distinct = bool((result[0].sort(-1).values.diff(dim=-1) > 0).all())
    same = distinct and torch.equal(full.gather(1, result[0]), expected[1])
    return same, float((result[1] - expected[1]).abs().max())


def measure(shape: tuple[int, int, int], dtype: torch.dtype, threads: int, top_k: int, rounds: int) -> list[dict]:
    """One record a method."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens, width, vocab_size = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocab_size, width, generator=generator, device=device).mul_(SHARPNESS / width**0.5).to(dtype)
    head = Head(weight)
    buffer = torch.empty(num_tokens, vocab_size, dtype=dtype, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "floor": lambda: torch.mm(hidden, weight.t(), out=buffer),
        "ours": lambda: topk_logprobs(hidden, head, top_k),
        "naive": lambda: naive(hidden, head, top_k),
    }
    expected, full = naive(hidden, head, top_k), torch.log_softmax(head.logits(hidden), dim=-1)
    checks = {name: agreement(calls[name](), expected, full) for name in ("ours", "naive")}
    del full
    memory = {name: peak_nbytes(calls[name]) for name in checks}
    floor, *others = (finished(call, device) for call in calls.values())
    timings = in_turns(floor, dict(zip(checks, others, strict=True)), rounds)
    common = {"shape": shape, "top_k": top_k, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
    return [
        {
            **common,
            "method": name,
            "over_floor": timings[name].ratio,
            "low": timings[name].low,
            "high": timings[name].high,
            "ms": 1e3 * timings[name].median_s,
            "floor_ms": 1e3 * timings["floor"].median_s,
            "extra_mb": memory[name] / 2**20,
            "same_ids": same,
            "max_difference": difference,
        }
        for name, (same, difference) in checks.items()
    ]


def finished(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call until the device has done it."""
    if device == "cpu":
        return call

    def waiting() -> None:
        call()
        torch.cuda.synchronize()

    return waiting


def main() -> int:
    parser = Parser("benchmark_topk", description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxDxV", help="tokens, width, vocabulary"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"],
        help="of hidden and head",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=whole(1), default=[1, 2], help="of torch")
    parser.add_argument("--top-k", type=whole(1), default=64, metavar="K", help="tokens kept")
    add_common(parser, rounds=7)
    args = parser.parse_args()
    if args.top_k > min(vocab_size for *_, vocab_size in args.shapes):
        parser.error(f"argument --top-k: {args.top_k} is more than a vocabulary of --shapes")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, is talkative
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as in the jobs' own Ray
    records = []
    print(
        "  N     D      V  dtype     threads  method  / floor      quartiles       ms  floor ms  extra MB  same ids"
        "  max diff"
    )
    for tokens, width, vocab_size in args.shapes:
        for dtype in args.dtypes:
            for threads in args.threads:
                found = measure((tokens, width, vocab_size), getattr(torch, dtype), threads, args.top_k, args.rounds)
                records += found
                for r in found:
                    print(
                        f"{tokens:4d} {width:4d} {vocab_size:6d}  {dtype:8s}  {threads:7d}  {r['method']:6s}"
                        f" {r['over_floor']:8.2f} {r['low']:8.2f}-{r['high']:.2f} {r['ms']:8.1f}  {r['floor_ms']:8.1f}"
                        f"  {r['extra_mb']:8.1f}"
                        f"  {r['same_ids']!s:8s}  {r['max_difference']:.0e}",
                        flush=True,
                    )
                if args.out:
                    args.out.write_text(json.dumps(records, indent=1) + "\n")
    if args.plot:
        groups = [f"{'x'.join(map(str, r['shape']))}\n{r['dtype']}\nthreads: {r['threads']}" for r in records[::2]]
        bars = {
            method: [Bar(r["over_floor"], r["low"], r["high"]) for r in records if r["method"] == method]
            for method in ("ours", "naive")
        }
        grouped_bars(args.plot, groups, bars, "time / one head product", bound=1.25)
    return 0


if __name__ == "__main__":
    sys.exit(main())
