"""One writer per run folder, also against workers that outlive their driver."""

import subprocess
import sys

import pytest

from ray_kd.errors import ConfigError, RetryableError
from ray_kd.locks import driver_lock, writer_lock

HOLD = """
import sys
from pathlib import Path
from ray_kd.locks import {0} as lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
    """Another process that holds a lock of the folder until it is killed."""
    processes = []

    def hold(kind):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(kind), str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_driver_is_refused_by_name(tmp_path, held):
    driver = held("driver_lock")
    with pytest.raises(ConfigError, match=rf"another run \(pid {driver.pid} "), driver_lock(tmp_path):
        pass


def test_workers_of_a_dead_driver_hold_the_folder(tmp_path, held):
    worker = held("writer_lock")
    with pytest.raises(RetryableError, match="still hold"), driver_lock(tmp_path, timeout_s=0.5):
        pass
    worker.kill()
    worker.wait()
    with driver_lock(tmp_path, timeout_s=5):
        pass


def test_a_killed_driver_leaves_no_lock(tmp_path, held):
    driver = held("driver_lock")
    driver.kill()
    driver.wait()
    with driver_lock(tmp_path):
        pass


def test_workers_share(tmp_path, held):
    held("writer_lock")
    with writer_lock(tmp_path):
        pass
