"""The deployment's own parts, without a cluster."""

from __future__ import annotations

import pytest

from serving.app import build
from serving.engines.scripted import ScriptedEngine
from serving.replica import Replica
from tests.serving.harness import serving_config


def test_health_check_follows_the_engine() -> None:
    replica = object.__new__(Replica)
    replica.engine = ScriptedEngine([])
    replica.check_health()
    replica.engine.stop()
    with pytest.raises(RuntimeError, match="died"):
        replica.check_health()


def test_settings_reach_the_deployment() -> None:
    config = serving_config(
        replicas={
            "minimum": 2,
            "maximum": 5,
            "cpus": 3,
            "gpus": 1,
            "target_ongoing_requests": 7.5,
            "maximum_ongoing_requests": 99,
            "graceful_shutdown_seconds": 321,
        }
    )
    deployment = build(config.model_dump(mode="json"))._bound_deployment
    options, settings = deployment.ray_actor_options, deployment._deployment_config
    scaling = settings.autoscaling_config
    assert options is not None
    assert scaling is not None
    assert (options["num_cpus"], options["num_gpus"]) == (3, 1)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 7.5)
    assert (settings.max_ongoing_requests, settings.graceful_shutdown_timeout_s) == (99, 321)
