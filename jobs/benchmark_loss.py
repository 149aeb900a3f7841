"""The loss against its own floor: time, memory and gradient error, beside other ways to compute the same thing.

    jobs/benchmark_loss.py [--shapes 1024x576x49152 ...] [--dtypes float32 bfloat16] [--threads 1]
                           [--out FILE.json] [--plot FILE.png]

time / floor     forward and backward over the products alone (logits, d hidden, d weight; two with --frozen-head). All
                 take turns, and the ratio is the median over the rounds of the ratio within a round (with quartiles).
memory           (inputs + peak above them) / (inputs + gradients), of resident memory, in a process of its own.
error            largest error of d hidden and d weight over the largest entry, against float64 (small shapes only).

Every candidate at every setting is a line, and takes (rounds + 1) calls and a new process for its memory: half an hour
for everything on two cores, a minute for `--shapes 256x256x16384 --candidates ours --rounds 3`.

torch takes huge pages (THP_MEM_ALLOC_ENABLE=1) unless the environment says otherwise, as in the jobs' own Ray: without
them the first touch of a gradient as large as the head is 4 % of a step.

On a CPU with AMX the bf16 products are more than twice as fast as in fp32, and the passes over the logits weigh as
much more; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment shows what a CPU without it makes of them.

The dense ones (ours and Liger's) compare whole distributions: their time has the teacher's product too, which is not in
the floor, and their gradient is another one's.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray_kd.benchmarks.loss import CANDIDATES, Floor, Setting, draw, gradient_errors, peak_over_inputs, step
from ray_kd.benchmarks.options import Help, add_common, positive, shape, whole
from ray_kd.benchmarks.plot import Bar, grouped_bars
from ray_kd.benchmarks.timing import in_turns
from ray_kd.cli import Parser

SHAPES = [(1024, 576, 49152), (512, 1024, 151936), (1024, 2048, 32000)]


def main() -> int:
    parser = Parser("benchmark_loss", description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxHxV", help="tokens, width, vocabulary"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=("float32", "bfloat16"),
        help="of hidden and head",
    )
    parser.add_argument("--temperatures", nargs="+", type=positive, default=[1.0, 2.0], help="of the divergence")
    parser.add_argument("--tail", default="bucket", choices=("bucket", "renormalize", "drop"), help="beyond the top K")
    parser.add_argument("--top-k", type=whole(1), default=64, metavar="K", help="tokens that the teacher sent")
    parser.add_argument("--ce-weight", type=float, default=0.5, help="of the cross-entropy beside the divergence")
    parser.add_argument(
        "--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="NAME",
        help=f"of {', '.join(map(repr, CANDIDATES))}",
    )  # fmt: skip
    parser.add_argument(
        "--sparse-weight-grad", action="store_true",
        help="ours gives d weight as a sparse tensor (--tail renormalize --ce-weight 0 only)",
    )  # fmt: skip
    parser.add_argument("--frozen-head", action="store_true", help="no gradient of the head: a floor of two products")
    parser.add_argument("--threads", type=whole(1), default=1, help="of torch")
    add_common(parser, rounds=7)
    parser.add_argument("--peak", nargs=2, metavar=("CANDIDATE", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sparse_weight_grad and (options.tail != "renormalize" or options.ce_weight):
        parser.error("argument --sparse-weight-grad: the gradient is sparse with --tail renormalize --ce-weight 0 only")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation
    import torch

    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak_over_inputs(Setting(**json.loads(options.peak[1])), options.peak[0])))
        return 0
    print(f"{'tokens x width x vocabulary':<28}{'dtype':<10}{'T':>4}  {'candidate':<22}{'s':>8}{'/ floor':>9}"
          f"{'quartiles':>16}{'memory':>8}{'error':>9}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for num_tokens, width, vocab_size in options.shapes:
        if 4 * options.top_k > vocab_size:
            parser.error(f"argument --top-k: {options.top_k} is more than a quarter of the vocabulary of {vocab_size}")
        for dtype in options.dtypes:
            for temperature in options.temperatures:
                setting = Setting(num_tokens, width, vocab_size, dtype, options.top_k, temperature, tail=options.tail,
                                  ce_weight=options.ce_weight, is_head_frozen=options.frozen_head,
                                  sparse_weight_grad=options.sparse_weight_grad)  # fmt: skip
                rows += measure(setting, options.candidates, options.rounds)
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot is not None:
        plot(options.plot, rows, options.candidates)
    return 0


def plot(path: Path, rows: list[dict[str, Any]], names: list[str]) -> None:
    """One group of bars a setting."""
    settings = rows[:: len(names)]
    groups = [
        f"{r['num_tokens']}x{r['width']}x{r['vocab_size']}\n{r['dtype']}\nT = {r['temperature']:g}" for r in settings
    ]
    bars = {name: [Bar(r["ratio"], r["low"], r["high"]) for r in rows if r["candidate"] == name] for name in names}
    grouped_bars(path, groups, bars, "time / products alone", bound=1.15)


def measure(setting: Setting, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One printed row a candidate."""
    batch = draw(setting)
    calls = {name: step(setting, batch, CANDIDATES[name]) for name in names}
    timings = in_turns(Floor(setting, batch, chunk_size=256), calls, rounds)
    small = replace(setting, num_tokens=96, vocab_size=4096)
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--peak", name, json.dumps(asdict(setting))]
        inputs, grads, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        error = None if "dense" in name else max(gradient_errors(small, name).values())
        t, memory = timings[name], (inputs + peak) / (inputs + grads)
        print(f"{setting.name:<28}{setting.dtype:<10}{setting.temperature:>4g}  {name:<22}{t.median_s:>8.3f}"
              f"{t.ratio:>9.3f}{f'{t.low:.3f}-{t.high:.3f}':>16}{memory:>8.2f}"
              + ("" if error is None else f"{error:>9.1e}"), flush=True)  # fmt: skip
        rows.append(asdict(setting) | asdict(t) | {"candidate": name, "memory": memory, "error": error})
    return rows


if __name__ == "__main__":
    sys.exit(main())
