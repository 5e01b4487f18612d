"""What `python -m training verify` found about a checkpoint: `verification.json`, beside the manifest that it judges.

It is no part of the manifest, whose hash it holds: a verdict on files that were changed since counts for nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.artifacts import MANIFEST, ArtifactError, sha256

VERDICT = "verification.json"


class Check(BaseModel):
    """One thing that was looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    passed: bool
    message: str
    """one sentence: what was found, and what to do about it if it did not pass"""
    figures: dict[str, Any] = {}
    """what was measured; a figure that is not finite is null"""


class Verdict(BaseModel):
    """All checks of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    """whether all checks passed"""
    manifest_sha256: str
    """SHA-256 of the `manifest.json` that was judged"""
    format: str
    """of the checkpoint: bf16, mxfp4 or adapter"""
    checks: tuple[Check, ...]
    date: str
    """UTC, ISO 8601"""
    versions: dict[str, str]
    device: str

    def to_bytes(self) -> bytes:
        """The content of `verification.json`."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]


def current_verdict(folder: Path) -> Verdict | None:
    """The verdict on the manifest that lies in `folder` now; None, with a warning where it judges another, if none is.

    Raises:
        ArtifactError: `verification.json` cannot be read.
    """
    path = folder / VERDICT
    try:
        verdict = Verdict.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ArtifactError(
            f"{path} cannot be read ({reason}); verify the checkpoint again: python -m training verify {folder}"
        ) from None
    manifest = folder / MANIFEST
    if not manifest.is_file() or sha256(manifest) != verdict.manifest_sha256:
        logging.getLogger(__name__).warning(
            f"{path} judges another manifest than the one that lies there and is ignored; verify the checkpoint again"
        )
        return None
    return verdict


def refuse_failed(folder: Path) -> None:
    """Return unless the checkpoint in `folder` was verified as it is now, and failed.

    Raises:
        ArtifactError: it failed; the message names the first check that did. Or its verdict cannot be read.
    """
    verdict = current_verdict(folder)
    if verdict is not None and not verdict.passed:
        name, message = next(((check.name, check.message) for check in verdict.failed), ("verdict", "it says so"))
        raise ArtifactError(
            f"{folder} failed its verification, check {name}: {message.rstrip('.')}; merge it again and verify it, or "
            f"remove {VERDICT} to use it all the same"
        )
