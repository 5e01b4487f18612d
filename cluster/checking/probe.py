"""What one machine has. It runs on nodes to which nothing of ours was copied, so it needs the standard library alone.

Ray carries the module there by value (`cluster.checking.nodes`). PyTorch is not imported, which would take seconds and
a CUDA context on each GPU: versions come from the packages' metadata, GPUs from `nvidia-smi`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "triton", "transformers", "trl", "peft", "accelerate", "pyarrow", "pydantic", "tokenizers")
QUERY = "name,memory.total,driver_version"
SMI_SECONDS = 20.0


def probe(storage: str | None) -> dict[str, Any]:
    """This machine's hardware and versions; with `storage`, a path or URI, whether a file can be kept there."""
    return {
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "versions": {"python": platform.python_version(), **_versions()},
        "cuda": _torch_cuda(),
        "free_disk_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "token": os.environ.get("RAY_AUTH_MODE", "") == "token",
        "storage_error": _storage_error(storage) if storage else None,
    }


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of each GPU, whether or not this process may use it."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in found.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3:
            memory = int(cells[1]) * 2**20 if cells[1].isdigit() else None
            gpus.append({"name": cells[0], "memory_bytes": memory, "driver": cells[2]})
    return gpus


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if re.fullmatch(r"nvidia-nccl-cu\d+", name):
            found["nccl"] = distribution.version
    return found


def _torch_cuda() -> str | None:
    """The CUDA version that PyTorch was built for, out of its `version.py`."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _storage_error(storage: str) -> str | None:
    """Why a small file cannot be written, read and deleted in a folder; None where it can."""
    content, name = b"raysoner", f".raysoner-check-{uuid.uuid4().hex}"
    try:
        from pyarrow import fs

        if "://" in storage:
            filesystem, path = fs.FileSystem.from_uri(storage)
        else:
            filesystem, path = fs.LocalFileSystem(), str(Path(storage).expanduser().absolute())
        filesystem.create_dir(path, recursive=True)
        place = f"{path.rstrip('/')}/{name}"
        with filesystem.open_output_stream(place) as stream:
            stream.write(content)
        try:
            with filesystem.open_input_stream(place) as stream:
                found = stream.read()
        finally:
            filesystem.delete_file(place)
    except Exception as error:  # of any file system; the caller shows it
        lines = str(error).replace(storage, "the storage").splitlines() or ["no reason given"]
        return f"{type(error).__name__}: {lines[0]}"[:300]
    return None if found == content else "what was read is not what was written"
