"""Files for Ray's own cluster launcher, `ray up`: AWS, GCP, and hosts that are there already."""

from __future__ import annotations

import shlex
from typing import Any

from cluster.config import ConfigError
from cluster.deploy.description import ClusterDescription, LauncherConfig, MachineConfig, WorkersConfig
from cluster.storage import is_uri

HEAD = "head"
TOKEN = "/tmp/raysoner/auth_token"
"""where a node's container finds Ray's token, which the launcher copies from `~/.ray/auth_token`"""

Settings = dict[str, Any]


def ray_up(description: ClusterDescription) -> Settings:
    """Content of the file that `ray up` takes.

    Raises:
        ConfigError: the description lacks what the provider needs.
    """
    launcher = description.launcher
    if launcher is None:
        raise ConfigError("a file for ray up needs a table [launcher] with provider")
    if description.secrets:
        raise ConfigError(
            f"secrets.{next(iter(description.secrets))} names a Kubernetes Secret, which hosts of ray up do not have: "
            "leave it out, and give the variable in the job's own environment when you submit it"
        )
    if description.redis is not None and description.redis.password is not None:
        raise ConfigError(
            "redis.password names a Kubernetes Secret, which hosts of ray up do not have: leave it out, and let Redis "
            "be reached from the cluster's network alone"
        )
    settings: Settings = {
        "cluster_name": description.name,
        "max_workers": sum(group.maximum for group in description.workers.values()),
        "idle_timeout_minutes": max(group.idle_seconds for group in description.workers.values()) / 60,
        "provider": _provider(launcher),
        "auth": _login(launcher),
        "docker": _docker(description),
        "file_mounts": {TOKEN: "~/.ray/auth_token"},
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", _start(description, head=True)],
        "worker_start_ray_commands": ["ray stop", _start(description, head=False)],
    }
    if launcher.provider == "on-premises":
        return _on_premises(settings, description, launcher)
    types = {HEAD: _type(launcher, HEAD, description.head)}
    for name, group in description.workers.items():
        types[f"worker-{name}"] = _type(launcher, f"workers.{name}", group)
    return {**settings, "head_node_type": HEAD, "available_node_types": types}


def _on_premises(settings: Settings, description: ClusterDescription, launcher: LauncherConfig) -> Settings:
    """Ray's provider `local` knows one type of node, whose resources each node finds out by itself."""
    if len(description.workers) > 1:
        raise ConfigError(
            f"on premises, ray up knows one type of worker, and the description has {', '.join(description.workers)}: "
            "give one group, whose hosts may differ, for each finds out by itself what it has; or use Kubernetes"
        )
    ((name, group),) = description.workers.items()
    if (hosts := len(launcher.worker_addresses)) != group.maximum:
        raise ConfigError(
            f"launcher.worker_addresses names {hosts} hosts and workers.{name}.maximum is {group.maximum}; on premises "
            "the two must agree"
        )
    return {**settings, "min_workers": group.minimum, "max_workers": group.maximum}


def _provider(launcher: LauncherConfig) -> Settings:
    if launcher.provider == "on-premises":
        return {"type": "local", "head_ip": launcher.head_address, "worker_ips": list(launcher.worker_addresses)}
    settings: Settings = {"type": launcher.provider, "region": launcher.region, "cache_stopped_nodes": False}
    if launcher.zones:
        settings["availability_zone"] = ",".join(launcher.zones)
    if launcher.provider == "gcp":
        settings["project_id"] = launcher.project
    return settings


def _login(launcher: LauncherConfig) -> Settings:
    key = {"ssh_private_key": launcher.ssh_private_key} if launcher.ssh_private_key else {}
    return {"ssh_user": launcher.ssh_user, **key}


def _docker(description: ClusterDescription) -> Settings:
    options = ["--ulimit nofile=65536:65536", "--security-opt no-new-privileges"]
    if not is_uri(description.storage):
        options.append(f"-v {description.storage}:{description.storage}")
    return {
        "image": description.image,
        "container_name": "raysoner",
        "pull_before_run": True,
        "run_options": options,
    }


def _start(description: ClusterDescription, *, head: bool) -> str:
    """`ray start` with health checks that find a lost host soon, and with the token."""
    given = description.head_variables if head else description.host_variables
    variables = {**given, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    if not head:
        return f"{exports} ray start --address=$RAY_HEAD_IP:6379 --metrics-export-port=8080"
    # The dashboard listens on the head alone: `ray dashboard FILE` forwards it.
    return (
        f"{exports} ray start --head --port=6379 --metrics-export-port=8080 --num-cpus=0 --num-gpus=0 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )


def _type(launcher: LauncherConfig, place: str, machine: MachineConfig) -> Settings:
    if machine.machine is None:
        raise ConfigError(f"{place}.machine is missing: name the machine type that {launcher.provider} calls it by")
    config = _aws(launcher, machine) if launcher.provider == "aws" else _gcp(launcher, machine)
    settings: Settings = {"node_config": config, "resources": {"CPU": 0}, "max_workers": 0}
    if isinstance(machine, WorkersConfig):
        settings |= {"resources": {"CPU": machine.cpus}, "min_workers": machine.minimum}
        settings |= {"max_workers": machine.maximum, "idle_timeout_s": machine.idle_seconds}
        settings["priority"] = machine.priority
        if machine.profile is not None:
            kind = machine.profile.accelerator_type
            settings["resources"] |= {"GPU": machine.gpus, f"accelerator_type:{kind}": 1}
            settings["labels"] = {"ray.io/accelerator-type": kind}
    return settings


def _aws(launcher: LauncherConfig, machine: MachineConfig) -> Settings:
    disk = {"VolumeSize": launcher.disk_gib, "VolumeType": "gp3", "Encrypted": True}
    config: Settings = {
        "InstanceType": machine.machine,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # One hop more, for the container asks too; version 2 alone hands out no credentials to a forged request.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if launcher.instance_profile is not None:
        config["IamInstanceProfile"] = {"Arn": launcher.instance_profile}
    if isinstance(machine, WorkersConfig) and machine.spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    return config


def _gcp(launcher: LauncherConfig, machine: MachineConfig) -> Settings:
    disk = {"diskSizeGb": launcher.disk_gib, "sourceImage": launcher.source_image}
    config: Settings = {
        "machineType": machine.machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
    }
    if isinstance(machine, WorkersConfig):
        # Machines with GPUs cannot be moved to another host.
        scheduling = [{"onHostMaintenance": "TERMINATE"}] if machine.gpus else []
        config["scheduling"] = scheduling + ([{"preemptible": True}] if machine.spot else [])
    return config
