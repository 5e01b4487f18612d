"""Settings of an endpoint: the checkpoint, the address, how much a replica takes on, how many replicas there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.config import Config
from cluster.harmony import Effort
from cluster.languages import InstructionForm

OnFault = Literal["report", "retry", "fail"]
NonEmpty = Annotated[str, Field(min_length=1)]

NO_ADAPTERS = (
    "model.adapters needs the engine vLLM on a GPU, for transformers' continuous batching runs one model; set "
    "engine.kind to vllm and replicas.gpus to 1, or merge each adapter and deploy it as an application of its own"
)
"""what is said where adapters by name are asked of an engine that has none"""


class ModelConfig(Config):
    """The merged checkpoint that is served."""

    path: Annotated[str, Field(min_length=1)]
    """checkpoint folder in Hugging Face layout (MXFP4, bf16 or fp32 weights), reachable from every replica's node"""
    name: Annotated[str, Field(min_length=1)] | None = None
    """id that clients ask for as `model`; without one, the name of the folder"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """precision of the weights in memory; packed experts are dequantised to it on load"""
    instruction_form: InstructionForm = "english"
    """wording of the wish for a reasoning language that the model was trained on: english or japanese"""
    adapters: dict[NonEmpty, NonEmpty] = Field(default_factory=dict)
    """further models of the same base, with vLLM alone: the id that clients ask for, and the folder of a PEFT adapter
    or of an export of `python -m training merge --format adapter`"""

    @property
    def served_name(self) -> str:
        """The id of the checkpoint itself, as clients see it."""
        return self.name or Path(self.path).name

    @property
    def served_names(self) -> tuple[str, ...]:
        """All ids that clients may ask for, that of the checkpoint itself first."""
        return (self.served_name, *self.adapters)


class EndpointConfig(Config):
    """Where the application listens."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """address that Serve's proxies bind; 0.0.0.0 opens the endpoint to other machines"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port that Serve's proxies bind"""
    application: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "raysoner"
    """name of the Serve application; the same name again replaces what runs under it"""
    proxy: Literal["auto", "haproxy", "python"] = "python"
    """what passes HTTP on to replicas, on a Serve that is started here: HAProxy, or Serve's own in Python. auto takes
    HAProxy where it can be had, and the proxy of a Serve that runs already"""
    gathering_seconds: Annotated[float, Field(ge=0, le=1)] = 0.2
    """longest that a stream's token waits to be sent with the next, with 256 streams at a time, and less with fewer; 0
    sends each alone"""


class EngineConfig(Config):
    """What one replica computes with, and what it computes and holds at a time."""

    kind: Literal["auto", "transformers", "vllm"] = "auto"
    """auto takes vLLM where it is installed and replicas have a GPU, else transformers' continuous batching"""
    maximum_concurrent: PositiveInt = 16
    """sequences that advance together in one forward pass; more wait for their turn"""
    maximum_batch_tokens: PositiveInt = 512
    """tokens of one forward pass over all sequences; a longer prompt is read in several passes"""
    maximum_cached_tokens: PositiveInt = 32768
    """tokens whose keys and values are kept, over all sequences; this bounds the cache's memory"""
    maximum_output_tokens: PositiveInt = 4096
    """most tokens, thinking included, that a request may ask for"""
    default_output_tokens: PositiveInt = 2048
    """tokens that a request gets that does not ask"""


class PolicyConfig(Config):
    """What happens to a completion that is malformed, thinks in another language, or runs out of tokens.

    A request may ask for another policy in the fields `on_malformed`, `on_wrong_language` and `rescue`.
    """

    on_malformed: OnFault = "report"
    """report returns what came, with its outcome; retry draws again; fail does too, and ends in an error at last"""
    on_wrong_language: OnFault = "report"
    """the same for thinking in another language than asked for"""
    retries: Annotated[int, Field(ge=0, le=8)] = 2
    """further attempts of one choice; the last begins the thinking in the language that was asked for"""
    rescue_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of a request's tokens kept for the answer: thinking that reaches it is closed; 0 lets it run to the end"""


class SecurityConfig(Config):
    """Who may use the endpoint."""

    keys: Annotated[str, Field(min_length=1)] | None = None
    """file of API keys that `python -m serving keys` writes, reachable from every replica's node; none lets all in"""
    allow_public: bool = False
    """serve on an address that other machines reach without API keys"""


