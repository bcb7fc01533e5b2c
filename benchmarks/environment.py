"""The machine and the versions, for the record; and the same share of the machine for everyone."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "higher", "torchopt", "torch_maml", "jax")


def confine(threads: int | None, *, limit_memory: bool) -> None:
    """Keep this process and those it will start to ``threads`` cores and to the memory there is.

    JAX has no option for the number of threads and uses the cores it is given. With the limit, a
    library that needs more memory than there is fails, where otherwise the machine would.
    """
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if limit_memory and (available := _meminfo("MemAvailable")):
        limit = int(0.85 * available)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def describe(device: str, threads: int) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    about = {
        "processor": _processor(),
        "threads": threads,
        "memory": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "device": device,
    }
    if device.startswith("cuda"):
        about["device"] = torch.cuda.get_device_name(device)
    return about


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _meminfo(field: str) -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str | None:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or None
