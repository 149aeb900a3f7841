"""A Ray of several raylets on this machine, in a process of its own, for tests that need nodes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LocalCluster:
    """Nodes that come and go. The resources of a node are logical: two cores can play a cluster."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = self._answer()

    def add(self, name: str, num_cpus: float, labels: dict[str, str] | None = None) -> None:
        """Start a node, and wait until the cluster has it."""
        self._ask({"add": name, "num_cpus": num_cpus, "labels": labels or {}})

    def kill(self, name: str) -> None:
        """SIGKILL for all processes of a node, its raylet first."""
        self._ask({"kill": name})

    def _ask(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster's process ended"
        return line


@contextmanager
def local_cluster(
    environment: dict[str, str], num_cpus: float = 0, labels: dict[str, str] | None = None
) -> Iterator[LocalCluster]:  # fmt: skip
    """A cluster of a head with these CPUs and labels; more nodes are added."""
    head = {"num_cpus": num_cpus, "labels": labels or {}, "include_dashboard": False}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "cluster_server.py"), json.dumps(head)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield LocalCluster(process)
    finally:
        process.communicate(input="stop\n", timeout=120)
