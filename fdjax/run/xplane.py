"""Spans as a plane of the profiles that TensorBoard opens.

Such a file is one protobuf message, XSpace, whose field 1 is a list of planes: a plane that is appended to its bytes is
one more of them. The fields are those of xplane.proto in OpenXLA; names of events are metadata of the plane.
Planes called /device:CUSTOM:... are shown as they are.
"""

from collections.abc import Mapping, Sequence

_NAME = b"/device:CUSTOM:stages of rounds"
_ID = 1 << 20  # which no other plane has


def plane_of(spans: Mapping[str, Sequence[tuple[float, float, str]]]) -> bytes:
    """The bytes to append, of spans by device: begin and end in microseconds since the profile began, and a name."""
    names = sorted({name for found in spans.values() for _, _, name in found})
    lines = []
    for number, (device, found) in enumerate(spans.items(), 1):
        events = [
            # XEvent: metadata_id = 1, offset_ps = 2, duration_ps = 3
            _number(1, names.index(name) + 1) + _number(2, round(begin * 1e6)) + _number(3, round((end - begin) * 1e6))
            for begin, end, name in found
        ]
        # XLine: id = 1, name = 2, events = 4
        name = f"stages of device {device}".encode()
        lines.append(_number(1, number) + _block(2, name) + b"".join(_block(4, event) for event in events))
    # XPlane: id = 1, name = 2, lines = 3, event_metadata = 4, a map of id to XEventMetadata: id = 1, name = 2
    metadata = [_number(1, i) + _block(2, _number(1, i) + _block(2, name.encode())) for i, name in enumerate(names, 1)]
    plane = _number(1, _ID) + _block(2, _NAME) + b"".join(_block(3, line) for line in lines)
    return _block(1, plane + b"".join(_block(4, entry) for entry in metadata))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _number(field: int, n: int) -> bytes:
    return _varint(field << 3) + _varint(n)


def _block(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
