"""The image: nothing in it but code, its versions pinned, and a user who is not root."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pathspec
import pytest

DOCKERFILE = Path("cluster/deploy/Dockerfile")


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile, comments left out and continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def sent() -> list[str]:
    """Tracked files that `docker build` is given. Docker's patterns are anchored where git's are not."""
    lines = [line.strip() for line in Path(".dockerignore").read_text(encoding="utf-8").splitlines()]
    patterns = []
    for line in lines:
        if line and not line.startswith("#"):
            mark, name = ("!", line[1:]) if line.startswith("!") else ("", line)
            patterns.append(f"{mark}/{name}")
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", patterns)
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in tracked if name and not ignored.match_file(name)]


def test_the_last_user_is_not_root(steps: list[tuple[str, str]]) -> None:
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["1000:1000"]
    assert steps[-1][0] == "USER"
    assert not any(word in ("ADD", "ARG") for word, _ in steps)


def test_versions_are_pinned(steps: list[tuple[str, str]]) -> None:
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.search(r":\d+\.\d+\.\d+", base)
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_what_is_copied_is_there_and_sent(steps: list[tuple[str, str]]) -> None:
    names = [name for word, rest in steps if word == "COPY" for name in rest.split()[:-1]]
    assert {"cluster", "training", "tuning", "serving"} <= set(names)
    files = sent()
    for name in names:
        assert any(file == name or file.startswith(f"{name}/") for file in files), name


def test_no_weights_tests_or_data_are_sent() -> None:
    files = sent()
    assert {file.partition("/")[0] for file in files if "/" in file} == {"cluster", "training", "tuning", "serving"}
    assert not [file for file in files if file.endswith((".safetensors", ".jsonl", ".parquet", ".bin"))]
    assert max(Path(file).stat().st_size for file in files) < 2_000_000
    assert "training/configs/gpt-oss-20b.toml" in files
