"""A run that was killed and went on is bitwise the run that was not: metrics, weights, moments, random state.

fp32 on CPU, dropout on, two epochs of six steps, a checkpoint every three, an evaluation every five. Each kill point
meets two (ZeRO stage, ranks) pairs, each pair at least one kill point. The driver and its workers get SIGKILL; the
workers are stopped first, so that the run is still where the test found it.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ray_kd import checkpoint, storage
from tests.conftest import JOB_TIMEOUT_S, Job, Jobs

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

ROWS, BATCH = 24, 4
EPOCH = ROWS // BATCH  # steps
SETTINGS = (
    "train.max_steps=null", "train.epochs=2", f"train.global_batch_size={BATCH}", "train.checkpoint_every=3",
    "train.eval_every=5", "train.weight_decay=0.1", "data.eval_fraction=0", "eval.max_rows=0", "eval.batch_size=1",
)  # fmt: skip


class Place:
    """Jobs with a student whose attention drops out, and the uninterrupted run of each (stage, ranks)."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        model = AutoModelForCausalLM.from_pretrained(jobs.student)
        model.config.attention_dropout = 0.2
        student = jobs.folder / "dropout-student"
        model.save_pretrained(student)
        for file in jobs.student.glob("token*"):
            (student / file.name).write_bytes(file.read_bytes())
        held_out = jobs.folder / "eval.jsonl"
        for path, count in ((jobs.data, ROWS), (held_out, 4 * ROWS)):
            path.write_text("".join(_record(i) for i in range(count)))
        self._settings = (
            *SETTINGS, f"student.model={student}", f"data.eval_source={{kind: jsonl, paths: [{held_out}]}}"
        )  # fmt: skip
        self._whole: dict[tuple[int, int], Job] = {}

    def settings(self, stage: int, ranks: int) -> tuple[str, ...]:
        return (*self._settings, f"train.zero_stage={stage}", f"train.num_workers={ranks}")

    def whole(self, stage: int, ranks: int) -> Job:
        key = stage, ranks
        if key not in self._whole:
            job = self.jobs.distill(f"whole-{stage}-{ranks}", *self.settings(stage, ranks))
            assert job.exit_code == 0, job.stderr
            assert (job.summary["rows_prepared"], job.summary["steps"]) == (ROWS, 2 * EPOCH)
            self._whole[key] = job
        return self._whole[key]


def _record(i: int) -> str:
    """One row of 96 tokens has no room for two of these."""
    turns = [{"role": "user", "content": f"say {i} twice"},
             {"role": "assistant", "content": f"{i} and again {i}, " * 2 + "which is what was asked"}]  # fmt: skip
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_environment: dict[str, str], ray_address: str) -> Place:
    return Place(Jobs(tmp_path_factory.mktemp("same-run"), ray_environment, ray_address))


class Victim:
    """A started job, watched from outside."""

    def __init__(self, place: Place, name: str, stage: int, ranks: int) -> None:
        self.run_dir = place.jobs.run_dir(name)
        self.whole = place.whole(stage, ranks)
        self._address, self._ranks = place.jobs.address, ranks
        self.process = place.jobs.start(name, *place.settings(stage, ranks))
        self.workers: list[psutil.Process] = []

    def wait_until(self, is_there: Callable[[], object]) -> None:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not is_there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def lines(self) -> list[dict]:
        lines = storage.read_lines(self.run_dir / "metrics.jsonl")
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)

    def has_checkpoint(self, step: int) -> bool:
        return (self.run_dir / "checkpoints" / f"step_{step:08d}" / checkpoint.MANIFEST).exists()

    def partial(self) -> list[str]:
        """Checkpoints that are being written."""
        root = self.run_dir / "checkpoints"
        return [name for name in os.listdir(root) if name.startswith(".tmp-step")] if root.exists() else []

    def find_workers(self) -> None:
        """Its train workers, once it trains: children of its Ray, by the title Ray gives them."""
        self.wait_until(lambda: self.last_step() >= 1)
        raylets = [
            p
            for p in psutil.process_iter(["cmdline"])
            if f"--gcs-address={self._address}" in " ".join(p.info["cmdline"] or [])
        ]
        children = [child for raylet in raylets for child in raylet.children(recursive=True)]
        self.workers = [p for p in children if p.cmdline() and p.cmdline()[0].startswith("ray::RayTrainWorker")]
        assert len(self.workers) == self._ranks, self.workers

    def signal_workers(self, number: signal.Signals) -> None:
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    def kill(self) -> None:
        self.signal_workers(signal.SIGSTOP)
        self.process.kill()
        self.process.communicate(timeout=30)
        self.signal_workers(signal.SIGKILL)


def gaps_of(metrics: list[dict]) -> list[float]:
    """Seconds from each step to the next."""
    return [after["time"] - before["time"] for before, after in pairwise(metrics)]


def in_the_middle_of_an_epoch(victim: Victim) -> None:
    # Written while training goes on: on a busy machine it is not there at step 4 yet.
    victim.wait_until(lambda: victim.last_step() >= 4 and victim.has_checkpoint(3))


def while_a_checkpoint_is_written(victim: Victim) -> None:
    while True:
        victim.wait_until(victim.partial)
        victim.signal_workers(signal.SIGSTOP)
        if victim.partial():
            return
        victim.signal_workers(signal.SIGCONT)


