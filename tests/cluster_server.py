"""A Ray of several raylets on this machine, until its standard input says stop or closes.

The only argument is the head's of `Cluster.add_node`, as JSON. Prints the address that jobs join, then answers each
line of JSON: {"add": NAME, ...of add_node} starts a node, {"kill": NAME} ends all its processes with SIGKILL.
"""

import json
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        command = json.loads(line)
        if name := command.pop("add", None):
            nodes[name] = cluster.add_node(**command)
        else:
            cluster.remove_node(nodes.pop(command["kill"]), allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()
