"""Stacks of symbols: asymmetric numeral systems (rANS, Duda 2009) in lanes.

A head of 64 bits holds what was pushed last. Where it grows too large its low 32 bits
go onto a stack of words, from which it is filled again. Several heads (lanes) share one
stack of words, and several such stacks (groups) are worked on at once. A symbol is an
interval [start, start + freq) of 2^24, and takes 24 - log2(freq) bits.

What pops from a stack is as random as what is on it. Two things make that so:

  Heads begin random. A head that begins low gives the same symbol in all lanes.
  After each operation the low bits of all heads are changed by a mask, which the
  opposite operation takes away again. Without it a pop returns the quantile of what
  was pushed last: noise that copies the residuals of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_jax.errors import DataError

BITS = 24
"""Of a frequency: they add up to 2^24."""
LOW = np.uint64(2**31)
_HALF, _PART = np.uint64(32), np.uint64(BITS)
_WORD, _MASK = np.uint64(2**32 - 1), np.uint64(2**BITS - 1)
_ROOM = np.uint64(63 - BITS)

Find = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""From positions in 0..2^24-1, int64 [rows, width], to symbols, starts, freqs."""


@dataclass
class Stacks:
    """The state of G stacks of L lanes; `push` and `pop` change it."""

    heads: np.ndarray
    """uint64 [G, L], each from 2^31 to below 2^63."""
    words: np.ndarray
    """uint32 [G, room]: the first `size` of each row are on the stack."""
    size: np.ndarray
    """int64 [G]."""
    least: np.ndarray
    """int64 [G], the least that `size` has been: what is below was never touched."""
    count: int
    """Operations made by who writes, less those undone by who reads."""
    reading: bool = False
    """Whether operations undo those of a writer, in reverse order."""


def start(groups: int, lanes: int, reserve: int, seed: int = 0) -> Stacks:
    """Returns stacks to write to, filled with random bits.

    Args:
      groups: how many stacks.
      lanes: heads of each.
      reserve: random words below each. Those that were popped are in the file.
      seed: of the random bits.
    """
    rng = np.random.default_rng(seed)
    # In the upper half, so that 31 bits of each are popped before a word is.
    heads = rng.integers(2**62, 2**63, (groups, lanes), dtype=np.uint64)
    words = rng.integers(0, 2**32, (groups, reserve), dtype=np.uint32)
    size = np.full(groups, reserve, np.int64)
    return Stacks(heads, words, size, size.copy(), 0)


def opened(heads: np.ndarray, words: list[np.ndarray], count: int) -> Stacks:
    """Returns stacks to read from.

    Args:
      heads: uint64 [G, L].
      words: of each group, uint32.
      count: operations that the writer made.

    Raises:
      DataError: a head that no writer leaves.
    """
    if not np.all((heads >= LOW) & (heads < np.uint64(2**63))):
        raise _damaged("a head outside its range")
    size = np.array([len(each) for each in words], np.int64)
    table = np.zeros((len(words), int(size.max(initial=0))), np.uint32)
    for row, each in zip(table, words, strict=True):
        row[: len(each)] = each
    return Stacks(heads.copy(), table, size, np.zeros_like(size), count, True)


def written(stacks: Stacks) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the heads and the words of each group that a reader needs."""
    parts = zip(stacks.words, stacks.least, stacks.size, strict=True)
    return stacks.heads, [row[low:high] for row, low, high in parts]


def push(stacks: Stacks, start: np.ndarray, freq: np.ndarray) -> None:
    """Pushes one symbol onto each of the first lanes of the first groups.

    Args:
      stacks: what is changed.
      start: of the intervals, int64 [rows, width].
      freq: their lengths, at least 1.

    Raises:
      DataError: an interval is empty, as only damaged files have it.
    """
    rows, width = freq.shape
    if freq.min() < 1:
        raise _damaged("a value that was never drawn")
    _unmix(stacks, rows)
    freq = freq.astype(np.uint64)
    head = stacks.heads[:rows, :width]
    full = head >= (freq << _ROOM)
    _push_words(stacks, rows, full, (head & _WORD).astype(np.uint32))
    head = np.where(full, head >> _HALF, head)
    whole, rest = np.divmod(head, freq)
    stacks.heads[:rows, :width] = (whole << _PART) + rest + start.astype(np.uint64)
    _mix(stacks, rows)


def pop(stacks: Stacks, rows: int, width: int, find: Find) -> np.ndarray:
    """Returns symbols from the first lanes of the first groups, [rows, width].

    Raises:
      DataError: nothing is left, of what is read.
    """
    _unmix(stacks, rows)
    head = stacks.heads[:rows, :width]
    at = head & _MASK
    symbol, start, freq = find(at.astype(np.int64))
    head = freq.astype(np.uint64) * (head >> _PART) + at - start.astype(np.uint64)
    empty = head < LOW
    words = _pop_words(stacks, rows, empty)
    stacks.heads[:rows, :width] = np.where(empty, (head << _HALF) | words, head)
    _mix(stacks, rows)
    return symbol


def _push_words(stacks: Stacks, rows: int, full: np.ndarray, words: np.ndarray) -> None:
    if not full.any():
        return
    each = full.sum(axis=1)
    size = stacks.size[:rows]
    need = int((size + each).max())
    if need > stacks.words.shape[1]:
        more = np.zeros((len(stacks.words), need), np.uint32)
        stacks.words = np.concatenate([stacks.words, more], axis=1)
    row, lane = np.nonzero(full)
    place = size[:, None] + np.cumsum(full, axis=1) - 1
    stacks.words[row, place[row, lane]] = words[row, lane]
    stacks.size[:rows] += each


def _pop_words(stacks: Stacks, rows: int, empty: np.ndarray) -> np.ndarray:
    if not empty.any():
        return np.zeros(empty.shape, np.uint64)
    # The last lane takes the word on top, as it was the last to push one.
    size = stacks.size[:rows] - empty.sum(axis=1)
    if size.min() < 0:
        raise _damaged("fewer words than its images take")
    row, lane = np.nonzero(empty)
    place = size[:, None] + np.cumsum(empty, axis=1) - 1
    words = np.zeros(empty.shape, np.uint64)
    words[row, lane] = stacks.words[row, place[row, lane]]
    stacks.size[:rows] = size
    stacks.least[:rows] = np.minimum(stacks.least[:rows], size)
    return words


def _mix(stacks: Stacks, rows: int) -> None:
    if not stacks.reading:
        stacks.heads[:rows] ^= mask(stacks.count, *stacks.heads[:rows].shape)
        stacks.count += 1


def _unmix(stacks: Stacks, rows: int) -> None:
    if stacks.reading:
        stacks.count -= 1
        stacks.heads[:rows] ^= mask(stacks.count, *stacks.heads[:rows].shape)


def mask(count: int, rows: int, lanes: int) -> np.ndarray:
    """Returns random bits below 2^24 for an operation, uint64 [rows, lanes].

    By the finaliser of splitmix64 (Steele, Lea, Flood 2014) of a number of its own for
    each operation, group and lane.
    """
    number = np.arange(rows * lanes, dtype=np.uint64) + np.uint64((count + 1) << 24)
    x = number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) & _MASK).reshape(rows, lanes)


def _damaged(what: str) -> DataError:
    return DataError(
        f"the archive must be as it was written; got {what}. It is damaged: copy it "
        "again from where it was made."
    )
