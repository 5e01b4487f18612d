"""One description of a cluster and of what runs on it, from which all manifests are made. No torch, no ray."""

from __future__ import annotations

import difflib
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from cluster.config import HIDDEN, Config, ConfigError
from cluster.hardware import PROFILES, GpuProfile
from cluster.storage import is_uri, without_secrets

KEYS_FILE = "/etc/raysoner/keys/keys.json"
"""where an endpoint's pods find the API keys of `serve.keys_secret`"""
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "15000",
}
"""environment of every Ray process: a host that is cut off counts as dead after some 10 s, by default after 60.

The last is gRPC's TCP_USER_TIMEOUT, too: how long what was sent may stay unacknowledged. With 5 s a cut of 4 s, after
which TCP takes 2 more to send again, broke connections, and runs with them."""
OUTLIVING = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""where the head comes back: how long hosts wait for it, by default 60 s. KubeRay sets the same on its own"""
_SECRET_WORDS = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE", re.IGNORECASE)


def _known_gpu(name: str) -> str:
    names = [profile.name for profile in PROFILES]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name} is no GPU type that cluster/hardware.py knows; {hint}it knows {', '.join(names)}")
    return name


def _without_secrets(location: str) -> str:
    if without_secrets(location) != location:
        raise PydanticCustomError(
            HIDDEN, "must hold neither user, password nor options: give those by name under [secrets]"
        )
    if not is_uri(location) and not Path(location).is_absolute():
        raise ValueError("must be an absolute path that all nodes share, or the URI of a storage as s3://bucket/runs")
    return location


Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
"""a DNS label that leaves room for what KubeRay appends"""


def _reference(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[-._A-Za-z0-9]+", value) is None:
        raise PydanticCustomError(HIDDEN, "names a Kubernetes Secret and a key in it, as SECRET/KEY, and is no value")
    return value


Reference = Annotated[str, AfterValidator(_reference)]
"""a Kubernetes Secret and a key in it, as SECRET/KEY"""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1)]
Labels = dict[Text, str]


class MachineConfig(Config):
    """What a node has."""

    cpus: PositiveInt = 4
    """CPUs of the node, requested and limited"""
    memory_gib: PositiveInt = 16
    """memory of the node in GiB, requested and limited"""
    node_selector: Labels = Field(default_factory=dict)
    """labels of the Kubernetes nodes that its pod may run on"""
    machine: Text | None = None
    """a cloud's machine type, for `ray up`: p5.48xlarge, a3-highgpu-8g"""


class WorkersConfig(MachineConfig):
    """A group of equal hosts; a cluster has one for each GPU type."""

    gpu: Annotated[str, AfterValidator(_known_gpu)] | None = None
    """GPU type, a name of cluster/hardware.py: H100, H200, A100-80G, L40S, …; without one the hosts have no GPU"""
    gpus: NonNegativeInt = 0
    """GPUs of each host"""
    cpus: PositiveInt = 8
    """CPUs of each host"""
    memory_gib: PositiveInt = 64
    """memory of each host in GiB, of which shared_memory_gib is a part"""
    shared_memory_gib: PositiveInt = 16
    """of /dev/shm in GiB: Ray's object store and NCCL's buffers"""
    minimum: NonNegativeInt = 0
    """hosts that always run"""
    maximum: PositiveInt = 1
    """hosts that autoscaling may start"""
    idle_seconds: PositiveInt = 300
    """how long a host is idle before autoscaling removes it"""
    priority: NonNegativeInt = 0
    """groups of a higher number are started first where several would do"""
    spot: bool = False
    """machines that the cloud may take back, for `ray up`; on Kubernetes node_selector says it"""
    taints: tuple[Text, ...] = ("nvidia.com/gpu",)
    """keys of taints that the pods tolerate"""

    @property
    def profile(self) -> GpuProfile | None:
        """Of the group's GPUs."""
        return next((profile for profile in PROFILES if profile.name == self.gpu), None)

    @model_validator(mode="after")
    def _fits_together(self) -> WorkersConfig:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not exceed maximum")
        if bool(self.gpu) != bool(self.gpus):
            raise ValueError("gpu and gpus go together: name the type and how many each host has, or neither")
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError("shared_memory_gib is a part of memory_gib and must be less")
        return self


