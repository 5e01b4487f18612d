"""API keys: what the file holds, who is let in, how much each may ask for; and the command that makes them."""

from __future__ import annotations

import hmac
import json
import logging
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from serving import deployment
from serving.config import ServingConfig
from serving.keys import ANONYMOUS, InvalidKeyError, KeyFile, Keys, RateLimitError, hash_of
from serving.keys_command import main
from tests.serving.harness import serving_config


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def create(path: Path, capsys: pytest.CaptureFixture[str], name: str, *flags: str) -> str:
    assert main(["create", name, "--file", str(path), *flags]) == 0
    return capsys.readouterr().out.strip()


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_is_printed_once_and_only_its_hash_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = create(path, capsys, "alice"), create(path, capsys, "bob")
    assert first != second
    assert len(first) == len("rs-") + 43  # 256 bits in base64
    text = path.read_text(encoding="utf-8")
    assert first not in text
    assert second not in text
    assert [key["sha256"] for key in json.loads(text)["keys"]] == [hash_of(first), hash_of(second)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_list_and_revoke(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "9000", "--expires", "2999-12-31")
    key = create(path, capsys, "alice", *limits)
    create(path, capsys, "bob")
    assert main(["list", "--file", str(path)]) == 0
    printed = capsys.readouterr().out
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert printed.splitlines() == [
        f"alice: made {today}, expires 3000-01-01 00:00 UTC, 60 requests per minute and 9000 tokens per minute",
        f"bob: made {today}, does not expire, no limits",
    ]
    assert hash_of(key) not in printed
    assert main(["revoke", "alice", "--file", str(path)]) == 0
    assert [entry.name for entry in KeyFile.read(path).keys] == ["bob"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "alice"], "a key named alice exists; revoke it first"),
        (["create", "a b"], "name 'a b': give 1 to 64 letters"),
        (["create", "new", "--expires", "2001-01-01"], "--expires 2001-01-01: that day is over"),
        (["create", "new", "--expires", "soon"], "--expires soon: give a date such as 2030-12-31"),
        (["revoke", "nobody"], "no key is named nobody"),
    ],
)
def test_commands_that_do_not_fit(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    create(path, capsys, "alice")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        main([*arguments, "--file", str(path)])
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys\.json: the file cannot be written \(No such file or directory\)"):
        main(["create", "alice", "--file", str(tmp_path / "nowhere" / "keys.json")])


def test_a_key_lets_its_owner_in(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = create(path, capsys, "alice"), create(path, capsys, "bob")
    keys = Keys(path)
    assert (len(keys), keys.required) == (2, True)
    assert keys.authenticate(bearer(alice)).name == "alice"
    assert keys.authenticate(f"bearer  {bob} ").name == "bob"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "rs-abc"])
def test_no_key_is_refused(path: Path, capsys: pytest.CaptureFixture[str], header: str | None) -> None:
    create(path, capsys, "alice")
    with pytest.raises(InvalidKeyError, match="an API key is needed; send it in the header Authorization"):
        Keys(path).authenticate(header)


