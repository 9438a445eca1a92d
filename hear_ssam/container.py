"""How much audio a file holds: headers lie, downloads end early, and streams follow one another in one file.

libsndfile believes the header of the first stream. `streams` walks the structure of a file (chunks, pages, frames; it
decodes nothing) and gives each stream as a file of its own, with a header that counts all that is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

SLACK = 64  # bytes, or samples, by which a header may be wrong without a word: some writers count the header, too
_ENDLESS = 0x7FFF0000  # sizes from here on, in a smaller file, mean "until the end": a pipe's writer knows no size


@dataclass(eq=False)
class Stream:
    """A part of a file as a file to read: `head`, then the file's bytes from `start` to `stop`."""

    file: BinaryIO
    start: int
    stop: int
    head: bytes = b""
    end: int = 0  # where the next stream begins, if not at `stop`
    frames: int = 0  # of audio that there must be, `slack` less at most; 0: unknown
    slack: int = 0
    fault: str = ""  # why it cannot be read whole; empty if it can
    remark: str = ""  # how its header was wrong, if what it says has been corrected
    pad: int = 0  # bytes that it claims to have more than there are
    _at: int = 0

    @property
    def size(self) -> int:
        """What it claims to have, in bytes."""
        return len(self.head) + self.stop - self.start + self.pad

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end."""
        data = self.head[self._at : self._at + count]
        position = self.start + self._at + len(data) - len(self.head)
        if len(data) < count and position < self.stop:
            data += _read(self.file, position, min(count - len(data), self.stop - position))
        if self.pad and self._at >= self.size - 128:  # where libmpg123 looks for a tag
            data = bytes(min(count, self.size - self._at))
        self._at += len(data)
        return data


def streams(file: BinaryIO) -> Iterator[Stream]:
    """The streams of audio in an open file, in their order. A file of unknown structure is one stream."""
    size, start = file.seek(0, os.SEEK_END), 0
    while start < size:
        begin = _read(file, start, 12)
        if begin[:4] in _FORMS:
            stream = _chunked(file, start, size)
        elif begin.startswith(b"OggS"):
            stream = _ogg(file, start, size)
        elif begin.startswith(b"NIST_1A"):
            count = re.search(rb"sample_count -i (\d+)", _read(file, start, 1024))
            stop = next(_find(file, rb"NIST_1A\n", start + 8, size), size)
            stream = Stream(file, start, stop, frames=int(count[1]) if count else 0, slack=SLACK)
        else:
            while (tag := _read(file, start, 10)).startswith(b"ID3"):  # its size in four times seven bits
                start += 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
            walk = _flac if _read(file, start, 4) == b"fLaC" else _mpeg
            stream = walk(file, start, size)
        yield stream
        start = stream.end or stream.stop


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(max(0, position))
    return file.read(count)


def _find(file: BinaryIO, pattern: bytes, position: int, stop: int) -> Iterator[int]:
    """Where a regular expression matches (up to 16 bytes)."""
    while position < stop:
        block = _read(file, position, min(1 << 20, stop - position))
        yield from (position + match.start() for match in re.finditer(pattern, block))
        position += max(1, len(block) - 15)


class _Form(NamedTuple):
    """The layout of WAV, RF64, W64, AIFF, CAF or AU."""

    first: int  # where the first chunk stands
    name: int  # bytes of a chunk's name
    size: int  # bytes of its size
    order: Literal["little", "big"]
    align: int


_FORMS = {
    b"RIFF": _Form(12, 4, 4, "little", 2),
    b"RIFX": _Form(12, 4, 4, "big", 2),
    b"RF64": _Form(12, 4, 4, "little", 2),
    b"riff": _Form(40, 16, 8, "little", 8),
    b"FORM": _Form(12, 4, 4, "big", 2),
    b"caff": _Form(8, 4, 8, "big", 1),
    b".snd": _Form(0, 4, 4, "big", 1),  # no chunks, but a size
}
_METADATA = frozenset(b"list id3 bext ixml axml fact cue smpl inst junk pad peak labl anno auth name".split())


class _Chunk(NamedTuple):
    name: bytes
    field: int  # where its size stands
    content: int
    size: int


def _chunks(file: BinaryIO, form: _Form, position: int, stop: int) -> Iterator[_Chunk]:
    start = position
    while (content := position + form.name + form.size) <= stop:
        head = _read(file, position, form.name + form.size)
        size = int.from_bytes(head[form.name :], form.order) - (24 if form.align == 8 else 0)
        yield _Chunk(head[:4], content - form.size, content, max(size, 0))
        position = content + max(size, 0)
        position += -(position - start) % form.align


def _chunked(file: BinaryIO, start: int, stop: int) -> Stream:
    magic = _read(file, start, 4)
    form = _FORMS[magic]
    data, width, large = None, form.size, 0  # large: where RF64 keeps the size of its data
    if magic == b".snd":
        offset, size = (int.from_bytes(_read(file, start + at, 4), "big") for at in (4, 8))
        data = _Chunk(b"data", start + 8, start + offset, size)
    for chunk in _chunks(file, form, start + form.first, stop) if data is None else ():
        if chunk.name == b"ds64":
            large = chunk.content + 8
        elif chunk.name in (b"data", b"SSND"):
            data = chunk
            break
    if data is None or data.content > stop:
        return Stream(file, start, stop)  # libsndfile says what it misses
    if large and data.size == 0xFFFFFFFF:
        width, size = 8, int.from_bytes(_read(file, large, 8), "little")
        data = data._replace(field=large, size=size)
    there = stop - data.content
    endless = data.size >= _ENDLESS and (there < _ENDLESS or data.size in (2**32 - 1, 2**64 - 1))
    if data.size > there + SLACK and not endless:
        return Stream(file, start, stop, fault=f"is cut off: {there:,} of {data.size:,} bytes of audio are there")
    end, more = (stop, False) if endless else _behind(file, form, magic, data, stop)
    if not endless and not more:  # libsndfile takes all behind the data of W64 for audio
        return Stream(file, start, min(end, data.content + data.size) if form.align == 8 else end, end=end)
    value = there + (24 if form.align == 8 else 0)
    if value >= 256**width:
        return Stream(file, start, stop, fault="holds more audio than its format can count")
    head = bytearray(_read(file, start, data.content - start))
    head[data.field - start : data.field - start + width] = value.to_bytes(width, form.order)
    remark = f"its header counts {data.size:,} bytes of audio, {there:,} are there and were read" if more else ""
    return Stream(file, data.content, stop, bytes(head), remark=remark)


def _behind(file: BinaryIO, form: _Form, magic: bytes, data: _Chunk, stop: int) -> tuple[int, bool]:
    """Where the stream of this audio ends, and whether what follows the audio can only be more of it."""
    position = data.content + data.size
    if stop - position <= SLACK:
        return stop, False
    for begin in (position, position + -data.size % form.align):  # some writers do not align
        for chunk in _chunks(file, form, begin, stop):
            if chunk.name == magic:  # another stream
                return chunk.field - form.name, False
            known = chunk.name.strip().lower() in _METADATA
            named = known or (chunk.name.isascii() and chunk.name.decode().isprintable())
            if not named or chunk.content + chunk.size > stop + SLACK:
                if known or chunk.content > begin + form.name + form.size:  # there was metadata, so the audio was over
                    return stop, False
                break
        else:
            return stop, False
    tagged = _read(file, position, 8).startswith((b"TAG", b"ID3", b"APETAGEX"))
    padding = next(_find(file, rb"[^\0]", position, stop), stop) == stop
    return stop, not tagged and not padding


def _ogg(file: BinaryIO, start: int, stop: int) -> Stream:
    """Ogg pages up to the one that begins another stream (several may begin together, as of a film)."""
    position, last, begun = start, 0, False
    while position < stop:
        head = _read(file, position, 27)
        if not head.startswith(b"OggS"):  # after the last page: whatever it is, it is no audio
            break
        flags, segments = (head[5], head[26]) if len(head) == 27 else (0, 0)
        if flags & 2 and begun:
            stop = position
            break
        begun |= not flags & 2
        last = flags & 4
        table = _read(file, position + 27, segments)
        position += 27 + len(table) + sum(table)
    fault = "" if last and position <= stop else "is cut off or damaged: its last page is missing"
    return Stream(file, start, stop, fault=fault)


def _flac(file: BinaryIO, start: int, stop: int) -> Stream:
    """The count of samples stands in 36 bits of the first block; without it, libFLAC reads until the end."""
    head = bytearray(_read(file, start, 26))
    frames = int.from_bytes(head[21:26], "big") & (1 << 36) - 1
    head[21:26] = (int.from_bytes(head[21:26], "big") >> 36 << 36).to_bytes(5, "big")
    end = next(_find(file, rb"fLaC\0\0\0\x22", start + 4, stop), stop)
    has_tag = _read(file, end - 128, 3) == b"TAG"  # ID3v1
    return Stream(file, start + 26, end - 128 * has_tag, bytes(head), end=end, frames=frames, slack=SLACK)


_LAYER_III = rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG 1
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG 2 and 2.5


class _Frame(NamedTuple):
    kind: tuple[int, int]  # version, sample rate in Hz
    bytes: int
    samples: int
    side: int  # bytes before the data, or before "Xing"
    counts: bool  # holds no audio, but the count of the frames that do


def _frame(head: bytes) -> _Frame | None:
    """The frame of MPEG layer III that begins with these 44 bytes, if one does."""
    bits = int.from_bytes(head[:4], "big")
    version, kbps, rate = bits >> 19 & 3, bits >> 12 & 15, bits >> 10 & 3
    if bits >> 21 != 0x7FF or version == 1 or bits >> 17 & 3 != 1 or kbps in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] >> (2 if version == 0 else 3 - version)
    samples, wide = (1152, (32, 17)) if version == 3 else (576, (17, 9))
    side = 4 + wide[bits >> 6 & 3 == 3]  # the second of a pair: mono
    counts = head[side : side + 4] in (b"Xing", b"Info") and bool(head[side + 7] & 1)
    length = samples * (_KBPS_1 if version == 3 else _KBPS_2)[kbps] * 125 // hertz + (bits >> 9 & 1)
    return _Frame((version, hertz), length, samples, side, counts)


def _mpeg(file: BinaryIO, start: int, stop: int) -> Stream:
    """Frames up to something else; frames behind that are another stream, as in files that were joined."""

    def at(position: int) -> _Frame | None:
        return _frame(_read(file, position, 44).ljust(44, b"\0")) if position < stop else None

    first = frame = at(start)
    if first is None:
        return Stream(file, start, stop)
    position, count = start, 0
    while frame and frame.kind == first.kind and position + frame.bytes <= stop and not (frame.counts and count):
        count += not frame.counts
        position += frame.bytes
        frame = at(position)
    for end in _find(file, _LAYER_III, position, stop):
        if (frame := at(end)) and (after := at(end + frame.bytes)) and after.kind == frame.kind:
            break
    else:
        end = stop
    stream = Stream(file, start, position, end=end, frames=count * first.samples, slack=5 * first.samples)
    if not first.counts:  # libsndfile expects as many frames as there would be if all were as long as the first
        stream.pad = max(256, (count + 2) * (first.bytes + 1) - (position - start))
        return stream
    field = start + first.side + 8
    promised = int.from_bytes(_read(file, field, 4), "big")
    if promised > count + 2:
        stream.fault = f"is cut off or damaged: {count:,} of {promised:,} frames are there"
    elif promised < count - 2:
        stream.head, stream.start = _read(file, start, field - start) + count.to_bytes(4, "big"), field + 4
        stream.remark = f"its header counts {promised:,} frames, {count:,} are there and were read"
    return stream
