"""The wire measured: bytes and microseconds a token, and what rounding costs, for each encoding, K, vocabulary and row.

jobs/benchmark_wire.py                                     # rows like a language model's (payloads.example)
jobs/benchmark_wire.py --payloads FILE.npz --out FILE      # real ones: ids and logprobs [..., M, K], vocab_size

Times are medians over interleaved rounds, each after an untimed one, so that a busy machine slows all columns alike;
both: the quartiles of encode + decode.
`x memcpy` is encode + decode over copying the arrays. KL is exact || decoded on the K tokens and a bucket, in nats.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_kd.benchmarks.options import Help, add_common, whole
from ray_kd.benchmarks.plot import Bar, grouped_bars
from ray_kd.cli import Parser
from ray_kd.payloads.topk_logprobs import WIRES, TopKLogprobs, example

COLUMNS = (
    "wire", "K", "vocabulary", "tokens", "B/token", "encode us", "decode us", "both 25%", "both 75%", "x memcpy",
    "KL mean", "KL 99.9%",
)  # fmt: skip


def main() -> int:
    parser = Parser("benchmark_wire", description=__doc__, formatter_class=Help)
    parser.add_argument("--top-k", type=whole(1), nargs="+", default=[8, 64], metavar="K", help="tokens that are sent")
    parser.add_argument(
        "--vocab-size", type=whole(4), nargs="+", default=[49152, 151936], metavar="V", help="at least 4 K"
    )
    parser.add_argument(
        "--tokens", type=whole(1), nargs="+", default=[128, 500, 2048], metavar="M", help="targets a row"
    )
    parser.add_argument("--payloads", type=Path, metavar="FILE", help="an .npz to take instead of synthetic rows")
    add_common(parser, rounds=31)
    options = parser.parse_args()
    if 4 * max(options.top_k) > min(options.vocab_size):
        parser.error(f"argument --vocab-size: {min(options.vocab_size)} is less than 4 times --top-k")
    if options.payloads is None:
        shapes = itertools.product(options.tokens, options.top_k, options.vocab_size)
        payloads = [example(m, np.random.default_rng(0), k, v, empty=0.0) for m, k, v in shapes]
    elif options.payloads.is_file():
        file = np.load(options.payloads, allow_pickle=False)
        ids, logprobs = (file[name].reshape(-1, file[name].shape[-1]) for name in ("ids", "logprobs"))
        payloads = [TopKLogprobs(ids[:m], logprobs[:m], 1.0, int(file["vocab_size"])) for m in options.tokens]
    else:
        parser.error(f"argument --payloads: there is no file '{options.payloads}'")
    print("  ".join(f"{name:>10}" for name in COLUMNS))
    rows: list[dict[str, Any]] = [
        dict(zip(COLUMNS, row, strict=True)) for payload in payloads for row in measure(payload, options.rounds)
    ]
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot is not None:
        groups = [f"K = {r['K']}\nV = {r['vocabulary']}\n{r['tokens']} tokens" for r in rows[:: len(WIRES)]]
        bars = {
            wire: [
                Bar(r["encode us"] + r["decode us"], r["both 25%"], r["both 75%"]) for r in rows if r["wire"] == wire
            ]
            for wire in WIRES
        }
        grouped_bars(options.plot, groups, bars, "encode + decode, us a token", bound=1.0)
    return 0


def measure(payload: TopKLogprobs, rounds: int) -> list[tuple[str | int | float, ...]]:
    """One printed row an encoding."""
    num_tokens, top_k = payload.ids.shape
    blobs = {wire: payload.encode(wire) for wire in WIRES}
    steps: list[Callable[[], object]] = [lambda: (payload.ids.copy(), payload.logprobs.copy())]
    for wire, blob in blobs.items():
        steps += [partial(payload.encode, wire), partial(TopKLogprobs.decode, blob)]
    seconds = np.empty((rounds, len(steps)))
    for round_ in range(rounds):
        for place, step in enumerate(steps):
            step()
            start = time.perf_counter()
            step()
            seconds[round_, place] = time.perf_counter() - start
    us = 1e6 * seconds / num_tokens
    copy_us, *codec_us = np.median(us, axis=0).tolist()
    both = np.quantile(us[:, 1::2] + us[:, 2::2], [0.25, 0.75], axis=0).T.tolist()
    rows: list[tuple[str | int | float, ...]] = []
    medians = zip(blobs.items(), codec_us[::2], codec_us[1::2], both, strict=True)
    for (wire, blob), encode_us, decode_us, (low, high) in medians:
        kl = induced_kl(payload.logprobs, TopKLogprobs.decode(blob).logprobs)
        ratio = (encode_us + decode_us) / copy_us
        row = (wire, top_k, payload.vocab_size, num_tokens, len(blob) / num_tokens, encode_us, decode_us, low, high,
               ratio, float(kl.mean()), float(np.quantile(kl, 0.999)))  # fmt: skip
        print("  ".join(f"{value:>10.3g}" if isinstance(value, float) else f"{value:>10}" for value in row))
        rows.append(row)
    return rows


def induced_kl(exact: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """[M] of [M, K]; the bucket holds at least 1e-7, as in the loss."""
    exact, decoded = exact.astype(np.float64), decoded.astype(np.float64)
    is_filled = np.isfinite(exact) & np.isfinite(decoded)
    mass = np.where(is_filled, np.exp(exact), 0.0)
    tail, decoded_tail = (np.maximum(1 - np.exp(x).sum(axis=1), 1e-7) for x in (exact, decoded))
    return (mass * np.where(is_filled, exact - decoded, 0.0)).sum(axis=1) + tail * np.log(tail / decoded_tail)


if __name__ == "__main__":
    sys.exit(main())
