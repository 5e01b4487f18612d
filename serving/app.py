"""The Ray Serve application: one deployment of autoscaled replicas, ingress and engine together.

`python -m serving deploy` runs it; so does a Serve YAML file with `import_path: serving.app:build` and the settings
of a `ServingConfig` under `args`.
"""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from serving.autoscaling import ScalingPolicy
from serving.config import ServingConfig
from serving.replica import Replica

_REPORT_SECONDS = 2.0
"""how often proxies and replicas tell the controller their load"""
_LOOK_BACK_SECONDS = 6.0
"""span whose mean the controller goes by"""

_RETRY_SECONDS = 5.0
"""when a proxy that holds too many requests asks for the next; replicas may be starting"""


def build(args: dict[str, Any]) -> serve.Application:
    """The application for a `ServingConfig` given as plain data.

    Raises:
        pydantic.ValidationError: a setting is unknown or not allowed.
    """
    return application(ServingConfig.model_validate(args), Replica)


def application(config: ServingConfig, replica: type[Any]) -> serve.Application:
    """The application of a configuration whose replicas are `replica`, or a subclass of it."""
    replicas = config.replicas
    deploy = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        autoscaling_config=scaling(config),
        max_ongoing_requests=config.maximum_ongoing_requests,
        # Only while replicas start do requests queue in a proxy.
        max_queued_requests=config.maximum_ongoing_requests * replicas.maximum,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_SECONDS),
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_seconds,
    )
    deployment: serve.Deployment = deploy(replica)
    return deployment.bind(config.model_dump(mode="json"))


def scaling(config: ServingConfig) -> AutoscalingConfig:
    """When Serve's controller adds and removes replicas: `serving.autoscaling` with a configuration's targets."""
    replicas, engine = config.replicas, config.engine
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={
            "tokens": config.target_tokens,
            "places": engine.maximum_concurrent,
            "requests": replicas.target_ongoing_requests,
            "queue_seconds": replicas.target_queue_seconds,
        },
    )
    with warnings.catch_warnings():
        # Serve 2.60 calls the interval deprecated, and takes it from nowhere else.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.minimum,
            max_replicas=replicas.maximum,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_seconds,
            downscale_delay_s=replicas.downscale_seconds,
            metrics_interval_s=_REPORT_SECONDS,
            look_back_period_s=_LOOK_BACK_SECONDS,
            policy=policy,
        )
