"""examples/idx.py: MNIST's files, whole and damaged."""

from __future__ import annotations

import gzip
import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.cpu_only

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def idx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("idx")


def encoded(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("array", [IMAGES, IMAGES[0, 0], IMAGES[:0]], ids=["3d", "1d", "empty"])
def test_plain_and_gzip_give_the_array(idx: ModuleType, tmp_path: Path, array: np.ndarray) -> None:
    (tmp_path / "plain").write_bytes(encoded(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(encoded(array)))
    for name in ("plain", "packed"):
        read = idx.read_idx(tmp_path / name, array.ndim)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


def test_sizes_are_big_endian(idx: ModuleType, tmp_path: Path) -> None:
    array = np.arange(300).astype(np.uint8)
    (tmp_path / "x").write_bytes(b"\0\0\x08\x01\0\0\x01\x2c" + array.tobytes())
    np.testing.assert_array_equal(idx.read_idx(tmp_path / "x", 1), array)


def test_the_plain_file_comes_first(idx: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(IMAGES))
    (tmp_path / "x.gz").write_bytes(b"damaged")
    np.testing.assert_array_equal(idx.read_idx(tmp_path / "x", 3), IMAGES)


def test_what_is_compressed_is_seen_from_the_content(idx: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(gzip.compress(encoded(IMAGES)))
    (tmp_path / "y.gz").write_bytes(encoded(IMAGES))
    for name in ("x", "y"):
        np.testing.assert_array_equal(idx.read_idx(tmp_path / name, 3), IMAGES)


def cut(to: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:to]


def other(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + bytes([value]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["x", "x.gz"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(-1), "truncated: 39 bytes, 40 expected for 2 x 3 x 4"),
        (cut(16), "truncated: 16 bytes, 40 expected"),
        (cut(15), "truncated: 15 bytes, the header alone has 16"),
        (cut(2), "truncated: 2 bytes, the header alone has 16"),
        (cut(0), "truncated: 0 bytes, the header alone has 16"),
        (lambda content: content + b"\0", "too long: 41 bytes, 40 expected"),
        (other(4, 255), "truncated: 40 bytes, .* expected for 4278190082 x 3 x 4"),
        (other(0, 1), "wrong magic number 01 00 08 03: expected 00 00 08 03"),
        (other(2, 0x0D), "wrong magic number 00 00 0d 03"),
        (other(3, 1), "wrong magic number 00 00 08 01: .* in 3 dimensions"),
    ],
)
def test_damaged_files(
    idx: ModuleType, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    content = damage(encoded(IMAGES))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        idx.read_idx(tmp_path / "x", 3)


@pytest.mark.parametrize(
    "damage",
    [cut(-1), cut(20), cut(2), other(12, 255), other(-5, 255), lambda content: content + b"tail"],
)
def test_damaged_gzip(idx: ModuleType, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "x.gz").write_bytes(damage(gzip.compress(encoded(IMAGES))))
    with pytest.raises(ValueError, match=r"x\.gz: truncated or damaged gzip"):
        idx.read_idx(tmp_path / "x", 3)


def test_missing_file(idx: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither .*labels nor labels\.gz beside it"):
        idx.read_idx(tmp_path / "labels", 1)


def test_images_and_labels_together(idx: ModuleType, tmp_path: Path) -> None:
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(encoded(IMAGES)))
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        idx.read_mnist(tmp_path, "t10k")
    labels.write_bytes(encoded(np.array([7, 2], np.uint8)))
    images, read = idx.read_mnist(tmp_path, "t10k")
    np.testing.assert_array_equal(images, IMAGES)
    assert read.tolist() == [7, 2]
    labels.write_bytes(encoded(np.array([7], np.uint8)))
    with pytest.raises(ValueError, match="t10k has 2 images, but 1 labels"):
        idx.read_mnist(tmp_path, "t10k")


@pytest.mark.parametrize("shape", [(2, 0, 0), (2, 0, 3)])
def test_images_without_pixels(idx: ModuleType, tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(encoded(np.zeros(shape, np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(encoded(np.array([7, 2], np.uint8)))
    with pytest.raises(ValueError, match=f"train have 0 x {shape[2]} pixels"):
        idx.read_mnist(tmp_path, "train")
