"""Test hosts on one machine, to which `ray up` can log in: each has its own address, processes, home and sshd.

A host is a network namespace on a bridge, with its own process tree in which sshd is process 1. `ray stop` on one host
does not see the processes of another, and killing process 1 ends all processes of the host. All hosts share the file
system of the machine, except /root, /dev/shm, /run, Ray's /tmp/ray and the folder `private` next to the SSH keys.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BRIDGE = "raydistill-br"  # at most 15 characters
NETWORK = "10.78.9"
TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "unshare": "util-linux"}
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 50
PidFile none
"""
# The script that boots a host and then becomes its sshd. Arguments: the host's name, its private folder, sshd's
# configuration, and the folders of this Python, which may be below the /root that the script replaces.
BOOT = """
set -e
name=$1 own=$2 config=$3
shift 3
hostname "$name"
mount --make-rprivate /
for folder; do
    case $folder in /root/*)
        mkdir -p "$own$folder"
        mount --bind "$folder" "$own$folder"
    esac
done
mkdir -p /tmp/ray
mount --bind "$own/ray" /tmp/ray
mount --bind "$own/private" "$(dirname "$own")/private"
mount --rbind "$own/root" /root
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec "$(command -v sshd)" -D -e -f "$config"
"""


def missing_requirements() -> str:
    """The reason why this machine cannot run test hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "test hosts are network namespaces, which only root on Linux can create"
    packages = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    return f"test hosts need {', '.join(packages)} (apt-get install {' '.join(packages)})" if packages else ""


@dataclass
class Host:
    """A test host.

    Attributes:
        name: the host's name.
        address: the host's IP address.
        files: the folder with the host's own folders.
        boot: the process outside of the host whose child is the host's process 1; None while the host is off.
    """

    name: str
    address: str
    files: Path
    boot: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """The folder that the host sees as /root."""
        return self.files / "root"

    @property
    def private(self) -> Path:
        """The folder that the host sees as `private` next to the SSH keys."""
        return self.files / "private"

    def processes(self) -> list[psutil.Process]:
        """All processes of the host except sshd."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.boot.pid).children(recursive=True) if self.boot else []
            return [process for process in children if (name := _process_name(process)) and not name.startswith("sshd")]
        return []

    def switch_on(self) -> None:
        """Boot the host and wait until its sshd answers."""
        folder = self.files.parent
        isolate = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        boot = ["bash", "-c", BOOT, "boot", self.name, str(self.files), str(folder / "sshd_config")]
        with (folder / f"{self.name}.log").open("ab") as log:
            self.boot = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *isolate, *boot, sys.base_prefix, sys.prefix],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.connect()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.boot.poll() is None:
            with suppress(OSError), socket.create_connection((self.address, 22), timeout=1):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} has no sshd after 20 s; see its log next to the SSH keys")

    def lose(self) -> None:
        """Fail as in a power cut: disconnect the network first, then kill every process."""
        self.disconnect()
        self.switch_off()

    def disconnect(self) -> None:
        """Disconnect the network; the host keeps running."""
        _run("ip", "link", "set", f"{self.name}-br", "down")

    def connect(self) -> None:
        """Reconnect the network."""
        _run("ip", "link", "set", f"{self.name}-br", "up")

    def switch_off(self) -> None:
        """Kill every process of the host."""
        if self.boot:
            self.boot.kill()
            self.boot.wait()
            self.boot = None


@contextmanager
def running_hosts(folder: Path, count: int) -> Iterator[list[Host]]:
    """Context with `count` hosts that accept root's login with the key `folder`/key."""
    for name in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "private").mkdir()
    hosts: list[Host] = []
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        _run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number in range(1, count + 1):
            hosts.append(_create_host(folder, f"rd-host{number}", f"{NETWORK}.{10 + number}"))
        for host in hosts:
            host.switch_on()
        yield hosts
    finally:
        for host in hosts:
            host.switch_off()
            _run("ip", "link", "delete", f"{host.name}-br")
            _run("ip", "netns", "delete", host.name)
        _run("ip", "link", "delete", BRIDGE)


def _create_host(folder: Path, name: str, address: str) -> Host:
    """Create a host's network and folders. The host is not running yet."""
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", f"{name}-br", "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", f"{name}-br", "master", BRIDGE)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", name, "link", "set", "eth0", "up")
    # A route to nowhere: Ray finds its own address by asking which one would be used towards the Internet.
    _run("ip", "-n", name, "route", "add", "default", "via", f"{NETWORK}.1")
    host = Host(name, address, folder / name)
    for subfolder in ("root", "ray", "private"):
        (host.files / subfolder).mkdir(parents=True, exist_ok=True)
    return host


def _process_name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name() if process.status() != psutil.STATUS_ZOMBIE else ""
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
