"""Throughput of the endpoint under load, and of what it is held against.

python -m tests.benchmarks.serving

Each row is a process of its own, the load (`python -m serving bench`, a closed loop) another. On a GPU, at full size
with random weights on the disk, once with prompts of 128 tokens and answers of 256, once with 1024 and 512: `raysoner`
(our endpoint on Ray Serve over vLLM, chat completions), `vllm-offline` (vLLM's `LLM.generate`, tokens in and out) and
`vllm-serve` (vLLM's own server; plain completions, since its chat interface fails on what random weights write, which
is less work for it). On a CPU: `scripted` (our endpoint over an engine that makes a token for each stream every 10 ms,
as a GPU would), `scripted-python` (the same behind Serve's proxy in Python) and `scripted-unclocked` (every token an
event of its own, as fast as they are taken).

A row that fails says `not measured` and why.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.local import free_ports, stop_tree
from tests.benchmarks.record import RESULTS, keep

GPU_ROWS = ("raysoner", "vllm-offline", "vllm-serve")
CPU_ROWS = ("scripted", "scripted-python", "scripted-unclocked")
Point = tuple[int, int]
"""tokens of a prompt and of an answer"""
SHAPES = {"serving": (128, 256), "serving_long": (1024, 512)}
"""by the benchmark's name"""
CHECKPOINT = Path(tempfile.gettempdir()) / "raysoner-serving-gpt-oss-20b"
DEMO = Path("training/demo/model")
BATCH_TOKENS = 8192
"""of one forward pass, for all rows"""
MARGIN_TOKENS = 128
"""what Harmony's system message and headers add to a prompt"""
START_SECONDS = 1200.0
ROW_SECONDS = 3600.0
APPLICATION = "benchmark"


def main() -> int:
    """Measure the rows one after the other; keep one file for each shape, anew after each row."""
    options = _options()
    if options.row:
        for found in measure(options.row, options):
            print(json.dumps(found), flush=True)
        return 0
    gpu = _gpu()
    names = options.rows.split(",") if options.rows else list(GPU_ROWS if gpu else CPU_ROWS)
    if gpu and any(name in GPU_ROWS for name in names):
        _write_checkpoint(Path(options.checkpoint))
    benchmarks = options.shapes.split(",") if gpu else ["serving"]
    model = "gpt-oss-20b" if gpu else "scripted"
    rows = {
        name: [{"name": name, "not measured": "the benchmark did not get there"}] * len(benchmarks) for name in names
    }
    for name in names:
        rows[name] = _row(name, benchmarks if gpu else [])
        for number, benchmark in enumerate(benchmarks):
            print(json.dumps({"benchmark": benchmark, **rows[name][number]}), flush=True)
            measured = [found[number] for found in rows.values()]
            print(keep(benchmark, model, gpu or f"cpu{os.cpu_count()}", _called(), measured, Path(options.out)))
    return 1 if any("not measured" in row for found in rows.values() for row in found) else 0


def _row(name: str, shapes: list[str]) -> list[dict[str, Any]]:
    """Figures of a row for each shape, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.serving", *sys.argv[1:], "--row", name]
    command += ["--points", ",".join(shapes)] if shapes else []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait(ROW_SECONDS)
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            reason = f"exit code {process.returncode}: {lines[-1] if lines else ''}"[:500]
        except subprocess.TimeoutExpired:
            reason = f"no figures after {ROW_SECONDS:g} s"
        finally:
            stop_tree(process)  # type: ignore[arg-type]
        out.seek(0)
        found: list[dict[str, Any]] = [json.loads(line) for line in out if line.startswith("{")]
    return found + [{"name": name, "not measured": reason}] * (max(1, len(shapes)) - len(found))


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row's figures of each shape, in this process: one start of the engine has room for all."""
    rows = {
        "raysoner": _measure_endpoint,
        "scripted": _measure_endpoint,
        "scripted-python": _measure_endpoint,
        "scripted-unclocked": _measure_endpoint,
        "vllm-offline": _measure_offline,
        "vllm-serve": _measure_server,
    }
    shapes = [SHAPES[point] for point in options.points.split(",")] if options.points else []
    points = shapes or [(options.prompt_tokens, options.output_tokens)]
    options.prompt_tokens, options.output_tokens = (max(sizes) for sizes in zip(*points, strict=True))
    for found in rows[name](name, options, points):
        yield {"name": name, **found}


