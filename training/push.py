"""`python -m training push`: a finished adapter or checkpoint to a repository of a model hub, in one commit.

The Hub's client does the work (huggingface_hub): large files go ahead of the commit, and what the Hub has already is
not sent again, so that the same command goes on after an interruption. Until the commit nothing of it can be seen.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from cluster.artifacts import CARD, MANIFEST, ArtifactError, Manifest, read_manifest, some_of
from cluster.storage import first_line, is_uri
from cluster.verdict import VERDICT, current_verdict, refuse_failed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WAITS = (2.0, 10.0)
"""seconds before a call whose connection broke is tried a second and a third time, beside the client's own tries"""
OF_THE_HUB = frozenset({".gitattributes"})
"""files that the Hub itself puts into a new repository"""
DESCRIPTION = """\
Send a finished adapter or checkpoint to a model hub, all files in one commit. The token is read from HF_TOKEN, the
hub's address from HF_ENDPOINT (default: https://huggingface.co). The same command goes on after an interruption.

Exit code 0: it is there; 2: it is not, and why."""
EXAMPLES = """\
examples:
  HF_TOKEN=… python -m training push merged --repo owner/gpt-oss-20b-french --private
  python -m training push merged --repo owner/gpt-oss-20b-french --dry-run"""

T = TypeVar("T")


@dataclass(frozen=True)
class Parcel:
    """What is sent."""

    folder: Path
    manifest: Manifest
    names: tuple[str, ...]
    """files by their path in the folder and in the repository"""
    verified: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.names)


@dataclass(frozen=True)
class Target:
    """Where it goes."""

    repo: str
    revision: str
    message: str
    private: bool
    replace: bool
    endpoint: str


def main(arguments: list[str]) -> int:
    """Push; returns the exit code."""
    flags = _parser().parse_args(arguments)
    target = Target(
        repo=flags.repo,
        revision=flags.revision,
        message=flags.message,
        private=flags.private,
        replace=flags.replace,
        endpoint=os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
    )
    try:
        parcel = pack(flags.folder, require_verified=flags.require_verified)
        _print_parcel(parcel, target)
        if flags.dry_run:
            print("dry run   nothing was sent")
            return 0
        print(f"pushed    {push(parcel, target, os.environ.get('HF_TOKEN', ''))}")
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def pack(name: str, *, require_verified: bool) -> Parcel:
    """The files of a finished adapter or checkpoint, each held against its hash.

    Raises:
        ArtifactError: it is unfinished or damaged, it failed its verification, or `require_verified` and it has none.
    """
    if is_uri(name):
        raise ArtifactError("push reads local folders: copy the checkpoint here first")
    folder = Path(name).expanduser()
    try:
        kind = Manifest.model_validate_json((folder / MANIFEST).read_bytes()).kind
    except FileNotFoundError:
        raise ArtifactError(f"{folder / MANIFEST} is missing: {folder} is no finished adapter or checkpoint") from None
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise ArtifactError(f"{folder / MANIFEST} cannot be read ({reason}); make it again") from None
    refuse_failed(folder)
    verdict = current_verdict(folder)
    if verdict is None and require_verified:
        raise ArtifactError(f"{folder} is not verified, and --require-verified asks for it: python -m training verify")
    manifest = read_manifest(folder, kind)
    outside = [
        name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    ]
    if outside:
        raise ArtifactError(f"{folder / MANIFEST} lists {some_of(outside)}, which lies outside the folder")
    card = {CARD} if (folder / CARD).is_file() else set()
    names = (*sorted(card.union(manifest.files)), MANIFEST, *([VERDICT] if verdict else []))
    return Parcel(folder, manifest, names, verdict is not None)


def push(parcel: Parcel, target: Target, token: str) -> str:
    """Send it; returns the commit's address.

    Args:
        parcel: of `pack`.
        target: the repository, which is made if there is none.
        token: of the hub, with write access.

    Raises:
        ArtifactError: the token is missing or not accepted, the hub cannot be reached or refuses, or the repository
            holds something else; one sentence. The token is never part of it.
    """
    if not token:
        raise ArtifactError("HF_TOKEN is not set: put a token with write access into the environment")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ArtifactError("HF_HUB_OFFLINE is set, and push needs the hub: unset it")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint, token=token)

    def step(call: Callable[[], T]) -> T:
        return _tried(call, target, token)

    step(lambda: api.whoami())
    step(lambda: api.create_repo(target.repo, private=target.private or None, exist_ok=True))
    if target.private and not step(lambda: api.model_info(target.repo)).private:
        raise ArtifactError(
            f"{target.repo} exists on {target.endpoint} and is public, and --private was asked for: make it private "
            "there, or take another name"
        )
    if target.revision != "main":
        step(lambda: api.create_branch(target.repo, branch=target.revision, exist_ok=True))
    unwanted = step(lambda: _other_content(api, parcel, target))
    commit: str = step(lambda: _commit(api, parcel, target, unwanted))
    return commit