def at_the_epochs_boundary(victim: Victim) -> None:
    victim.wait_until(lambda: victim.has_checkpoint(EPOCH))


def after_the_last_step(victim: Victim) -> None:
    victim.wait_until(lambda: victim.has_checkpoint(2 * EPOCH))


def in_an_evaluation(victim: Victim) -> None:
    """A step is trained on and then evaluated before its line is written: 4's stays the last for as long as that."""
    gaps = gaps_of(victim.whole.metrics)
    plain, evaluated = sorted(gaps)[len(gaps) // 2], gaps[4]  # times are taken before the evaluation
    for step in (4, 2 * EPOCH - 1):
        victim.wait_until(lambda: victim.last_step() >= step)  # noqa: B023 (called here)
        slower = gaps_of(victim.lines())[step - 2] / plain  # the machine now, against then
        time.sleep(slower * (plain + 0.4 * evaluated))
        victim.signal_workers(signal.SIGSTOP)
        if victim.last_step() == step:
            return
        victim.signal_workers(signal.SIGCONT)
    pytest.fail("both evaluations were over too soon")


KEPT = (
    "step", "epoch", "train/loss", "train/kd_loss", "train/ce_loss", "train/top1_agreement", "train/grad_norm",
    "train/learning_rate", "train/is_applied", "train/target_tokens", "teacher/topk_mass",
)  # fmt: skip

# Where the run goes on: the slot after the newest checkpoint.
START_SLOT = {
    in_the_middle_of_an_epoch: {3 * BATCH, 6 * BATCH},
    while_a_checkpoint_is_written: {step * BATCH for step in (0, 3, 6, 9)},
    at_the_epochs_boundary: {ROWS},
    after_the_last_step: {2 * ROWS},
    in_an_evaluation: {step * BATCH for step in (0, 3, 6, 9)},
}


@pytest.mark.parametrize(
    ("point", "stage", "ranks"),
    [
        (in_the_middle_of_an_epoch, 0, 1),
        (in_the_middle_of_an_epoch, 3, 2),
        (while_a_checkpoint_is_written, 1, 2),
        (while_a_checkpoint_is_written, 2, 1),
        (at_the_epochs_boundary, 1, 1),
        (at_the_epochs_boundary, 2, 2),
        (after_the_last_step, 0, 2),
        (after_the_last_step, 3, 1),
        (in_an_evaluation, 1, 2),
        (in_an_evaluation, 3, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_killed_and_gone_on_is_the_same_run(
    place: Place, point: Callable[[Victim], None], stage: int, ranks: int
) -> None:
    name = f"{point.__name__}-{stage}-{ranks}"
    victim = Victim(place, name, stage, ranks)
    try:
        victim.find_workers()
        point(victim)
    finally:
        victim.kill()
    partial = victim.partial()
    # On a busy machine a checkpoint is still being written at other points too.
    assert partial or point is not while_a_checkpoint_is_written
    assert not (victim.run_dir / "final").exists()
    job = place.jobs.distill(name, *place.settings(stage, ranks))
    log = (job.run_dir / "driver.log").read_text()
    assert all(f"removed the partial checkpoint {one}" in log for one in partial)
    first, second = [json.loads(line)["start_slot"] for line in storage.read_lines(job.run_dir / "attempts.jsonl")]
    assert first == 0
    assert second in START_SLOT[point]
    assert_same_run(job, victim.whole)


def assert_same_run(job: Job, whole: Job) -> None:
    """Bitwise: every number of every step but the times, evaluations, weights, moments, random states."""
    assert job.exit_code == 0, job.stderr
    kept = [key for key in whole.metrics[4] if key.startswith(("eval/", "data/row", "data/slot")) or key in KEPT]
    assert len(kept) > len(KEPT)
    assert [[line.get(key) for key in kept] for line in job.metrics] == [
        [line.get(key) for key in kept] for line in whole.metrics
    ]
    for key in ("eval", "rows_consumed", "rows_missing", "rows_duplicated", "steps", "tokens", "target_tokens"):
        assert job.summary[key] == whole.summary[key], key
    assert (job.summary["rows_consumed"], job.summary["rows_duplicated"]) == (2 * ROWS, 0)
    assert fragment_hashes(job) == fragment_hashes(whole)
    for ours, theirs in zip(random_states(job), random_states(whole), strict=True):
        assert torch.equal(ours, theirs)
    weights = [(one.run_dir / "final" / "model.safetensors").read_bytes() for one in (job, whole)]
    assert weights[0] == weights[1]


def newest_checkpoint(job: Job) -> Path:
    newest = checkpoint.newest_verified(job.run_dir / "checkpoints")
    assert newest is not None
    return newest


def fragment_hashes(job: Job) -> dict[str, str]:
    """Of the files with weights and moments, in the last checkpoint."""
    files = json.loads((newest_checkpoint(job) / checkpoint.MANIFEST).read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if re.fullmatch(r"rank\d+-\d+\.safetensors", name)}


def random_states(job: Job) -> list[torch.Tensor]:
    """What dropout draws from, of each rank. (The other generators are nobody's: each process has its own state.)"""
    return [load_file(path)["torch_cpu"] for path in sorted(newest_checkpoint(job).glob("rank*.rng.safetensors"))]
