"""A range coder (Martin 1979): a queue of symbols, which may be cut anywhere.

A symbol is an interval [start, start + freq) of 2^24, and takes 24 - log2(freq) bits.
A reader knows how far what it has been given determines the symbols: of a file that was
cut it returns those that are certain and no other.
"""

from bisect import bisect_right
from collections.abc import Sequence

BITS = 24
_TOP, _LEAST = 1 << 64, 1 << 56


class Writer:
    """Collects symbols; `finish` returns their bytes."""

    def __init__(self) -> None:
        """Starts empty."""
        self.low, self.range, self.out = 0, _TOP, bytearray()

    def write(self, start: int, freq: int) -> None:
        """Appends one symbol."""
        unit = self.range >> BITS
        self.low += unit * start
        self.range = unit * freq
        if self.low >= _TOP:
            self._carry()
        while self.range < _LEAST:
            self.out.append(self.low >> 56)
            self.low = (self.low << 8) & (_TOP - 1)
            self.range <<= 8

    def finish(self) -> bytes:
        """Returns the fewest bytes that mean these symbols, whatever follows them."""
        count, unit = 0, _TOP
        while -(-self.low // unit) * unit + unit > self.low + self.range:
            count, unit = count + 1, unit >> 8
        self.low = -(-self.low // unit) * unit
        if self.low >= _TOP:
            self._carry()
        return bytes(self.out) + self.low.to_bytes(8, "big")[:count]

    def _carry(self) -> None:
        self.low -= _TOP
        place = len(self.out) - 1
        while self.out[place] == 255:
            self.out[place] = 0
            place -= 1
        self.out[place] += 1


class Reader:
    """Reads symbols back from bits of which the end may be missing."""

    def __init__(self, data: bytes, bits: int | None = None) -> None:
        """Starts with the first symbol; of the data the first `bits` are known."""
        self.data, self.place = data, 0
        self.bits = 8 * len(data) if bits is None else bits
        self.code = self.slack = 0
        self.range = _TOP
        for _ in range(8):
            self._next()

    def read(self, edges: Sequence[int]) -> int | None:
        """Returns the next symbol; None where the bytes do not suffice to know it.

        Args:
          edges: of the symbols' intervals, rising from 0 to 2^24.
        """
        unit = self.range >> BITS
        last = (1 << BITS) - 1
        symbol = bisect_right(edges, min(self.code // unit, last)) - 1
        if min((self.code + self.slack) // unit, last) >= edges[symbol + 1]:
            return None
        self.code -= unit * edges[symbol]
        self.range = unit * (edges[symbol + 1] - edges[symbol])
        # Beyond it only where the data are damaged.
        self.code = min(self.code, self.range - 1)
        while self.range < _LEAST:
            self.range <<= 8
            self._next()
        return symbol

    def _next(self) -> None:
        byte = self.data[self.place] if self.place < len(self.data) else 0
        known = min(max(self.bits - 8 * self.place, 0), 8)
        self.place += 1
        self.code = (self.code << 8) | byte
        self.slack = (self.slack << 8) | (255 >> known)
