"""A Ray of several raylets on this machine: prints its address, then takes one command a line and answers in JSON.

add POOL             one node more
kill PID             the node that process PID belongs to, at once: SIGKILL for its raylet and what it started
drain PID SECONDS    that node is told that it will be taken away then; it is not
take                 the node that was drained, at once
kill_head            SIGKILL for everything on the head

It ends, and all of it, when its standard input says stop or closes.
"""

import json
import sys
import time

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

POOLS = {
    # Enough on one node for both teachers, a read and the repartition: the other may die.
    "teacher": {"num_cpus": 3, "labels": {"ray-subcluster": "teacher", "ray-kd.io/pool": "teacher"}},
    "student": {"num_cpus": 1, "labels": {"ray-kd.io/pool": "student"}},
}


class Server:
    """The cluster and what can be done to it."""

    def __init__(self, pools: list[str]) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for pool in pools:
            self.add(pool)

    def add(self, pool: str) -> str:
        return self.cluster.add_node(**POOLS[pool]).node_id

    def kill(self, pid: str) -> str:
        node = self._node_of(int(pid))
        self.cluster.remove_node(node, allow_graceful=False)
        return node.node_id

    def kill_head(self) -> None:
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def drain(self, pid: str, seconds: str) -> list:
        node = self._node_of(int(pid))
        client = ray._raylet.GcsClient(address=self.cluster.gcs_address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + float(seconds)) * 1000)
        self._drained = node  # its processes may be gone by then
        return list(client.drain_node(node.node_id, reason, "a spot machine is taken back", deadline_ms))

    def take(self) -> None:
        self.cluster.remove_node(self._drained, allow_graceful=False)

    def _node_of(self, pid: int) -> "ray._private.node.Node":
        above = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
        for node in self.cluster.worker_nodes:
            if any(info.process.pid in above for info in node.all_processes["raylet"]):
                return node
        raise ValueError(f"process {pid} is on none of the nodes")


if __name__ == "__main__":
    server = Server(sys.argv[1:])
    print(json.dumps(server.cluster.gcs_address), flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        if name == "stop":
            break
        print(json.dumps(getattr(server, name)(*arguments)), flush=True)
    server.cluster.shutdown()
