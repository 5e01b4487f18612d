"""KubeRay's resources: valid under its own definitions, and as strict as the house asks."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.__main__ import main as cluster
from cluster.config import ConfigError, ConfigParser, load_files
from cluster.deploy.commands import main, render
from cluster.deploy.description import HEALTH, ClusterDescription
from serving.config import ServingConfig
from tests.cluster.kuberay_crds import FOLDER, faults
from training.config import TrainingConfig

CONFIGS = Path("cluster/deploy/configs")
KUBERNETES = CONFIGS / "kubernetes.toml"
KINDS = {
    "raycluster.yaml": "RayCluster",
    "rayjob-train.yaml": "RayJob",
    "rayjob-tune.yaml": "RayJob",
    "rayservice.yaml": "RayService",
}
IMAGE_CODE = "/opt/raysoner/"


@pytest.fixture(scope="module")
def description() -> ClusterDescription:
    return load_files(ClusterDescription, KUBERNETES)


@pytest.fixture(scope="module")
def manifests(description: ClusterDescription) -> dict[str, Any]:
    return {name: yaml.safe_load(text) for name, text in render(description, "kuberay").items()}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = manifest["spec"].get("submitterPodTemplate")
    return [group["template"]["spec"] for group in groups] + ([submitter["spec"]] if submitter else [])


def changed(description: ClusterDescription, **settings: Any) -> ClusterDescription:
    return ClusterDescription.model_validate(description.model_dump(mode="json") | settings)


def test_every_resource_is_valid(manifests: dict[str, Any]) -> None:
    assert {name: manifest["kind"] for name, manifest in manifests.items()} == KINDS
    assert {name: faults(manifest) for name, manifest in manifests.items()} == {name: [] for name in KINDS}


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a manifest that the definitions name, by its place."""
    free = ("nodeSelector", "labels", "rayStartParams", "resources", "metadata", "limits", "requests")
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            if key not in free:
                yield from places(value, (*path, key))
    elif isinstance(node, list) and node:
        yield from places(node[0], (*path, 0))


def respelt(manifest: dict[str, Any], place: tuple[Any, ...]) -> dict[str, Any]:
    other = copy.deepcopy(manifest)
    node = other
    for key in place[:-1]:
        node = node[key]
    node[f"{place[-1]}z"] = node.pop(place[-1])
    return other


