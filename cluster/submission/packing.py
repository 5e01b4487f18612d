"""What of a directory Ray would upload, sized beforehand."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _get_excludes, get_excludes_from_ignore_files

from cluster.config import ConfigError
from cluster.memory import size

LIMIT_BYTES = GCS_STORAGE_MAX_SIZE
NEAR_SHARE = 0.8
"""of the limit, from which a warning names the biggest files"""
BIGGEST = 5
ZIP_BYTES = 76
"""of a file's two headers, beside twice its name"""

Rule = Callable[[Path], bool]
_QUIET = logging.getLogger("cluster.submission.packing")
_QUIET.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Package:
    """Files of a directory, and what they come to in Ray's archive, which does not compress."""

    folder: Path
    files: dict[str, int]
    """bytes by name"""

    @property
    def total_bytes(self) -> int:
        """Of the archive, to a few bytes a file."""
        return sum(count + 2 * len(name.encode()) + ZIP_BYTES for name, count in self.files.items())

    def biggest(self) -> str:
        """The biggest files, for a person."""
        ordered = sorted(self.files.items(), key=lambda item: -item[1])[:BIGGEST]
        return ", ".join(f"{name} ({size(count)})" for name, count in ordered)

    def warning(self) -> str | None:
        """A sentence where the package comes near the limit.

        Raises:
            ConfigError: it is over it.
        """
        told = f"the working directory packs to {size(self.total_bytes)}, and Ray takes less than {size(LIMIT_BYTES)}"
        if self.total_bytes >= LIMIT_BYTES:
            raise ConfigError(f"{told}: name in .rayignore what the job needs not; the biggest are {self.biggest()}")
        return f"{told}; the biggest are {self.biggest()}" if self.total_bytes >= NEAR_SHARE * LIMIT_BYTES else None


def package_of(folder: Path, excludes: list[str]) -> Package:
    """What Ray packs of a directory: all but its default exclusions and what `excludes`, each directory's .gitignore
    and each directory's .rayignore name. The rules are Ray's own functions.

    Raises:
        ConfigError: it is no directory, or a file of it cannot be read.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is no directory")
    try:
        rules = [_get_excludes(folder, [*get_runtime_env_default_excludes(), *excludes])]
        files = dict(_walk(folder, folder, rules))
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be read ({error.strerror}): name it in .rayignore"
        ) from None
    return Package(folder, files)


def _walk(root: Path, path: Path, rules: list[Rule]) -> Iterator[tuple[str, int]]:
    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    inner = [*rules, *get_excludes_from_ignore_files(path, include_gitignore=gitignore, logger=_QUIET)]
    if any(rule(path) for rule in inner):
        return
    if path.is_dir():
        for below in sorted(path.iterdir()):
            yield from _walk(root, below, inner)
    elif path.is_file():
        yield str(path.relative_to(root)), path.stat().st_size
