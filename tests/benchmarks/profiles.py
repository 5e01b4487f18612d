"""Where a training step's time on the device goes: shares by kind of work, and the kernels that take most."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from tests.benchmarks.record import record
from tests.benchmarks.train_models import Subject
from training.modeling.loss import weighted_nll

KINDS = (
    ("dequantisation", ("dequantise",)),
    ("attention", ("flex_attention",)),
    ("experts' rows", ("gather_kernel", "activate", "combine_kernel")),
    ("grouped GEMM", ("13device_kernel", "cutlass::device_kernel")),
    ("dense GEMM", ("nvjet", "gemm", "cublas")),
    ("copies", ("memcpy", "memset")),
)
"""kinds of work by parts of kernels' names, the first that fits; all else is elementwise"""


def profile(subject: Subject, batch: dict[str, torch.Tensor], chunk_tokens: int, command: str, path: Path) -> None:
    """Write the shares of one forward and backward pass, the loss timed apart, and the largest kernels as JSON."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiler(activities=activities) as measured:
        subject.loss(batch).backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = [event for event in measured.key_averages() if _is_kernel(event)]
    total = sum(event.self_device_time_total for event in kernels) or 1.0
    shares: dict[str, float] = defaultdict(float)
    for event in kernels:
        shares[_kind(event.key)] += event.self_device_time_total / total
    loss = _loss_seconds(subject, batch, chunk_tokens)
    rows = [
        {
            "name": "step",
            "device_seconds": round(total / 1e6, 4),
            "shares": {kind: round(share, 4) for kind, share in sorted(shares.items(), key=lambda item: -item[1])},
        },
        {
            "name": "loss",
            "seconds": round(loss, 4),
            "share": round(loss * 1e6 / total, 4),
            "note": "head and cross-entropy, measured apart; contained in dense GEMM and elementwise above",
        },
        *(
            {
                "name": event.key[:160],
                "calls": event.count,
                "milliseconds": round(event.self_device_time_total / 1e3, 2),
                "share": round(event.self_device_time_total / total, 4),
            }
            for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:25]
        ),
    ]
    result = record("profile", command, rows)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _is_kernel(event: Any) -> bool:
    """Work on the device itself; operators and ranges of the host count the kernels under them once more."""
    return "CUDA" in str(event.device_type) and not event.is_user_annotation


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "elementwise")


def _loss_seconds(subject: Subject, batch: dict[str, torch.Tensor], chunk_tokens: int) -> float:
    head = subject.model.get_output_embeddings().weight
    labels = batch["labels"][:, 1:].flatten()
    labels = labels[labels >= 0]
    hidden = torch.randn(len(labels), head.shape[1], dtype=head.dtype, device=head.device, requires_grad=True)
    weights = torch.ones(len(labels), device=head.device)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        weighted_nll(hidden, head, labels, weights, chunk_tokens)[0].backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
