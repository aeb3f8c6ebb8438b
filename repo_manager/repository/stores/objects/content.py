"""A file's content: its digest for the manifest, and a store's mark of the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from repo_manager.errors import ConcurrentChangeError
from repo_manager.repository.manifest import FileRecord
from repo_manager.types import Digest

__all__ = ["MeasuredFile", "measure", "part_bytes_for", "read_part"]

_MAX_PARTS = 9000  # S3 allows 10,000 (Amazon S3 User Guide, "Multipart upload limits")
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class MeasuredFile:
    """A file as it was read once.

    Attributes:
        record: digest and size, as the manifest says it.
        part_bytes: the size of the parts it is sent in. The last one may be smaller.
        part_md5s: of each part, hexadecimal. One when the file is sent whole.
    """

    record: FileRecord
    part_bytes: int
    part_md5s: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether it is sent in one request."""
        return self.record.size_bytes <= self.part_bytes

    @property
    def e_tag(self) -> str:
        """Return S3's ETag of these bytes when they are sent in such parts (without encryption by a key of KMS)."""
        if self.whole:
            return f'"{self.part_md5s[0]}"'
        joined = hashlib.md5(b"".join(bytes.fromhex(one) for one in self.part_md5s), usedforsecurity=False)
        return f'"{joined.hexdigest()}-{len(self.part_md5s)}"'

    def part_size(self, number: int) -> int:
        """Return the size of a part. Numbers start at 1."""
        return min(self.part_bytes, self.record.size_bytes - (number - 1) * self.part_bytes)


def part_bytes_for(size_bytes: int, wanted: int) -> int:
    """Return the size of a file's parts: as wanted, larger where there would be too many."""
    if size_bytes <= wanted * _MAX_PARTS:
        return wanted
    return -(-size_bytes // (_MAX_PARTS * _MIB)) * _MIB


def measure(path: Path, part_bytes: int) -> MeasuredFile:
    """Read a file once.

    Raises:
        OSError: it cannot be read.
    """
    size_bytes = path.stat().st_size
    part = part_bytes_for(size_bytes, part_bytes)
    digest, found = hashlib.sha256(), 0
    md5s: list[str] = []
    with path.open("rb") as file:
        while True:
            md5, left = hashlib.md5(usedforsecurity=False), part
            while left and (chunk := file.read(min(left, _MIB))):
                digest.update(chunk)
                md5.update(chunk)
                left -= len(chunk)
            read = part - left
            if read or not md5s:
                md5s.append(md5.hexdigest())
            found += read
            if left:
                break
    return MeasuredFile(FileRecord(Digest("sha256:" + digest.hexdigest()), found), part, tuple(md5s))


def read_part(path: Path, measured: MeasuredFile, number: int) -> bytes:
    """Return a part's bytes, the same measured.

    Args:
        path: the measured file, on this machine. It must not have changed since.
        measured: size, digest and parts of the file.
        number: number of the part, from 0.

    Raises:
        RepositoryError: the file changed at the same time.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek((number - 1) * measured.part_bytes)
        data = file.read(measured.part_bytes)
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != measured.part_md5s[number - 1]:
        raise ConcurrentChangeError(f"{path} was changed while it was uploaded", hint="Run the command again.")
    return data
