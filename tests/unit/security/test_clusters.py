"""Where others can reach it, Ray asks for a token: a dashboard and a cluster on another machine, unless forced."""

import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from ray_kd import cli, cluster
from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError
from tests.tiny import tiny_llama


@pytest.fixture
def joins(monkeypatch):
    """What `ray.init` was asked; nothing is started or reached."""
    seen = []

    def init(**given):
        seen.append(given)
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "_quiet_console", lambda: None)
    monkeypatch.setattr(cluster, "_check_reachable", lambda where: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.1.2.3:6379"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def join(**options) -> None:
    config = RunConfig()
    for name, value in options.items():
        setattr(config.cluster, name, value)
    with cluster.connected(config, trains=False):
        pass


def test_a_local_dashboard_is_on_loopback_and_with_ray_s_token(joins):
    join(dashboard=True)
    assert (joins[0]["include_dashboard"], joins[0]["dashboard_host"]) == (True, "127.0.0.1")
    join()
    assert (joins[1]["include_dashboard"], joins[1]["dashboard_host"]) == (False, "127.0.0.1")


def test_a_local_ray_turns_the_token_on_by_itself(monkeypatch):
    """Ray's own default, which the one above relies on."""
    from ray._private.authentication import authentication_token_setup as setup

    turned_on = []
    monkeypatch.setattr(setup, "_enable_token_auth", lambda: turned_on.append(True))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert setup.enable_token_auth_by_default()
    assert turned_on == [True]


@pytest.mark.parametrize("mode", ["disabled", "DISABLED", ""])
def test_a_dashboard_without_a_token_is_refused_unless_forced(joins, monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ConfigError, match=f"RAY_AUTH_MODE is '{mode}': unset it .* or set cluster.insecure=true"):
        join(dashboard=True)
    assert joins == []
    join()
    join(dashboard=True, insecure=True)
    assert [given["include_dashboard"] for given in joins] == [False, True]


@pytest.mark.parametrize("where", ["10.1.2.3:6379", "203.0.113.7:6379", "[2001:db8::1]:6379"])
def test_a_cluster_on_another_machine_is_not_joined_without_a_token(joins, monkeypatch, where):
    refusal = (
        r"on another machine and would be joined without a token: set RAY_AUTH_MODE=token .*cluster\.insecure=true"
    )
    with pytest.raises(ConfigError, match=refusal):
        join(address=where)
    monkeypatch.setenv("RAY_ADDRESS", where)
    for mode in ("disabled", "k8s", ""):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ConfigError, match=refusal):
            join()
    assert joins == []
    join(insecure=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    join()
    assert [given["address"] for given in joins] == [where, where]


def test_a_name_is_looked_up(joins, monkeypatch):
    found = {"head.example": "10.1.2.3", "here.example": "127.0.0.5"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (found[host], 0))])
    with pytest.raises(ConfigError, match=r"'head\.example:6379' is on another machine"):
        join(address="head.example:6379")
    join(address="here.example:6379")
    assert len(joins) == 1


def test_this_machine_is_joined_without_one(joins):
    """`ray job submit` and KubeRay run the driver on the head, whose address is no loopback."""
    own = [card.address for cards in psutil.net_if_addrs().values() for card in cards if card.family == socket.AF_INET]
    for host in ["127.0.0.1", "localhost", *own]:
        join(address=f"{host}:6379")
    assert len(joins) == 2 + len(own)


def test_what_auto_finds_is_looked_at_too(joins, monkeypatch):
    from ray._private.authentication import authentication_utils

    monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: False)
    with pytest.raises(ConfigError, match=r"'10\.1\.2\.3:6379' is on another machine"):
        join(address="auto")
    join(address="auto", insecure=True)
    monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: True)
    join(address="auto")


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("http://head:8265", "ray job submit --address"),
        ("https://me:canary-9f3b@head:8265", "ray job submit --address"),
        ("ray://head:10001", "from a node of the cluster$"),
    ],
)
def test_a_dashboard_or_a_client_s_address_is_no_cluster(joins, monkeypatch, where, hint):
    monkeypatch.setenv("RAY_ADDRESS", where)
    with pytest.raises(ConfigError, match=rf"is '\w+://.*': allowed is auto or host:port.*{hint}") as refused:
        join()
    assert "canary" not in str(refused.value)
    assert joins == []


def test_the_refusal_is_a_line_and_a_code(joins, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    model = tiny_llama(tmp_path / "model")
    data = f"data.source={{kind: jsonl, paths: [{tmp_path}/a.jsonl]}}"
    settings = [f"run.dir={tmp_path}/run", data, "data.format=text",
                f"teacher.model={model}", f"student.model={model}", "cluster.address=10.1.2.3:6379"]  # fmt: skip
    (tmp_path / "empty.yaml").write_text("{}")
    assert cli.main("distill", [str(tmp_path / "empty.yaml"), *settings]) == ConfigError.exit_code
    assert "error: the Ray cluster at '10.1.2.3:6379' is on another machine" in capsys.readouterr().err
    assert joins == []
