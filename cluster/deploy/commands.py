"""Command line of the manifests: `python -m cluster render`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.artifacts import publish_file
from cluster.config import ConfigError, ConfigParser, load_files
from cluster.deploy.description import ClusterDescription

TARGETS = ("kuberay", "ray-up", "local", "monitoring")
KINDS = ("cluster", "train", "tune", "serve")
Kind = Literal["cluster", "train", "tune", "serve"]

DESCRIPTION = """Writes what starts a cluster, all of it made from one description:

  kuberay     RayCluster, RayJob for training and for tuning, RayService for an endpoint
  ray-up      the file of Ray's cluster launcher, for AWS, GCP or hosts that are there
  local       scripts that start a head and workers by hand
  monitoring  dashboards for Grafana, prometheus.yml and alerts; takes the namespace of a description, and needs none

  python -m cluster render --target kuberay --config cluster/deploy/configs/kubernetes.toml --out manifests"""

_MADE = "# Made by python -m cluster render --target {target}; change {source}, not this file.\n"


def main(arguments: Sequence[str]) -> int:
    """Run `render`; returns the exit status: 0 done, 2 something that the user can mend.

    Raises:
        ConfigError: the description, or what it lacks, cannot be rendered.
    """
    if _asks_for_monitoring(arguments):
        return _monitoring(arguments)
    parser = ConfigParser(ClusterDescription, prog="python -m cluster render", description=DESCRIPTION)
    parser.add_argument("--target", choices=TARGETS, required=True, help="what starts the cluster")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the files; those of before are replaced"
    )
    parser.add_argument("--kind", choices=KINDS, help="of KubeRay's resources, only this; by default all described")
    description, flags = parser.load(ClusterDescription, arguments)
    if flags.kind and flags.target != "kuberay":
        raise ConfigError(f"--kind {flags.kind} goes with --target kuberay alone; leave it out")
    _write(Path(flags.out), render(description, flags.target, flags.kind))
    return 0


def render(description: ClusterDescription, target: str, kind: Kind | None = None) -> dict[str, str]:
    """The content of each file, by its name.

    Args:
        description: of the cluster.
        target: kuberay, ray-up or local.
        kind: of KubeRay's resources; None makes all that the description has.

    Raises:
        ConfigError: the description lacks what is needed.
    """
    if target == "kuberay":
        from cluster.deploy.kuberay import ray_cluster, ray_job, ray_service

        makers: dict[Kind, tuple[str, Callable[[], Mapping[str, Any]]]] = {
            "cluster": ("raycluster.yaml", lambda: ray_cluster(description)),
            "train": ("rayjob-train.yaml", lambda: ray_job(description, "train")),
            "tune": ("rayjob-tune.yaml", lambda: ray_job(description, "tune")),
            "serve": ("rayservice.yaml", lambda: ray_service(description)),
        }
        described = [each for each in makers if each == "cluster" or getattr(description, each) is not None]
        chosen = [makers[each] for each in ([kind] if kind else described)]
        return {name: to_yaml(make(), target) for name, make in chosen}
    if target == "ray-up":
        from cluster.deploy.ray_up import ray_up

        return {"ray-up.yaml": to_yaml(ray_up(description), target)}
    from cluster.deploy.local import head_script, worker_script

    workers = {f"worker-{name}.sh": worker_script(description, group) for name, group in description.workers.items()}
    return {"head.sh": head_script(description), **workers}


def _asks_for_monitoring(arguments: Sequence[str]) -> bool:
    return "--target=monitoring" in arguments or ("--target", "monitoring") in pairwise(arguments)


def _monitoring(arguments: Sequence[str]) -> int:
    """Render what watches a cluster, which is the same for all of them."""
    from cluster.monitoring.files import dashboard_files, yaml_files

    parser = argparse.ArgumentParser(
        prog="python -m cluster render --target monitoring",
        description="Writes dashboards for Grafana, prometheus.yml and alerts.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", required=True, choices=("monitoring",), help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the files; those of before are replaced"
    )
    parser.add_argument("--temp-dir", default="/tmp/ray", metavar="DIR", help="of the head, as ray start has it")
    own = ClusterDescription.model_fields["namespace"].default
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of a cluster: its namespace is taken",
    )
    parser.add_argument(
        "--namespace", metavar="NAME", help=f"of the cluster on Kubernetes; by default the description's, else {own}"
    )
    flags = parser.parse_args(arguments)
    described = load_files(ClusterDescription, *flags.config).namespace if flags.config else own
    namespace = flags.namespace or described
    if not flags.temp_dir.startswith("/"):
        raise ConfigError(f"--temp-dir {flags.temp_dir} is relative; Prometheus needs the whole path")
    made = {
        name: to_yaml(content, flags.target, "cluster/monitoring")
        for name, content in yaml_files(flags.temp_dir, namespace).items()
    }
    _write(Path(flags.out), {**dashboard_files(), **made})
    return 0


def to_yaml(content: Mapping[str, Any], target: str, source: str = "the description") -> str:
    """A file of YAML made from `source`, whose keys keep their order. A string of digits and dots is quoted."""
    text: str = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return _MADE.format(target=target, source=source) + text


class _Dumper(yaml.SafeDumper):
    """Writes the same mapping out wherever it stands, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else '"' if re.fullmatch(r"[\d.]+", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish_file(path) as scratch:
                scratch.write_text(text, encoding="utf-8")
                scratch.chmod(0o755 if name.endswith(".sh") else 0o644)
        except OSError as error:
            raise ConfigError(f"--out {folder}: {path} cannot be written ({error.strerror})") from error
        print(path, file=sys.stdout)
