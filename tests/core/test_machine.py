"""Memory of this process: physical memory and the limits of control groups."""

import os

import pytest

from raydistill.core import machine
from raydistill.core.machine import available_memory_bytes

PHYSICAL_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes files of a system with control groups, by path, and lets `machine` read them."""
    monkeypatch.setattr(machine, "SYSTEM_ROOT", tmp_path)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, PHYSICAL_BYTES),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": 4096}, 4096),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": 8192}, 8192),  # of the group around
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/memory.max": 8192,
                "sys/fs/cgroup/memory.max": 4096,
            },
            4096,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, PHYSICAL_BYTES),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 10 * PHYSICAL_BYTES}, PHYSICAL_BYTES),
        # A container sees its own limits at the top, but the name of its group is that of the host.
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/memory.max": 4096}, 4096),
        ({"proc/self/cgroup": "0::/../x", "sys/fs/cgroup/memory.max": 4096}, 4096),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/docker/1f\n0::/",
                "sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes": 4096,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            },
            4096,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/1f", "sys/fs/cgroup/memory/memory.limit_in_bytes": 4096}, 4096),
        ({"proc/self/cgroup": "no such format", "sys/fs/cgroup/memory.max": 4096}, PHYSICAL_BYTES),
    ],
)
def test_memory_is_limited_by_the_control_groups_of_the_process(files, expected, system):
    system(files)
    assert available_memory_bytes() == expected


def test_memory_of_this_machine_is_at_most_the_physical_memory():
    assert 0 < available_memory_bytes() <= PHYSICAL_BYTES
