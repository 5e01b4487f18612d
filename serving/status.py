"""python -m serving status: whether an endpoint is well, what it serves, and what its replicas are doing."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
from pydantic import BaseModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from serving.client.ask import connected
from serving.client.connection import DEFAULT_URL, KEY_VARIABLE, RefusedError, models, silence

_TIMEOUT = 10.0
_ASKED_FOR_EACH = 8
"""questions for each replica: Serve's proxy chooses who answers"""


class ReplicaStatus(BaseModel):
    """A replica that answered; figures that its server does not tell are None."""

    replica: str
    healthy: bool
    running: int | None = None
    waiting: int | None = None
    tokens_in_flight: int | None = None
    generated_tokens: int | None = None
    queue_seconds: float | None = None


class ApplicationStatus(BaseModel):
    """An application on the cluster, as Ray Serve sees it; `replicas` counts them by state."""

    name: str
    state: str
    message: str = ""
    replicas: dict[str, int] = {}


class EndpointStatus(BaseModel):
    """Everything that could be learnt. `applications` is None where no cluster was asked."""

    url: str
    healthy: bool = False
    ready: bool | None = None
    models: list[str] | None = None
    applications: list[ApplicationStatus] | None = None
    replicas: list[ReplicaStatus] = []
    problems: list[str] = []


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status: 0 healthy, 1 not.

    Raises:
        ConfigError: RAY_ADDRESS names no cluster that answers.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving status",
        description="Tells whether an endpoint is healthy, what it serves, and what its replicas are doing; on a "
        "cluster, where RAY_ADDRESS names one, also what Ray Serve says of them. Exit code 0 when healthy, 1 when not. "
        f"An API key is taken from {KEY_VARIABLE}.",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="address of the endpoint (default: %(default)s)")
    parser.add_argument("--application", metavar="NAME", help="look at this application of the cluster alone")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    flags, http = connected(parser, arguments)
    applications = _applications(flags.application) if "RAY_ADDRESS" in os.environ else None
    with http:
        found = ask(http, applications)
    if flags.json:
        print(found.model_dump_json(indent=2))
    else:
        _show(found, Console())
    return 0 if found.healthy else 1


def ask(http: httpx.Client, applications: list[ApplicationStatus] | None) -> EndpointStatus:
    """The state of the endpoint behind `http`, given what its cluster says of its applications."""
    url = str(http.base_url).rstrip("/")
    found = EndpointStatus(url=url, applications=applications)
    well = _judge(applications, found.problems)
    running = None if applications is None else sum(each.replicas.get("RUNNING", 0) for each in applications)
    if running == 0:
        # Asking would start a replica, and wait for it.
        if well:
            found.problems.append("no replica runs; the first request starts one")
        return found.model_copy(update={"healthy": well})
    try:
        found.replicas = _replicas(http, running)
        found.ready = _ready(http)
        found.models = _models(http, found.problems)
    except httpx.TransportError as error:
        found.problems.append(silence(url, error))
        return found
    found.problems += [f"replica {each.replica} is unhealthy" for each in found.replicas if not each.healthy]
    found.healthy = well and all(each.healthy for each in found.replicas)
    return found


def _judge(applications: list[ApplicationStatus] | None, problems: list[str]) -> bool:
    """Whether the cluster's applications are all well; says in `problems` which are not."""
    if applications is None:
        return True
    if not applications:
        problems.append("no application runs on this cluster")
    for each in applications:
        if each.state != "RUNNING":
            problems.append(f"application {each.name} is {each.state}: {each.message or 'Serve does not say why'}")
    return bool(applications) and all(each.state == "RUNNING" for each in applications)


def _applications(name: str | None) -> list[ApplicationStatus]:
    """Applications on the cluster of RAY_ADDRESS; only the one that is called `name`, if given."""
    import ray
    from ray import serve

    from serving.deployment import join_cluster

    join_cluster()
    try:
        found = []
        for title, overview in serve.status().applications.items():
            counts: Counter[str] = Counter()
            for deployment in overview.deployments.values():
                counts.update({str(getattr(s, "value", s)): n for s, n in deployment.replica_states.items() if n})
            state = str(overview.status.value)
            message = overview.message.strip().splitlines()[-1] if overview.message.strip() else ""
            if name in (None, title):
                found.append(ApplicationStatus(name=title, state=state, message=message, replicas=counts))
        return found
    finally:
        ray.shutdown()


def _replicas(http: httpx.Client, running: int | None) -> list[ReplicaStatus]:
    """Those that answer `GET /health`: asked until all `running` ones have, a bounded number of times."""
    found: dict[str, ReplicaStatus] = {}
    for _ in range(_ASKED_FOR_EACH * (running or 1)):
        # A connection of its own for each: on one, the proxy of some clusters always chooses the same replica.
        status = _replica(http.get("/health", headers={"Connection": "close"}, timeout=_TIMEOUT))
        if status is None:
            break
        found[status.replica] = status
        if len(found) == running:
            break
    return [found[name] for name in sorted(found)]


def _replica(response: httpx.Response) -> ReplicaStatus | None:
    """What a replica tells of itself; None of a server that has no such page."""
    if response.status_code in (404, 405):
        return None
    try:
        body = response.json()
        engine, queue = body.get("engine") or {}, body.get("queue") or {}
    except (ValueError, AttributeError):
        body, engine, queue = {}, {}, {}

    def figure(name: str) -> Any:
        return queue.get(name, engine.get(name))

    return ReplicaStatus(
        replica=str(body.get("replica", "?")),
        healthy=response.is_success,
        running=figure("running"),
        waiting=figure("waiting"),
        tokens_in_flight=figure("tokens_in_flight"),
        generated_tokens=figure("generated_tokens"),
        queue_seconds=figure("queue_seconds"),
    )


def _ready(http: httpx.Client) -> bool | None:
    response = http.get("/ready", timeout=_TIMEOUT)
    return None if response.status_code in (404, 405) else response.is_success


def _models(http: httpx.Client, problems: list[str]) -> list[str] | None:
    try:
        names = models(http, timeout=_TIMEOUT)
    except RefusedError as error:
        problems.append(f"models unknown: {error}")
        return None
    if names is None:
        problems.append("models unknown: the endpoint does not list its models")
    return names


def _show(found: EndpointStatus, console: Console) -> None:
    ready = {None: "", True: ", takes requests", False: ", takes no requests now"}[found.ready]
    health = "healthy" if found.healthy else "not healthy"
    console.print(Text(f"{found.url}: {health}{ready}", style="bold green" if found.healthy else "bold red"))
    if found.models is not None:
        console.print(Text(f"models: {', '.join(found.models)}"))
    for each in found.applications or ():
        counts = ", ".join(f"{count} {state}" for state, count in each.replicas.items()) or "none"
        console.print(Text(f"application {each.name}: {each.state}; replicas: {counts}"))
    if found.replicas:
        console.print(_table(found.replicas))
    for problem in found.problems:
        console.print(Text(problem, style="yellow" if found.healthy else "red"), soft_wrap=True)


def _table(replicas: Sequence[ReplicaStatus]) -> Table:
    names = ("running", "waiting", "tokens_in_flight", "generated_tokens", "queue_seconds")
    columns = [Column(name.replace("_", " "), justify="right") for name in names]
    table = Table("replica", "healthy", *columns, box=None, pad_edge=False)
    for each in replicas:
        figures = [getattr(each, name) for name in names]
        shown = ["-" if figure is None else f"{figure:,.2f}".removesuffix(".00") for figure in figures]
        table.add_row(Text(each.replica), "yes" if each.healthy else "no", *shown)
    return table
