"""Files of `ray up`, held against Ray's own schema and checks without a cloud, and the scripts that start Ray."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import ConfigError, load_files
from cluster.deploy.commands import render
from cluster.deploy.description import HEALTH, ClusterDescription

CONFIGS = Path("cluster/deploy/configs")
PROVIDERS = ("aws", "gcp", "on-premises")
SHIPPED = sorted(path for path in CONFIGS.glob("*.toml") if path.stem != "endpoint")


def described(name: str, **settings: Any) -> ClusterDescription:
    shipped = load_files(ClusterDescription, CONFIGS / f"{name}.toml").model_dump(mode="json")
    return ClusterDescription.model_validate(shipped | settings)


def launcher_file(name: str, **settings: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(render(described(name, **settings), "ray-up")["ray-up.yaml"])
    return content


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_descriptions_load(path: Path) -> None:
    assert load_files(ClusterDescription, path)


@pytest.mark.parametrize("name", PROVIDERS)
def test_ray_takes_the_file(name: str) -> None:
    prepared = prepare_config(launcher_file(name))
    validate_config(prepared)
    assert prepared["provider"]["type"] == {"on-premises": "local"}.get(name, name)


@pytest.mark.parametrize("name", PROVIDERS)
def test_ray_refuses_a_typo(name: str) -> None:
    content = launcher_file(name)
    for key in content:
        other = copy.deepcopy(content)
        other[f"{key}z"] = other[key]
        with pytest.raises(jsonschema.ValidationError, match=f"{key}z"):
            validate_config(prepare_config(other))


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_process_has_the_token_and_fast_health_checks(name: str) -> None:
    content = launcher_file(name)
    assert content["file_mounts"] == {"/tmp/raysoner/auth_token": "~/.ray/auth_token"}
    for which in ("head", "worker"):
        command = content[f"{which}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/tmp/raysoner/auth_token ray start" in command
        assert all(f"{key}={value} " in command for key, value in HEALTH.items())


def test_types_of_a_cloud() -> None:
    types = launcher_file("aws")["available_node_types"]
    assert types.keys() == {"head", "worker-h100", "worker-l40s"}
    assert types["worker-h100"]["resources"] == {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}
    assert types["worker-h100"]["labels"] == {"ray.io/accelerator-type": "H100"}
    assert types["worker-l40s"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["worker-h100"]["node_config"]
    assert launcher_file("gcp")["available_node_types"]["worker-h100"]["node_config"]["scheduling"] == [
        {"onHostMaintenance": "TERMINATE"}
    ]


def test_on_premises_has_one_type_of_worker() -> None:
    prepared = prepare_config(launcher_file("on-premises"))
    assert prepared["available_node_types"].keys() == {"local.cluster.node"}
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    workers = described("on-premises").model_dump(mode="json")["workers"]
    with pytest.raises(ConfigError, match=r"on premises, ray up knows one type of worker.*gpu, more"):
        launcher_file("on-premises", workers={**workers, "more": workers["gpu"]})
    with pytest.raises(ConfigError, match=r"names 2 hosts and workers\.gpu\.maximum is 3"):
        launcher_file("on-premises", workers={"gpu": {**workers["gpu"], "maximum": 3}})


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("aws", {"secrets": {"HF_TOKEN": "hugging-face/token"}}, "secrets.HF_TOKEN names a Kubernetes Secret"),
        ("aws", {"workers": {"cpu": {}}}, "workers.cpu.machine is missing"),
    ],
)
def test_what_hosts_do_not_have_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launcher_file(name, **settings)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"provider": "aws"}, "aws needs region too"),
        ({"provider": "gcp", "region": "us-central1"}, "gcp needs zones, project, source_image too"),
        ({"provider": "on-premises", "head_address": "192.0.2.1"}, "needs worker_addresses, ssh_private_key too"),
        ({"provider": "azure"}, "should be 'aws', 'gcp' or 'on-premises'"),
    ],
)
def test_a_launcher_that_lacks_something(launcher: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        described("aws", launcher=launcher)


def test_scripts_are_shell() -> None:
    for name in ("laptop", "on-premises"):
        for text in render(described(name), "local").values():
            assert subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).stderr == ""
            assert all(f"export {key}={value}\n" in text for key, value in HEALTH.items())


def test_hosts_wait_for_a_head_that_keeps_its_state() -> None:
    """Its password is the environment's, in no file; and the address of Redis is the head's business alone."""
    redis = {"address": "192.0.2.9:6379", "password": "redis/password"}
    texts = render(described("on-premises", redis=redis), "local")
    assert "export RAY_REDIS_ADDRESS=192.0.2.9:6379\n" in texts["head.sh"]
    assert "export RAY_external_storage_namespace=raysoner\n" in texts["head.sh"]
    assert "REDIS" not in texts["worker-gpu.sh"]
    assert all("export RAY_gcs_rpc_server_reconnect_timeout_s=600\n" in text for text in texts.values())
    said = subprocess.run(["sh", "-s"], input=texts["head.sh"], text=True, capture_output=True, env={"PATH": "/bin"})
    assert "REDIS_PASSWORD: set it to the password of Redis" in said.stderr
    with pytest.raises(ConfigError, match=r"redis\.password names a Kubernetes Secret"):
        launcher_file("on-premises", redis=redis)
    content = launcher_file("on-premises", redis={"address": redis["address"]})
    assert "RAY_REDIS_ADDRESS=192.0.2.9:6379 " in content["head_start_ray_commands"][-1]
    assert "RAY_REDIS_ADDRESS" not in content["worker_start_ray_commands"][-1]


def test_a_worker_without_a_head_says_so() -> None:
    text = render(described("laptop"), "local")["worker-laptop.sh"]
    done = subprocess.run(["sh", "-s"], input=text, text=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "RAY_HEAD: set it to the host:port of the head" in done.stderr
