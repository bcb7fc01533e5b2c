"""How much memory is free: read from a made-up system, and of this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffopt._loop import free

MIB = 2**20


class System:
    """Files as a Linux kernel shows them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(free, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(free, "_CGROUPS", tmp_path / "cgroup")
    made = System(tmp_path)
    made.write("proc/meminfo", f"MemTotal: 9 kB\nMemAvailable:   {800 * 1024} kB\n")
    return made


def group(system: System, name: str, limit: str, used: int, cache: int = 0) -> None:
    """A control group of version 2, in MiB."""
    system.write(f"cgroup/{name}/memory.max", f"{limit}\n")
    system.write(f"cgroup/{name}/memory.current", f"{used * MIB}\n")
    system.write(f"cgroup/{name}/memory.stat", f"anon 7\ninactive_file {cache * MIB}\n")


def test_what_the_kernel_calls_available(system: System) -> None:
    assert free.host_bytes() == 800 * MIB


def test_the_tightest_control_group_above_the_process_counts(system: System) -> None:
    system.write("proc/self/cgroup", "0::/jobs/mine\n")
    group(system, "", "max", 9000)
    group(system, "jobs", str(700 * MIB), 400, cache=50)
    group(system, "jobs/mine", str(600 * MIB), 100)
    group(system, "jobs/other", str(10 * MIB), 9)
    assert free.host_bytes() == 350 * MIB


def test_in_a_container_the_root_is_its_own_group(system: System) -> None:
    system.write("proc/self/cgroup", "0::/../../elsewhere\n")
    group(system, "", str(300 * MIB), 100)
    assert free.host_bytes() == 200 * MIB


def test_control_groups_of_version_1(system: System) -> None:
    system.write("proc/self/cgroup", "5:cpu:/x\n4:memory:/x\n0::/\n")
    for name, limit, used in (("x", 500 * MIB, 300 * MIB), ("", 9223372036854771712, 400 * MIB)):
        system.write(f"cgroup/memory/{name}/memory.limit_in_bytes", f"{limit}")
        system.write(f"cgroup/memory/{name}/memory.usage_in_bytes", f"{used}")
        system.write(f"cgroup/memory/{name}/memory.stat", f"total_inactive_file {20 * MIB}")
    assert free.host_bytes() == 220 * MIB


def test_more_used_than_allowed_is_nothing_free(system: System) -> None:
    system.write("proc/self/cgroup", "0::/x\n")
    group(system, "x", str(100 * MIB), 120)
    assert free.host_bytes() == 0


def test_a_system_that_tells_nothing(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    (system.root / "proc/meminfo").unlink()
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(free.os, "sysconf", pages.__getitem__, raising=False)
    assert free.host_bytes() == 2_048_000
    monkeypatch.delattr(free.os, "sysconf")
    assert free.host_bytes() == 2**31


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as Linux has it")
def test_a_limit_on_the_address_space() -> None:
    code = """
import resource
from diffopt._loop.free import host_bytes
before = host_bytes()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
print(before, host_bytes())
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = map(int, found.stdout.split())
    assert 0 < after <= min(before, 64 * MIB)


def test_this_machine() -> None:
    assert 0 < free.free_bytes([torch.device("cpu"), torch.device("meta")]) < 2**50


class FakeModule:
    """An accelerator of which 100 bytes are free, and 50 more within PyTorch's allocator."""

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 100, 1000

    def memory_reserved(self, device: torch.device) -> int:
        return 80

    def memory_allocated(self, device: torch.device) -> int:
        return 30


def test_an_accelerator_is_asked_and_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda kind: FakeModule())
    assert free.free_bytes([torch.device("cuda:1"), torch.device("cpu")]) == 150


def test_an_accelerator_that_shares_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared:
        def recommended_max_memory(self) -> int:
            return 900

        def driver_allocated_memory(self) -> int:
            return 200

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Shared())
    assert free.free_bytes([torch.device("mps")]) == 700
