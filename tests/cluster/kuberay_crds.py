"""KubeRay's custom resource definitions as JSON schemas, with what Kubernetes' own format leaves open closed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).parents[2].parent / "shared" / "kuberay-crds"
"""beside the checkout; SOURCE.txt there says which version"""
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of a kind's version v1; the test is skipped where the definitions are not there."""
    path = FOLDER / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's definitions are not at {FOLDER}")
    definition = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schema = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """The same as JSON Schema: an unknown key is an error, Kubernetes' extensions are gone, null is a type.

    `metadata` of a resource has no properties in the definitions, so only the API server could check it.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: value if key in ("enum", "required", "default") else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key != "nullable"
    }
    if schema.get("nullable") and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        kept.setdefault("additionalProperties", False)
    return kept


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest: the place of each fault, and what it is."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator(manifest["kind"]).iter_errors(manifest)
    ]
    spec = manifest["spec"]
    # The definitions have no enum of these two; the operator refuses others.
    if manifest["kind"] == "RayJob" and spec.get("submissionMode", "K8sJobMode") not in SUBMISSION_MODES:
        found.append(f"spec.submissionMode: {spec['submissionMode']}")
    if manifest["kind"] == "RayService" and spec.get("upgradeStrategy", {}).get("type", "NewCluster") not in UPGRADES:
        found.append(f"spec.upgradeStrategy.type: {spec['upgradeStrategy']['type']}")
    return found