def _other_content(api: HfApi, parcel: Parcel, target: Target) -> list[str]:
    """With --replace, files of the repository that are not of this parcel. What was pushed before is not "other".

    Raises:
        ArtifactError: there is something else in it, and --replace was not given.
    """
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(target.repo, recursive=True, revision=target.revision)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path not in OF_THE_HUB}
    if not there or (MANIFEST in there and there[MANIFEST].blob_id == _git_id(parcel.folder / MANIFEST)):
        return sorted(set(there) - set(parcel.names)) if target.replace else []
    if not target.replace:
        raise ArtifactError(
            f"{target.repo} on {target.endpoint} holds other files ({some_of(sorted(there))}): take another name or "
            "--revision, or give --replace, which removes them in the same commit"
        )
    return sorted(set(there) - set(parcel.names))


def _commit(api: HfApi, parcel: Parcel, target: Target, unwanted: list[str]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, str(parcel.folder / name)) for name in parcel.names]
    operations += [CommitOperationDelete(name) for name in unwanted]
    made = api.create_commit(
        target.repo, operations=operations, commit_message=target.message, revision=target.revision
    )
    return str(made.commit_url)


def _git_id(path: Path) -> str:
    """The object id that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _tried(call: Callable[[], T], target: Target, token: str) -> T:
    """What `call` returns; tried again where the connection broke.

    Raises:
        ArtifactError: it failed, and why.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for wait in (*WAITS, None):
        try:
            return call()
        except ArtifactError:
            raise
        except HfHubHTTPError as error:
            raise ArtifactError(_refusal(error, target).replace(token, "***")) from None
        except (HFValidationError, ValueError) as error:
            raise ArtifactError(
                f"{target.repo} cannot be pushed to: {first_line(error)}".replace(token, "***")
            ) from None
        except Exception as error:  # the client's HTTP library is its own affair
            if refused := _cause(error, HfHubHTTPError):
                raise ArtifactError(_refusal(refused, target).replace(token, "***")) from None
            if not _connection_broke(error):
                raise
            if wait is None:
                reason = first_line(error).replace(token, "***")
                raise ArtifactError(
                    f"{target.endpoint} cannot be reached, or the connection broke ({reason}): check network and "
                    "HF_ENDPOINT, and run the same command again, which goes on"
                ) from None
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _refusal(error: Any, target: Target) -> str:
    status = getattr(error.response, "status_code", None)
    where = f"{target.repo} on {target.endpoint}"
    if status == 401:
        return f"{target.endpoint} does not accept the token in HF_TOKEN: take one that is valid there"
    if status == 403:
        return f"the token in HF_TOKEN may not write to {where}: take one with write access to it"
    if status == 404:
        return f"{where} has no such repository or revision for this token: check --repo and --revision"
    if status == 429:
        return f"{target.endpoint} asks for fewer requests: run the same command again later, which goes on"
    said = first_line(ValueError(getattr(error, "server_message", None) or str(error)))
    return f"{where} refused it with HTTP {status} ({said}): run the same command again, which goes on"


def _cause(error: BaseException | None, kind: type[Any]) -> Any:
    """The error of this kind among an error and its causes."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _connection_broke(error: BaseException | None) -> bool:
    """Whether it, or what it comes from, is of the network: httpx, which the client brings along, calls it so."""
    while error is not None:
        if isinstance(error, OSError) or "TransportError" in {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _print_parcel(parcel: Parcel, target: Target) -> None:
    for name in parcel.names:
        print(f"  {name}  {(parcel.folder / name).stat().st_size:,} bytes")
    visible = "private" if target.private else "public unless it exists as private"
    print(f"{parcel.manifest.kind:<9} {parcel.folder}: {len(parcel.names)} files, {parcel.size:,} bytes")
    print(f"to        {target.endpoint}/{target.repo}, revision {target.revision}, {visible}", flush=True)
    if parcel.manifest.kind == "checkpoint" and not parcel.verified:
        print(f"warning: {parcel.folder} is not verified; python -m training verify does it", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training push",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="finished adapter or checkpoint on this machine")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it private; refuse one that is public")
    parser.add_argument("--revision", default="main", help="branch; made if there is none (default: %(default)s)")
    parser.add_argument("--message", default="Push with Raysoner", help="of the commit (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="replace what else the repository holds")
    parser.add_argument("--require-verified", action="store_true", help="refuse a checkpoint that was not verified")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    return parser
