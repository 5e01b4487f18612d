"""`render --target monitoring`: in which namespace a cluster is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.deploy.commands import main

KUBERNETES = "cluster/deploy/configs/kubernetes.toml"


@pytest.mark.parametrize(
    ("words", "namespace"),
    [([], "default"), (["--config", KUBERNETES], "raysoner"), (["--config", KUBERNETES, "--namespace", "own"], "own")],
)
def test_the_namespace_is_the_description_s(words: list[str], namespace: str, tmp_path: Path) -> None:
    assert main(["--target", "monitoring", "--out", str(tmp_path), *words]) == 0
    monitor = yaml.safe_load((tmp_path / "kubernetes" / "podmonitor.yaml").read_text(encoding="utf-8"))
    rule = yaml.safe_load((tmp_path / "kubernetes" / "prometheusrule.yaml").read_text(encoding="utf-8"))
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": [namespace]}
    assert monitor["metadata"]["namespace"] == rule["metadata"]["namespace"] == namespace
