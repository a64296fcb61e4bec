"""LZMA for whole files of a container, and limits on what a compressed file may become."""

from __future__ import annotations

import lzma
from pathlib import Path

from rarefy.common.errors import ContainerError
from rarefy.formats.index import short

MAX_RATIO = 256  # bytes that a compressed byte may become; what is denser is stored as it is
SLACK = 2**20  # bytes allowed besides


def compress(data: bytes) -> bytes:
    """Return data through LZMA, tuned for text or for unrelated bytes, whichever is smaller."""
    for_text = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    for_bytes = {**for_text, "lc": 0, "lp": 0, "pb": 0}
    return min((lzma.compress(data, check=lzma.CHECK_CRC32, filters=[f]) for f in (for_bytes, for_text)), key=len)


def decompress(file: Path, size: int, max_size: int) -> bytes:
    """Return the contents of a compressed file, which must have exactly `size` bytes; ContainerError for anything
    else, and for more than `max_size`."""
    if not 0 <= size <= max_size:
        raise ContainerError(f"{file}: decompresses to {short(size)} bytes, at most {max_size:,} are allowed")
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=1 << 30)
    try:
        data = unpacker.decompress(file.read_bytes(), max_length=size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ContainerError(f"{file}: damaged LZMA data: {error}") from error
    if len(data) != size or not unpacker.eof:
        raise ContainerError(f"{file}: does not hold the {size:,} bytes that the index says")
    return data


def max_decompressed(compressed_bytes: int) -> int:
    """Return how many bytes a compressed file may become; weights never become more."""
    return MAX_RATIO * compressed_bytes + SLACK