class RedisConfig(Config):
    """Where the head keeps what it must know after a restart: fault tolerance of Ray's GCS."""

    address: Text
    """host:port of a Redis that outlives the head"""
    password: Reference | None = None
    """Secret and key that hold its password"""


class JobConfig(Config):
    """A command that runs once on a cluster of its own."""

    command: Annotated[tuple[Text, ...], Field(min_length=1)]
    """words of the command: ["python", "-m", "training", "run", "--config", …]; paths are those in the image"""
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    """who submits the job; with K8sJobMode a pod of its own, as KubeRay names them"""
    retries: NonNegativeInt = 2
    """how often a failed job begins again on a new cluster; a run goes on from its newest checkpoint"""
    pending_seconds: PositiveInt = 1800
    """how long the cluster may take to come up, for want of GPUs say, before the job fails"""
    deadline_seconds: PositiveInt | None = None
    """after which it is ended; without one it may take as long as it takes"""
    kept_seconds: NonNegativeInt = 600
    """how long the cluster stays after the job, for its dashboard and logs"""
    working_dir: Annotated[str, Field(pattern=r"^(https|s3|gs)://.+\.zip$")] | None = None
    """archive of a checkout that replaces the image's; none runs what is in the image"""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """further variables of the job alone"""


class ServeConfig(Config):
    """An endpoint."""

    config: Text
    """TOML file of a serving configuration; its model.path must be what pods see"""
    keys_secret: Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")] | None = None
    """Secret whose key keys.json is the file that `python -m serving keys` writes"""
    allow_public: bool = False
    """serve without API keys to whoever reaches the cluster"""
    gateway_class: Text | None = None
    """of the Gateway API, for upgrades that shift traffic step by step; without one a whole new cluster takes over"""
    step_percent: Annotated[int, Field(ge=1, le=100)] = 25
    """share of traffic that an upgrade moves at a time"""
    step_seconds: PositiveInt = 60
    """time between two such moves"""
    surge_percent: Annotated[int, Field(ge=1, le=100)] = 25
    """share of the capacity that an upgrade may use beyond what is there"""

    @model_validator(mode="after")
    def _guarded(self) -> ServeConfig:
        if self.keys_secret is None and not self.allow_public:
            raise ValueError(
                "an endpoint on a cluster is reached by others: name the Secret of its API keys in keys_secret, or set "
                "allow_public = true to let everybody in"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """The serving configuration's TOML as plain data, with the keys' file where pods find it.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            settings = tomllib.loads(Path(self.config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"serve.config {self.config} cannot be read: {error}") from None
        security = {"keys": KEYS_FILE} if self.keys_secret else {"allow_public": True}
        return {**settings, "security": {**settings.get("security", {}), **security}}


class LauncherConfig(Config):
    """Where `ray up` starts hosts."""

    provider: Literal["aws", "gcp", "on-premises"]
    """whose machines they are"""
    region: Text | None = None
    """of the cloud: us-west-2, us-central1"""
    zones: tuple[Text, ...] = ()
    """of the region; GCP takes exactly one"""
    project: Text | None = None
    """GCP's project id"""
    instance_profile: Annotated[str, Field(pattern=r"^arn:aws:iam::\d+:instance-profile/.+$")] | None = None
    """ARN of an AWS instance profile with which hosts reach the storage"""
    source_image: Text | None = None
    """GCP's disk image, with the GPU driver and Docker"""
    disk_gib: PositiveInt = 500
    """of each host"""
    ssh_user: Text = "ubuntu"
    """who logs in on the hosts"""
    ssh_private_key: Text | None = None
    """file of the key that logs in; clouds make one where none is given"""
    head_address: Text | None = None
    """of the head, on premises"""
    worker_addresses: tuple[Text, ...] = ()
    """of the workers, on premises"""

    @model_validator(mode="after")
    def _complete(self) -> LauncherConfig:
        needed = {
            "aws": ("region",),
            "gcp": ("region", "zones", "project", "source_image"),
            "on-premises": ("head_address", "worker_addresses", "ssh_private_key"),
        }[self.provider]
        if missing := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"{self.provider} needs {', '.join(missing)} too")
        if self.provider == "gcp" and len(self.zones) != 1:
            raise ValueError("gcp takes exactly one of zones")
        return self