@pytest.mark.parametrize("key", ["rs-guessed", "\udcff\u2603", "x" * 10_000])
def test_an_unknown_key_is_refused_and_not_repeated(path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    create(path, capsys, "alice")
    with pytest.raises(InvalidKeyError) as refused:
        Keys(path).authenticate(bearer(key))
    assert str(refused.value) == "the API key is not valid here"


def test_the_stored_hash_is_no_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(path, capsys, "alice")
    with pytest.raises(InvalidKeyError):
        Keys(path).authenticate(bearer(KeyFile.read(path).keys[0].sha256))


def test_every_entry_is_compared_in_constant_time(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = (create(path, capsys, name) for name in ("a", "b", "c"))
    keys = Keys(path)
    compared = []
    real = hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    assert keys.authenticate(bearer(first)).name == "a"
    assert len(compared) == 3


def test_a_key_expires(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = create(path, capsys, "alice", "--expires", "2999-12-31")
    day = datetime(2999, 12, 31, 23, 59, tzinfo=UTC)
    assert Keys(path, now=lambda: day).authenticate(bearer(key)).name == "alice"
    with pytest.raises(InvalidKeyError, match="the API key alice has expired"):
        Keys(path, now=lambda: day + timedelta(minutes=1)).authenticate(bearer(key))


def test_without_a_file_all_come_in() -> None:
    keys = Keys(None)
    caller = keys.authenticate(None)
    assert (caller.name, keys.required, len(keys)) == (ANONYMOUS, False, 0)
    for _ in range(1000):
        caller.count_request()
        caller.reserve_tokens(10**9)


def test_requests_per_minute(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    key = create(path, capsys, "alice", "--requests-per-minute", "6")
    keys = Keys(path, clock=clock)
    for _ in range(6):
        keys.authenticate(bearer(key)).count_request()
    with pytest.raises(RateLimitError, match="may use 6 requests per minute") as limited:
        keys.authenticate(bearer(key)).count_request()
    assert limited.value.retry_after_seconds == 10
    clock.seconds += limited.value.retry_after_seconds
    keys.authenticate(bearer(key)).count_request()
    with pytest.raises(RateLimitError):
        keys.authenticate(bearer(key)).count_request()
    clock.seconds += 3600
    for _ in range(6):
        keys.authenticate(bearer(key)).count_request()
    with pytest.raises(RateLimitError):
        keys.authenticate(bearer(key)).count_request()


def test_tokens_per_minute_count_what_was_used(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    key = create(path, capsys, "alice", "--tokens-per-minute", "600")
    caller = Keys(path, clock=clock).authenticate(bearer(key))
    reservation = caller.reserve_tokens(500)
    with pytest.raises(RateLimitError) as limited:
        caller.reserve_tokens(500)
    assert limited.value.retry_after_seconds == 40
    reservation.settle(100)
    reservation.settle(0)
    caller.reserve_tokens(500).settle(500)
    with pytest.raises(RateLimitError):
        caller.reserve_tokens(1)
    clock.seconds += 30
    caller.reserve_tokens(300).settle(450)
    with pytest.raises(RateLimitError) as limited:
        caller.reserve_tokens(10)
    assert limited.value.retry_after_seconds == 16


def test_a_request_larger_than_a_minute_waits_for_a_full_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    key = create(path, capsys, "alice", "--tokens-per-minute", "60")
    caller = Keys(path, clock=clock).authenticate(bearer(key))
    caller.reserve_tokens(180)
    with pytest.raises(RateLimitError) as limited:
        caller.reserve_tokens(60)
    assert limited.value.retry_after_seconds == 180
    clock.seconds += 180
    caller.reserve_tokens(180)


def test_changes_are_noticed_within_a_second(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    alice = create(path, capsys, "alice", "--requests-per-minute", "1")
    keys = Keys(path, clock=clock)
    keys.authenticate(bearer(alice)).count_request()
    bob = create(path, capsys, "bob")
    with pytest.raises(InvalidKeyError):
        keys.authenticate(bearer(bob))
    clock.seconds += 1
    assert keys.authenticate(bearer(bob)).name == "bob"
    # What alice has used is not forgotten with the reload.
    with pytest.raises(RateLimitError):
        keys.authenticate(bearer(alice)).count_request()
    main(["revoke", "alice", "--file", str(path)])
    clock.seconds += 1
    with pytest.raises(InvalidKeyError):
        keys.authenticate(bearer(alice))


def test_the_file_is_looked_at_once_a_second(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    key = create(path, capsys, "alice")
    keys = Keys(path, clock=clock)
    looks = []
    real = Path.stat

    def counting(self: Path, **options: Any) -> os.stat_result:
        looks.append(self)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", counting)
    for _ in range(100):
        clock.seconds += 0.05
        keys.authenticate(bearer(key))
    assert 4 <= len(looks) <= 5


BROKEN = {
    "no JSON": '{"keys": [secret',
    "another form": '{"keys": [{"name": "secret", "rs-secret": 1}]}',
    "a wrong hash": '{"keys": [{"name": "a", "sha256": "secret", "created": "2026-01-01T00:00:00Z"}]}',
    "no UTF-8": "\udcff secret",
    "two of a name": json.dumps(
        {"keys": [{"name": "secret", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}] * 2}
    ),
}


@pytest.mark.parametrize("case", [*BROKEN, "gone"])
def test_a_broken_file_keeps_the_keys_and_logs_one_sentence(
    path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, case: str
) -> None:
    clock = Clock()
    key = create(path, capsys, "alice")
    keys = Keys(path, clock=clock)
    if case == "gone":
        path.unlink()
    else:
        path.write_bytes(BROKEN[case].encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            clock.seconds += 1
            assert keys.authenticate(bearer(key)).name == "alice"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"the API keys stay as they were: API keys {path}")
    assert "secret" not in caplog.text
    with pytest.raises(ConfigError) as refused:
        Keys(path)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "2001:db8::1", "example.org"])
def test_a_public_address_needs_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything starts; with keys, or when told to, it goes on to the next check."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(deployment, "_deploy_locally", lambda _: 0)
    with pytest.raises(ConfigError, match=rf"^endpoint\.host {host} lets other machines in, .* security\.allow_public"):
        deployment.deploy(serving_config(endpoint={"host": host}))
    assert deployment.deploy(serving_config(endpoint={"host": host}, security={"keys": "keys.json"})) == 0
    assert deployment.deploy(serving_config(endpoint={"host": host}, security={"allow_public": True})) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_a_loopback_address_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(deployment, "_deploy_locally", lambda _: 0)
    assert deployment.deploy(serving_config(endpoint={"host": host})) == 0


def test_replicas_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    deployed: list[ServingConfig] = []
    monkeypatch.setattr(deployment, "_deploy_locally", deployed.append)
    deployment.deploy(serving_config(security={"keys": "keys.json"}))
    assert deployed[0].security.keys == str(tmp_path / "keys.json")
    assert deployed[0].model.path == str(tmp_path / "nowhere")


def test_a_local_deployment_reads_the_keys_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = serving_config(
        model={"path": str(tmp_path)}, security={"keys": str(tmp_path / "none")}, endpoint={"port": 1 + 2**15}
    )
    monkeypatch.setattr(deployment, "_require_free", lambda _: None)
    with pytest.raises(ConfigError, match=r"none: the file cannot be read \(No such file or directory\)"):
        deployment.deploy(config)
