"""A stack of symbols: asymmetric numeral systems (rANS, Duda 2009) in lanes.

A head of 64 bits holds what was pushed last. Where it grows too large its low 32 bits
go onto a stack of words, from which it is filled again. Several heads (lanes) share the
words and are worked on at once. A symbol is an interval [start, start + freq) of 2^24,
and takes 24 - log2(freq) bits.

What pops from a stack is as random as what is on it. Two things make that so:

  Heads and the words below all others begin random. A head that begins low gives the
  same symbol in all lanes.
  After each operation the low bits of all heads are changed by a mask, which the
  opposite operation takes away again. Without it a pop returns the quantile of what
  was pushed last: noise that copies the residuals of the network.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_jax.codec import container

BITS = 24
"""Of a frequency: they add up to 2^24."""
LOW = np.uint64(2**31)
_HALF, _PART = np.uint64(32), np.uint64(BITS)
_WORD, _MASK = np.uint64(2**32 - 1), np.uint64(2**BITS - 1)
_ROOM = np.uint64(63 - BITS)
_BLOCK = 1024
"""Words, or masks, that are made at once."""

Find = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""From positions in 0..2^24-1, int64 [width], to symbols, starts, freqs."""


@dataclass
class Stack:
    """The state of a stack of L lanes; `push` and `pop` change it."""

    heads: np.ndarray
    """uint64 [L], each from 2^31 to below 2^63."""
    words: np.ndarray
    """uint32 [room]: the first `size` are on the stack."""
    size: int
    least: int
    """The least that `size` has been: what is below was never touched."""
    count: int
    """Operations made by who writes, less those undone by who reads."""
    rng: np.random.Generator | None
    """Of the random words below; who reads has None, and undoes operations of a writer
    in reverse order."""


def start(lanes: int, seed: int = 0) -> Stack:
    """Returns a stack to write to, filled with random bits without end.

    Those that were popped are in the file.
    """
    rng = np.random.default_rng(seed)
    heads = rng.integers(LOW, 2 * LOW, lanes, dtype=np.uint64)
    return Stack(heads, np.zeros(0, np.uint32), 0, 0, 0, rng)


def opened(heads: np.ndarray, words: np.ndarray, count: int) -> Stack:
    """Returns a stack to read from, after so many operations of who wrote it.

    Raises:
      DataError: a head that no writer leaves.
    """
    if not np.all((heads >= LOW) & (heads < np.uint64(2**63))):
        raise container.damaged("a head outside its range")
    return Stack(heads.copy(), words.copy(), len(words), 0, count, None)


def push(stack: Stack, start: np.ndarray, freq: np.ndarray) -> None:
    """Pushes one symbol onto each of the first lanes, by its interval, int64 [width].

    Raises:
      DataError: an interval is empty, as only damaged files have it.
    """
    if freq.min() < 1:
        raise container.damaged("a value that was never drawn")
    _unmix(stack)
    freq = freq.astype(np.uint64)
    head = stack.heads[: len(freq)]
    full = head >= (freq << _ROOM)
    _push_words(stack, (head[full] & _WORD).astype(np.uint32))
    head = np.where(full, head >> _HALF, head)
    whole, rest = np.divmod(head, freq)
    stack.heads[: len(freq)] = (whole << _PART) + rest + start.astype(np.uint64)
    _mix(stack)


def pop(stack: Stack, width: int, find: Find) -> np.ndarray:
    """Returns symbols from the first lanes, [width].

    Raises:
      DataError: nothing is left, of what is read.
    """
    _unmix(stack)
    head = stack.heads[:width]
    at = head & _MASK
    symbol, start, freq = find(at.astype(np.int64))
    head = freq.astype(np.uint64) * (head >> _PART) + at - start.astype(np.uint64)
    empty = np.flatnonzero(head < LOW)
    head[empty] = (head[empty] << _HALF) | _pop_words(stack, len(empty))
    stack.heads[:width] = head
    _mix(stack)
    return symbol


def _push_words(stack: Stack, words: np.ndarray) -> None:
    size = stack.size + len(words)
    if size > len(stack.words):
        more = np.zeros(size + _BLOCK, np.uint32)
        stack.words = np.concatenate([stack.words, more])
    stack.words[stack.size : size] = words
    stack.size = size


def _pop_words(stack: Stack, count: int) -> np.ndarray:
    """Returns the words on top; the last lane was the last to push one."""
    if count > stack.size:
        if stack.rng is None:
            raise container.damaged("fewer words than its images take")
        more = stack.rng.integers(0, 2**32, count + _BLOCK, dtype=np.uint32)
        stack.words = np.concatenate([more, stack.words])
        stack.size, stack.least = stack.size + len(more), stack.least + len(more)
    stack.size -= count
    stack.least = min(stack.least, stack.size)
    return stack.words[stack.size : stack.size + count].astype(np.uint64)


def _mix(stack: Stack) -> None:
    if stack.rng is not None:
        stack.heads ^= mask(stack.count, len(stack.heads))
        stack.count += 1


def _unmix(stack: Stack) -> None:
    if stack.rng is None:
        stack.count -= 1
        stack.heads ^= mask(stack.count, len(stack.heads))


def mask(count: int, lanes: int) -> np.ndarray:
    """Returns random bits below 2^24 for an operation, uint64 [lanes].

    By the finaliser of splitmix64 (Steele, Lea, Flood 2014) of a number of its own for
    each operation and lane.
    """
    made: np.ndarray = _masks(count // _BLOCK, lanes)[count % _BLOCK]
    return made


@functools.lru_cache(2)
def _masks(block: int, lanes: int) -> np.ndarray:
    operations = np.arange(block * _BLOCK + 1, (block + 1) * _BLOCK + 1)[:, None]
    number = (operations << 24 | np.arange(lanes)).astype(np.uint64)
    x = number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) & _MASK
