"""A run beside its own teacher and student without Ray: tokens a second, waiting, what each process was busy with.

    jobs/benchmark_pipeline.py [CONFIG] [key=value ...] [--steps 30] [--rounds 2] [--out FILE.json] [--plot FILE.png]

CONFIG is by default the quickstart's, whose inputs are made first. A run that is not counted makes data and student.
Then, in each round, one after the other:

ray_kd          the distill job on a Ray of its own, without evaluation
two processes   the same teacher and student as two plain processes with a queue between them: the bound
in turns        the same two taking turns in one process, with the threads of both

tokens/s is of target tokens, without the first steps; wait is the student's for the teacher, teacher busy its share of
the same time; first step is from the command on. A ratio is the median over the rounds of a figure by that of the two
processes in the same round. Below the table stands what reading the prepared data costs. Only local runs of one worker
and one teacher on CPU are measured like this.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from quickstart import CONFIG, INPUTS
from quickstart_inputs import make_inputs

from ray_kd import checkpoint, run_folder
from ray_kd import config as configuration
from ray_kd.benchmarks.options import Help, add_common, whole
from ray_kd.benchmarks.pipeline import WARM_UP_STEPS, Timeline, Work, in_turns, of_run, read_costs, two_processes
from ray_kd.cli import Parser
from ray_kd.plot import STUDENT, TEACHER, new_axes, save
from ray_kd.trainer.loop import CHECKPOINTS

OURS, PLAIN, TURNS = "ray_kd", "two processes", "in turns"


def main() -> int:
    parser = Parser("benchmark_pipeline", description=__doc__, formatter_class=Help)
    parser.add_argument("config", nargs="?", default=CONFIG, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="over it")
    parser.add_argument("--steps", type=whole(WARM_UP_STEPS + 2), default=30, help="optimiser steps of each")
    parser.add_argument("--work-dir", default="runs/benchmark-pipeline", help="where the runs go")
    parser.add_argument("--threads", type=whole(1), default=1, help="of the teacher, and of the student")
    add_common(parser, rounds=2)
    options = parser.parse_intermixed_args()
    if options.config == CONFIG:
        make_inputs(Path(INPUTS))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    headings = ("tokens/s", "/ plain", "wait", "teacher busy", "first step s", "bytes/token")
    print(" " * 16 + "".join(f"{heading:>14}" for heading in headings))
    found: dict[str, list[Timeline]] = {OURS: [], PLAIN: [], TURNS: []}
    base = Path(options.work_dir).absolute()
    distill(options, base / f"{stamp}-first", steps=1)  # not counted: it makes the data and the student
    for round_ in range(options.rounds):
        run_dir = base / f"{stamp}-{round_}"
        found[OURS].append(distill(options, run_dir, options.steps))
        work = work_of(run_dir, options)
        found[PLAIN].append(two_processes(work))
        found[TURNS].append(in_turns(work))
        for name, timelines in found.items():
            show(name, timelines[-1:], found[PLAIN][-1:])
        if options.out is not None:
            document = {name: [timeline.to_dict() for timeline in timelines] for name, timelines in found.items()}
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    if options.rounds > 1:
        print("medians")
        for name, timelines in found.items():
            show(name, timelines, found[PLAIN])
    costs = ", ".join(f"{cost:.0f} us {name}" for name, cost in read_costs(work).items())
    print(f"reading a prepared row: {costs}")
    if options.plot is not None:
        plot(options.plot, {name: timelines[-1] for name, timelines in found.items()})
    return 0


def distill(options: argparse.Namespace, run_dir: Path, steps: int) -> Timeline:
    """Run the job, and read what it wrote."""
    settings = [
        f"run.dir={run_dir}", f"train.max_steps={steps}", "train.eval_every=0", "train.log_every=1",
        "train.checkpoint_every=0", f"teacher.threads={options.threads}", f"train.threads_per_worker={options.threads}",
        "data.eval_source=null", "data.eval_fraction=0", "eval.prompts=[]", "train.num_workers=1",
        "teacher.pool.max_actors=1", "teacher.cache.mode=disabled", "teacher.payload=topk_logprobs",
        "teacher.selection=topk", "teachers=[]",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ray_kd", "distill", options.config, *options.overrides, *settings]
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return of_run(run_dir, started)


def work_of(run_dir: Path, options: argparse.Namespace) -> Work:
    """What the finished run did, for the others to do."""
    config = configuration.load(run_dir / run_folder.CONFIG)
    newest = checkpoint.newest_verified(run_dir / CHECKPOINTS)
    assert newest is not None
    return Work(
        run_dir=str(run_dir),
        prepared_dir=str(run_folder.prepared_of(run_dir, config)),
        student_path=checkpoint.read_state(newest)["state"]["student_path"],
        steps=options.steps,
        teacher_threads=options.threads,
        student_threads=options.threads,
    )


def show(name: str, timelines: list[Timeline], plain: list[Timeline]) -> None:
    """Print the medians of some rounds."""

    def median(figure: str) -> float:
        return statistics.median(getattr(timeline, figure) for timeline in timelines)

    ratio = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(timelines, plain, strict=True))
    print(
        f"{name:<16}{median('tokens_per_second'):>14.1f}{ratio:>14.3f}{median('wait_fraction'):>14.1%}"
        f"{median('teacher_busy'):>14.1%}{median('first_step_s'):>14.1f}{median('nbytes'):>14.0f}",
        flush=True,
    )


def plot(path: Path, timelines: dict[str, Timeline]) -> None:
    """A lane for each teacher and student, from the command on."""
    figure, axes = new_axes(11, 1 + 0.8 * 2 * len(timelines))
    lanes: list[str] = []
    for name, timeline in timelines.items():
        base = timeline.started
        axes.broken_barh([(s - base, e - s) for s, e in timeline.teacher], (len(lanes) - 0.4, 0.8), color=TEACHER)
        lanes.append(f"{name}: teacher")
        steps = [(s - base, wait) for (s, _), wait in zip(timeline.student, timeline.waits, strict=True)]
        busy = [(s - base + wait, e - s - wait) for (s, e), wait in zip(timeline.student, timeline.waits, strict=True)]
        axes.broken_barh(busy, (len(lanes) - 0.4, 0.8), color=STUDENT, edgecolor="white", linewidth=0.5)
        axes.broken_barh(steps[1:], (len(lanes) - 0.4, 0.8), color="tab:red")
        lanes.append(f"{name}: student")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the command (orange: teacher, blue: student, red: student waits)")
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
