"""Zip archives, read so strictly that every reader finds the same in them, and written anew from their parts.

A zip file may have two directories, two members of one name, or sizes that contradict each other: two readers then see two files, and
what one has checked the other does not load. So a `.pt2` is read here once. Its end record must end the file, the directory must end
where the end record begins, every member must be stored as it is, within the file, apart from all others, and under a name of plain
letters that no other has, also without case. (PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16.)

`Fresh` is an archive of checked parts that is never written: it is read like a file, headers are made here, and the data of a member
that was not changed comes from the mapped file.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*")
_FLAGS = 0x0808
"""The flags that a member may have: its sizes stand behind its data, its name is UTF-8. Neither changes what it holds."""
_VERSION = 45
"""Of the format: ZIP64."""
_ALIGNMENT = 64
"""Where torch maps tensors, their data begin at multiples of this."""
_WIDE = 0xFFFFFFFF


class BadArchive(Exception):
    """An archive in which readers may find different things; the text says where."""


@dataclass(frozen=True, slots=True)
class _Member:
    start: int
    size: int
    crc: int


class Archive:
    """The members of a zip file by their names; the file stays mapped while any of them is in use."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            try:
                self._data = memoryview(_mapped(file.fileno()))
            except ValueError as error:  # of an empty file
                raise BadArchive("it is empty") from error
        self._members = _members(self._data)

    def names(self) -> list[str]:
        """The names of all members, in the order of their data."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> memoryview:
        """The data of a member, not copied."""
        member = self._members[name]
        return self._data[member.start : member.start + member.size]

    def checksum(self, name: str) -> int:
        """The CRC-32 of a member as the directory has it."""
        return self._members[name].crc

    def damaged(self) -> str:
        """The name of the first member whose data have another CRC-32 than the directory says; empty where there is none."""
        return next((name for name in self._members if zlib.crc32(self[name]) != self.checksum(name)), "")


def _mapped(file: int) -> mmap.mmap:
    """The file as read-only memory; where the system can, its pages come in at once, since all of it is read."""
    populate = getattr(mmap, "MAP_POPULATE", None)
    if populate is None:
        return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    return mmap.mmap(file, 0, flags=mmap.MAP_SHARED | populate, prot=mmap.PROT_READ)


def _members(data: memoryview) -> dict[str, _Member]:
    count, start, end = _directory(data)
    found: dict[str, _Member] = {}
    used: list[tuple[int, int, str]] = []
    folded: set[str] = set()
    at = start
    for _ in range(count):
        if at + _ENTRY.size > end:
            raise BadArchive("its directory is shorter than it says")
        magic, _, needed, flags, method, _, _, crc, packed, size, long, extra, comment, disk, _, _, offset = _ENTRY.unpack_from(
            data, at
        )
        if magic != b"PK\1\2" or at + _ENTRY.size + long + extra + comment > end:
            raise BadArchive("its directory is damaged")
        raw = bytes(data[at + _ENTRY.size : at + _ENTRY.size + long])
        name = raw.decode("ascii", "replace")
        if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
            raise BadArchive(f"a part is called {name[:80]!r}, which is no plain relative path")
        if name.lower() in folded:
            raise BadArchive(f"two parts are called '{name}', if case does not count")
        if flags & ~_FLAGS or method or disk or comment or needed > _VERSION:
            raise BadArchive(f"'{name}' is packed or encrypted, where torch stores plainly")
        packed, size, offset = _wide(data[at + _ENTRY.size + long :][:extra], packed, size, offset)
        if packed != size:
            raise BadArchive(f"'{name}' has two sizes")
        first = _local(data, offset, raw, start, name)
        if first + size > start:
            raise BadArchive(f"'{name}' is larger than the file")
        found[name] = _Member(first, size, crc)
        used.append((offset, first + size, name))
        folded.add(name.lower())
        at += _ENTRY.size + long + extra + comment
    if at != end:
        raise BadArchive("its directory is longer than it says")
    used.sort()
    for (_, before, one), (after, _, other) in pairwise(used):
        if after < before:
            raise BadArchive(f"'{one}' and '{other}' overlap")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _directory(data: memoryview) -> tuple[int, int, int]:
    """How many entries the directory has, where it begins, and where it ends."""
    at = len(data) - _END.size
    if at < 0 or bytes(data[at : at + 4]) != b"PK\5\6":
        raise BadArchive("it does not end in the end record of a zip archive")
    _, disk, first, here, count, size, start, comment = _END.unpack_from(data, at)
    end = at
    locator = at - _LOCATOR.size
    if locator >= 0 and bytes(data[locator : locator + 4]) == b"PK\6\7":
        _, disk64, end, disks = _LOCATOR.unpack_from(data, locator)
        if disk64 or disks != 1 or end + _END64.size != locator or bytes(data[end : end + 4]) != b"PK\6\6":
            raise BadArchive("its end records contradict each other")
        narrow = (here, count, size, start)
        _, length, _, _, disk, first, here, count, size, start = _END64.unpack_from(data, end)
        wide = (here, count, size, start)
        if length != _END64.size - 12 or any(n not in (w, 0xFFFF, _WIDE) for n, w in zip(narrow, wide, strict=True)):
            raise BadArchive("its end records contradict each other")
    if disk or first or here != count or comment or start + size != end:
        raise BadArchive("its directory does not stand where its end record says")
    return count, start, end


def _wide(extra: memoryview, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset of an entry, with those of its ZIP64 field where they do not fit."""
    numbers = [size, packed, offset]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [place for place, number in enumerate(numbers) if number == _WIDE]
            if length != 8 * len(wide) or at + 4 + length > len(extra):
                raise BadArchive("a ZIP64 field of its directory is damaged")
            for place, number in zip(wide, struct.unpack_from(f"<{len(wide)}Q", extra, at + 4), strict=True):
                numbers[place] = number
        at += 4 + length
    return numbers[1], numbers[0], numbers[2]


