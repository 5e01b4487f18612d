"""Scratch folders: gone with their block, and gone after their process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from training.scratch import LOCK, scratch_folder

HOLD = """from training.scratch import scratch_folder
with scratch_folder() as one:
    print(one, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_it_is_gone_when_the_block_ends(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "rows").write_bytes(b"1")
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        folders = [Path(str(holder.stdout and holder.stdout.readline()).strip()) for holder in holders]
        (folders[0] / "rows").write_bytes(b"1")
        holders[0].kill()
        holders[0].wait()
        for folder in folders:
            age(folder)
        with scratch_folder():
            assert not folders[0].exists()
            assert (folders[1] / LOCK).is_file()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_new_folders_and_those_of_others_are_left_alone(temporary: Path) -> None:
    (temporary / "raysoner-new").mkdir()
    (temporary / "raysoner-new" / LOCK).touch()
    (temporary / "raysoner-other").mkdir()
    age(temporary / "raysoner-other")
    with scratch_folder():
        pass
    assert {path.name for path in temporary.iterdir()} == {"raysoner-new", "raysoner-other"}
