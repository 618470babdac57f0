"""What a header may hold, counted before anything is made of it: an empty list is one byte there and 64 in memory."""

from __future__ import annotations

from vflair_core.errors import ProtocolError

MAX_HEADER = 2**20  # bytes
MAX_VALUES = 2**18  # lists, maps, texts and numbers of one header
MAX_NESTING = 32


def _sizes() -> tuple[list[int], list[int]]:
    """Of each first byte of a value: how many bytes the value takes with its content, and how many values follow in it.

    Where a length comes first: minus the bytes of that length, and how many values each that it counts is. 0 bytes: refused.
    """
    sizes, within = [1] * 256, [0] * 256
    for count in range(16):
        within[0x80 + count], within[0x90 + count] = 2 * count, count  # small maps and lists
    for count in range(32):
        sizes[0xA0 + count] = 1 + count  # short texts
    for group in (0xCA, 0xCC, 0xD0):  # floats, whole numbers without and with a sign
        widths = (4, 8) if group == 0xCA else (1, 2, 4, 8)
        sizes[group : group + len(widths)] = [1 + width for width in widths]
    for lead, width in ((0xC4, 1), (0xC5, 2), (0xC6, 4), (0xD9, 1), (0xDA, 2), (0xDB, 4)):
        sizes[lead] = -width  # bytes and texts
    for lead, width, each in ((0xDC, 2, 1), (0xDD, 4, 1), (0xDE, 2, 2), (0xDF, 4, 2)):
        sizes[lead], within[lead] = -width, each  # lists and maps
    for lead in (0xC1, *range(0xC7, 0xCA), *range(0xD4, 0xD9)):
        sizes[lead] = 0  # unused, and msgpack's extensions
    return sizes, within


_SIZES, _WITHIN = _sizes()


def check_packed(packed: bytes) -> None:
    """See that `packed` is one value of msgpack, and not more than a header may hold.

    No memory is taken, and time is in proportion to the bytes.

    Raises:
        ProtocolError: It is cut short or too long, has too many values, or nests too deep.
    """
    if len(packed) > MAX_HEADER:
        raise ProtocolError(
            f"A header may have {MAX_HEADER} bytes; this one has {len(packed)}. Names of very many weights are "
            "too long for one message; train fewer weights, for example adapters."
        )
    position, values, left = 0, 0, 1
    above: list[int] = []  # values that follow, of each list and map around this one
    try:
        while left or above:
            if not left:
                left = above.pop()
                continue
            left -= 1
            lead = packed[position]
            size, within = _SIZES[lead], _WITHIN[lead]
            position += 1
            if size > 0:
                position += size - 1
            elif size:
                count = int.from_bytes(packed[position : position - size], "big")
                position -= size
                if within:
                    within *= count
                else:
                    position += count
            else:
                raise ProtocolError("A header holds plain values only, no extension of msgpack's.")
            values += 1
            if within:
                above.append(left)
                left = within
                if len(above) > MAX_NESTING:
                    raise ProtocolError(f"A header may nest {MAX_NESTING} deep.")
            if values + left > MAX_VALUES:
                raise ProtocolError(f"A header may hold {MAX_VALUES} values; this one claims more.")
    except IndexError:
        position = len(packed) + 1
    if position > len(packed):
        raise ProtocolError("The header is cut short: it claims more than it has.")
    if position < len(packed):
        raise ProtocolError(f"The header has {len(packed) - position} bytes after its end.")
