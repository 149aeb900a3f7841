"""Which objective leaves the best student at equal steps: held-out KL and perplexity of the quickstart's models.

    jobs/benchmark_objectives.py [key=value ...] [--steps 40] [--seeds 3] [--out FILE.json] [--plot FILE.png]

CE                       the labels alone
KD                       the teacher's distributions alone
KD + CE                  both, CE at half the weight
KD + CE + hidden states  and the cosine of three layers with the teacher's

Each is run once a seed by the distill job, with the quickstart's config and key=value over it. A run that is finished
in --work-dir is not run again: the same command goes on where it was stopped. The teacher's answers are kept there, so
the first run of a seed that needs a kind of them is slower than the others. A run that finished keeps final/ and no
checkpoints. The table has the mean and the standard deviation over the seeds.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from quickstart import CONFIG, INPUTS
from quickstart_inputs import make_inputs

from ray_kd.benchmarks.objectives import (
    METRICS,
    OBJECTIVES,
    Result,
    Study,
    bars,
    measure,
    table,
    verdict,
    write_held_out,
)
from ray_kd.benchmarks.options import Help, out_path, plot_path, whole
from ray_kd.benchmarks.plot import grouped_bars
from ray_kd.cli import Parser
from ray_kd.errors import RayKDError

EVAL_EVERY_RECORD = 4
"""About 5,000 held-out tokens instead of 22,000: the teacher and two students go over them in half a minute."""


def main() -> int:
    parser = Parser("benchmark_objectives", description=__doc__, formatter_class=Help)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="over the quickstart's config")
    parser.add_argument("--steps", type=whole(1), default=40, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=whole(1), default=3, help="runs of each objective, seeds 0, 1, ...")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/benchmark-objectives"), help="where the runs go")
    parser.add_argument("--out", type=out_path, metavar="FILE", help="write the figures as JSON, as they come")
    parser.add_argument("--plot", type=plot_path, metavar="FILE", help="draw them at the end, as .png, .svg or .pdf")
    try:
        return benchmark(parser.parse_intermixed_args())
    except RayKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def benchmark(options: argparse.Namespace) -> int:
    """Run, print each run as it ends, then the table and who wins."""
    folder = options.work_dir.absolute()
    study = Study(CONFIG, options.overrides, folder / "eval.jsonl", folder, options.steps)
    study.check()
    make_inputs(Path(INPUTS))
    folder.mkdir(parents=True, exist_ok=True)
    write_held_out(Path(INPUTS) / "eval.jsonl", study.eval_path, EVAL_EVERY_RECORD)
    results: list[Result] = []
    for result in measure(study, OBJECTIVES, range(options.seeds)):
        results.append(result)
        ends = ", ".join(f"{metric} {result.before[metric]:.3f} -> {result.after[metric]:.3f}" for metric in METRICS)
        print(
            f"seed {result.seed}, {result.objective}: {ends}, {result.wall_s:.0f} s, "
            f"{result.teacher_rows_computed} rows computed by the teacher",
            flush=True,
        )
        if options.out is not None:
            document = {"steps": options.steps, "runs": [asdict(one) for one in results]}
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))
    for metric in METRICS:
        print(verdict(results, metric))
    if options.plot is not None:
        grouped_bars(options.plot, *bars(results), label="held-out at the end, nats a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
