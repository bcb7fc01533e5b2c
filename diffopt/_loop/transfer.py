"""Copies of tensors between devices and the host, on the way while computing goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[Any, Tensor]


class Copier:
    """Copies tensors between devices and the host; for CUDA devices on streams of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, tensors: Mapping[Any, Tensor]) -> Copy:
        """Copy tensors to host memory, without gaps; tensors that lie there so are not copied."""
        copy = Copy({}, self._begun(x.device for x in tensors.values()))
        for path, x in tensors.items():
            if x.device.type == "cuda":
                with torch.cuda.stream(copy.streams[x.device]):
                    host = torch.empty_like(x, device="cpu", pin_memory=True)
                    copy.tensors[path] = host.copy_(x, non_blocking=True)
                x.record_stream(copy.streams[x.device])
            else:
                x = x.cpu()
                form = torch.empty_like(x, device="meta")
                is_dense = x.stride() == form.stride() and not x.is_conj() and not x.is_neg()
                copy.tensors[path] = x if is_dense else torch.empty_like(x).copy_(x)
        copy.mark()
        return copy

    def to_devices(self, host: Mapping[Any, Tensor], devices: Mapping[Any, torch.device]) -> Copy:
        """Copy tensors from host memory to the devices where they belong."""
        copy = Copy({}, self._begun(devices.values()))
        for path, x in host.items():
            device = devices[path]
            if device.type == "cuda":
                with torch.cuda.stream(copy.streams[device]):
                    copy.tensors[path] = x.to(device, non_blocking=True)
            else:
                copy.tensors[path] = x.to(device)
        copy.mark()
        return copy

    def _begun(self, devices: Any) -> dict[torch.device, torch.cuda.Stream]:
        """The stream of each CUDA device, at the point where the device's computing is now."""
        used = {device for device in devices if device.type == "cuda"}
        new_stream: Any = torch.cuda.Stream
        for device in used:
            if device not in self._streams:
                self._streams[device] = new_stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return {device: self._streams[device] for device in used}


@dataclass
class Copy:
    """Tensors on their way, and the stream of each CUDA device that takes part."""

    tensors: Tensors
    streams: dict[torch.device, torch.cuda.Stream]
    _events: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)

    def mark(self) -> None:
        """Note that all copies have been asked for."""
        self._events = {device: stream.record_event() for device, stream in self.streams.items()}

    def synchronize(self) -> None:
        """Wait until the tensors are there."""
        for event in self._events.values():
            event.synchronize()

    def received(self) -> Tensors:
        """The tensors, for the current streams to use: these wait, not the caller."""
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for x in self.tensors.values():
            if x.device in self._events:
                x.record_stream(torch.cuda.current_stream(x.device))
        return self.tensors
