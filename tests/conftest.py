"""Fixtures that several test files share: one Ray for the session, and jobs run the way a user runs them."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_kd import storage
from tests.tiny import tiny_llama

REPOSITORY = Path(__file__).parent.parent
JOB_TIMEOUT_S = 540


@pytest.fixture(scope="session")
def ray_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that use Ray: no token, a home of their own, no usage statistics."""
    home = tmp_path_factory.mktemp("home")
    return os.environ | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def ray_address(ray_environment: dict[str, str]) -> Iterator[str]:
    """A Ray of this session's own, in a process of its own, that jobs join through cluster.address."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "ray_server.py")],
        env=ray_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "Ray did not start"
    yield address
    process.communicate(input="stop\n", timeout=60)


@dataclass
class Job:
    """A finished job: exit code, what it printed, and its run folder."""

    exit_code: int
    stdout: str
    stderr: str
    run_dir: Path
    """As of `storage.path`: one in an object store reads the same."""

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(storage.read_text(self.run_dir / "summary.json"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in storage.read_lines(self.run_dir / "metrics.jsonl")]


class Jobs:
    """Runs `jobs/*.py` in a folder of tiny models and data."""

    def __init__(self, folder: Path, environment: dict[str, str], address: str | None) -> None:
        self.folder = folder
        self.environment = environment
        self.address = address
        self.runs = str(folder / "runs")
        self.teacher = tiny_llama(folder / "teacher", layers=4, seed=1)
        self.student = tiny_llama(folder / "student", layers=2, seed=2)
        self.data = folder / "train.jsonl"
        lines = [{"messages": [{"role": "user", "content": f"say {i} twice"},
                               {"role": "assistant", "content": f"{i} and again {i}, " * (1 + i % 3)}],
                  "parity": "odd" if i % 2 else "even"}
                 for i in range(60)]  # fmt: skip
        self.data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def config(self, name: str) -> Path:
        """A config for the run `name`; settings are given as overrides."""
        path = self.folder / "config.yaml"
        content = {
            "run": {"dir": "SET"},
            "data": {"source": {"kind": "jsonl", "paths": [str(self.data)]}, "format": {"kind": "messages"},
                     "eval_fraction": 0.15, "sequence_length": 96},
            "teacher": {"model": str(self.teacher), "top_k": 16, "threads": 1},
            "student": {"model": str(self.student)},
            "train": {"global_batch_size": 4, "max_steps": 5, "zero_stage": 0, "checkpoint_every": 2,
                      "eval_every": 0, "learning_rate": 1.0e-3, "warmup_steps": 2, "threads_per_worker": 1,
                      "timeout_s": 120},
            "eval": {"max_rows": 8},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        return path

    def command(self, job: str, *arguments: str) -> list[str]:
        return [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *arguments]

    def start(self, name: str, *overrides: str) -> "subprocess.Popen[str]":
        """Start the distill job of run `name`."""
        return self.popen("distill", *self.arguments(name, *overrides))

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """Config, run folder and cluster of run `name`, then overrides."""
        address = [f"cluster.address={self.address}"] if self.address else []
        return [str(self.config(name)), f"run.dir={self.run_dir(name)}", *address, *overrides]

    def popen(self, job: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start any job."""
        return subprocess.Popen(
            self.command(job, *arguments),
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
        )  # fmt: skip

    def finish(self, name: str, process: "subprocess.Popen[str]") -> Job:
        """Wait for a started job."""
        try:
            stdout, stderr = process.communicate(timeout=JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"the job hung:\n{stdout}\n{stderr}")
        return Job(process.returncode, stdout, stderr, self.run_dir(name))

    def distill(self, name: str, *overrides: str) -> Job:
        """Run the distill job of run `name` to its end."""
        return self.finish(name, self.start(name, *overrides))

    def run(self, job: str, *arguments: str) -> Job:
        """Run another job."""
        done = subprocess.run(
            self.command(job, *arguments), env=self.environment, capture_output=True, text=True,
            cwd=self.folder, timeout=JOB_TIMEOUT_S, check=False,
        )  # fmt: skip
        return Job(done.returncode, done.stdout, done.stderr, self.folder)

    def run_dir(self, name: str) -> Path:
        return storage.path(self.runs) / name

    def wait_for_step(self, name: str, step: int, process: "subprocess.Popen[str]") -> None:
        """Until metrics.jsonl has a line of this step."""
        path = self.run_dir(name) / "metrics.jsonl"
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            if any(f'"step": {step},' in line for line in storage.read_lines(path)):
                return
            time.sleep(0.05)
        stdout, stderr = process.communicate(timeout=10)
        pytest.fail(f"step {step} was never reached:\n{stdout}\n{stderr}")


@dataclass(frozen=True)
class ObjectStore:
    """A server of the S3 protocol on this machine; the environment names it to this process and to its children."""

    environment: dict[str, str]
    uri: str


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 store with one empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        yield ObjectStore(environment, "s3://runs")
    server.stop()


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory, ray_environment: dict[str, str], ray_address: str) -> Jobs:
    """Jobs that join the session's Ray."""
    return Jobs(tmp_path_factory.mktemp("jobs"), ray_environment, ray_address)


@pytest.fixture(scope="session")
def local_jobs(tmp_path_factory: pytest.TempPathFactory, ray_environment: dict[str, str]) -> Jobs:
    """Jobs that start a Ray of their own."""
    return Jobs(tmp_path_factory.mktemp("local-jobs"), ray_environment, None)
