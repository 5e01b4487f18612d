"""Pushing to a hub: what arrives, what is refused in one sentence, and where the token is and is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session

from cluster.artifacts import MANIFEST, Manifest, sha256, write_manifest
from cluster.local import free_ports
from cluster.verdict import VERDICT, Check, Verdict
from training import push as module
from training.card import model_card
from training.push import main

from .hub import READ_TOKEN, TOKEN, Hub, running_hub

REPO = "owner/tuned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as pushing goes: two large files, small ones, one in a subfolder."""
    folder = tmp_path / "merged"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 3000)
    (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(reversed(range(256))) * 2000)
    (folder / "config.json").write_text("{}\n")
    (folder / "README.md").write_text(model_card("openai/gpt-oss-20b", "bf16", {}))
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 8}\n')
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, VERDICT))
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    manifest = Manifest(kind="checkpoint", base="openai/gpt-oss-20b", details={"format": "bf16"}, files=files)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())


def judge(folder: Path, *, passed: bool) -> None:
    verdict = Verdict(
        passed=passed,
        manifest_sha256=sha256(folder / MANIFEST),
        format="bf16",
        checks=(Check(name="logits", passed=passed, message="greedy agreement 3.00%"),),
        date="2026-11-25T00:00:00+00:00",
        versions={},
        device="CPU",
    )
    (folder / VERDICT).write_bytes(verdict.to_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = dict(hub.repositories[REPO].branches[branch])
    files.pop(".gitattributes", None)
    return files


def words(folder: Path, *more: str) -> list[str]:
    return [str(folder), "--repo", REPO, *more]


def test_files_arrive_byte_for_byte(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    judge(folder, passed=True)
    (folder / "notes.txt").write_text("not of the manifest")
    assert main(words(folder, "--private", "--message", "First")) == 0
    expected = contents(folder)
    del expected["notes.txt"]
    assert pushed(hub) == expected
    assert hub.repositories[REPO].private
    assert [commit["summary"] for commit in hub.repositories[REPO].commits] == ["First"]
    out, err = capfd.readouterr()
    assert "model-00001-of-00002.safetensors  768,000 bytes" in out
    assert f"to        {hub.url}/{REPO}, revision main, private" in out
    assert f"pushed    {hub.url}/{REPO}/commit/" in out
    assert "warning" not in err
    sent = [authorization for method, path, authorization in hub.requests if not path.startswith("/lfs/")]
    assert set(sent) == {f"Bearer {TOKEN}"}
    assert TOKEN not in out + err


def test_an_adapter(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text("{}")
    write_manifest(adapter, "adapter", "openai/gpt-oss-20b", {})
    assert main(words(adapter)) == 0
    assert pushed(hub) == contents(adapter)
    assert not hub.repositories[REPO].private
    assert "not verified" not in capfd.readouterr().err


def test_another_branch(hub: Hub, folder: Path) -> None:
    assert main(words(folder, "--revision", "v2")) == 0
    assert pushed(hub, "v2") == contents(folder)
    assert pushed(hub) == {}
    assert main(words(folder, "--revision", "v2")) == 0


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, "--dry-run")) == 0
    assert hub.requests == []
    out, err = capfd.readouterr()
    assert "checkpoint" in out
    assert "6 files, 1,28" in out
    assert "warning:" in err
    assert "is not verified; python -m training verify does it" in err


def test_the_same_again_sends_no_large_file_twice(hub: Hub, folder: Path) -> None:
    assert main(words(folder)) == 0
    uploads = hub.asked("PUT", "/lfs/")
    assert uploads == 2
    assert main(words(folder)) == 0
    assert hub.asked("PUT", "/lfs/") == uploads
    assert len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize("fault", ["dropped_uploads", "dropped_commits"])
def test_a_connection_that_breaks_is_tried_again(hub: Hub, folder: Path, fault: str) -> None:
    setattr(hub, fault, 1)
    assert main(words(folder)) == 0
    assert pushed(hub) == contents(folder)


def test_what_broke_off_goes_on(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each try loses one of two uploads; nothing is seen of it until a command gets through."""
    monkeypatch.setattr(module, "WAITS", ())
    monkeypatch.setattr("huggingface_hub.lfs.http_backoff", once)
    hub.dropped_uploads = 1
    assert main(words(folder)) == 2
    error = capfd.readouterr().err
    assert "run the same command again, which goes on" in error
    assert TOKEN not in error
    assert pushed(hub) == {}
    assert main(words(folder)) == 0
    assert pushed(hub) == contents(folder)
    assert hub.asked("PUT", "/lfs/") == 3, "the upload that got through was not sent again"


def once(method: str, url: str, **keywords: object) -> object:
    """The client's request without its own tries."""
    return get_session().request(method, url, **keywords)  # type: ignore[arg-type]


def test_other_content_is_not_overwritten(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder)) == 0
    first = pushed(hub)
    hub.repositories[REPO].branches["main"]["photo.png"] = b"theirs"
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "config.json").write_text('{"another": 1}\n')
    sign(folder)
    assert main(words(folder)) == 2
    assert "holds other files (README.md, adapter/adapter_config.json and " in capfd.readouterr().err
    assert pushed(hub) == first | {"photo.png": b"theirs"}
    assert main(words(folder, "--replace")) == 0
    assert pushed(hub) == contents(folder)


def test_a_public_repository_is_not_used_where_a_private_one_was_asked_for(
    hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder)) == 0
    before = len(hub.requests)
    assert main(words(folder, "--private")) == 2
    assert "is public, and --private was asked for" in capfd.readouterr().err
    assert not any("commit" in path for _, path, _ in hub.requests[before:])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "does not accept the token in HF_TOKEN"),
        (READ_TOKEN, f"the token in HF_TOKEN may not write to {REPO}"),
        ("", "HF_TOKEN is not set"),
    ],
)
def test_a_token_that_does_not_serve(
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(words(folder)) == 2
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not token or token not in out + err
    assert "Traceback" not in err
    assert hub.repositories == {}


def test_no_hub(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert main(words(folder)) == 2
    assert f"error: {address} cannot be reached, or the connection broke" in capfd.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(words(folder)) == 2
    assert "HF_HUB_OFFLINE is set, and push needs the hub: unset it" in capfd.readouterr().err


def test_a_name_that_the_hub_does_not_take(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--repo", "a/b/c"]) == 2
    assert "error: a/b/c cannot be pushed to: " in capfd.readouterr().err


def test_what_must_not_leave_is_refused(hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *more: str) -> None:
        assert main(words(folder, *more)) == 2
        assert message in capfd.readouterr().err
        assert hub.requests == []

    refused("is not verified, and --require-verified asks for it", "--require-verified")
    judge(folder, passed=False)
    refused("failed its verification, check logits: greedy agreement 3.00%")
    (folder / VERDICT).unlink()
    data = bytearray((folder / "config.json").read_bytes())
    data[0] ^= 1
    (folder / "config.json").write_bytes(data)
    refused("config.json is corrupted")
    (folder.parent / "secret.txt").write_text("secret")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {"../secret.txt": sha256(folder.parent / "secret.txt")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused("lists ../secret.txt, which lies outside the folder")
    (folder / MANIFEST).unlink()
    refused("manifest.json is missing")
    assert main(["s3://bucket/merged", "--repo", REPO]) == 2
    assert "push reads local folders" in capfd.readouterr().err