def _measure_endpoint(name: str, options: argparse.Namespace, points: list[Point]) -> Iterator[dict[str, Any]]:
    """Our endpoint on a Ray of its own."""
    with endpoint(name, options) as (url, proxy, take_first_token_seconds):
        for prompt, output in points:
            words = _words(prompt, _codec_folder(name, options))
            single = bench(url, output, words, 1, options.single_requests, warmup=3)
            engine = sorted(take_first_token_seconds()[-options.single_requests :])
            found = bench(url, output, words, options.streams, options.requests, warmup=options.streams)
            whole = single["summary"]["latencies"]["time_to_first_token"]["p50"]
            yield {
                "proxy": proxy,
                **_figures(found),
                "first_token_ms_one_request": round(whole * 1000, 2),
                "added_first_token_ms_one_request": round((whole - engine[len(engine) // 2]) * 1000, 2),
            }


@contextmanager
def endpoint(name: str, options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Our endpoint with one replica, on a Ray of this process; its address, its proxy, and a call that takes what its
    engine took for first tokens."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serving.app import application
    from serving.config import ServingConfig
    from serving.haproxy import choose_proxy, environment, private_folder
    from tests.benchmarks import serving_replicas as replicas

    kinds = {"raysoner": replicas.RandomReplica, "scripted-unclocked": replicas.UnclockedReplica}
    config = ServingConfig.model_validate(_settings(name, options))
    proxy = choose_proxy(config)
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="rs-") as folder, private_folder() as files:
        variables = {"env_vars": environment(config, proxy, files)}  # as `python -m serving deploy` does
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder, runtime_env=variables)
        try:
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
            kind = kinds.get(name, replicas.ScriptedReplica)
            handle = serve.run(application(config, kind), name=APPLICATION, route_prefix="/")
            yield f"http://127.0.0.1:{port}", proxy, lambda: handle.take_first_token_seconds.remote().result()
        finally:
            serve.shutdown()
            ray.shutdown()


def _settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Room for all streams at once, so that nothing waits."""
    longest, gpus = options.prompt_tokens + MARGIN_TOKENS + options.output_tokens, int(name == "raysoner")
    return {
        "model": {"path": str(_codec_folder(name, options).absolute()), "name": "benchmark"},
        "endpoint": {"proxy": "python" if name == "scripted-python" else options.proxy},
        "engine": {
            "kind": "vllm" if gpus else "auto",
            "maximum_concurrent": options.streams,
            "maximum_batch_tokens": BATCH_TOKENS,
            "maximum_cached_tokens": options.streams * longest,
            "maximum_output_tokens": options.output_tokens,
            "default_output_tokens": options.output_tokens,
        },
        "replicas": {"gpus": gpus, "target_ongoing_requests": options.streams, "graceful_shutdown_seconds": 1},
        "limits": {"prompt_tokens": options.prompt_tokens + MARGIN_TOKENS, "waiting_requests": options.streams},
    }


def _codec_folder(name: str, options: argparse.Namespace) -> Path:
    return Path(options.checkpoint) if name in GPU_ROWS else DEMO


def _words(tokens: int, folder: Path) -> int:
    """Words of a prompt that takes about so many tokens with what Harmony adds; most are one token."""
    from cluster.harmony import Codec, Conversation, Message
    from serving.bench.prompts import synthetic

    codec = Codec.from_folder(folder)

    def taken(words: int) -> int:
        content = synthetic(words, 0, 0)[0]["content"]
        return len(codec.prompt(Conversation(messages=(Message(role="user", content=content),))))

    few, many = taken(1), taken(101)
    return max(1, round((tokens - few) / ((many - few) / 100)))


def bench(
    url: str, output: int, words: int, concurrency: int, requests: int, warmup: int, *flags: str
) -> dict[str, Any]:
    """The report of a load from a process of its own.

    Raises:
        RuntimeError: a request failed; the message holds what was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "serving", "bench", "--url", url, "--json", str(path), *flags]
        command += ["--concurrency", str(concurrency), "--requests", str(requests), "--warmup", str(warmup)]
        command += ["--words", str(words), "--max-tokens", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the load failed: {' '.join((result.stdout + result.stderr).split())[-400:]}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    summary, latencies = report["summary"], report["summary"]["latencies"]
    gaps = latencies["inter_chunk_latency"]
    return {
        "tokens_per_second": round(summary["tokens_per_second"]),
        "requests": summary["requests"],
        "prompt_tokens": round(summary["prompt_tokens"] / summary["succeeded"]),
        "output_tokens": round(summary["completion_tokens"] / summary["succeeded"]),
        "first_token_ms_p50": round(latencies["time_to_first_token"]["p50"] * 1000, 1),
        "first_token_ms_p99": round(latencies["time_to_first_token"]["p99"] * 1000, 1),
        "inter_token_ms_p50": round(latencies["inter_token_latency"]["p50"] * 1000, 2),
        "inter_token_ms_p99": round(latencies["inter_token_latency"]["p99"] * 1000, 2),
        "tokens_in_a_chunk": round(summary["completion_tokens"] / (gaps["measured"] + summary["requests"]), 2),
        "generator_cpu": round(report["generator_cpu"], 2),
    }


def _measure_offline(name: str, options: argparse.Namespace, points: list[Point]) -> Iterator[dict[str, Any]]:
    """vLLM's own offline interface: all requests at the start, as many at a time as we have streams."""
    import random

    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    longest = options.prompt_tokens + MARGIN_TOKENS + options.output_tokens
    engine = LLM(
        model=options.checkpoint,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=options.streams,
        max_num_batched_tokens=BATCH_TOKENS,
    )
    rng = random.Random(0)

    def generate(count: int, prompt: int, output: int) -> int:
        sampling = SamplingParams(max_tokens=output, temperature=1.0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [rng.randrange(1000, 190_000) for _ in range(prompt)]} for _ in range(count)]
        return sum(len(answer.outputs[0].token_ids) for answer in engine.generate(prompts, sampling, use_tqdm=False))

    for prompt, output in points:
        generate(options.streams, prompt, output)
        began = time.perf_counter()
        tokens = generate(options.requests, prompt, output)
        seconds = time.perf_counter() - began
        yield {
            "tokens_per_second": round(tokens / seconds),
            "requests": options.requests,
            "prompt_tokens": prompt,
            "output_tokens": round(tokens / options.requests),
        }


def _measure_server(name: str, options: argparse.Namespace, points: list[Point]) -> Iterator[dict[str, Any]]:
    """vLLM's own server."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    longest = options.prompt_tokens + MARGIN_TOKENS + options.output_tokens
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.checkpoint]
    command += ["--served-model-name", "benchmark", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(longest), "--max-num-seqs", str(options.streams)]
    command += ["--max-num-batched-tokens", str(BATCH_TOKENS), "--generation-config", "vllm"]
    command += ["--disable-uvicorn-access-log"]
    flags = ("--completions", "--field", "ignore_eos=true")
    with tempfile.TemporaryFile("w+b") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_healthy(url, server)
            for prompt, output in points:
                single = bench(url, output, prompt, 1, options.single_requests, 3, *flags)
                found = bench(url, output, prompt, options.streams, options.requests, options.streams, *flags)
                first = single["summary"]["latencies"]["time_to_first_token"]["p50"]
                yield {**_figures(found), "first_token_ms_one_request": round(first * 1000, 2)}
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}; {' '.join(log.read().decode(errors='replace').split())[-300:]}") from None
        finally:
            stop_tree(server)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise RuntimeError(f"the server was not healthy after {START_SECONDS:g} s")


def _write_checkpoint(folder: Path) -> None:
    """Random weights of the 20b with gpt-oss's tokenizer, by a process of its own, unless they are there."""
    if (folder / "tokenizer_config.json").is_file():
        return
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder,))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"writing {folder} failed; delete it, and look at what stands above")


