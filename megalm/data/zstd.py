"""Reading of .zst files, all frames of them, and never a shortened one as if it were whole.

The library's own stream reader ends quietly after the first frame and at a cut inside a frame.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import zstandard

CHUNK_BYTES = 1 << 17


class ZstdFile(io.RawIOBase):
    """The unpacked bytes of `packed`.

    Raises:
        EOFError: on reading to the end of a file that breaks off inside a frame.
        OSError: on reading damaged bytes.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest = b""  # packed, not yet given to a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._unpack_some():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack_some(self) -> bool:
        """Unpack one more piece; False at the end of the file."""
        packed = self._rest or self._packed.read(CHUNK_BYTES)
        if not packed:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except zstandard.ZstdError as error:
            raise OSError(f"damaged zstd data: {error}") from error
        self._rest = b""
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True
