"""Entropy-coded bf16: exponents in a Huffman code, sign and mantissa as they are; about two thirds of the bytes, every bit kept.

Paper: DFloat11 (70% Size, 100% Accuracy). Its idea, with a container of our own that needs no counting pass: blocks of fixed size, cut into
lanes that are decoded side by side. This page is the format; whoever writes another decoder needs nothing else.

A word is s(15) e(14..7) m(6..0). `e` goes into the stream, `s << 7 | m` into the byte plane. The code is canonical (symbols sorted by length,
then by value, take rising codes) and no code is longer than 12 bits, so a table of 4096 entries decodes one symbol from the next 12 bits.
A block is LANES * STEPS = 32768 consecutive words; lane t of a block holds its words t, t + LANES, t + 2 LANES ..., as codes one behind the
other, high bit first, from a byte boundary on. Words past the end of the tensor are absent, so late lanes of the last block may be empty.

Container, little endian, one after the other:
    header    <4sIIIHHIQ: magic b"BFE1", crc32 of what follows in the header and of the code lengths, rows, columns, lanes, steps,
              1 if the matrix is handed out transposed, bytes of the stream
    lengths   u8 [256]            bits of each exponent's code, 0 where the exponent does not occur
    checks    u32 [blocks]        crc32 of each block's words
    bases     u64 [blocks + 1]    first byte of each block in the stream
    offsets   u16 [blocks * lanes]  first byte of each lane, from the block's first
    stream    u8 [bytes of the stream]
    plane     u8 [rows * columns]  sign and mantissa
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planc.runtime.errors import ArtifactError

Words = NDArray[np.uint16]
Bytes = NDArray[np.uint8]

LONGEST = 12  #: bits of a code at most; costs 0.002 bits per weight against no limit
LANES, STEPS = 256, 128
_MAGIC, _HEADER = b"BFE1", struct.Struct("<4sIIIHHIQ")
_TOGETHER = 32  # blocks that are decoded side by side: 8192 lanes, whose registers fit into the second-level cache
_REFILL = 4  # codes per 64-bit register: 4 * 12 bits and the 15 that may be used up when it is filled


def code_lengths(counts: NDArray[np.int64]) -> Bytes:
    """Bits [256] of an optimal prefix code with no code above LONGEST for symbols that occur `counts` [256] times (package-merge)."""
    symbols = np.flatnonzero(counts)
    lengths = np.zeros(256, np.uint8)
    if len(symbols) == 1:
        lengths[symbols] = 1
        return lengths
    coins = sorted((int(counts[s]), (int(s),)) for s in symbols)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        row = sorted(coins + packages)
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
    for _, members in packages[: len(symbols) - 1]:  # each membership makes a code one bit longer
        for symbol in members:
            lengths[symbol] += 1
    return lengths


def _codes(lengths: Bytes) -> NDArray[np.uint32]:
    """Canonical codes [256]."""
    codes, code, last = np.zeros(256, np.uint32), 0, 0
    for symbol in np.lexsort((np.arange(256), lengths)):
        if length := int(lengths[symbol]):
            code <<= length - last
            codes[symbol], code, last = code, code + 1, length
    return codes


def encode(words: Words) -> Bytes:
    """The container of a matrix of bf16 words [rows, columns]."""
    rows, columns = words.shape
    flat = np.ascontiguousarray(words).reshape(-1)
    exponents = ((flat >> 7) & 255).astype(np.uint8)
    lengths = code_lengths(np.bincount(exponents, minlength=256))
    codes, size = _codes(lengths), LANES * STEPS
    checks, streams, offsets, bases = list[int](), list[bytes](), list[Words](), [0]
    for start in range(0, flat.size, size):
        checks.append(zlib.crc32(flat[start : start + size].tobytes()))
        stream, places = _encode_block(exponents[start : start + size], lengths, codes)
        streams.append(stream)
        offsets.append(places)
        bases.append(bases[-1] + len(stream))
    parts = [_head(rows, columns, False, bases[-1], lengths), np.array(checks, "<u4").tobytes(), np.array(bases, "<u8").tobytes()]
    parts += [np.concatenate(offsets).astype("<u2").tobytes()] if offsets else []
    plane = ((flat >> 8) & 128 | flat & 127).astype(np.uint8)
    return np.frombuffer(b"".join([*parts, *streams, plane.tobytes()]), np.uint8)


def transposed(coded: Bytes) -> Bytes:
    """The same container, marked to be handed out transposed."""
    _, _, rows, columns, _, _, mark, size = _HEADER.unpack(coded[: _HEADER.size].tobytes())
    start = _HEADER.size + 256
    return np.concatenate([np.frombuffer(_head(rows, columns, not mark, size, coded[_HEADER.size : start]), np.uint8), coded[start:]])


def _head(rows: int, columns: int, mark: bool, size: int, lengths: Bytes) -> bytes:
    rest = struct.pack("<IIHHIQ", rows, columns, LANES, STEPS, mark, size) + lengths.tobytes()
    return _MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def _encode_block(exponents: Bytes, lengths: Bytes, codes: NDArray[np.uint32]) -> tuple[bytes, Words]:
    """Stream of one block, and where each lane starts in it."""
    bits = np.zeros(LANES * STEPS, np.int64)
    bits[: len(exponents)] = lengths[exponents]
    ends = bits.reshape(STEPS, LANES).cumsum(0)
    used = (ends[-1] + 7) // 8
    starts = used.cumsum() - used
    places = ((ends - bits.reshape(STEPS, LANES)) + 8 * starts).reshape(-1)[: len(exponents)]
    # a code touches at most three bytes; no two codes share a bit, so adding is joining
    shifted = codes[exponents].astype(np.int64) << (24 - (places & 7) - bits[: len(exponents)])
    total = int(used.sum())
    stream = sum(np.bincount((places >> 3) + i, (shifted >> (16 - 8 * i)) & 255, total + 2) for i in range(3))
    return np.asarray(stream)[:total].astype(np.uint8).tobytes(), starts.astype(np.uint16)


@dataclass(frozen=True)
class Container:
    """A container taken apart: views of its arrays, checked against each other."""

    shape: tuple[int, int]
    transposed: bool
    table: NDArray[np.uint64]  # [4096]: next 12 bits -> symbol << 8 | bits of its code
    checks: NDArray[np.uint32]
    bases: NDArray[np.int64]
    offsets: NDArray[np.int64]  # [blocks, LANES]
    stream: Bytes
    plane: Bytes

    @classmethod
    def parse(cls, coded: Bytes) -> Container:
        """Read the header and the tables. Raises ArtifactError[artifact-corrupt] where they do not fit together."""
        raw = memoryview(np.ascontiguousarray(coded).data)
        head = _HEADER.size + 256
        if len(raw) < head or bytes(raw[:4]) != _MAGIC:
            raise _corrupt("it does not start like an entropy-coded matrix")
        _, check, rows, columns, lanes, steps, transposed, size = _HEADER.unpack(raw[: _HEADER.size])
        if zlib.crc32(raw[8:head]) != check or (lanes, steps) != (LANES, STEPS):
            raise _corrupt("its header is damaged")
        blocks = -(-rows * columns // (LANES * STEPS))
        sizes = [4 * blocks, 8 * (blocks + 1), 2 * blocks * LANES, size, rows * columns]
        if len(raw) != head + sum(sizes):
            raise _corrupt(f"it has {len(raw)} bytes, its header says {head + sum(sizes)}")
        cuts = np.cumsum([head, *sizes])
        checks, bases, offsets, stream, plane = (raw[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        starts = np.frombuffer(bases, "<u8").astype(np.int64)
        if starts[0] != 0 or starts[-1] != size or bool((np.diff(starts) < 0).any()):
            raise _corrupt("its blocks do not follow each other")
        places = np.frombuffer(offsets, "<u2").astype(np.int64).reshape(blocks, LANES)
        lengths = np.frombuffer(raw[_HEADER.size : head], np.uint8)
        return cls(
            (rows, columns),
            bool(transposed),
            _table(lengths),
            np.frombuffer(checks, "<u4"),
            starts,
            places,
            np.frombuffer(stream, np.uint8),
            np.frombuffer(plane, np.uint8),
        )

    def words(self, first: int = 0, last: int | None = None) -> Words:
        """The words of blocks first .. last - 1 (of all), flat. Raises ArtifactError[artifact-corrupt] when a block fails its check."""
        last = len(self.checks) if last is None else last
        size = LANES * STEPS
        out = np.empty(max(0, min(last * size, len(self.plane)) - first * size), np.uint16)
        for start in range(first, last, _TOGETHER):
            stop = min(start + _TOGETHER, last)
            part = out[(start - first) * size : (stop - first) * size]
            plane = self.plane[start * size : start * size + len(part)].astype(np.uint16)
            exponents = self._exponents(start, stop)[: len(part)]
            np.bitwise_or((plane & 128) << 8, plane & 127, out=part)
            part |= exponents.astype(np.uint16) << 7
            for block in range(start, stop):
                if zlib.crc32(part[(block - start) * size : (block - start + 1) * size].data) != self.checks[block]:
                    raise _corrupt(f"block {block} does not match its checksum")
        return out

    def _exponents(self, start: int, stop: int) -> Bytes:
        """Exponents of some blocks, flat; one step decodes one symbol of every lane."""
        low, high = int(self.bases[start]), int(self.bases[stop])
        padded = np.zeros((high - low + 1) // 2 * 2 + 8, np.uint8)
        padded[: high - low] = self.stream[low:high]
        halves = padded.view(">u2").astype(np.uint64)
        # 64 bits from every 16-bit boundary on: at least 49 of them are ahead of a position
        ahead = halves[:-3] << 48 | halves[1:-2] << 32 | halves[2:-1] << 16 | halves[3:]
        place = ((self.bases[start:stop, None] - low + self.offsets[start:stop]) * 8).reshape(-1)
        register, entry, bits = (np.empty(place.shape, np.uint64) for _ in range(3))
        index = np.empty(place.shape, np.int64)
        out = np.empty((stop - start, STEPS, LANES), np.uint8)
        for step in range(STEPS):
            if step % _REFILL == 0:
                np.right_shift(place, 4, out=index)
                np.take(ahead, index, out=register, mode="clip")  # a damaged stream may run past the end; its check fails later
                np.bitwise_and(place, 15, out=index)
                np.left_shift(register, index.view(np.uint64), out=register)
            np.right_shift(register, 64 - LONGEST, out=bits)
            np.take(self.table, bits.view(np.int64), out=entry, mode="clip")
            np.bitwise_and(entry, 255, out=bits)
            np.left_shift(register, bits, out=register)
            place += bits.view(np.int64)
            np.right_shift(entry, 8, out=entry)
            out[:, step] = entry.reshape(stop - start, LANES)
        return out.reshape(-1)


def decode(coded: Bytes) -> Words:
    """The matrix of a container: bf16 words [rows, columns], or [columns, rows] where it is marked as transposed."""
    container = Container.parse(coded)
    words = container.words().reshape(container.shape)
    return words.T if container.transposed else words


def widen(words: Words) -> NDArray[np.float32]:
    """bf16 words as float32 of the same shape; every word has its exact value."""
    return (np.ascontiguousarray(words).astype(np.uint32) << 16).view(np.float32)


def _table(lengths: Bytes) -> NDArray[np.uint64]:
    table = np.zeros(1 << LONGEST, np.uint64)
    at = 0
    for symbol in np.lexsort((np.arange(256), lengths)):  # in the order of their codes
        if length := int(lengths[symbol]):
            span = 1 << (LONGEST - length) if length <= LONGEST else 0
            table[at : at + span] = int(symbol) << 8 | length
            at += span
    if at > 1 << LONGEST:
        raise _corrupt("its code lengths are those of no code")
    table[at:] = table[at - 1] if at else 1  # a code of one symbol leaves half of the table over
    return table


def _corrupt(message: str) -> ArtifactError:
    fix = "compile the model again or copy the artifact anew"
    return ArtifactError("artifact-corrupt", f"an entropy-coded matrix cannot be decoded: {message}", fix=fix)
