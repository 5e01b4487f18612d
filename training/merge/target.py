"""Where a merge goes: made out of sight, resumed after an interruption, and there once it is whole.

On a local file system the files are written to a scratch folder beside the target, which is renamed at the end. Object
stores know no renaming: there the files are written in place and the manifest last, and a folder without a manifest is
no checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.artifacts import MANIFEST, ArtifactError, put_in_place
from cluster.storage import Storage
from training.merge.requantise import Effect

STATE = ".merge.json"


@dataclass(frozen=True)
class Written:
    """A file that is whole."""

    sha256: str
    size: int
    effects: dict[str, Effect]
    """what is kept of the adapter, by weight"""
    device: str
    """where the arithmetic was done"""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Written:
        """Of plain values."""
        effects = {name: Effect(**effect) for name, effect in fields["effects"].items()}
        return cls(fields["sha256"], fields["size"], effects, fields["device"])


class Target:
    """Of one merge; the same command takes up what an earlier one of the same `identity` left.

    Args:
        out: folder or storage URI.
        identity: hash of all that the result depends on.
        overwrite: what stands there may be replaced.

    Raises:
        ArtifactError: something else stands there, or another merge is writing there.
        StorageError: the storage cannot be used.
    """

    def __init__(self, out: str, identity: str, *, overwrite: bool) -> None:
        self.out, self.identity = Storage.at(out), identity
        self.written: dict[str, Written] = {}
        """files that are whole, by name"""
        self._lock: int | None = None
        if self.out.is_local:
            place = Path(self.out.path)
            if place.exists() and not place.is_dir():
                raise ArtifactError(f"{place} is a file; name a folder in --out")
            if place.is_dir() and any(place.iterdir()) and not overwrite:
                raise self._occupied()
            scratch = place.with_name(f".{place.name}.partial")
            scratch.mkdir(parents=True, exist_ok=True)
            self._take_lock(scratch)
            self.folder = Storage.at(str(scratch))
        else:
            self.folder = self.out
            if self.out.names() and not self.out.exists(STATE) and not overwrite:
                raise self._occupied()
        self._take_up()

    def note(self, name: str, file: Written) -> None:
        """Remember a file that is whole."""
        self.written[name] = file
        self._save()

    def finish(self, files: Collection[str]) -> None:
        """Make what was written be the target.

        Args:
            files: of the manifest, which must be there, on an object store as the last file. What else lies there was
                left by tasks that were killed, or is the state of the merge, and goes.
        """
        kept = {name.partition("/")[0] for name in files} | {MANIFEST}
        for name, _ in self.folder.names():
            if name not in kept:
                self.folder.delete(name)
        if self.out.is_local:
            put_in_place(Path(self.folder.path), Path(self.out.path))

    def close(self) -> None:
        """Let another merge write there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _occupied(self) -> ArtifactError:
        return ArtifactError(
            f"{self.out} is not empty, and holds no unfinished merge of this base and adapter; name another folder in "
            "--out, or give --overwrite to replace it"
        )

    def _take_lock(self, scratch: Path) -> None:
        self._lock = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ArtifactError(f"another merge is writing to {self.out}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks

    def _take_up(self) -> None:
        """Go on from what is there, or begin anew."""
        names = [name for name, _ in self.folder.names()]
        state = self._read_state() if STATE in names else None
        if state is not None and state["identity"] == self.identity:
            self.written = {
                name: Written.from_json(fields)
                for name, fields in state["files"].items()
                if self._is_whole(name, fields["size"])
            }
            if self.written:
                print(f"resuming  {len(self.written)} files are there already", flush=True)
        elif state is not None:
            print(f"anew      what lay in {self.folder} was of another merge, and is removed", flush=True)
        kept = {name.partition("/")[0] for name in self.written} | {STATE}
        # The manifest first: what is left when this is interrupted is no checkpoint.
        for name in sorted(names, key=lambda name: name != MANIFEST):
            if name not in kept:
                self.folder.delete(name)
        self._save()

    def _is_whole(self, name: str, size: int) -> bool:
        try:
            return self.folder.file_info(name)[0] == size
        except FileNotFoundError:
            return False

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self.folder.read(STATE))
            return {"identity": str(state["identity"]), "files": dict(state["files"])}
        except (ValueError, KeyError, TypeError):
            return {"identity": "", "files": {}}

    def _save(self) -> None:
        files = {name: file.to_json() for name, file in self.written.items()}
        state = {"identity": self.identity, "files": files}
        self.folder.write(STATE, json.dumps(state).encode())
