"""How many bytes may still be allocated: on a device, or in the memory limit of the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_UNLIMITED = 1 << 62  # from here on a limit is none
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_UNKNOWN = 1 << 31  # assumed free where the system tells nothing


def free_bytes(devices: Iterable[torch.device]) -> int:
    """The bytes that are free now on each of ``devices``, of which the least is taken.

    A device is asked through its ``mem_get_info``; what PyTorch's allocator holds without using it
    counts as free. In host memory, and for a device that cannot be asked, it is the least of what
    the kernel calls available, what every control group above the process leaves (version 2 or 1;
    page cache that can be dropped counts as free), and what RLIMIT_AS leaves; half of the physical
    memory where none of these exists.

    Cost: about 0.2 ms for host memory.
    """
    used = {device for device in devices if device.type != "meta"}
    return min(map(_on_device, used), default=_UNKNOWN)


def _on_device(device: torch.device) -> int:
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        if hasattr(module, "mem_get_info"):
            free = int(module.mem_get_info(device)[0])
            return free + int(module.memory_reserved(device) - module.memory_allocated(device))
        if hasattr(module, "recommended_max_memory"):  # Apple's, which shares the host's memory
            left = int(module.recommended_max_memory() - module.driver_allocated_memory())
            return max(0, min(left, host_bytes()))
    return host_bytes()


def host_bytes() -> int:
    """The bytes of host memory that this process may still allocate."""
    limits = [x for x in (_available(), _address_space()) if x is not None]
    limits.extend(_left_by_groups())
    return max(0, min(limits, default=_half_of_physical()))


def _available() -> int | None:
    """What the kernel says can be given out without swapping."""
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space() -> int | None:
    """What RLIMIT_AS leaves."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or not 0 <= limit < _UNLIMITED:
        return None
    used = next(iter(_lines(_PROC / "self" / "statm")), "0").split()[0]
    return limit - int(used) * resource.getpagesize()


def _left_by_groups() -> Iterator[int]:
    """What each control group that the process is in, and each above it, leaves."""
    for line in _lines(_PROC / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inside = [part for part in path.split("/") if part not in ("", "..")]
        # In a container the path may be the host's, and the root is the container's own group.
        for depth in range(len(inside), -1, -1):
            left = _left_by_group(root.joinpath(*inside[:depth]), *names)
            if left is not None:
                yield left


def _left_by_group(group: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None or most >= _UNLIMITED:
        return None
    stat = (line.split() for line in _lines(group / "memory.stat"))
    return most - used + sum(int(words[1]) for words in stat if words[0] == cache)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as for "max"."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    """The lines of a file that may not exist, or not be this process's to read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _half_of_physical() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # not on this system
        return _UNKNOWN
