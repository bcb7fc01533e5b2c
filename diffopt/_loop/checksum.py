"""A checksum at the speed of memory, against faulty disks and altered files."""

from __future__ import annotations

import ctypes
import zlib

import torch
from torch import Tensor

_ROW = 512  # words: a page of 4 KiB


def checksum(data: Tensor, before: int = 0) -> int:
    """A 32-bit checksum of bytes in host memory.

    The words of each page are added up, and of the sums CRC-32 is taken: it changes with any one
    word that changes, and where pages are lost or in another order, and reads memory once. It does
    not tell apart two orders of the words within a page.

    Args:
        data: uint8, one-dimensional.
        before: the checksum of what precedes.
    """
    if data.data_ptr() % 8:
        data = data.clone()
    whole = len(data) // (8 * _ROW) * (8 * _ROW)
    sums = data.new_zeros(0, dtype=torch.int64)
    if whole:
        sums = data[:whole].view(torch.int64).view(-1, _ROW).sum(1)
    return zlib.crc32(memory_of(data[whole:]), zlib.crc32(memory_of(sums), before))


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of a tensor in host memory that has no gaps, as a uint8 tensor."""
    size, start = x.numel() * x.element_size(), x.storage_offset() * x.element_size()
    data = torch.empty(0, dtype=torch.uint8)
    data.set_(x.untyped_storage(), start, (size,), (1,))
    return data


def memory_of(x: Tensor) -> memoryview:
    """The bytes of a tensor in host memory that has no gaps."""
    size = x.numel() * x.element_size()
    if not size:  # its address is 0, for which CRC-32 would begin anew
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr())).cast("B")
