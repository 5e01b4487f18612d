"""Whether the checkpoint's files are those of its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from cluster.artifacts import MANIFEST, some_of
from cluster.verdict import VERDICT, Check
from training.verify.subject import Subject

BLOCK_BYTES = 8 * 2**20
THREADS = 4
"""files that are read at once; hashing does not hold Python's lock"""
LOADED = (".safetensors", ".json", ".jinja", ".bin", ".model", ".pt", ".pth", ".py")
"""suffixes of files that a library may load instead of those that the manifest lists"""


def check_hashes(subject: Subject) -> Check:
    """Every file is there with the manifest's SHA-256, and no other that a library would load."""
    folder, files = subject.folder, subject.manifest.files
    missing = sorted(name for name in files if not (folder / name).is_file())
    unlisted = sorted(name for name in _loadable(folder) if name not in files)
    present = [name for name in files if name not in missing]
    total = sum((folder / name).stat().st_size for name in present)
    lock = Lock()
    with (
        tqdm(desc="hashing", total=total, unit="B", unit_scale=True, disable=None, delay=1) as progress,
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
    ):

        def count(size: int) -> None:
            with lock:
                progress.update(size)

        found = dict(zip(present, pool.map(lambda name: _sha256(folder / name, count), present), strict=True))
    changed = sorted(name for name in present if found[name] != files[name])
    problems = [
        (missing, "is missing" if len(missing) == 1 else "are missing"),
        (changed, f"{'differs' if len(changed) == 1 else 'differ'} from the hash in {MANIFEST}"),
        (unlisted, f"{'is' if len(unlisted) == 1 else 'are'} not in {MANIFEST}, and a library may load it"),
    ]
    said = [f"{some_of(names)} {what}" for names, what in problems if names]
    figures = {"files": len(files), "bytes": total, "missing": missing, "changed": changed, "unlisted": unlisted}
    message = (
        f"{'; '.join(said)}: copy or merge the checkpoint again" if said else f"{len(files)} files, {total:,} bytes"
    )
    return Check(name="hashes", passed=not said, message=message, figures=figures)


def _loadable(folder: Path) -> list[str]:
    """Names of files that libraries load, hidden ones left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [path.as_posix() for path in shown if path.suffix in LOADED and path.name not in (MANIFEST, VERDICT)]


def _sha256(path: Path, count: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()
