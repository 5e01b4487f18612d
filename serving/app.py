"""The Ray Serve application: one deployment of autoscaled replicas, ingress and engine together.

`python -m serving deploy` runs it; so does a Serve YAML file with `import_path: serving.app:build` and the settings
of a `ServingConfig` under `args`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from serving.config import ServingConfig
from serving.replica import Replica


def build(args: dict[str, Any]) -> serve.Application:
    """The application for a `ServingConfig` given as plain data.

    Raises:
        pydantic.ValidationError: a setting is unknown or not allowed.
    """
    config = ServingConfig.model_validate(args)
    replicas = config.replicas
    deploy = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.minimum,
            max_replicas=replicas.maximum,
            target_ongoing_requests=replicas.target_ongoing_requests,
        ),
        max_ongoing_requests=replicas.maximum_ongoing_requests,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_seconds,
    )
    deployment: serve.Deployment = deploy(Replica)
    return deployment.bind(config.model_dump(mode="json"))
