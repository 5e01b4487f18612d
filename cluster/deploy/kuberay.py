"""KubeRay's custom resources (v1.7): RayCluster, RayJob for training and tuning, RayService for an endpoint."""

from __future__ import annotations

import shlex
from typing import Any, Literal

import yaml

from cluster.config import ConfigError
from cluster.deploy.description import ClusterDescription, JobConfig, WorkersConfig
from cluster.deploy.pods import (
    CONTAINER_SECURITY,
    METRICS_PORT,
    SERVE_PORT,
    Manifest,
    head_pod,
    secret_key,
    submitter_pod,
    worker_pod,
)
from cluster.hardware import GIB

API = "ray.io/v1"


def ray_cluster(description: ClusterDescription) -> Manifest:
    """A RayCluster that jobs are submitted to."""
    return _resource(description, "RayCluster", description.name, _cluster(description, outlives_head=True))


def ray_job(description: ClusterDescription, kind: Literal["train", "tune"]) -> Manifest:
    """A RayJob, which brings its own cluster and takes it away.

    Raises:
        ConfigError: the description has no such job.
    """
    job = description.train if kind == "train" else description.tune
    if job is None:
        raise ConfigError(f"a RayJob for {kind} needs a table [{kind}] with a command")
    spec: Manifest = {
        # The submitter's shell reads it too, so it is one command and nothing more.
        "entrypoint": shlex.join(job.command),
        "runtimeEnvYAML": _runtime_environment(job),
        "submissionMode": job.submission_mode,
        "backoffLimit": job.retries,
        "preRunningDeadlineSeconds": job.pending_seconds,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": job.kept_seconds,
        "rayClusterSpec": _cluster(description, outlives_head=False),
    }
    if job.submission_mode == "K8sJobMode":
        # A submitter that is started again follows the same job; it does not run it twice.
        spec |= {"submitterConfig": {"backoffLimit": 2}, "submitterPodTemplate": submitter_pod(description)}
    if job.deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = job.deadline_seconds
    return _resource(description, "RayJob", f"{description.name}-{kind}", spec)


def ray_service(description: ClusterDescription) -> Manifest:
    """A RayService, whose upgrades take no request's answer away.

    Raises:
        ConfigError: the description has no endpoint, or its configuration cannot be read.
    """
    serve = description.serve
    if serve is None:
        raise ConfigError("a RayService needs a table [serve] with config")
    strategy: Manifest = {"type": "NewCluster"}
    if serve.gateway_class is not None:
        strategy = {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "gatewayClassName": serve.gateway_class,
                "stepSizePercent": serve.step_percent,
                "intervalSeconds": serve.step_seconds,
                "maxSurgePercent": serve.surge_percent,
            },
        }
    cluster = _cluster(description, outlives_head=True, serving=True)
    drains = cluster["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    spec = {
        "upgradeStrategy": strategy,
        # The cluster before stays until its last requests have ended.
        "rayClusterDeletionDelaySeconds": drains,
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": _yaml(serve_config(description)),
        "rayClusterConfig": cluster,
    }
    return _resource(description, "RayService", f"{description.name}-serve", spec)


def serve_config(description: ClusterDescription) -> Manifest:
    """What Ray Serve is told: `serving.app:build` with the serving configuration as plain data.

    Raises:
        ConfigError: the description has no endpoint, or its configuration cannot be read.
    """
    if description.serve is None:
        raise ConfigError("an endpoint needs a table [serve] with config")
    settings = description.serve.settings()
    endpoint = settings.get("endpoint", {})
    settings["endpoint"] = {**endpoint, "host": "0.0.0.0", "port": SERVE_PORT}
    application = {
        "name": endpoint.get("application", "raysoner"),
        "route_prefix": "/",
        "import_path": "serving.app:build",
        "args": settings,
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [application],
    }


def _cluster(description: ClusterDescription, *, outlives_head: bool, serving: bool = False) -> Manifest:
    _require_selectors(description)
    autoscaler = {"cpu": "500m", "memory": "512Mi"}
    spec: Manifest = {
        "rayVersion": description.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": max(group.idle_seconds for group in description.workers.values()),
            "resources": {"requests": dict(autoscaler), "limits": dict(autoscaler)},
            "securityContext": CONTAINER_SECURITY,
        },
        "headGroupSpec": {
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                "metrics-export-port": str(METRICS_PORT),
                "num-cpus": "0",
                "num-gpus": "0",
            },
            "template": head_pod(description, serving=serving),
        },
        "workerGroupSpecs": [
            _group(description, name, group, serving=serving) for name, group in description.workers.items()
        ],
    }
    if description.token_secret is not None:
        spec["authOptions"]["secretName"] = description.token_secret
    if description.redis is not None and outlives_head:
        spec["gcsFaultToleranceOptions"] = {"backend": "redis", "redisAddress": description.redis.address}
        if description.redis.password is not None:
            reference = {"valueFrom": {"secretKeyRef": secret_key(description.redis.password)}}
            spec["gcsFaultToleranceOptions"]["redisPassword"] = reference
    return spec


def _group(description: ClusterDescription, name: str, group: WorkersConfig, *, serving: bool) -> Manifest:
    resources = {"CPU": str(group.cpus), "memory": str((group.memory_gib - group.shared_memory_gib) * GIB)}
    spec: Manifest = {
        "groupName": name,
        "replicas": group.minimum,
        "minReplicas": group.minimum,
        "maxReplicas": group.maximum,
        "idleTimeoutSeconds": group.idle_seconds,
        "priority": group.priority,
        "rayStartParams": {"metrics-export-port": str(METRICS_PORT)},
        "template": worker_pod(description, group, serving=serving),
    }
    if group.profile is not None:
        kind = group.profile.accelerator_type
        # With these the autoscaler knows what a host of the group would have before there is one.
        resources |= {"GPU": str(group.gpus), f"accelerator_type:{kind}": "1"}
        spec["labels"] = {"ray.io/accelerator-type": kind}
    return {**spec, "resources": resources}


def _require_selectors(description: ClusterDescription) -> None:
    """Raises ConfigError where pods of one GPU type could be put on nodes of another."""
    groups = {name: group for name, group in description.workers.items() if group.gpu}
    if len({group.gpu for group in groups.values()}) > 1:
        for name, group in groups.items():
            if not group.node_selector:
                raise ConfigError(
                    f"workers.{name}.node_selector is empty, and the cluster has several GPU types: without labels its "
                    f"pods could run on any of them; give those of the nodes that have {group.gpu}"
                )


def _runtime_environment(job: JobConfig) -> str:
    environment: dict[str, Any] = {"env_vars": {"PYTHONUNBUFFERED": "1", **job.environment}}
    if job.working_dir is not None:
        environment["working_dir"] = job.working_dir
    return _yaml(environment)


def _resource(description: ClusterDescription, kind: str, name: str, spec: Manifest) -> Manifest:
    metadata = {
        "name": name,
        "namespace": description.namespace,
        "labels": {"app.kubernetes.io/name": description.name, "app.kubernetes.io/part-of": "raysoner"},
    }
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}


def _yaml(content: Manifest) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text
