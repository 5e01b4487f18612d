"""Merges of a random base of gpt-oss's real shapes, beside the disk's speed and what a user would run instead.

python -m tests.benchmarks.merge --model gpt-oss-20b

Each row is a process of its own, so that peaks of memory are its own, and reads a base that is not in the page cache.
`disk` writes zeros one after the other, before and after; `bf16`, `mxfp4` and `adapter` are our merges, each followed
by `python -m training verify` of what it made; `peft` is `PeftModel.merge_and_unload` and `save_pretrained` of a base
that transformers dequantises. The adapter is on all attention linears and all experts. Without a model, sizes are small
and only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.model import GPT_OSS_20B, KNOWN_SHAPES
from cluster.verdict import current_verdict
from tests.benchmarks.checkpoints import forget_cached
from tests.benchmarks.record import RESULTS, keep
from tests.resident import peak_bytes

SMALL = replace(GPT_OSS_20B, num_hidden_layers=2, hidden_size=256, intermediate_size=256, vocab_size=3072, head_dim=16)
SHAPES = {"small": SMALL, **KNOWN_SHAPES}
FORMATS = ("bf16", "mxfp4", "adapter")
ROWS = (*FORMATS, "peft")
DISK_BYTES = 4 * 2**30
"""at most, of each measurement of the disk"""


def main() -> int:
    """Measure the rows one after the other and keep them in one file."""
    options = _options()
    if options.row:
        print(json.dumps(measure(options.row, Path(options.folder), options.device)))
        return 0
    shape = SHAPES[options.model]
    if options.layers:
        shape = replace(shape, num_hidden_layers=options.layers)
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=options.folder))
    try:
        from tests.benchmarks.random_checkpoints import write_adapter, write_base

        write_base(folder / "base", shape)
        write_adapter(folder / "adapter", folder / "base", shape, options.rank)
        rows = _rows(folder, options, shape.num_hidden_layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(keep("merge", options.model, _device_name(), _called(), rows, Path(options.out)))
    return 1 if any("not measured" in row for row in rows) else 0


def _rows(folder: Path, options: argparse.Namespace, layers: int) -> list[dict[str, Any]]:
    size = min(DISK_BYTES, 2 * sum(path.stat().st_size for path in (folder / "base").iterdir()))
    disk = [_disk(folder, size)]
    rows = []
    for name in options.rows.split(","):
        forget_cached(folder / "base")
        row = _process(name, folder, options.device)
        if name in FORMATS and "seconds" in row:
            row |= _verified(folder, options.device)
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(folder / "out", ignore_errors=True)
        disk.append(_disk(folder, size))
    rate = sorted(disk)[len(disk) // 2]
    for row in rows:
        if "seconds" in row:
            row["share_of_disk"] = round(row["gb_per_second"] / rate, 2)
    about = {"layers": layers, "rank": options.rank}
    measured = {"gb_per_second": round(rate, 3), "least": round(min(disk), 3), "most": round(max(disk), 3)}
    return [{"name": "disk", **measured, **about}, *rows]


def _process(name: str, folder: Path, device: str) -> dict[str, Any]:
    """A row, with the peak of its process's resident memory."""
    words = ["--row", name, "--folder", str(folder), "--device", device]
    command = [sys.executable, "-m", "tests.benchmarks.merge", *words]
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output, text=True) as process:
        peak = peak_bytes(process)
        output.seek(0)
        last = [line for line in output if line.startswith("{")][-1:]
    if process.returncode or not last:
        return {"name": name, "not measured": f"exit code {process.returncode}"}
    return {**json.loads(last[0]), "peak_host_gib": round(peak / 2**30, 2)}


def _verified(folder: Path, device: str) -> dict[str, Any]:
    """Seconds of the whole command on what was just merged, start and libraries included, and its verdict."""
    words = ["--base", str(folder / "base"), "--adapter", str(folder / "adapter"), "--device", device, "--quiet"]
    command = [sys.executable, "-m", "training", "verify", str(folder / "out"), *words]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = round(time.perf_counter() - began, 1)
    verdict = done.stdout.strip().splitlines()[-1].removeprefix("verified").replace(str(folder), "").strip()
    found = {"verify_seconds": seconds, "verify_exit_code": done.returncode, "verify": verdict}
    if judged := current_verdict(folder / "out"):
        found |= {check.name: check.message for check in judged.checks if check.name in ("adapter", "logits", "effect")}
    return found


def measure(name: str, folder: Path, device: str) -> dict[str, Any]:
    """Merge in this process: seconds from the first byte that is read, libraries loaded, until all is on the disk."""
    import torch

    base, adapter, out = (str(folder / part) for part in ("base", "adapter", "out"))
    found: dict[str, Any] = {}
    if name == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, Mxfp4Config

        began, cpu_began = time.perf_counter(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            quantization_config=Mxfp4Config(dequantize=True),
            device_map=None if device == "cpu" or not torch.cuda.is_available() else "cuda",
        )
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="2GB")
        os.sync()
    else:
        from training.merge.job import run_merge
        from training.merge.options import Options

        began, cpu_began = time.perf_counter(), time.process_time()
        options = Options(adapter, out, base=base, format=name, device=device, keep_at_least=0.0)  # type: ignore[arg-type]
        made = run_merge(options).details["merge"]
        if "report" in made:
            found["kept"] = made["report"]["kept"]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    gb = sum(path.stat().st_size for path in Path(out).rglob("*.safetensors")) / 1e9
    device_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "name": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "written_gb": round(gb, 2),
        "gb_per_second": round(gb / seconds, 3),
        "peak_device_gib": None if device_gib is None else round(device_gib, 2),
        **found,
    }


def _disk(folder: Path, size: int) -> float:
    """GB a second of one process that writes a file from end to end and waits until it is on the disk."""
    piece = memoryview(bytes(1 << 24))
    path = folder / "disk"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        left = size
        while left > 0:
            left -= stream.write(piece[: min(left, len(piece))])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / 1e9 / seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.merge")
    parser.add_argument("--model", choices=list(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--folder", help="on the disk that is measured (default: of temporary files)")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _device_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"cpu{os.cpu_count()}"
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]


def _called() -> str:
    return " ".join(["python -m tests.benchmarks.merge", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
