"""HPACK (RFC 7541): a decoder of header blocks, and an encoder of literal fields.

A decoder of its own because a general package keeps 20 MB of tables in every worker.
"""

from __future__ import annotations

import collections

__all__ = ["Decoder", "HpackError", "encode_integer", "encode_literal"]

# Huffman code lengths of the 256 bytes and the end mark (RFC 7541, Appendix B), from `A` for 5 bits to `Z` for 30. The
# code is canonical: codes of one length count up in symbol order, shorter codes first.
_CODE_LENGTHS = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJB"
    "KABABABBBACCBBBABCBAABCCCCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRS"
    "VVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWVZ"
)
_STATIC_FIELDS = (
    ":authority=|:method=GET|:method=POST|:path=/|:path=/index.html|:scheme=http|:scheme=https|:status=200|"
    ":status=204|:status=206|:status=304|:status=400|:status=404|:status=500|accept-charset=|"
    "accept-encoding=gzip, deflate|accept-language=|accept-ranges=|accept=|access-control-allow-origin=|age=|"
    "allow=|authorization=|cache-control=|content-disposition=|content-encoding=|content-language=|"
    "content-length=|content-location=|content-range=|content-type=|cookie=|date=|etag=|expect=|expires=|from=|"
    "host=|if-match=|if-modified-since=|if-none-match=|if-range=|if-unmodified-since=|last-modified=|link=|"
    "location=|max-forwards=|proxy-authenticate=|proxy-authorization=|range=|referer=|refresh=|retry-after=|"
    "server=|set-cookie=|strict-transport-security=|transfer-encoding=|user-agent=|vary=|via=|www-authenticate="
)
_STATIC = tuple(tuple(field.split("=", 1)) for field in _STATIC_FIELDS.split("|"))
_TABLE_BYTES = 4096
_END_MARK = 256


class HpackError(ValueError):
    """A header block in breach of RFC 7541."""


def _codes() -> dict[tuple[int, int], int]:
    """Return (length in bits, code) -> symbol."""
    found: dict[tuple[int, int], int] = {}
    code = length = 0
    for size, symbol in sorted((ord(letter) - ord("A") + 5, symbol) for symbol, letter in enumerate(_CODE_LENGTHS)):
        code <<= size - length
        length = size
        found[length, code] = symbol
        code += 1
    return found


_SYMBOLS = _codes()


def _huffman(data: bytes) -> bytes:
    """Decode a Huffman-coded string (RFC 7541, 5.2)."""
    out = bytearray()
    code = length = 0
    for byte in data:
        for place in range(7, -1, -1):
            code = code << 1 | byte >> place & 1
            length += 1
            symbol = _SYMBOLS.get((length, code))
            if symbol is not None:
                if symbol == _END_MARK:
                    raise HpackError("a string contains the end mark")
                out.append(symbol)
                code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise HpackError("a string ends in something other than the start of the end mark")
    return bytes(out)


class Decoder:
    """Decodes the header blocks of one connection, in order. Keeps the dynamic table."""

    def __init__(self) -> None:
        self._entries: collections.deque[tuple[str, str]] = collections.deque()
        self._size = 0
        self._limit = _TABLE_BYTES

    def decode(self, block: bytes) -> list[tuple[str, str]]:
        """Return the block's fields.

        Raises:
            HpackError: it is malformed. The connection cannot be decoded any further.
        """
        fields: list[tuple[str, str]] = []
        position = 0
        try:
            while position < len(block):
                first = block[position]
                if first & 0x80:
                    index, position = _integer(block, position, 7)
                    fields.append(self._at(index))
                elif first & 0xE0 == 0x20:
                    self._limit, position = _integer(block, position, 5)
                    if self._limit > _TABLE_BYTES:
                        raise HpackError(f"the table's size is set to {self._limit}, above {_TABLE_BYTES}")
                    self._evict()
                else:
                    is_added = bool(first & 0x40)
                    index, position = _integer(block, position, 6 if is_added else 4)
                    name, position = (self._at(index)[0], position) if index else _string(block, position)
                    value, position = _string(block, position)
                    fields.append((name, value))
                    if is_added:
                        self._entries.appendleft((name, value))
                        self._size += _entry_size(name, value)
                        self._evict()
        except IndexError as exc:
            raise HpackError("a header block ends in the middle of a field") from exc
        return fields

    def _at(self, index: int) -> tuple[str, str]:
        if 1 <= index <= len(_STATIC):
            name, value = _STATIC[index - 1]
            return name, value
        if not len(_STATIC) < index <= len(_STATIC) + len(self._entries):
            raise HpackError(f"the index {index} is not in the table")
        return self._entries[index - len(_STATIC) - 1]

    def _evict(self) -> None:
        while self._size > self._limit:
            self._size -= _entry_size(*self._entries.pop())


def _entry_size(name: str, value: str) -> int:
    """Return an entry's size in the dynamic table (RFC 7541, 4.1)."""
    return len(name.encode()) + len(value.encode()) + 32


def _integer(block: bytes, position: int, prefix_bits: int) -> tuple[int, int]:
    """Decode an integer. Return it and the position after it (RFC 7541, 5.1)."""
    limit = (1 << prefix_bits) - 1
    value = block[position] & limit
    position += 1
    if value < limit:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position
        if shift > 28:
            raise HpackError("an integer is too long")


def _string(block: bytes, position: int) -> tuple[str, int]:
    is_huffman = bool(block[position] & 0x80)
    size, position = _integer(block, position, 7)
    raw = block[position : position + size]
    if len(raw) != size:
        raise HpackError("a header block ends in the middle of a string")
    return (_huffman(raw) if is_huffman else raw).decode("utf-8", "replace"), position + size


def encode_integer(value: int, prefix_bits: int, first: int) -> bytes:
    """Encode an integer behind the pattern `first` (RFC 7541, 5.1).

    Args:
        value: the integer, 0 or more.
        prefix_bits: number of bits of the prefix, 1 to 8.
        first: bits of the first byte before the prefix.
    """
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((first | value,))
    out, value = [first | limit], value - limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes((*out, value))


def encode_literal(name: str, value: str, *, indexed: bool) -> bytes:
    """Encode a field with a literal name and value, not Huffman-coded.

    Args:
        name: field name in lower case.
        value: field value, written as UTF-8.
        indexed: the peer enters the field into its dynamic table.
    """
    raw_name, raw_value = name.encode("ascii"), value.encode("utf-8")
    sizes = encode_integer(len(raw_name), 7, 0), encode_integer(len(raw_value), 7, 0)
    return b"".join((b"\x40" if indexed else b"\x00", sizes[0], raw_name, sizes[1], raw_value))
