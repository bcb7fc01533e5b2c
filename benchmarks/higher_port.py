"""The memory of ``higher``'s inner loop, and of ``diffopt.unroll`` in its place.

    python benchmarks/higher_port.py [--steps 5 20 50] [--device cuda]

A meta-gradient of a small convolutional network through T steps, inside the same
``higher.innerloop_ctx``: once with the loop of ``dopt.step(loss)``, once with the loop replaced by
one line. Each measurement has a process of its own. Printed are the peak of the memory over what
was in use at the start (of the process on the CPU, of the allocator on CUDA), and how far the
meta-gradients are apart, as the norm of the difference relative to the norm, in float32.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt
import diffopt.higher

RATES = {"SGD": 0.01, "Adam": 1e-3}
WAYS = {"loop": None, "segment=1": 1, "segment=5": 5}
_CLEAR_PEAK = "5"  # of Linux's clear_refs: VmHWM starts again from VmRSS
# glibc gives a tensor's memory back when it is freed, and so the process shows what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def network() -> nn.Module:
    """Smooth, as rounding at a kink would show in the gradients as a difference."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.Tanh()]
        layers += [nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def meta_gradient(way: str, optimizer: str, steps: int, device: str) -> Tensor:
    model = network().to(device)
    x = torch.randn(25, 1, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    batch = (x, torch.arange(25, device=device) % 5)
    lr = torch.tensor(RATES[optimizer], device=device, requires_grad=True)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr.item())
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [lr]}) as (
        fmodel,
        dopt,
    ):
        if way == "loop":
            for _ in range(steps):
                dopt.step(loss_fn(fmodel, batch))
        else:
            diffopt.unroll(fmodel, dopt, [batch] * steps, loss_fn, segment=WAYS[way])
        loss_fn(fmodel, batch).backward()
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def status(field: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def measure(way: str, optimizer: str, steps: int, device: str, out: str) -> None:
    torch.set_num_threads(1)
    meta_gradient(way, optimizer, 1, device)  # what is allocated once: kernels, code, caches
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        gradient = meta_gradient(way, optimizer, steps, device)
        peak = torch.cuda.max_memory_allocated() - start
    else:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="utf-8")
        start = status("VmRSS")
        gradient = meta_gradient(way, optimizer, steps, device)
        peak = status("VmHWM") - start
    torch.save({"peak": peak, "gradient": gradient}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, optimizer, steps, out = args.measure
        measure(way, optimizer, int(steps), args.device, out)
        return
    print("| optimizer | steps | higher's loop, MiB | " + " | ".join(list(WAYS)[1:]), end=" ")
    print("| gradients differ by |\n|---|---|" + "---|" * (len(WAYS) + 1))
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in RATES:
            for steps in args.steps:
                found = []
                for way in WAYS:
                    out = str(Path(folder) / "result.pt")
                    command = [sys.executable, __file__, "--device", args.device]
                    subprocess.run(
                        [*command, "--measure", way, optimizer, str(steps), out],
                        check=True,
                        env=os.environ | _MALLOC,
                    )
                    found.append(torch.load(out))
                first, *others = (result["gradient"] for result in found)
                apart = max((g - first).norm() / first.norm() for g in others)
                loop, *peaks = (result["peak"] / 2**20 for result in found)
                cells = [f"{peak:.0f} (1/{loop / peak:.0f})" for peak in peaks]
                print(f"| {optimizer} | {steps} | {loop:.0f} |", " | ".join(cells), end=" ")
                print(f"| {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
