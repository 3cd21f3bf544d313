"""Whether a Matroska or WebM file is whole: FFmpeg skips what it can't read of one, and reports nothing.

The elements of EBML (RFC 8794) are walked down to the blocks of RFC 9559; none of them is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_TOP = {
    _CLUSTER: "Cluster",
    0x1A45DFA3: "EBML",
    0x114D9B74: "SeekHead",
    0x1549A966: "Info",
    0x1654AE6B: "Tracks",
    0x1C53BB6B: "Cues",
    0x1941A469: "Attachments",
    0x1043A770: "Chapters",
    0x1254C367: "Tags",
    0x1B538667: "SignatureSlot",
    0xEC: "Void",
    0xBF: "CRC-32",
}
"""What a segment holds, and the head before it."""
_BLOCKS = {
    0xE7: "Timestamp",
    0xA3: "SimpleBlock",
    0xA0: "BlockGroup",
    0xA7: "Position",
    0xAB: "PrevSize",
    0x5854: "SilentTracks",
    0xAF: "EncryptedBlock",
}
"""What a cluster holds beside void and CRC-32."""


def check_matroska(file: BinaryIO, size: int, path: object) -> None:
    """Checks that the elements of a file follow each other without a gap up to its end.

    Args:
      file: the file, opened.
      size: its number of bytes.
      path: its name, for messages.

    Raises:
      ValueError: an element is unknown, or reaches beyond the file's end.
    """
    for place, kind, end in _elements(file, size):
        if kind not in _TOP and kind not in _BLOCKS and kind != _SEGMENT:
            raise ValueError(f"{path} is damaged at byte {place}.")
        if end is not None and end > size:
            raise ValueError(f"{path} is truncated: {size} of at least {end} bytes are there.")


def _elements(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int | None]]:
    """Yields place, identifier and end of each element; of a segment and a cluster the contents follow.

    The end is None where the file leaves it open, as a live recording does. Zeros at the end of the file are padding.
    """
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(12)
        if not any(head) and not any(file.read()):
            return
        width = 9 - head[0].bit_length()
        if width > 4 or len(head) <= width or not head[width]:
            yield place, 0, None
            return
        kind, length = int.from_bytes(head[:width], "big"), 9 - head[width].bit_length()
        content = int.from_bytes(head[width : width + length], "big") & ((1 << 7 * length) - 1)
        start = place + width + length
        end = None if content == (1 << 7 * length) - 1 else start + content
        yield place, kind, end
        if kind in (_SEGMENT, _CLUSTER):
            place = start
        elif end is None:
            yield place, 0, None
            return
        else:
            place = end