class ReplicasConfig(Config):
    """Copies of the model, and when Ray Serve adds or removes one."""

    minimum: NonNegativeInt = 1
    """replicas that always run; 0 gives resources back when idle, and the first request then waits for a start"""
    maximum: PositiveInt = 1
    """replicas under load"""
    cpus: PositiveInt = 1
    """CPUs of each replica; also its number of CPU threads when it has no GPU"""
    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of each replica; 0 serves on CPU"""
    target_ongoing_requests: PositiveFloat = 16
    """requests in progress per replica that autoscaling aims at, where the engine tells no tokens"""
    target_tokens: PositiveInt | None = None
    """tokens in flight per replica that autoscaling aims at; by default half of engine.maximum_cached_tokens"""
    target_queue_seconds: PositiveFloat = 2.0
    """age of the oldest waiting request at which another replica is added"""
    upscale_seconds: NonNegativeFloat = 10.0
    """how long a need for more replicas must last"""
    downscale_seconds: NonNegativeFloat = 300.0
    """how long a need for fewer must last"""
    maximum_ongoing_requests: PositiveInt | None = None
    """requests that Serve's proxies give one replica at a time; by default twice what may run and wait there, so that
    the replica itself refuses what is too much, and none queues in a proxy, where all keys stand in one line"""
    graceful_shutdown_seconds: NonNegativeFloat = 600
    """how long a replica that is being removed may finish its requests; no less than the longest generation takes"""


class LimitsConfig(Config):
    """What a request may bring. More is answered with an error, never cut."""

    prompt_tokens: PositiveInt = 8192
    """longest prompt, in tokens, with Harmony's own"""
    messages: PositiveInt = 256
    """most messages in one request"""
    body_bytes: PositiveInt = 1_048_576
    """largest request body"""
    choices: PositiveInt = 8
    """largest n"""
    tools: PositiveInt = 128
    """most tools in one request"""
    waiting_requests: PositiveInt = 256
    """requests that wait for the engine in one replica; a further one is answered 429 with Retry-After"""
    waiting_seconds: PositiveFloat = 120.0
    """longest wait for the engine; a request that waited longer is answered 429"""
    request_seconds: PositiveFloat = 1800.0
    """longest time of one request, waiting included"""


class ServingConfig(Config):
    """An endpoint, from a merged checkpoint to replicas behind one address."""

    model: ModelConfig
    endpoint: EndpointConfig = EndpointConfig()
    engine: EngineConfig = EngineConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    limits: LimitsConfig = LimitsConfig()
    policy: PolicyConfig = PolicyConfig()
    security: SecurityConfig = SecurityConfig()
    default_effort: Effort = "medium"
    """reasoning effort of a request that names none: low, medium or high"""

    @property
    def target_tokens(self) -> int:
        """Tokens in flight that a replica should have."""
        return self.replicas.target_tokens or max(1, self.engine.maximum_cached_tokens // 2)

    @property
    def maximum_ongoing_requests(self) -> int:
        """Requests that Serve's proxies give one replica at a time."""
        return self.replicas.maximum_ongoing_requests or 2 * self._held_requests

    @property
    def _held_requests(self) -> int:
        """Requests that run and wait in one replica."""
        return self.engine.maximum_concurrent + self.limits.waiting_requests

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and the longest answer together."""
        return self.limits.prompt_tokens + self.engine.maximum_output_tokens

    def with_absolute_paths(self) -> ServingConfig:
        """The same, for processes that run in other folders."""

        def absolute(path: str) -> str:
            return str(Path(path).expanduser().absolute())

        adapters = {name: absolute(folder) for name, folder in self.model.adapters.items()}
        model = self.model.model_copy(update={"path": absolute(self.model.path), "adapters": adapters})
        keys = self.security.keys
        security = self.security if keys is None else self.security.model_copy(update={"keys": absolute(keys)})
        return self.model_copy(update={"model": model, "security": security})

    @model_validator(mode="after")
    def _fits_together(self) -> ServingConfig:
        engine, replicas = self.engine, self.replicas
        if self.model.served_name in self.model.adapters:
            raise ValueError(
                f"model.adapters has a {self.model.served_name!r}, which is what the checkpoint itself is served as; "
                "give one of the two another name (model.name)"
            )
        if self.model.adapters and (engine.kind == "transformers" or not replicas.gpus):
            raise ValueError(NO_ADAPTERS)
        if engine.default_output_tokens > engine.maximum_output_tokens:
            raise ValueError("engine.default_output_tokens must not exceed engine.maximum_output_tokens")
        if engine.maximum_batch_tokens < engine.maximum_concurrent:
            raise ValueError("engine.maximum_batch_tokens must be at least engine.maximum_concurrent: a token for each")
        if engine.maximum_cached_tokens < self.longest_sequence:
            raise ValueError(
                "engine.maximum_cached_tokens must hold one whole request: at least limits.prompt_tokens + "
                f"engine.maximum_output_tokens = {self.longest_sequence}"
            )
        if replicas.minimum > replicas.maximum:
            raise ValueError("replicas.minimum must not exceed replicas.maximum")
        if self.maximum_ongoing_requests <= self._held_requests:
            raise ValueError(
                "replicas.maximum_ongoing_requests must be more than engine.maximum_concurrent + "
                f"limits.waiting_requests = {self._held_requests}, or requests would queue in Serve's proxies"
            )
        if self.maximum_ongoing_requests < replicas.target_ongoing_requests:
            raise ValueError(
                "replicas.maximum_ongoing_requests must be at least replicas.target_ongoing_requests, or a replica "
                "could never be full"
            )
        return self
