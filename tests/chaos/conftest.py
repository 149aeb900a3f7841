"""A cluster that things happen to, runs that must not mind, and the account of both."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_kd import checkpoint, doctor, run_folder
from ray_kd import config as configuration
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from tests.conftest import REPOSITORY, Job, Jobs

RECORD = "RAY_KD_CHAOS_RECORD"
"""Environment variable: the file to which each case adds a line (`table.py` prints it)."""

DEADLINE_S = 300.0
TEACHER, STUDENT = "ray::MapWorker", "ray::RayTrainWorker"  # titles that Ray gives their processes

DEADLY, NAN = "^", "~"  # characters of one record each, for faults that are in the data
KEPT = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "data/row_ids_sha256", "eval/topk_bucket_kl")


class Cluster:
    """`ray_cluster.py` and the processes it has."""

    def __init__(self, environment: dict[str, str], *pools: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="chaos-")  # short: Ray keeps sockets there
        quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "ray_cluster.py"), *pools],
            env=environment | quick | {"RAY_TMPDIR": self._folder},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address: str = self._answer()

    def ask(self, *words: object) -> Any:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def processes(self, title: str) -> list[psutil.Process]:
        """Workers of all nodes whose title begins so."""
        raylets = [
            process for process in psutil.process_iter(["cmdline"])
            if f"--gcs-address={self.address}" in " ".join(process.info["cmdline"] or [])
        ]  # fmt: skip
        found = []
        for raylet in raylets:
            with suppress(psutil.NoSuchProcess):
                for child in raylet.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        found += [child] if "".join(child.cmdline()[:1]).startswith(title) else []
        return found

    def close(self) -> None:
        self._process.communicate(input="stop\n", timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster's process ended; what it said is above"
        return json.loads(line)


class Chaos(Jobs):
    """Runs of one config, two epochs, in which the teachers are what takes the time."""

    def __init__(self, folder: Path, environment: dict[str, str], cluster: Cluster) -> None:
        super().__init__(folder, environment, cluster.address)
        self.cluster = cluster
        self.num_steps = 0  # known after the first run
        records = [json.loads(line) for line in self.data.read_text().splitlines()[:40]]
        for index, mark in ((7, DEADLY), (20, NAN)):
            records[index]["messages"][1]["content"] += mark
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records))
        # With dropout a resume that lost a random state would show.
        model = AutoModelForCausalLM.from_pretrained(self.student)
        model.config.attention_dropout = 0.2
        model.save_pretrained(self.student)
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)

    def settings(self, **engine: Any) -> tuple[str, ...]:
        """Overrides of every run; engine: options of `engine.py`."""
        options = {"kind": "tests.chaos.engine", "delay_s": 0.2} | engine
        return (
            f"teacher.engine={json.dumps(options)}", "teacher.run_ahead_rows=24",
            "teacher.pool.min_actors=2", "teacher.pool.max_actors=2",
            "teacher.pool.label_selector={ray-kd.io/pool: teacher}", "train.label_selector={ray-kd.io/pool: student}",
            "train.max_steps=null", "train.epochs=2", "train.checkpoint_every=3", "train.eval_every=4",
            "eval.max_rows=4",
        )  # fmt: skip

    def token(self, character: str) -> int:
        [token] = self.tokenizer.encode(character, add_special_tokens=False)
        return token


@dataclass
class Run:
    """One run and the commands it took."""

    chaos: Chaos
    name: str
    settings: tuple[str, ...]
    jobs: list[Job] = field(default_factory=list)
    wall_s: float = 0.0
    """Of all commands, ended or killed."""

    @property
    def cluster(self) -> Cluster:
        return self.chaos.cluster

    @property
    def folder(self) -> Path:
        return self.chaos.run_dir(self.name)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def notes(self) -> Path:
        """The engine's, made when asked for."""
        folder = self.chaos.folder / "notes" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self) -> None:
        self._started = time.monotonic()
        self.process = self.chaos.start(self.name, *self.settings)

    def end(self) -> Job:
        """Wait for the command, which must not hang."""
        try:
            stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            stdout, stderr = self.process.communicate()
            pytest.fail(f"the job hung:\n{stdout}\n{stderr}")
        self.wall_s += time.monotonic() - self._started
        self.jobs.append(Job(self.process.returncode, stdout, stderr, self.folder))
        return self.jobs[-1]

    def command(self) -> Job:
        """The command, undisturbed."""
        self.start()
        return self.end()

    def wait_for_step(self, step: int) -> None:
        self.chaos.wait_for_step(self.name, step, self.process)

    def wait(self, found: Callable[[], Any], every_s: float = 0.05) -> Any:
        """What is found, once it is; the command must be running till then."""
        deadline = time.monotonic() + DEADLINE_S
        while not (result := found()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                stdout, stderr = self.process.communicate(timeout=10)
                pytest.fail(f"nothing was found to strike:\n{stdout}\n{stderr}")
            time.sleep(every_s)
        return result

    def teacher(self, place: int = 0) -> psutil.Process:
        return self.wait(lambda: self.cluster.processes(TEACHER)[place:])[0]

    def student(self) -> psutil.Process:
        [process] = self.wait(lambda: self.cluster.processes(STUDENT))
        return process

    def constructing(self, title: str) -> psutil.Process:
        """A process of this title in which an engine is being built (its `construct_s`)."""
        return self.wait(
            lambda: [one for one in self.cluster.processes(title) if (self.notes / str(one.pid)).exists()]
        )[0]

    def kill_driver(self) -> None:
        """And wait until its cluster noticed: its last worker may still be writing."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + DEADLINE_S
        while self.cluster.processes(STUDENT):
            assert time.monotonic() < deadline, "the train worker outlived its driver"
            time.sleep(0.2)

    def start_slots(self) -> list[int]:
        """Where each attempt began."""
        return [json.loads(line)["start_slot"] for line in (self.folder / "attempts.jsonl").read_text().splitlines()]


def count_rows(folder: Path) -> np.ndarray:
    """How often each row of each epoch [epochs * rows] was trained, from the digests in metrics.jsonl alone."""
    config = configuration.load(folder / run_folder.CONFIG, [f"run.dir={folder}"])
    num_rows = PreparedData(run_folder.prepared_of(folder, config)).num_rows
    batch, epochs = config.train.global_batch_size, config.train.epochs
    order = SlotOrder(num_rows, batch, epochs, config.train.max_steps, config.run.seed)
    counts = np.zeros(num_rows * epochs, dtype=int)
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        start = line["data/slot_start"]
        rows = order.rows(start, start + batch)
        if hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == line["data/row_ids_sha256"]:
            epoch_of = np.arange(start, start + batch) // num_rows
            np.add.at(counts, (epoch_of * num_rows + rows)[rows >= 0], 1)
    return counts


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


def is_same(run: Run, expected: Run) -> bool:
    """Bitwise: losses, gradient norms, evaluation and weights."""
    lines = [[[line.get(key) for key in KEPT] for line in each.jobs[-1].metrics] for each in (run, expected)]
    ours, theirs = weights(run.folder), weights(expected.folder)
    return lines[0] == lines[1] and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def check(fault: str, run: Run, exit_codes: tuple[int, ...], uninterrupted: Run, same_as: Run | None) -> None:
    """I1 to I5 of a run that came to its end, and its line in the account.

    exit_codes: of the commands it took. same_as: the run it must equal bitwise, or none where the fault is in the data.
    """
    assert tuple(job.exit_code for job in run.jobs) == exit_codes, [job.stderr for job in run.jobs]
    summary, counts, starts = run.jobs[-1].summary, count_rows(run.folder), run.start_slots()
    account = {
        "fault": fault,
        "happened": f"exit {', '.join(map(str, exit_codes))}; from slot {', '.join(map(str, starts))}"
        + (f"; {summary['rows_quarantined']} row refused" if summary["rows_quarantined"] else ""),
        "rows_lost": int((counts == 0).sum()),
        "rows_duplicated": int((counts > 1).sum()),
        "teacher_rows_again": summary["teacher_rows_repeated"],
        "seconds_lost": round(run.wall_s - uninterrupted.wall_s, 1),
        "is_same": None if same_as is None else is_same(run, same_as),
    }
    if path := os.environ.get(RECORD):
        with Path(path).open("a") as file:
            file.write(json.dumps(account) + "\n")
    assert account["rows_lost"] == account["rows_duplicated"] == 0
    assert summary["rows_missing"] == summary["rows_duplicated"] == 0
    assert account["is_same"] is not False
    assert checkpoint.orphans(run.checkpoints) == []
    report = doctor.examine(run.folder)
    assert not report.is_broken, str(report)
    assert not [found for found in report.findings if (found.check, found.state) == ("leftovers", doctor.WARNING)]
    for job in run.jobs:
        if job.exit_code > 0:
            assert len([line for line in job.stderr.splitlines() if line.startswith("error: ")]) == 1, job.stderr


@pytest.fixture(scope="session")
def chaos_environment(ray_environment: dict[str, str]) -> dict[str, str]:
    """In which every process finds the engine of these tests."""
    return ray_environment | {"PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="session")
def cluster(chaos_environment: dict[str, str]) -> Iterator[Cluster]:
    """A head, two nodes for teachers and one for the student."""
    cluster = Cluster(chaos_environment, "teacher", "teacher", "student")
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory, chaos_environment: dict[str, str], cluster: Cluster) -> Chaos:
    """Runs on that cluster."""
    return Chaos(tmp_path_factory.mktemp("chaos"), chaos_environment, cluster)


@pytest.fixture(scope="session")
def uninterrupted(chaos: Chaos) -> Run:
    """The run that nothing happened to: the second one, which finds data prepared and a warm disk, as all others do."""
    for name in ("first", "uninterrupted"):
        run = Run(chaos, name, chaos.settings())
        job = run.command()
        assert job.exit_code == 0, job.stderr
    chaos.num_steps = job.summary["steps"]
    return run


@pytest.fixture(scope="session")
def interrupted(chaos: Chaos) -> Run:
    """One whose driver was killed after two checkpoints, to be copied and damaged."""
    run = Run(chaos, "interrupted", chaos.settings())
    run.start()
    run.wait(lambda: [path.name for path in checkpoint.folders(run.checkpoints)] == ["step_00000003", "step_00000006"])
    run.kill_driver()
    run.end()
    return run


@pytest.fixture(scope="session")
def refused(chaos: Chaos) -> Run:
    """The run in which the teacher's answer to one row is NaN."""
    run = Run(chaos, "refused", chaos.settings(nan_token=chaos.token(DEADLY)))
    run.command()
    return run
