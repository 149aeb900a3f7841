"""Faults while a run is on, in what it left behind, and in what it is given: each leaves I1 to I5 of the design as they
are, and the weights bitwise those of the run that nothing happened to (`check` in conftest.py).
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_kd import checkpoint
from tests.chaos.conftest import DEADLY, NAN, STUDENT, TEACHER, Chaos, Cluster, Run, check, weights

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

KILLED = -9


@dataclass(frozen=True)
class Case:
    """A fault that strikes a run."""

    fault: str
    strike: Callable[[Run], None]
    exit_codes: tuple[int, ...] = (0,)
    """Of the command that was struck, and of those after it."""
    engine: dict = field(default_factory=dict)
    settings: tuple[str, ...] = ()


def nothing(run: Run) -> None:
    """The fault is in the settings."""


def teacher_dies(run: Run) -> None:
    run.wait_for_step(2)
    run.teacher().kill()


def teachers_keep_dying(run: Run) -> None:
    run.wait_for_step(1)
    for count in range(4):
        run.teacher(place=count % 2).kill()
        time.sleep(2.5)


def teacher_dies_in_its_constructor(run: Run) -> None:
    run.constructing(TEACHER).kill()


def teacher_node_dies(run: Run) -> None:
    run.wait_for_step(2)
    run.cluster.ask("kill", run.teacher().pid)
    run.cluster.ask("add", "teacher")


def worker_dies(run: Run) -> None:
    run.wait_for_step(5)
    run.student().kill()


def worker_dies_in_a_checkpoint(run: Run) -> None:
    """Stopped while its temporary folder is there, then killed: the folder stays."""
    run.wait_for_step(4)
    student = run.student()

    def stopped() -> bool:
        if not list(run.checkpoints.glob(".tmp-step_*")):
            return False
        student.suspend()
        if list(run.checkpoints.glob(".tmp-step_*")):
            return True
        student.resume()  # it had just been renamed
        return False

    run.wait(stopped, every_s=0.0005)
    student.kill()


def student_node_dies(run: Run) -> None:
    run.wait_for_step(5)
    run.cluster.ask("kill", run.student().pid)
    run.cluster.ask("add", "student")


def driver_dies(run: Run) -> None:
    run.wait_for_step(5)
    run.kill_driver()


def driver_dies_after_the_last_step(run: Run) -> None:
    run.wait_for_step(run.chaos.num_steps)
    run.kill_driver()
    assert not (run.folder / "final" / "config.json").exists(), "too late: final/ was complete"


def driver_dies_in_eval(run: Run) -> None:
    """While the train worker builds the engine that answers the held-out rows."""
    run.constructing(STUDENT)
    run.kill_driver()
    assert not (run.folder / "eval_before.json").exists()


def sigterm(run: Run) -> None:
    run.wait_for_step(4)
    run.process.terminate()


def sigterm_while_teachers_are_silent(run: Run) -> None:
    """The student has trained on all that was answered, and waits."""
    run.wait_for_step(4)
    teachers = [run.teacher(place) for place in range(2)]
    for teacher in teachers:
        teacher.suspend()
    metrics = run.folder / "metrics.jsonl"
    seen = b""
    while seen != (seen := metrics.read_bytes()):
        time.sleep(4)
    run.process.terminate()
    run.process.wait(timeout=60)
    for teacher in teachers:
        with suppress(psutil.NoSuchProcess):
            teacher.resume()


def student_node_is_drained(run: Run) -> None:
    """Its last seconds are announced; there is no checkpoint but what is saved in them."""
    run.wait_for_step(4)
    pid = run.student().pid
    assert run.cluster.ask("drain", pid, 15)[0]
    deadline = time.monotonic() + 15
    run.cluster.ask("add", "student")  # as an autoscaler would
    run.wait(lambda: checkpoint.folders(run.checkpoints))
    time.sleep(max(0.0, deadline - time.monotonic()))
    assert run.process.poll() is None, "too late: the run is done"
    run.cluster.ask("take")


CASES = [
    Case("a teacher actor is killed", teacher_dies),
    Case("a teacher actor is killed every few seconds", teachers_keep_dying),
    Case("a teacher actor is killed in its constructor", teacher_dies_in_its_constructor, engine={"construct_s": 3.0}),
    Case("a teacher's node dies", teacher_node_dies),
    Case("a train worker is killed mid-epoch", worker_dies),
    Case("a train worker is killed mid-checkpoint", worker_dies_in_a_checkpoint),
    Case("the student's node dies", student_node_dies),
    Case("the driver is killed mid-epoch", driver_dies, (KILLED, 0)),
    Case("the driver is killed after the last step", driver_dies_after_the_last_step, (KILLED, 0)),
    Case("the driver is killed in eval", driver_dies_in_eval, (KILLED, 0), engine={"construct_s": 3.0}),
    Case("SIGTERM", sigterm, (75, 0)),
    Case("SIGTERM while no teacher answers", sigterm_while_teachers_are_silent, (75, 0)),
    Case("the student's node is drained", student_node_is_drained, engine={"delay_s": 1.0},
         settings=("train.checkpoint_every=0",)),
    Case("a slow teacher", nothing, engine={"delay_s": 0.8}),
    Case("a teacher that never answers", nothing, engine={"hangs": True}, settings=("teacher.timeout_s=5",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.replace(" ", "-"))
def test_a_fault_strikes(chaos: Chaos, uninterrupted: Run, case: Case) -> None:
    run = Run(chaos, case.fault.replace(" ", "-").replace("'", ""), ())
    engine = case.engine | ({"notes": str(run.notes)} if case.engine else {})
    run.settings = (*chaos.settings(**engine), *case.settings)
    run.start()
    case.strike(run)
    run.end()
    for _ in case.exit_codes[1:]:
        run.command()
    check(case.fault, run, case.exit_codes, uninterrupted, same_as=uninterrupted)


def test_the_head_dies(chaos: Chaos, uninterrupted: Run, chaos_environment: dict[str, str]) -> None:
    """The run goes on on another cluster."""
    first = Cluster(chaos_environment, "teacher", "student")
    chaos.address = first.address
    run = Run(chaos, "head", chaos.settings())
    try:
        run.start()
        run.wait_for_step(5)
        first.ask("kill_head")
        job = run.end()
    finally:
        first.close()
        chaos.address = chaos.cluster.address
    assert job.exit_code == 75, job.stderr
    run.command()
    check("the head dies, another cluster goes on", run, (75, 0), uninterrupted, same_as=uninterrupted)


def shard_of(folder: Path) -> Path:
    """The largest file of a checkpoint."""
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def flip_a_byte(newest: Path) -> None:
    with shard_of(newest).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_a_file(newest: Path) -> None:
    os.truncate(shard_of(newest), shard_of(newest).stat().st_size // 2)


def remove_a_shard(newest: Path) -> None:
    shard_of(newest).unlink()


def remove_the_manifest(newest: Path) -> None:
    (newest / checkpoint.MANIFEST).unlink()


def cut_rays_snapshot(newest: Path) -> None:
    snapshot = newest.parent.parent / "checkpoint_manager_snapshot.json"
    os.truncate(snapshot, snapshot.stat().st_size // 2)


def break_all(newest: Path) -> None:
    for folder in checkpoint.folders(newest.parent):
        flip_a_byte(folder)


DAMAGES = {
    "a flipped byte in the newest checkpoint": (flip_a_byte, 3),
    "a file of it cut short": (cut_a_file, 3),
    "a file of it missing": (remove_a_shard, 3),
    "its manifest missing": (remove_the_manifest, 3),
    "every checkpoint broken": (break_all, 0),
    "Ray Train's snapshot cut short": (cut_rays_snapshot, 6),
}
"""Fault -> what is done to the newest checkpoint, that of step 6, and the step from which the run goes on."""


@pytest.mark.parametrize("fault", DAMAGES, ids=lambda fault: fault.replace(" ", "-"))
def test_a_run_is_damaged_between_two_commands(chaos: Chaos, uninterrupted: Run, interrupted: Run, fault: str) -> None:
    damage, step = DAMAGES[fault]
    run = Run(chaos, fault.replace(" ", "-").replace("'", ""), interrupted.settings, list(interrupted.jobs))
    run.wall_s = interrupted.wall_s
    shutil.copytree(interrupted.folder, run.folder)
    newest = checkpoint.newest_verified(run.checkpoints)
    assert newest is not None
    assert newest.name == "step_00000006"
    damage(newest)
    job = run.command()
    assert run.start_slots() == [0, 4 * step]
    is_told = step == 6 or "is skipped for an older one" in job.stdout or "removed the partial checkpoint" in job.stdout
    assert is_told, job.stdout
    check(fault, run, (KILLED, 0), uninterrupted, same_as=uninterrupted)


@pytest.fixture
def small_disk(chaos: Chaos) -> Iterator[Path]:
    """A run folder that is a file system of 8 MB."""
    folder = chaos.run_dir("full")
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_is_full(chaos: Chaos, uninterrupted: Run, small_disk: Path) -> None:
    run = Run(chaos, small_disk.name, chaos.settings())
    run.start()
    run.wait_for_step(4)
    with suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            os.write(filler.fileno(), bytes(4096))
    job = run.end()
    assert "no space left on device" in job.stderr.lower(), job.stderr
    good = checkpoint.newest_verified(run.checkpoints)
    assert good is not None
    next_slot = checkpoint.read_state(good)["next_slot"]
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    run.command()
    assert run.start_slots()[-1] == next_slot > 0
    check("the disk is full, then larger", run, (75, 0), uninterrupted, same_as=uninterrupted)


def test_a_poison_record(chaos: Chaos, uninterrupted: Run) -> None:
    """Two lines of the source that are no records."""
    data = chaos.folder / "poison.jsonl"
    data.write_text(chaos.data.read_text() + '{"messages": [{"role": "us\n{"messages": 5}\n')
    run = Run(chaos, "poison", (*chaos.settings(), f"data.source.paths=[{data}]", "data.max_bad_fraction=0.1"))
    run.command()
    assert run.jobs[-1].summary["records_quarantined"] == 2
    check("a poison record", run, (0,), uninterrupted, same_as=None)


def test_a_row_ends_its_teacher_every_time(chaos: Chaos, uninterrupted: Run, refused: Run) -> None:
    """Its process four times, then the row is refused; all others are as in the run that refused it at once."""
    run = Run(chaos, "deadly", chaos.settings(deadly_token=chaos.token(DEADLY)))
    job = run.command()
    assert job.summary["rows_quarantined"] == 2  # epochs
    records = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert len({record["row_id"] for record in records}) == 1
    assert all("process ended 4 times" in record["reason"] for record in records)
    assert job.summary["restarts"] == 0
    check("a row that ends its teacher every time", run, (0,), uninterrupted, same_as=refused)


def test_the_teacher_answers_nan(chaos: Chaos, uninterrupted: Run, refused: Run) -> None:
    assert refused.jobs[-1].summary["rows_quarantined"] == 2
    reasons = {json.loads(line)["reason"] for line in (refused.folder / "quarantine.jsonl").read_text().splitlines()}
    assert ["NaN" in reason for reason in reasons] == [True]
    check("the teacher answers NaN", refused, (0,), uninterrupted, same_as=None)


def test_the_loss_is_nan(chaos: Chaos, uninterrupted: Run) -> None:
    """The student's embedding of one character: the steps that come by it are skipped, one an epoch."""
    folder = chaos.folder / "nan-student"
    shutil.copytree(chaos.student, folder)
    student = AutoModelForCausalLM.from_pretrained(folder)
    student.config.tie_word_embeddings = False  # tied, no logit would be finite
    embedding = student.get_input_embeddings().weight
    student.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
    with torch.no_grad():
        embedding[chaos.token(NAN)] = torch.nan
    student.save_pretrained(folder)
    run = Run(chaos, "nan", (*chaos.settings(), f"student.model={folder}"))
    job = run.command()
    assert job.summary["bad_steps"] == 2
    bad = [line["step"] for line in job.metrics if not line["train/is_applied"]]
    records = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted({record["step"] for record in records}) == bad
    assert sum(int(value.isnan().sum()) for value in weights(run.folder).values()) == 64, "the one embedding, as it was"
    check("the loss is NaN", run, (0,), uninterrupted, same_as=None)