@pytest.mark.parametrize("name", KINDS)
def test_a_typo_in_any_key_is_caught(manifests: dict[str, Any], name: str) -> None:
    """Each key of the spec once, down to the containers'; the validator is only worth what it catches."""
    manifest = manifests[name]
    keys = [("spec", *place) for place in places(manifest["spec"])]
    assert len(keys) > 60
    short = {place[-1]: place for place in keys}  # one place for each name of a key keeps the test short
    missed = [place for place in short.values() if not faults(respelt(manifest, place))]
    assert missed == []


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("raycluster.yaml", ("spec", "rayVersion"), 2.6),
        ("raycluster.yaml", ("spec", "authOptions", "mode"), "tokens"),
        ("raycluster.yaml", ("spec", "autoscalerOptions", "version"), "v3"),
        ("raycluster.yaml", ("spec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 4),
        ("raycluster.yaml", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        ("rayjob-train.yaml", ("spec", "submissionMode"), "K8SJobMode"),
        ("rayservice.yaml", ("spec", "upgradeStrategy", "type"), "IncrementalUpgrade"),
    ],
)
def test_a_wrong_value_is_caught(manifests: dict[str, Any], name: str, place: tuple[Any, ...], value: Any) -> None:
    manifest = copy.deepcopy(manifests[name])
    node = manifest
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert any(str(place[-1]) in fault for fault in faults(manifest))


def test_a_group_for_each_gpu_type(description: ClusterDescription, manifests: dict[str, Any]) -> None:
    groups = {group["groupName"]: group for group in cluster_of(manifests["raycluster.yaml"])["workerGroupSpecs"]}
    assert groups.keys() == description.workers.keys()
    h100 = groups["h100"]
    assert h100["labels"] == {"ray.io/accelerator-type": "H100"}
    assert (h100["resources"]["GPU"], h100["resources"]["accelerator_type:H100"]) == ("8", "1")
    assert (h100["minReplicas"], h100["maxReplicas"], h100["idleTimeoutSeconds"], h100["priority"]) == (0, 4, 300, 10)
    container = h100["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert groups["a100"]["labels"] == {"ray.io/accelerator-type": "A100"}
    assert h100["template"]["spec"]["nodeSelector"] != groups["a100"]["template"]["spec"]["nodeSelector"]


def test_every_cluster_has_tokens_the_new_autoscaler_and_fast_health_checks(manifests: dict[str, Any]) -> None:
    for manifest in manifests.values():
        cluster = cluster_of(manifest)
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        for pod in pods_of(manifest):
            assert pod["restartPolicy"] == "Never"
            if pod["containers"][0]["name"] != "ray-job-submitter":
                variables = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
                assert HEALTH.items() <= variables.items()


def test_the_version_is_quoted_and_that_of_the_constraints(description: ClusterDescription) -> None:
    pinned = re.search(r"^ray==(.+)$", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    for text in render(description, "kuberay").values():
        assert f'rayVersion: "{pinned[1]}"' in text


def test_pods_are_restricted_limited_and_probed(manifests: dict[str, Any]) -> None:
    for manifest in manifests.values():
        assert pods_of(manifest)
        for pod in pods_of(manifest):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
                if container["name"] != "ray-job-submitter":
                    assert container.keys() >= {"startupProbe", "livenessProbe", "readinessProbe"}


def test_secrets_are_references(description: ClusterDescription, manifests: dict[str, Any]) -> None:
    for manifest in manifests.values():
        for variable in pods_of(manifest)[0]["containers"][0]["env"]:
            if variable["name"] in description.secrets:
                assert variable.keys() == {"name", "valueFrom"}
    options = cluster_of(manifests["raycluster.yaml"])["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}


def test_a_job_is_one_command_and_begins_again_where_it_was(manifests: dict[str, Any]) -> None:
    spec = manifests["rayjob-train.yaml"]["spec"]
    assert spec["entrypoint"].startswith("python -m training run --config ")
    assert not set(spec["entrypoint"]) & set("&|;$`\n")
    assert (spec["submissionMode"], spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == ("K8sJobMode", 2, True)
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"PYTHONUNBUFFERED": "1"}}
    assert "gcsFaultToleranceOptions" not in spec["rayClusterSpec"]


def command_words(description: ClusterDescription, kind: str) -> list[str]:
    """Of a job, with the image's checkout taken for this one, and data that is there for that on the storage."""
    words = [word.removeprefix(IMAGE_CODE) for word in getattr(description, kind).command]
    words[words.index("--data.train") + 1] = "training/demo/data/train.jsonl"
    assert words[:2] == ["python", "-m"]
    return words[2:]


def test_the_training_command_is_one_that_training_takes(description: ClusterDescription) -> None:
    package, verb, *flags = command_words(description, "train")
    assert (package, verb) == ("training", "run")
    config = ConfigParser(TrainingConfig, prog="t", description="").load(TrainingConfig, flags)[0]
    assert config.run.storage.startswith(description.storage)


def test_the_tuning_command_is_one_that_tuning_takes(description: ClusterDescription) -> None:
    tuning = pytest.importorskip("tuning.config", reason="the search is not built yet")
    package, verb, *flags = command_words(description, "tune")
    assert (package, verb) == ("tuning", "search")
    parser = ConfigParser(tuning.SearchConfig, prog="t", description="")
    assert parser.load(tuning.SearchConfig, flags)[0]


def test_the_endpoint_is_one_that_serve_and_serving_take(manifests: dict[str, Any]) -> None:
    spec = manifests["rayservice.yaml"]["spec"]
    assert spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    told = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = told.applications
    config = ServingConfig.model_validate(application.args)
    assert config.security.keys == "/etc/raysoner/keys/keys.json"
    worker = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    container = worker["containers"][0]
    assert {"name": "api-keys", "mountPath": "/etc/raysoner/keys", "readOnly": True} in container["volumeMounts"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    assert worker["terminationGracePeriodSeconds"] > config.replicas.graceful_shutdown_seconds
    package, name = application.import_path.split(":")
    assert hasattr(__import__(package, fromlist=[name]), name)


def test_without_a_gateway_a_whole_cluster_takes_over(description: ClusterDescription) -> None:
    assert description.serve is not None
    serve = description.serve.model_dump(mode="json") | {"gateway_class": None}
    (text,) = render(changed(description, serve=serve), "kuberay", "serve").values()
    manifest = yaml.safe_load(text)
    assert manifest["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    if FOLDER.is_dir():
        assert faults(manifest) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": {"x": {"gpu": "H1000", "gpus": 8}}}, "H1000 is no GPU type .* did you mean H100"),
        ({"workers": {"x": {"gpu": "H100"}}}, "gpu and gpus go together"),
        ({"workers": {"x": {"minimum": 3, "maximum": 2}}}, "minimum must not exceed maximum"),
        ({"workers": {}}, "at least 1 item"),
        ({"environment": {"HF_TOKEN": "hf_abc"}}, r"HF_TOKEN looks like a secret, .* \[secrets\]"),
        ({"secrets": {"HF_TOKEN": "hf_abc"}}, "as SECRET/KEY, and is no value"),
        ({"storage": "s3://me:secret@bucket/runs"}, "neither user, password nor options"),
        ({"storage": "runs"}, "must be an absolute path"),
        ({"image": "raysoner"}, "should match pattern"),
        ({"name": "Raysoner_1"}, "should match pattern"),
        ({"serve": {"config": "x.toml"}}, "name the Secret of its API keys in keys_secret"),
    ],
)
def test_what_cannot_be_is_refused(description: ClusterDescription, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(description, **settings)


@pytest.mark.parametrize(
    "words", [["--secrets", '{"HF_TOKEN": "hf_abc"}'], ["--storage", "s3://me:hf_abc@bucket/runs"]]
)
def test_a_secret_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cluster(["render", "--target", "kuberay", "--config", str(KUBERNETES), "--out", "unused", *words]) == 2
    printed = "".join(capsys.readouterr())
    assert "SECRET/KEY" in printed or "neither user, password" in printed
    assert "hf_abc" not in printed


def test_gpu_types_that_labels_do_not_tell_apart_are_refused(description: ClusterDescription) -> None:
    workers = description.model_dump(mode="json")["workers"]
    workers["a100"]["node_selector"] = {}
    with pytest.raises(ConfigError, match=r"workers\.a100\.node_selector is empty.*A100-80G"):
        render(changed(description, workers=workers), "kuberay", "cluster")


def test_a_folder_that_no_pod_has_is_refused(description: ClusterDescription) -> None:
    with pytest.raises(ConfigError, match="name its PersistentVolumeClaim in storage_claim"):
        render(changed(description, storage_claim=None), "kuberay", "cluster")


def test_a_kind_without_its_table_is_refused(description: ClusterDescription) -> None:
    with pytest.raises(ConfigError, match=r"needs a table \[tune\]"):
        render(changed(description, tune=None), "kuberay", "tune")
    assert "rayjob-tune.yaml" not in render(changed(description, tune=None), "kuberay")


def test_the_command_writes_what_is_rendered(
    description: ClusterDescription, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", "kuberay", "--kind", "train", "--config", str(KUBERNETES), "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    path = tmp_path / "out" / "rayjob-train.yaml"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8") == render(description, "kuberay", "train")["rayjob-train.yaml"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "kubernetes"], "invalid choice"),
        (["--target", "kuberay", "--kinds", "serve"], "--kinds is unknown: did you mean --kind"),
        (["--target", "kuberay", "--namespac", "x"], "--namespac is unknown: did you mean --namespace"),
        (["--target", "local", "--kind", "serve"], "--kind serve goes with --target kuberay alone"),
        (["--target", "ray-up"], r"needs a table \[launcher\]"),
        (["--target", "kuberay", "--namespace", "Bad_"], "flag --namespace: .*match pattern"),
    ],
)
def test_mistakes_on_the_command_line(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        main([*flags, "--config", str(KUBERNETES), "--out", str(tmp_path)])


def test_a_mistake_in_a_file_names_its_line_and_ends_with_2(tmp_path: Path) -> None:
    text = KUBERNETES.read_text(encoding="utf-8").replace('gpu = "A100-80G"', 'gpu = "A100-80"')
    path = tmp_path / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "cluster", "render", "--target", "kuberay", "--config", str(path), "--out", "."]
    done = subprocess.run(command, capture_output=True, text=True)
    line = text[: text.index('A100-80"')].count("\n") + 1
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}:{line}: workers.a100.gpu: A100-80 is no GPU type")
    assert len(done.stderr.splitlines()) == 1