class ClusterDescription(Config):
    """A cluster: its nodes, its storage and secrets, and what runs on it."""

    name: Name
    """of the cluster, and the beginning of its jobs' and endpoint's names"""
    image: Annotated[str, Field(pattern=r"^[^\s:@]+(:\d+)?[^\s:@]*(:[^\s:]+|@sha256:[0-9a-f]{64})$")]
    """container image with a tag or digest, made from cluster/deploy/Dockerfile"""
    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = Field(default_factory=lambda: version("ray"))
    """of the image; by default the one installed here"""
    namespace: Name = "default"
    """of Kubernetes"""
    head: MachineConfig = MachineConfig()
    """the node that runs Ray's own services and the drivers of jobs, and no work"""
    workers: Annotated[dict[Name, WorkersConfig], Field(min_length=1)]
    """groups of hosts, by name"""
    storage: Annotated[str, AfterValidator(_without_secrets)]
    """folder that all nodes share, or URI, where runs and models lie"""
    storage_claim: Name | None = None
    """PersistentVolumeClaim (ReadWriteMany) that is mounted where storage says, when that is a folder"""
    secrets: dict[Variable, Reference] = Field(default_factory=dict)
    """environment variables from Kubernetes Secrets, as HF_TOKEN = "hugging-face/token"; a value never stands here"""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """environment variables of all Ray processes; none that is secret"""
    token_secret: Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")] | None = None
    """Secret whose key auth_token is Ray's token; by default KubeRay makes one for each cluster"""
    user_id: PositiveInt = 1000
    """user of the image that all processes run as; not root"""
    grace_seconds: PositiveInt = 120
    """between the notice that a pod must go and its end; a training run saves in it"""
    redis: RedisConfig | None = None
    """makes a cluster and an endpoint outlive their head"""
    train: JobConfig | None = None
    """a training run"""
    tune: JobConfig | None = None
    """a search for the fastest batch"""
    serve: ServeConfig | None = None
    """an endpoint"""
    launcher: LauncherConfig | None = None
    """for `ray up`"""

    @property
    def variables(self) -> dict[str, str]:
        """Environment of every Ray process, without secrets."""
        return {**HEALTH, **self.environment}

    @property
    def host_variables(self) -> dict[str, str]:
        """The same on hosts that no operator looks after."""
        return {**HEALTH, **(OUTLIVING if self.redis else {}), **self.environment}

    @property
    def head_variables(self) -> dict[str, str]:
        """The same on the head, which keeps its state under the cluster's name in Redis, where there is one."""
        if self.redis is None:
            return self.host_variables
        kept = {"RAY_REDIS_ADDRESS": self.redis.address, "RAY_external_storage_namespace": self.name}
        return {**kept, **self.host_variables}

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterDescription:
        for name in (*self.environment, *(name for job in (self.train, self.tune) if job for name in job.environment)):
            if _SECRET_WORDS.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret, and manifests are no place for one: put it into a "
                    f'Kubernetes Secret and name that under [secrets], {name} = "SECRET/KEY"'
                )
        if both := self.environment.keys() & self.secrets.keys():
            raise ValueError(f"{sorted(both)[0]} stands under both environment and secrets; keep one")
        if self.storage_claim and is_uri(self.storage):
            raise ValueError("storage_claim mounts a folder, and storage is a URI; leave one of them out")
        return self
