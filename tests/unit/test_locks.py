"""One writer per run folder, also against workers that outlive their driver."""

import json
import os
import subprocess
import sys
import time
import uuid

import pytest

from ray_kd import locks, storage
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


@pytest.fixture
def run_in_store(object_store, monkeypatch):
    """A run folder in an object store, with leases short enough to wait for."""
    monkeypatch.setattr(locks, "BEAT_S", 0.2)
    monkeypatch.setattr(locks, "LEASE_S", 1.0)
    monkeypatch.setattr(locks, "_SETTLE_S", 0.1)
    return storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")


def leave(run_dir, name):
    """What a killed holder leaves: a lease that does not change any more."""
    storage.write_text(run_dir / name, json.dumps({"holder": "pid 7 on gone", "beat": 3}))


def test_in_a_store_a_second_driver_is_refused_by_name(run_in_store):
    with driver_lock(run_in_store), pytest.raises(ConfigError, match=rf"another run \(pid {os.getpid()} on .*\)"):
        driver_lock(run_in_store).__enter__()
    with driver_lock(run_in_store):
        pass
    assert storage.sizes(run_in_store) == {}


def test_in_a_store_the_leases_of_the_dead_run_out(run_in_store):
    leave(run_in_store, ".driver.lock")
    leave(run_in_store, ".writers.lock/one")
    start = time.monotonic()
    with driver_lock(run_in_store):
        assert time.monotonic() - start > locks.LEASE_S
        assert list(storage.sizes(run_in_store)) == [".driver.lock"]


def test_in_a_store_living_workers_are_waited_for(run_in_store):
    with writer_lock(run_in_store), writer_lock(run_in_store), pytest.raises(RetryableError, match="still hold"):
        driver_lock(run_in_store, timeout_s=1.5).__enter__()
    assert storage.sizes(run_in_store) == {}


def test_in_a_store_of_two_that_start_at_once_one_has_it(run_in_store, monkeypatch):
    wait = time.sleep

    def sleep(seconds):
        if seconds == locks._SETTLE_S:  # the other wrote later
            leave(run_in_store, ".driver.lock")
        wait(seconds)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with pytest.raises(ConfigError, match=r"another run \(pid 7 on gone\)"), driver_lock(run_in_store):
        pass
    assert ".driver.lock" in storage.sizes(run_in_store)  # the other's lease stays


@pytest.mark.parametrize(("lock", "name"), [(driver_lock, ".driver.lock"), (writer_lock, ".writers.lock/*")])
def test_in_a_store_a_holder_that_stood_still_for_too_long_knows_it(run_in_store, lock, name):
    with lock(run_in_store) as held:
        held.check()
        (lease,) = run_in_store.glob(name)
        deadline = time.monotonic() + 20
        while held.lost_to is None and time.monotonic() < deadline:
            leave(lease.parent, lease.name)  # another took over, and renews: a beat under way may cover one write
            time.sleep(0.05)
        with pytest.raises(locks.Lost, match=r"pid 7 on gone has its run\.dir now"):
            held.check()
    assert lease.exists()


def test_on_a_disk_a_lock_is_held_until_it_is_given_up(tmp_path):
    with driver_lock(tmp_path) as held:
        held.check()
