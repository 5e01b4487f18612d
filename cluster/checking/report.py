"""What was found on the nodes of a cluster, what is wrong with it, and the remedy of each. No torch, no ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from cluster.config import Config, ConfigError
from cluster.hardware import GIB, PROFILES, GpuProfile, profile_of
from cluster.memory import size
from cluster.planning.gpus import GpuGroup, counts_text
from cluster.planning.plan import Job, make_plan
from cluster.tables import table

LEAST_DISK_BYTES = 20 * GIB
"""free, for spilled objects, logs and a model's shards"""
LEAST_OBJECT_STORE_BYTES = 128 * 2**20
NEEDED = ("ray", "torch", "transformers", "trl", "peft")
NEEDED_WITH_GPU = ("triton", "nccl")
HEAD = ("node", "GPUs", "memory", "driver", "CUDA", "torch", "triton", "NCCL", "python", "ray", "disk", "object store",
        "storage", "token")  # fmt: skip


class Gpu(Config):
    """As `nvidia-smi` reports it."""

    name: str
    memory_bytes: int | None
    driver: str


class Node(Config):
    """A node's answer; `error` says why there is none."""

    host: str
    node_id: str = ""
    address: str = ""
    ray_gpus: int = 0
    """that Ray hands out"""
    ray_gpu_type: str | None = None
    object_store_bytes: int | None = None
    error: str | None = None
    cpus: int | None = None
    gpus: tuple[Gpu, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    cuda: str | None = None
    """that PyTorch was built for"""
    free_disk_bytes: int | None = None
    token: bool | None = None
    """Ray asks for a token"""
    storage_error: str | None = None

    @property
    def profile(self) -> GpuProfile | None:
        """Of its GPUs, where they are known."""
        if self.gpus:
            return profile_of(self.gpus[0].name)
        return next((each for each in PROFILES if each.accelerator_type == self.ray_gpu_type), None)


class Finding(Config):
    """Something to mend (`error`: a run will fail) or to know (`warning`)."""

    severity: Literal["error", "warning"]
    where: str
    what: str
    remedy: str


class Report(Config):
    """The whole check."""

    nodes: list[Node]
    findings: list[Finding]
    storage: str | None
    """that every node was asked to keep a file in"""
    fits: list[str]
    """for each model, whether and how it fits"""
    ready: bool
    """no finding is an error"""


def make_report(
    nodes: Sequence[Node], models: Sequence[Job], *, cluster: bool, storage: str | None, must_fit: bool = False
) -> Report:
    """Judge the nodes.

    Args:
        nodes: as they answered.
        models: that are held against the nodes' GPUs.
        cluster: the nodes are a Ray cluster's, not this machine alone.
        storage: that they were asked to reach, without secrets.
        must_fit: a model that does not fit is an error.
    """
    findings = [*_on_nodes(nodes, cluster=cluster, storage=storage), *_between(nodes)]
    fits, unfit = [], []
    for job in models:
        sentence, finding = _fit(job, nodes)
        fits.append(sentence)
        unfit += [finding] if finding and must_fit else []
    findings += unfit
    ready = not any(finding.severity == "error" for finding in findings)
    return Report(nodes=list(nodes), findings=findings, storage=storage, fits=fits, ready=ready)


def _on_nodes(nodes: Sequence[Node], *, cluster: bool, storage: str | None) -> Iterator[Finding]:
    for node in nodes:

        def finding(severity: Literal["error", "warning"], what: str, remedy: str, where: str = node.host) -> Finding:
            return Finding(severity=severity, where=where, what=what, remedy=remedy)

        if node.error:
            yield finding("error", node.error, "see `ray status` and the node's logs; take it off or start Ray again")
            continue
        for package in NEEDED + (NEEDED_WITH_GPU if node.gpus else ()):
            if package not in node.versions:
                yield finding("error", f"{package} is not installed", "install this project's requirements on the node")
        if node.gpus and node.cuda is None:
            yield finding("error", "there are GPUs, and PyTorch was built for CPUs", "install PyTorch's CUDA build")
        if node.ray_gpus and not node.gpus:
            yield finding("warning", f"Ray offers {node.ray_gpus} GPUs, and nvidia-smi shows none",
                          "install the driver, or start Ray without --num-gpus")  # fmt: skip
        if cluster and len(node.gpus) > node.ray_gpus:
            yield finding("warning", f"Ray offers {node.ray_gpus} of {len(node.gpus)} GPUs",
                          f"start Ray with --num-gpus {len(node.gpus)}, if all are to be used")  # fmt: skip
        if node.free_disk_bytes is not None and node.free_disk_bytes < LEAST_DISK_BYTES:
            yield finding("warning", f"{size(node.free_disk_bytes)} of disk are free",
                          f"{size(LEAST_DISK_BYTES)} or more are wanted where Ray spills objects")  # fmt: skip
        if node.object_store_bytes is not None and node.object_store_bytes < LEAST_OBJECT_STORE_BYTES:
            yield finding("warning", f"the object store has {size(node.object_store_bytes)}",
                          f"give --object-store-memory {LEAST_OBJECT_STORE_BYTES} or more to ray start")  # fmt: skip
        if node.storage_error:
            yield finding("error", f"a file cannot be kept in {storage}: {node.storage_error}",
                          "mount it on the node, or give it the credentials")  # fmt: skip
        if cluster and node.token is False:
            yield finding("warning", "Ray asks for no token: whoever reaches its ports runs code here",
                          "export RAY_AUTH_MODE=token and a token for every process of Ray")  # fmt: skip


def _between(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Versions that disagree. Of Python the patch level may, which Ray lets pass."""
    answered = [node for node in nodes if not node.error]
    for package in sorted({package for node in answered for package in node.versions}):
        hosts: dict[str, list[str]] = {}
        for node in answered:
            version = node.versions.get(package, "none")
            hosts.setdefault(".".join(version.split(".")[:2]) if package == "python" else version, []).append(node.host)
        if len(hosts) > 1:
            told = "; ".join(f"{version} on {', '.join(where)}" for version, where in sorted(hosts.items()))
            yield Finding(severity="error", where="between nodes", what=f"{package} disagrees: {told}",
                          remedy=f"install one version of {package} everywhere, best from one image")  # fmt: skip
    drivers = {gpu.driver for node in answered for gpu in node.gpus}
    if len(drivers) > 1:
        yield Finding(severity="warning", where="between nodes", what=f"drivers {', '.join(sorted(drivers))}",
                      remedy="NCCL is happiest with one driver")  # fmt: skip


def _fit(job: Job, nodes: Sequence[Node]) -> tuple[str, Finding | None]:
    counts: dict[str, int] = {}
    profiles: dict[str, GpuProfile] = {}
    hosts = [node for node in nodes if not node.error and (node.ray_gpus or node.gpus)]
    for node in hosts:
        if profile := node.profile:
            counts[profile.name] = counts.get(profile.name, 0) + (node.ray_gpus or len(node.gpus))
            profiles[profile.name] = profile
    if not counts:
        if hosts:
            return f"{job.model}: not known, for the GPUs' type has no profile", None
        what = f"{job.model} needs GPUs, and there are none"
        return f"{job.model}: there is no GPU", Finding(
            severity="error", where="GPUs", what=what, remedy="add nodes with GPUs"
        )
    per_host = min(node.ray_gpus or len(node.gpus) for node in hosts)
    try:
        best = make_plan(job, [GpuGroup(counts[name], profiles[name]) for name in counts], per_host, 100.0).recommended
    except ConfigError as error:
        finding = Finding(
            severity="error", where="GPUs", what=str(error), remedy="`python -m cluster plan` weighs others"
        )
        return f"{job.model}: does not fit {counts_text(counts)}", finding
    return (
        f"{job.model}: fits {counts_text(best.gpus)} as {best.strategy}, micro-batch {best.micro_batch_size}, "
        f"recomputing {best.activation_checkpointing}, {size(best.memory_bytes)} of "
        f"{size(best.memory_limit_bytes)} a GPU"
    ), None


def describe(report: Report, *, cluster: bool) -> str:
    """The report for a person."""
    lines = [] if cluster else ["this machine alone: no --address, and RAY_ADDRESS is not set", ""]
    lines += [table(HEAD, [_cells(node, report.storage) for node in report.nodes]), ""]
    if not any(node.gpus or node.ray_gpus for node in report.nodes):
        lines += ["no GPU anywhere: the demo model trains and answers on CPUs, gpt-oss does not"]
    lines += report.fits
    lines += [f"{each.severity:<8}{each.where}: {each.what}. Remedy: {each.remedy}" for each in report.findings]
    lines += ["ready" if report.ready else "not ready: mend the errors above"]
    return "\n".join(lines)


def _cells(node: Node, storage: str | None) -> tuple[str, ...]:
    if node.error:
        return (node.host, node.error, *["–"] * (len(HEAD) - 2))
    names = sorted({gpu.name for gpu in node.gpus})
    memory = {gpu.memory_bytes for gpu in node.gpus if gpu.memory_bytes}
    kinds = ", ".join(names) if names else node.ray_gpu_type or ("unknown" if node.ray_gpus else "")
    count = node.ray_gpus or len(node.gpus)
    versions = [node.versions.get(package, "–") for package in ("torch", "triton", "nccl", "python", "ray")]
    return (
        node.host,
        f"{count} × {kinds}" if count else f"none, {node.cpus} CPUs",
        size(min(memory)) if memory else "–",
        node.gpus[0].driver if node.gpus else "–",
        node.cuda or "–",
        *versions,
        size(node.free_disk_bytes) if node.free_disk_bytes is not None else "–",
        size(node.object_store_bytes) if node.object_store_bytes else "–",
        "–" if storage is None else "fails" if node.storage_error else "ok",
        {True: "on", False: "off", None: "–"}[node.token],
    )
