"""Pod templates of a Ray cluster on Kubernetes: resources, probes, security, storage and secrets."""

from __future__ import annotations

from typing import Any

from cluster.config import ConfigError
from cluster.deploy.description import KEYS_FILE, ClusterDescription, MachineConfig, WorkersConfig
from cluster.storage import is_uri

GCS_PORT = 6379
DASHBOARD_PORT = 8265
CLIENT_PORT = 10001
METRICS_PORT = 8080
SERVE_PORT = 8000
AGENT_PORT = 52365
"""of the agent on each node, which answers `/api/healthz` without a token"""
SERVE_MARGIN_SECONDS = 30
"""between the longest that a replica may drain and the end of its pod"""

Manifest = dict[str, Any]

CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""what Kubernetes' "restricted" pod security standard asks of a container"""


def head_pod(description: ClusterDescription, *, serving: bool) -> Manifest:
    """Template of the head's pod.

    Args:
        description: of the cluster.
        serving: whether an endpoint runs on it.
    """
    head = description.head
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": CLIENT_PORT, "metrics": METRICS_PORT}
    container = _container(description, "ray-head", head, ports | ({"serve": SERVE_PORT} if serving else {}))
    container |= _probes(readiness=("/api/healthz", AGENT_PORT))
    # The autoscaler beside Ray asks Kubernetes for pods, with the account that KubeRay makes.
    return _pod(description, container, head, shared_memory_gib=max(1, head.memory_gib // 4), serving=serving)


def worker_pod(description: ClusterDescription, group: WorkersConfig, *, serving: bool) -> Manifest:
    """Template of a group's pods. An endpoint's are ready once Serve's proxy on them answers."""
    ports = {"metrics": METRICS_PORT} | ({"serve": SERVE_PORT} if serving else {})
    container = _container(description, "ray-worker", group, ports)
    if group.gpus:
        container["resources"]["requests"]["nvidia.com/gpu"] = group.gpus
        container["resources"]["limits"]["nvidia.com/gpu"] = group.gpus
    container |= _probes(readiness=("/-/healthz", SERVE_PORT) if serving else ("/api/healthz", AGENT_PORT))
    pod = _pod(description, container, group, shared_memory_gib=group.shared_memory_gib, serving=serving)
    pod["spec"]["automountServiceAccountToken"] = False
    pod["spec"]["tolerations"] = [
        {"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in (group.taints if group.gpus else ())
    ]
    return pod


def submitter_pod(description: ClusterDescription) -> Manifest:
    """Template of the pod that hands a job in and follows its log."""
    resources = {"cpu": "500m", "memory": "512Mi"}
    container: Manifest = {
        "name": "ray-job-submitter",
        "image": description.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
    }
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": pod_security(description),
            "containers": [container],
        }
    }


def pod_security(description: ClusterDescription) -> Manifest:
    """Security context of a whole pod: one user who is not root, and its group for mounted folders."""
    user = description.user_id
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def environment(description: ClusterDescription, *, serving: bool) -> list[Manifest]:
    """Variables of a Ray container; a secret is a reference."""
    plain = {**description.variables, "RAY_USAGE_STATS_ENABLED": "0"}
    if serving:  # Serve's proxies import it; see serving/proxy.py
        plain["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serving.proxy.middlewares"
    entries: list[Manifest] = [{"name": name, "value": value} for name, value in plain.items()]
    for name, reference in description.secrets.items():
        entries.append({"name": name, "valueFrom": {"secretKeyRef": secret_key(reference)}})
    return entries


def secret_key(reference: str) -> Manifest:
    """A `secretKeyRef` of SECRET/KEY."""
    secret, _, key = reference.partition("/")
    return {"name": secret, "key": key}


def _container(description: ClusterDescription, name: str, machine: MachineConfig, ports: dict[str, int]) -> Manifest:
    resources = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
    return {
        "name": name,
        "image": description.image,
        "env": environment(description, serving="serve" in ports),
        "ports": [{"name": port_name, "containerPort": port} for port_name, port in ports.items()],
        # Requests that equal limits: a pod that is not the first to go when the node runs out of memory.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
    }


def _probes(readiness: tuple[str, int]) -> Manifest:
    """Starting may take five minutes; then a node that does not answer for two is started anew."""

    def asks(path: str, port: int, failures: int) -> Manifest:
        return {
            "httpGet": {"path": path, "port": port},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        }

    return {
        "startupProbe": asks("/api/healthz", AGENT_PORT, 30),
        "livenessProbe": asks("/api/healthz", AGENT_PORT, 12),
        "readinessProbe": asks(*readiness, 3),
    }


def _pod(
    description: ClusterDescription,
    container: Manifest,
    machine: MachineConfig,
    *,
    shared_memory_gib: int,
    serving: bool,
) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_gib}Gi"}},
        {"name": "ray-logs", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "ray-logs", "mountPath": "/tmp/ray"},
    ]
    if description.storage_claim:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": description.storage_claim}})
        mounts.append({"name": "storage", "mountPath": description.storage})
    elif not is_uri(description.storage):
        raise ConfigError(
            f"storage {description.storage} is a folder, and no pod has it: name its PersistentVolumeClaim in "
            "storage_claim, or give the URI of a storage"
        )
    if serving and description.serve and description.serve.keys_secret:
        volumes.append({"name": "api-keys", "secret": {"secretName": description.serve.keys_secret}})
        mounts.append({"name": "api-keys", "mountPath": KEYS_FILE.rpartition("/")[0], "readOnly": True})
    spec: Manifest = {
        # Autoscaler v2 replaces pods itself: one that Kubernetes starts anew would join as a node that Ray gave up.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _grace_seconds(description, serving=serving),
        "securityContext": pod_security(description),
        "containers": [{**container, "volumeMounts": mounts}],
        "volumes": volumes,
    }
    if machine.node_selector:
        spec["nodeSelector"] = dict(machine.node_selector)
    return {"metadata": {"labels": {"app.kubernetes.io/part-of": "raysoner"}}, "spec": spec}


def _grace_seconds(description: ClusterDescription, *, serving: bool) -> int:
    """No less than a replica may take to finish its requests."""
    if not serving or description.serve is None:
        return description.grace_seconds
    draining = description.serve.settings().get("replicas", {}).get("graceful_shutdown_seconds", 600)
    return max(description.grace_seconds, round(float(draining)) + SERVE_MARGIN_SECONDS)
