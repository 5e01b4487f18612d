"""Scripts that start a head and workers by hand, on a laptop or on hosts without Kubernetes or a cloud."""

from __future__ import annotations

import shlex

from cluster.deploy.description import ClusterDescription, WorkersConfig

_HEADER = """#!/bin/sh
# Made by python -m cluster render --target local from the description of {name}; change that, not this.
# Further words are handed to `ray start`; the token is that of `ray get-auth-token --generate`, the same on all hosts.
set -eu
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
{exports}
"""


def head_script(description: ClusterDescription) -> str:
    """Starts the head, which works too where the description has one group of one host, as a laptop is."""
    groups = list(description.workers.values())
    works = len(groups) == 1 and groups[0].maximum == 1
    resources = _resources(groups[0]) if works else ["--num-cpus=0", "--num-gpus=0"]
    words = ["exec", "ray", "start", "--head", "--block", "--include-dashboard=true", *resources]
    secret = description.redis is not None and description.redis.password is not None
    password = ' --redis-password="${REDIS_PASSWORD:?set it to the password of Redis}"' if secret else ""
    return _script(description.head_variables, description.name, words, password)


def worker_script(description: ClusterDescription, group: WorkersConfig) -> str:
    """Starts a host of a group; `RAY_HEAD` is the head's host:port."""
    words = ["exec", "ray", "start", "--block", *_resources(group)]
    head = ' --address="${RAY_HEAD:?set it to the host:port of the head}"'
    return _script(description.host_variables, description.name, words, head)


def _resources(group: WorkersConfig) -> list[str]:
    """What a host is taken to have. Ray finds a GPU's type by itself, and labels the host with it."""
    return [f"--num-cpus={group.cpus}", f"--num-gpus={group.gpus}"]


def _script(variables: dict[str, str], name: str, words: list[str], more: str = "") -> str:
    exports = "\n".join(f"export {variable}={shlex.quote(value)}" for variable, value in variables.items())
    return f'{_HEADER.format(name=name, exports=exports)}{shlex.join(words)}{more} "$@"\n'
