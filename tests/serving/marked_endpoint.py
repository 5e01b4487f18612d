"""python -m tests.serving.marked_endpoint KEYS FOLDER: marked replicas on a Ray of its own, as `deploy` starts it.

Prints the address. Replaces the application at each line on standard input, and says so; ends with the input.

Args:
    KEYS: file of API keys.
    FOLDER: of Ray's session.
"""

from __future__ import annotations

import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.local import free_ports
from serving.app import application
from serving.proxy import CALLBACK
from tests.serving.harness import serving_config
from tests.serving.marked_replica import MarkedReplica

GRACEFUL_SECONDS = 2


def main(keys: str, folder: str) -> None:
    """Serves until the input ends."""
    [port] = free_ports(1)
    ray.init(address="local", _temp_dir=folder, num_cpus=3, include_dashboard=False, runtime_env={"env_vars": CALLBACK})
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        deploy(keys, 0)
        print(f"http://127.0.0.1:{port}", flush=True)
        for number, _ in enumerate(sys.stdin, start=1):
            deploy(keys, number)
            print("replaced", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(keys: str, number: int) -> None:
    """The application, in place of what runs; another number makes another of it."""
    config = serving_config(
        security={"keys": keys},
        replicas={"gpus": 0, "graceful_shutdown_seconds": GRACEFUL_SECONDS},
        limits={"prompt_tokens": 1500, "messages": 8, "body_bytes": 8192, "waiting_requests": 50 + number},
        engine={"maximum_output_tokens": 400, "default_output_tokens": 300, "maximum_cached_tokens": 4096},
    )
    serve.run(application(config, MarkedReplica), name="marked", route_prefix="/")


if __name__ == "__main__":
    main(*sys.argv[1:])
