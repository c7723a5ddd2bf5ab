"""The wire format of messages that others send, before a parser makes objects of it."""

_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
"""Bytes of a value by wire type, where the type says it."""


class WireError(ValueError):
    """Bytes that no parser should see; `reason` is TOO_LARGE or BAD_PAYLOAD."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_num_fields(data: bytes, inside: int, limit: int) -> None:
    """Refuse what a parser would make millions of messages of: an empty one has two bytes on the
    wire, and a hundred in memory.

    Walks the wire format, and ends early only where a parser finds the message malformed.

    Args:
        data: a message.
        inside: number of the field of messages whose own fields count too.
        limit: most fields.

    Raises:
        WireError: there are more, or one of a wire type that is none.
    """
    inside_tag = inside << 3 | _LENGTH_DELIMITED
    position = inside_end = num_fields = 0
    while position < len(data):
        num_fields += 1
        if num_fields > limit:
            raise WireError("TOO_LARGE", f"has more than {limit} fields")
        end = inside_end if position < inside_end else len(data)
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _read_varint(data, position)
        elif kind == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            if position + length > end:
                return
            if tag == inside_tag and end > inside_end:  # go on with the fields inside
                inside_end = position + length
            else:
                position += length
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            raise WireError("BAD_PAYLOAD", f"has a field of wire type {kind}")
        if position > end:
            return


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at a position, and where it ends; beyond the data come zeros."""
    value = shift = 0
    for byte in data[position : position + 10]:
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, position
