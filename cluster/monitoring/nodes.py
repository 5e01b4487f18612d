"""The row about nodes that ends each dashboard."""

from __future__ import annotations

from cluster.monitoring.panels import AMBER, GREEN, RED, Panel, Query, Row, Variable
from cluster.monitoring.series import RAY_SERIES as RAY

UTILISATION_ID, NODES_ID = 24, 41
"""Ray's own overview page shows the panels of these ids, from whichever dashboard it embeds"""

DISK_PERCENT, DISK_FULL_PERCENT = 90, 97
MEMORY_SHARE, GPU_MEMORY_SHARE = 0.95, 0.97

NODE = Variable("node", "Node", RAY["node_mem_total"], "instance")
"""host and port that Prometheus scrapes a node at, a label of every metric"""

_AT = 'instance=~"$node"'

MEMORY_USED = f"{RAY['node_mem_used'].gauge(_AT)} / {RAY['node_mem_total'].gauge(_AT)}"
_GPU_USED = RAY["node_gram_used"].gauge(_AT)
_GPU_FREE = RAY["node_gram_available"].gauge(_AT)


def node_row() -> Row:
    """GPUs, memory, disk and network of the nodes."""
    return Row(
        "Nodes",
        (
            Panel(
                "CPU",
                "CPU time in use. Training on GPUs needs little of it.",
                (Query(RAY["node_cpu_utilization"].gauge(_AT), "{{RayNodeType}} {{ip}}"),),
                unit="percent",
                maximum=100,
                id=UTILISATION_ID,
            ),
            Panel(
                "Nodes",
                "Nodes that send metrics.",
                (Query(f"count by (RayNodeType) ({RAY['node_mem_total'].gauge(_AT)})", "{{RayNodeType}}"),),
                stacked=True,
                id=NODES_ID,
            ),
            Panel(
                "Memory",
                "Share of a node's memory in use. Ray ends workers at 95 %.",
                (Query(MEMORY_USED, "{{RayNodeType}} {{ip}}"),),
                unit="percentunit",
                maximum=1,
                thresholds=((None, GREEN), (MEMORY_SHARE, RED)),
            ),
            Panel(
                "GPU in use",
                "Time in which a GPU ran a kernel. A GPU of a run that stays under the others is a straggler.",
                (Query(RAY["node_gpus_utilization"].gauge(_AT), "{{ip}} GPU {{GpuIndex}} {{GpuDeviceName}}"),),
                unit="percent",
                maximum=100,
            ),
            Panel(
                "GPU memory",
                "Share of a GPU's memory in use, the allocator's reserve among it.",
                (Query(f"{_GPU_USED} / ({_GPU_USED} + {_GPU_FREE})", "{{ip}} GPU {{GpuIndex}} {{GpuDeviceName}}"),),
                unit="percentunit",
                maximum=1,
                thresholds=((None, GREEN), (GPU_MEMORY_SHARE, RED)),
            ),
            Panel(
                "Disk",
                "Of the root file system in use. Ray stops placing tasks at 95 %.",
                (Query(RAY["node_disk_utilization_percentage"].gauge(_AT), "{{RayNodeType}} {{ip}}"),),
                unit="percent",
                maximum=100,
                thresholds=((None, GREEN), (DISK_PERCENT, AMBER), (DISK_FULL_PERCENT, RED)),
            ),
            Panel(
                "Disk free",
                "On the root file system. A checkpoint or a merge needs its size twice.",
                (Query(RAY["node_disk_free"].gauge(_AT), "{{RayNodeType}} {{ip}}"),),
                unit="bytes",
            ),
            Panel(
                "Network",
                "What a node receives. Sharded training gathers weights over it in each step.",
                (Query(RAY["node_network_receive_speed"].gauge(_AT), "{{RayNodeType}} {{ip}}"),),
                unit="Bps",
            ),
        ),
    )
