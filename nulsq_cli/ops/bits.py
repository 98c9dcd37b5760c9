"""Pack codes of 1 to 8 bits into bytes without gaps, and back."""

from __future__ import annotations

import numpy as np

PART = 1 << 20
"""Codes that are unpacked at once; a multiple of 8, so that each part begins with a byte."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as one stream of bits, least significant bit first.

    Element i takes the bits i*bits .. i*bits + bits - 1 of the stream; bit j of the stream is bit
    j % 8 of byte j // 8; the tail is zero. For 2 and 4 bits these are ONNX's uint2 and uint4 bytes.

    Args:
        codes: uint8, any shape, each below 2**bits; read in C order.
        bits: 1..8.

    Returns:
        (ceil(n * bits / 8),) uint8.
    """
    wide = np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return np.packbits(wide.reshape(-1), bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: the first `count` codes, as (count,) uint8.

    Raises:
        ValueError: there are more or fewer bytes than `count` codes take, or the tail is not zero.
    """
    if packed.shape != ((count * bits + 7) // 8,):
        raise ValueError(f"{count} codes of {bits} bits do not take {packed.size} bytes")
    codes = np.empty(count, np.uint8)
    for start in range(0, count, PART):  # a bit takes a byte meanwhile: in parts, so that a large tensor stays cheap
        size = min(PART, count - start)
        stream = np.unpackbits(packed[start * bits // 8 : ((start + size) * bits + 7) // 8], bitorder="little")
        if stream[size * bits :].any():
            raise ValueError("the bits behind the last code are not zero")
        codes[start : start + size] = np.packbits(stream[: size * bits].reshape(size, bits), axis=1, bitorder="little")[:, 0]
    return codes