def _local(data: memoryview, offset: int, raw: bytes, end: int, name: str) -> int:
    """Where the data of a member begin, whose header must say the same as the directory."""
    if offset + _LOCAL.size > end:
        raise BadArchive(f"'{name}' stands outside the file")
    magic, _, flags, method, _, _, _, _, _, long, extra = _LOCAL.unpack_from(data, offset)
    at = offset + _LOCAL.size
    if magic != b"PK\3\4" or flags & ~_FLAGS or method or bytes(data[at : at + long]) != raw:
        raise BadArchive(f"'{name}' has another header than the directory says")
    return at + int(long) + int(extra)


class Fresh(io.RawIOBase):
    """A zip archive of `parts`, read like a file; nothing is copied but headers and the directory.

    `checksums` are the CRC-32 of parts where they are known; of others they are computed.
    """

    def __init__(self, parts: Mapping[str, bytes | memoryview], checksums: Mapping[str, int]):
        self._pieces: list[bytes | memoryview] = []
        self._starts: list[int] = []
        self._size = self._at = 0
        directory = b""
        for name, part in parts.items():
            checksum = checksums[name] if name in checksums else zlib.crc32(part)
            directory += self._member(name.encode("ascii"), part, checksum)
        start = self._size
        self._add(directory)
        end = self._size
        count, size = len(parts), end - start
        self._add(_END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, start))
        self._add(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        self._add(_END.pack(b"PK\5\6", 0, 0, few, few, min(size, _WIDE), min(start, _WIDE), 0))

    def _member(self, name: bytes, part: bytes | memoryview, crc: int) -> bytes:
        """Add a member; its entry of the directory."""
        offset, size = self._size, len(part)
        large, far = size >= _WIDE, offset >= _WIDE
        wide = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        narrow = _WIDE if large else size
        gap = -(offset + _LOCAL.size + len(name) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", gap) + bytes(gap)
        self._add(_LOCAL.pack(b"PK\3\4", 45, 0x0800, 0, 0, 0, crc, narrow, narrow, len(name), len(extra)) + name + extra)
        self._add(part)
        numbers = [size, size] * large + [offset] * far
        entry = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        place = _WIDE if far else offset
        head = _ENTRY.pack(b"PK\1\2", 45, 45, 0x0800, 0, 0, 0, crc, narrow, narrow, len(name), len(entry), 0, 0, 0, 0, place)
        return head + name + entry

    def _add(self, piece: bytes | memoryview) -> None:
        if len(piece):
            self._starts.append(self._size)
            self._pieces.append(piece)
            self._size += len(piece)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._at < self._size:
            place = bisect_right(self._starts, self._at) - 1
            piece = self._pieces[place]
            inside = self._at - self._starts[place]
            count = min(len(view) - done, len(piece) - inside)
            view[done : done + count] = piece[inside : inside + count]
            done += count
            self._at += count
        return done