def write_checkpoint(folder: Path) -> None:
    """A folder that vLLM serves too; its last file says that it is whole."""
    import torch

    from tests.benchmarks.checkpoints import write_packed
    from tests.benchmarks.train_step import model_config
    from tests.o200k import save_o200k_tokenizer

    write_packed(folder, model_config("gpt-oss-20b"), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    save_o200k_tokenizer(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _gpu() -> str | None:
    """The GPU's short name, such as h100; the driver is asked by a child, since rows are to find the GPU untouched."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return name.replace("NVIDIA ", "").split()[0].lower() if name else None


def _called() -> str:
    """The command that a user typed."""
    return " ".join(["python -m tests.benchmarks.serving", *sys.argv[1:]])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serving", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", help=f"separated by commas; on a GPU {','.join(GPU_ROWS)}, else {','.join(CPU_ROWS)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="on a GPU (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=256, help="requests at a time (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2048, help="requests of a row (default: %(default)s)")
    parser.add_argument("--single-requests", type=int, default=30,
                        help="one after the other, for the time to first token (default: %(default)s)")  # fmt: skip
    parser.add_argument("--proxy", choices=("auto", "haproxy", "python"), default="auto",
                        help="in front of our endpoint (default: %(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="folder of random weights; made if not there")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result files (default: %(default)s)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--points", default="", help=argparse.SUPPRESS)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="on a CPU; a GPU measures both shapes")
    parser.add_argument("--output-tokens", type=int, default=256, help="on a CPU (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
