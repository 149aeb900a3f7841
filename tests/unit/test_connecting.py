"""Ray starts while the driver looks at models and data, and is stopped whatever comes of that."""

import socket
import threading
from types import SimpleNamespace

import pytest
import ray

from ray_kd import cluster
from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError, RetryableError


@pytest.fixture
def seen(monkeypatch):
    """What was asked of Ray; `ray.init` waits for the gate."""
    seen = {"calls": [], "gate": threading.Event(), "error": None}

    def init(**_):
        assert seen["gate"].wait(timeout=30)
        seen["calls"].append("init")
        if seen["error"] is not None:
            raise seen["error"]
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: seen["calls"].append("shutdown"))
    monkeypatch.setattr(cluster, "_quiet_console", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return seen


def test_the_block_begins_before_ray_is_there(seen, caplog):
    caplog.set_level("INFO", logger="ray_kd")
    with cluster.connecting(RunConfig()) as wait_for_ray:
        assert seen["calls"] == []
        seen["gate"].set()
        wait_for_ray()
        assert seen["calls"] == ["init"]
        assert "Ray dashboard: http://127.0.0.1:8265" in caplog.messages
        # Ray's processes live as long as the thread that started them.
        assert "ray.init" in [thread.name for thread in threading.enumerate()]
    assert seen["calls"] == ["init", "shutdown"]
    assert "ray.init" not in [thread.name for thread in threading.enumerate()]


def test_a_refusal_meanwhile_is_raised_once_ray_is_down_again(seen):
    threading.Timer(0.2, seen["gate"].set).start()
    with pytest.raises(ConfigError, match=r"teacher\.model"), cluster.connecting(RunConfig()):
        raise ConfigError("teacher.model: ...")
    assert seen["calls"] == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("error", "raised", "line"),
    [
        (ConnectionError("no such\ncluster"), ConfigError, r"cannot join .*: no such$"),
        (OSError("disk"), OSError, "disk"),
    ],
)
def test_what_goes_wrong_is_raised_where_it_is_waited_for(seen, error, raised, line):
    seen["error"] = error
    seen["gate"].set()
    with pytest.raises(raised, match=line), cluster.connected(RunConfig()):
        pytest.fail("there is no Ray")
    assert seen["calls"] == ["init", "shutdown"]


def test_a_head_that_is_gone_ends_the_run_before_ray_ends_the_process():
    """Of a pause it makes nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        head, impatient = (cluster.Head(where, lost_s, every_s=0.0) for lost_s in (60.0, 0.0))
        own = cluster.Head(where, 0.0, every_s=0.0, is_own=True)
        head.check()
        impatient.check()
    head.check()
    with pytest.raises(RetryableError, match=f"the Ray cluster at {where} did not answer for 0 s .*goes on"):
        impatient.check()
    with pytest.raises(RetryableError, match="the Ray that this run started has ended: the same command goes on"):
        own.check()
