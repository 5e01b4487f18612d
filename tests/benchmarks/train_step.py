"""Training steps of Raysoner and of what a user would run instead, on the same random weights of gpt-oss's real shapes.

python -m tests.benchmarks.train_step --model gpt-oss-20b

Each row is a process of its own: `raysoner` (packed MXFP4 base, LoRA on all attention linears and all experts),
`seed` (the recipe Raysoner grew from: bf16, eager attention and experts, stock PEFT on the attention linears and three
layers' experts, gradient checkpointing) and `transformers-peft` (bf16, grouped_mm experts, flex attention, stock PEFT
on all layers' experts, gradient checkpointing). A step is forward, backward and AdamW under bf16 autocast, as Trainer
runs it; all tokens are trained. Rows of the others are one document each, ours are packed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from tests.benchmarks.checkpoints import forget_cached, write_packed
from tests.benchmarks.record import RESULTS, keep

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""as a run's workers have it"""
DEMO = "training/demo/model"
ROWS = ("raysoner", "seed", "transformers-peft")


def main() -> int:
    """Measure the rows one after the other and keep them in one file."""
    options = _options()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return 0
    rows = []
    if options.checkpoint:
        _checkpoint(Path(options.checkpoint), options.model)
    for name in options.rows.split(","):
        if options.checkpoint:
            forget_cached(Path(options.checkpoint))
        command = [sys.executable, "-m", "tests.benchmarks.train_step", *sys.argv[1:], "--row", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
        if result.returncode:
            rows.append({"name": name, "not measured": f"exit code {result.returncode}"})
        else:
            rows.append(json.loads(result.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    device = _device_name()
    print(keep(options.keep_as, options.model, device, _called(), rows, Path(options.out)))
    return 1 if any("not measured" in row for row in rows) else 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row's figures, in this process."""
    from tests.benchmarks import profiles, train_models

    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(options.model)
    subject = train_models.BUILDERS[name](config, device, options)
    optimizer = torch.optim.AdamW(
        [weight for weight in subject.model.parameters() if weight.requires_grad], lr=1e-4, fused=device.type == "cuda"
    )
    micro_batch = options.micro_batch_size if name == "raysoner" else options.rival_micro_batch_size
    packed = subject.packed and not options.one_document
    batches = train_models.batches(config, micro_batch, options.sequence_length, device, packed)
    built = time.perf_counter()
    seconds, losses, first = [], [], 0.0
    for step in range(options.warmup + options.steps):
        begin = time.perf_counter()
        loss = subject.loss(next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        first = first or time.perf_counter() - started
        if step >= options.warmup:
            seconds.append(time.perf_counter() - begin)
        print(f"{name} step {step} loss {losses[-1]:.4f} {time.perf_counter() - begin:.2f} s", file=sys.stderr)
    tokens = micro_batch * options.sequence_length
    median = sorted(seconds)[len(seconds) // 2]
    row = {
        "name": name,
        "tokens_per_second": round(tokens / median, 1),
        "step_seconds": round(median, 4),
        "spread": round((max(seconds) - min(seconds)) / median, 3),
        "micro_batch_size": micro_batch,
        "sequence_length": options.sequence_length,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
        "activation_checkpointing": subject.checkpointing,
        "trainable_parameters": sum(w.numel() for w in subject.model.parameters() if w.requires_grad),
        "first_loss": round(losses[0], 4),
        "build_seconds": round(built - started, 1),
        "seconds_to_first_step": round(first, 1),
    }
    if options.profile and name == "raysoner":
        profiles.profile(subject, next(batches), options.chunk_tokens, _called(), Path(options.profile))
    return row


def _checkpoint(folder: Path, model: str) -> None:
    """Write the model's checkpoint, in a process of its own, unless it is there."""
    if (folder / "config.json").is_file():
        return
    context = multiprocessing.get_context("spawn")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = context.Process(target=write_packed, args=(folder, model_config(model), device))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"writing {folder} failed")


def model_config(name: str) -> GptOssConfig:
    """gpt-oss's shapes; the demo's for `raysoner-demo`."""
    if name == "raysoner-demo":
        config = GptOssConfig.from_pretrained(DEMO)
        del config.quantization_config
        return config
    layers, experts = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}[name]
    return GptOssConfig(num_hidden_layers=layers, num_local_experts=experts)


def _called() -> str:
    """The command that a user typed; the process of a row has one more option behind it."""
    given = sys.argv[1 : sys.argv.index("--row")] if "--row" in sys.argv else sys.argv[1:]
    return " ".join(["python -m tests.benchmarks.train_step", *given])


def _device_name() -> str:
    if not torch.cuda.is_available():
        return f"cpu{os.cpu_count()}"
    return torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="gpt-oss-20b" if gpu else "raysoner-demo",
                        choices=("gpt-oss-20b", "gpt-oss-120b", "raysoner-demo"))  # fmt: skip
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas")
    parser.add_argument("--micro-batch-size", type=int, default=8 if gpu else 2, help="rows of ours in a step")
    parser.add_argument("--rival-micro-batch-size", type=int, default=4 if gpu else 2, help="rows of the others")
    parser.add_argument("--sequence-length", type=int, default=2048 if gpu else 256)
    parser.add_argument("--one-document", action="store_true", help="a row of ours is one document, not packed ones")
    parser.add_argument("--checkpointing", default="none", choices=("none", "experts", "full"), help="ours")
    parser.add_argument("--activation-offload", action="store_true", help="ours wait in host memory")
    parser.add_argument("--compile", default="on" if gpu else "off", choices=("on", "off"), help="ours")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of our loss")
    parser.add_argument("--checkpoint", default="", help="folder that the base is read from, cold; written if missing")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", default="", help="JSON file for where our step's time goes")
    parser.add_argument("--keep-as", default="train_step", help="name of the result")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
