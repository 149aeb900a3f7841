"""A head of its own as `ray start --head` makes it, with dashboard, metrics port and token, for tests that submit."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
RAY = str(Path(sys.executable).parent / "ray")


@dataclass
class RayHead:
    """environment: of clients, with the token. dashboard, metrics: addresses."""

    environment: dict[str, str]
    dashboard: str
    metrics: str
    token: str

    def get(self, path: str, token: str | None = None) -> Any:
        """A JSON document of the dashboard. token: in place of the right one; "" sends none."""
        token = self.token if token is None else token
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def status_of(self, path: str, token: str) -> int:
        """The HTTP status that a token gets."""
        try:
            self.get(path, token)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def job(self, submission_id: str) -> dict[str, Any]:
        """What the dashboard knows of a submitted job."""
        found: dict[str, Any] = self.get(f"/api/jobs/{submission_id}")
        return found

    def scrape(self) -> str:
        """The node's metrics as Prometheus gets them, without a token."""
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def cli(self, *arguments: str, cwd: Path, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
        """`ray job ...` to its end."""
        return subprocess.run(
            [RAY, "job", *arguments], env=self.environment, cwd=cwd, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def wait(self, what: str, look: Callable[[], T | None], timeout_s: float = 240) -> T:
        """The first value that look gives which is neither None nor empty."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := look():
                return found
            time.sleep(0.5)
        raise AssertionError(f"{what}: not within {timeout_s:g} s")

    def end_of(self, submission_id: str) -> dict[str, Any]:
        """The job once it has ended."""
        return self.wait(
            f"end of {submission_id}",
            lambda: job if (job := self.job(submission_id))["status"] in ("STOPPED", "SUCCEEDED", "FAILED") else None,
        )


@contextmanager
def ray_head(environment: dict[str, str], num_cpus: int) -> Iterator[RayHead]:
    """Start one and stop it, and only it. The metrics are a second old at most."""
    temporary = Path(tempfile.mkdtemp(prefix="rk"))  # short: paths of sockets may have 107 bytes
    token = secrets.token_hex(32)
    (temporary / "token").write_text(token)
    gcs, dashboard, metrics, agent, client = _free_ports(5)
    environment = environment | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(temporary / "token"),
        "RAY_metrics_report_interval_ms": "1000",
    }
    log = (temporary / "start.log").open("w+")
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--num-cpus={num_cpus}", "--include-dashboard=true",
         "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
         f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}",
         f"--ray-client-server-port={client}", f"--temp-dir={temporary}", "--disable-usage-stats"],
        env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    head = RayHead(
        environment | {"RAY_API_SERVER_ADDRESS": url}, url, f"http://127.0.0.1:{metrics}/metrics", token
    )  # fmt: skip
    try:
        head.wait("the dashboard", lambda: _answers(head, process, Path(log.name)), timeout_s=120)
        yield head
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        for left in started:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _answers(head: RayHead, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"ray start ended with {process.returncode}: {log.read_text()[-2000:]}")
    try:
        head.get("/api/jobs/")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
