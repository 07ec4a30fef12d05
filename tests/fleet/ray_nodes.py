"""A Ray cluster of several nodes on this machine, as a program: `python ray_nodes.py NODES`.

Prints its address and the processes of its nodes, of which the first is the head, and ends with its
stdin.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112  # Ray spells it so

from ray.cluster_utils import Cluster  # after what it reads when it is imported

STORE_BYTES = 80 * 2**20  # the least that Ray takes


def main() -> None:
    cluster = Cluster()
    nodes = []
    for number in range(int(sys.argv[1])):
        node = cluster.add_node(
            num_cpus=2,  # so that nothing but a decision keeps two replicas apart
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            labels={"zone": f"zone-{number}"},
        )
        processes = [one for several in node.all_processes.values() for one in several]
        nodes.append({"zone": f"zone-{number}", "pids": [one.process.pid for one in processes]})
    print(json.dumps({"address": cluster.address, "nodes": nodes}), flush=True)
    sys.stdin.read()  # until whoever started it is done, or gone
    cluster.shutdown()


if __name__ == "__main__":
    main()
