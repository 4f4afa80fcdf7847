"""IDX files, the format of MNIST: plain, or compressed by gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08  # IDX knows other types; MNIST has none of them
GZIP = b"\x1f\x8b"


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in ``path`` or, if there is no such file, in ``path`` with ``.gz`` added.

    Args:
        path: name of the plain file.
        dimensions: how many the array must have.

    Returns:
        The array, read-only.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: the file is none of unsigned bytes in that many dimensions, too short or too
            long.
    """
    packed = path.with_name(f"{path.name}.gz")
    found = path if path.exists() else packed
    if not found.exists():
        raise FileNotFoundError(f"neither {path} nor {packed.name} beside it is there")
    content = found.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{found}: truncated or damaged gzip: {error}") from error

    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    start = len(magic) + 4 * dimensions
    if not content.startswith(magic[: len(content)]):
        raise ValueError(
            f"{found}: wrong magic number {content[:4].hex(' ')}: expected {magic.hex(' ')}, "
            f"unsigned bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}"
        )
    if len(content) < start:
        raise ValueError(f"{found}: truncated: {len(content)} bytes, the header alone has {start}")
    shape = struct.unpack_from(f">{dimensions}I", content, len(magic))
    wanted = start + math.prod(shape)
    if len(content) != wanted:
        fault = "truncated" if len(content) < wanted else "too long"
        size = " x ".join(map(str, shape))
        raise ValueError(f"{found}: {fault}: {len(content)} bytes, {wanted} expected for {size}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_mnist(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[N, rows, columns]`` and labels ``[N]`` of MNIST.

    Args:
        folder: where the files are.
        part: what their names begin with, ``train`` or ``t10k``.

    Raises:
        FileNotFoundError, ValueError: as of :func:`read_idx`, the two files do not go together,
            or the images have no pixels.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte", 3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {part} has {len(images)} images, but {len(labels)} labels")
    if images.size == 0 and len(images):
        size = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"{folder}: the images of {part} have {size} pixels")
    return images, labels
