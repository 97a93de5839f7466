"""TensorBoard's event files, written by hand: a length, a checksum, an `Event` in protobuf's wire format.

Scalars are all a run has to tell.  The libraries that write these files import TensorFlow, or torch where it is
installed, and write from a thread that blocks the run for ever once the disk is full.
https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
"""

import struct
import time
from collections.abc import Mapping


def file_header() -> bytes:
    """What an event file begins with."""
    return _record(_text(3, b"brain.Event:2"))


def restart(step: int) -> bytes:
    """Says that the run starts again: TensorBoard forgets what it has read from `step` on."""
    return _record(_varint(2, step) + _text(7, _varint(1, 1)))


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """One event: {tag: value} at a step; a float32 holds no more than 3e38."""
    summary = b"".join(
        _text(1, _text(1, tag.encode()) + b"\x15" + struct.pack("<f", max(-3e38, min(value, 3e38))))
        for tag, value in values.items()
    )
    return _record(_varint(2, step) + _text(5, summary))


def _record(event: bytes) -> bytes:
    event = b"\x09" + struct.pack("<d", time.time()) + event
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _number(value: int) -> bytes:
    """Seven bits a byte, lowest first, the eighth bit says that more follow."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _number(rest) if rest else bytes([low])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _text(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC; of b'123456789' it is 0xE3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """Masked, as in every file of TensorFlow's records."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
