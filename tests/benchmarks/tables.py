"""The README's tables, made of kept results.

    python -m tests.benchmarks.tables            # says which table differs from what was measured
    python -m tests.benchmarks.tables --write    # writes them

A table stands in README.md between the lines `<!-- table NAME, of tests/benchmarks/tables.py -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.record import RESULTS

README = Path("README.md")
MARKED = re.compile(r"(<!-- table (\w+), of tests/benchmarks/tables\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Rows = dict[str, dict[str, Any]]


def main(arguments: list[str]) -> int:
    """Check or write; returns 1 when a table is not what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    flags = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    if flags.write:
        README.write_text(written(text), encoding="utf-8")
        return 0
    faults = differences(text)
    for fault in faults:
        print(f"README.md:{fault}; python -m tests.benchmarks.tables --write puts it right", file=sys.stderr)
    return int(bool(faults))


def written(text: str) -> str:
    """The text with each of its tables as it was measured."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def differences(text: str) -> list[str]:
    """A sentence for each line of a table that is not as it was measured, and for each table that is not there."""
    faults, there = [], set()
    for found in MARKED.finditer(text):
        name, start = found[2], text[: found.start(3)].count("\n") + 1
        there.add(name)
        if name not in TABLES:
            faults.append(f"{start - 1}: there is no table {name}; there are {', '.join(TABLES)}")
            continue
        stands, measured = found[3].splitlines(), TABLES[name]().splitlines()
        for place in range(max(len(stands), len(measured))):
            is_, should = (lines[place] if place < len(lines) else "nothing" for lines in (stands, measured))
            if is_ != should:
                faults.append(f"{start + place}: table {name} has {is_!r}, and {should!r} was measured")
    return faults + [f"1: table {name} is not there" for name in TABLES if name not in there]


def rows_of(result: str) -> Rows:
    """Rows of a kept result, by name."""
    record = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in record["rows"]}


def table(head: tuple[str, ...], *lines: tuple[str, ...]) -> str:
    """In Markdown, with a line's end."""
    ruled = [_line(head), "|" + "---|" * len(head), *map(_line, lines)]
    return "\n".join(ruled) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def percent(share: float) -> str:
    """With one decimal."""
    return f"{share:.1%}".replace("%", " %")


def demo() -> str:
    """Before and after fine-tuning."""
    rows = rows_of("demo-raysoner-demo-cpu2")
    return table(
        ("", "before", "after"),
        *(
            (said, *(percent(rows[name][figure]) for name in ("before", "after")))
            for said, figure in (
                ("thinks in the language asked for, outside English", "adherence"),
                ("answers right", "accuracy"),
            )
        ),
    )


def story() -> str:
    """What adapters on attention, on some experts and on all of them learn."""
    rows = rows_of("story-raysoner-demo-cpu2")
    lines: list[tuple[str, ...]] = [
        ("none: the base", "", percent(rows["base"]["adherence"]), percent(rows["base"]["accuracy"]))
    ]
    for name, row in rows.items():
        if "seeds" not in row:
            continue
        shares = (
            f"{percent(row[figure])} ({100 * row[f'{figure}_least']:.1f} to {100 * row[f'{figure}_most']:.1f})"
            for figure in ("adherence", "accuracy")
        )
        lines.append((name, f"{row['trainable_parameters'] / 1e6:.2f} M", *shares))
    return table(("adapters on", "trained parameters", "thinks as asked, outside English", "answers right"), *lines)


def data() -> str:
    """Samples a minute."""
    rows = rows_of("data-o200k-cpu2")
    return table(
        ("", "samples a minute", ""),
        *(
            (said, f"{rows[name]['samples_per_minute']:,}", f"{rows[name]['times_faster']:.1f} ×".replace(".0 ×", " ×"))
            for said, name in (
                ("Raysoner: read, render, label, tokenise and pack", "raysoner: read, render, label, tokenise, pack"),
                ("`apply_chat_template` for each sample: neither labels nor packing", "apply_chat_template"),
            )
        ),
    )


def training() -> str:
    """Tokens a second of a training step."""
    rows = rows_of("train_step-gpt-oss-20b-h100")
    slowest = min(row["tokens_per_second"] for row in rows.values())
    return table(
        ("", "tokens/s", "peak GB", ""),
        *(
            (
                said,
                f"{rows[name]['tokens_per_second']:,.0f}",
                f"{rows[name]['peak_memory_gb']:.1f}",
                f"{round(rows[name]['tokens_per_second'] / slowest, 1):g} ×",
            )
            for said, name in (
                ("Raysoner, base packed in MXFP4", "raysoner"),
                ("transformers with grouped_mm and flex attention, stock PEFT on all experts", "transformers-peft"),
                ("the recipe it grew from: eager, experts of three layers", "seed"),
            )
        ),
    )


def scaling() -> str:
    """Two GPUs against one."""
    rows = rows_of("scaling-gpt-oss-20b-2xh200") | rows_of("scaling-gpt-oss-120b-2xh200")
    return table(
        ("", "tokens/s a GPU", "of one GPU", "peak GB"),
        *(
            (
                said,
                f"{rows[name]['tokens_per_second_per_gpu']:,.0f}",
                percent(rows[name]["efficiency"]) if "efficiency" in rows[name] else "",
                f"{max(rows[name]['peak_memory_gb']):.1f}",
            )
            for said, name in (
                ("20b, base whole on each", "data_parallel"),
                ("20b, one base shared in four bits", "sharded_mxfp4"),
                ("20b, one base shared in bf16", "sharded_bf16"),
                ("120b, one base shared in four bits", "sharded_120b"),
            )
        ),
    )


def merge() -> str:
    """Seconds and memory of a merge at full size."""
    rows = rows_of("merge-gpt-oss-20b-h200")
    ours = [rows[name] for name in ("bf16", "mxfp4", "adapter")]
    peft = rows["peft"]
    return table(
        ("", "seconds", "host memory", "GPU memory"),
        (
            "Raysoner, to bf16 / MXFP4 / base with adapter",
            " / ".join(f"{row['seconds']:.0f}" for row in ours),
            " / ".join(f"{row['peak_host_gib']:.1f}" for row in ours) + " GiB",
            " / ".join(f"{row['peak_device_gib']:.1f}".removesuffix(".0") for row in ours) + " GiB",
        ),
        (
            "`merge_and_unload` and `save_pretrained`, bf16",
            f"{peft['seconds']:.0f}",
            f"{peft['peak_host_gib']:.1f} GiB",
            f"{peft['peak_device_gib']:.1f} GiB",
        ),
    )


TABLES: dict[str, Callable[[], str]] = {made.__name__: made for made in (demo, story, data, training, scaling, merge)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
