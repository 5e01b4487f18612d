"""Hosts on this machine: Linux namespaces behind a bridge, each with its own address, name, processes and files.

Nothing of it is named outside, so networks of several runs do not meet, and nothing outlives the process that made it:
a host ends, with every process in it, when the pipe to its first process closes. The file system is shared, as a folder
that all hosts mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SUBNET = "192.0.2"
"""of RFC 5737, for examples: no route outside leads there"""
SWITCH = "switch"
TOOLS = ("ip", "unshare", "nsenter", "mount")
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
# The last process reaps whatever is orphaned on the host, which a process 1 must: an ignored SIGCHLD does that.
_BEGIN = """set -e
hostname "$1"; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2" "$3"; mount --bind "$4" /etc/hosts
ip link set lo up; echo ready; trap '' CHLD; exec cat"""


class Host:
    """A host that is on, until `power_off`.

    Attributes:
        name: of the host, which resolves to its address on all of them.
        address: IPv4 address.
    """

    def __init__(self, name: str, address: str, own: Path, mounted: Path, names: Path) -> None:
        self.name, self.address, self._mounted = name, address, mounted
        own.mkdir(exist_ok=True)
        words = ["unshare", *_NAMESPACES, "sh", "-c", _BEGIN, "sh", name, own, mounted, names]
        self._first = subprocess.Popen(
            list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._first.stdout is not None
        if (said := self._first.stdout.readline()) != "ready\n":
            self.power_off()
            raise OSError(f"no namespaces for a host: {said.strip()}")
        self.pid = psutil.Process(self._first.pid).children()[0].pid

    def command(self, words: Sequence[object]) -> list[str]:
        """`words` as a command that runs on the host, in the working directory of this process."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "env", f"--chdir={Path.cwd()}"]
        return [*enter, f"TMPDIR={self._mounted}", *map(str, words)]

    def start(self, words: Sequence[object], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Run `words` on the host; what it prints is added to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the host."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):  # it has ended
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == space:
                    found.append(process)
        return found

    @property
    def on(self) -> bool:
        """Whether it runs."""
        return self._first.poll() is None

    def power_off(self) -> None:
        """Kill every process of the host."""
        for pipe in (self._first.stdin, self._first.stdout):
            assert pipe is not None
            pipe.close()
        self._first.wait()


class Network:
    """A bridge and the hosts on it; see `network`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=10)}
        self._names = folder / "hosts"
        lines = [f"{address} {name}\n" for name, address in self.addresses.items()]
        self._names.write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="ascii")
        self.mounted.mkdir()
        self.hosts: dict[str, Host] = {}
        self._switch = Host(SWITCH, f"{SUBNET}.1", folder / SWITCH, self.mounted, self._names)

    @property
    def mounted(self) -> Path:
        """Where each host has its own folder, which lies in `folder` under the host's name."""
        return self.folder / "host"

    def connect(self) -> None:
        """Start the bridge.

        Raises:
            OSError: the kernel has none.
        """
        self._ip(self._switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        self._ip(self._switch, "link", "set", "bridge", "up")

    def boot(self, name: str) -> Host:
        """Turn a host on, for the first time or after `Host.power_off`."""
        address = self.addresses[name]
        host = self.hosts[name] = Host(name, address, self.folder / name, self.mounted, self._names)
        # The end on the bridge vanishes with the host, or a little later.
        subprocess.run(self._inside(self._switch, "link", "del", name), capture_output=True, check=False)
        # The same after the next boot, or the others would go on sending to the old one.
        hardware = "02:00:00:00:00:" + format(int(address.rpartition(".")[2]), "02x")
        ends = ["name", name, "type", "veth", "peer", "name", "eth0", "address", hardware, "netns", str(host.pid)]
        self._ip(self._switch, "link", "add", *ends)
        self._ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        self._ip(self._switch, "link", "set", name, "master", "bridge", "up")
        return host

    def cut(self, name: str) -> None:
        """Take a host off the network: no packet passes, and nobody is told."""
        self._ip(self._switch, "link", "set", name, "down")

    def heal(self, name: str) -> None:
        """Undo `cut`."""
        self._ip(self._switch, "link", "set", name, "up")

    def end(self) -> None:
        """Turn everything off."""
        for host in (*self.hosts.values(), self._switch):
            host.power_off()

    def _inside(self, host: Host, *words: str) -> list[str]:
        # Only the network: another process number would not be known in the host's own list of processes.
        return ["nsenter", "--target", str(host.pid), "--net", "ip", *words]

    def _ip(self, host: Host, *words: str) -> None:
        done = subprocess.run(self._inside(host, *words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """A network for hosts of these names, which `Network.boot` turns on; all of it is gone afterwards.

    Raises:
        OSError: namespaces or bridges are not allowed here.
    """
    folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))  # short: paths of sockets have at most 107 characters
    made: Network | None = None
    try:
        made = Network(folder, names)
        made.connect()
        yield made
    finally:
        if made is not None:
            made.end()
        shutil.rmtree(folder, ignore_errors=True)


def why_not() -> str | None:
    """Why hosts cannot be built on this machine; None where they can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {' and no '.join(missing)} on this machine (Debian: iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "namespaces for hosts need root"
    try:
        with network("host") as probe:
            probe.boot("host")
    except OSError as error:
        return str(error)
    return None
