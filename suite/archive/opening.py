"""Opens a bundle that somebody sent: a .tar, plain or gzip, told by its content. No torch.

Nothing is extracted: members are read one by one, and only regular files whose name is that of a published file are written,
under the name that was checked, into a folder of our own. Everything else ends with a FileError that names the member.
Python's tarfile reads headers (their checksum, numbers and names) and nothing more: members, sizes and their limits are
counted here.
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from suite.archive.published import IN_FOLDER, NAME, VERDICT, is_leaving
from suite.door import GZIP_MAGIC, MAX_FILE_BYTES, MIB, FileError, open_file, printable, unzipped, whatever_fails

MAX_BUNDLE_BYTES = 256 * MIB  # of the file, and of what it holds
MAX_MEMBERS = 20_000
_BLOCK = 512
_MAX_LONG_NAME = 64 * 1024  # bytes of the extra header in which a long name stands, and a Mac's attributes
_MEMBER = re.compile(rf"results/(?P<task>{NAME})/(?P<machine>{NAME})/(?P<inside>.+)")
_OTHERS = {b"\xfd7zXZ\x00": "an .xz file", b"BZh": "a .bz2 file", b"PK": "a .zip file", b"\x28\xb5\x2f\xfd": "a .zst file",
           b"7z\xbc\xaf": "a .7z file"}  # fmt: skip
AGAIN = "download it again"


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The results/ folder of a bundle, for as long as the context lasts. Raises FileError for anything that is no bundle."""
    with tempfile.TemporaryDirectory(prefix="bundle-") as scratch:
        results = Path(scratch) / "results"
        results.mkdir()
        _write_members(Path(path).resolve() if Path(path).is_file() else Path(path), results)
        yield results


def _write_members(path: Path, results: Path) -> None:
    seen: dict[str, str] = {}
    tar = _Tar(path)
    for count, (name, size) in enumerate(tar.members(), 1):
        if count > MAX_MEMBERS:
            raise FileError(path, name, f"more than {MAX_MEMBERS} members", f"at most {MAX_MEMBERS}")
        plain = name.removeprefix("./")
        if size is None or is_leaving(plain):
            continue
        if plain.lower() in seen:
            raise FileError(path, name, "this name a second time", "each file once")
        seen[plain.lower()] = plain
        if not (match := _MEMBER.fullmatch(plain)):
            continue
        if not IN_FOLDER.fullmatch(match["inside"]):
            raise FileError(path, name, "another file than a published folder has", "records, metrics, sums, points, figures, verdict, manifest")
        target = results / match["task"] / match["machine"] / match["inside"]
        content = tar.content()
        with whatever_fails(path, "a file that can be written", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    strangers = [name for name in seen.values() if not _MEMBER.fullmatch(name)]
    if len(strangers) == len(seen):
        raise FileError(path, "", _what_is_there(seen), "results/<task>/<fingerprint>/ in it", "pack the folder results/ itself")
    if strangers:
        raise FileError(path, strangers[0], "a file outside results/<task>/<fingerprint>/", "published files only")


def _what_is_there(seen: dict[str, str]) -> str:
    tops = sorted({name.split("/")[0] for name in seen.values()})
    inside = any(name.endswith(f"/{VERDICT}") or name == VERDICT for name in seen.values())
    return (f"no results/<task>/<fingerprint>/ in it, but {', '.join(map(printable, tops[:3])) or 'nothing'}"
            + (" (packed from inside?)" if inside else ""))  # fmt: skip


class _Tar:
    """A .tar read once from front to end: headers, and the content of the member that was named last."""

    def __init__(self, path: Path):
        self.path, self._buffer, self._left, self._total = path, b"", 0, 0
        self._chunks = self._stream()

    def _stream(self) -> Iterator[bytes]:
        with open_file(self.path, MAX_BUNDLE_BYTES) as file:
            first = file.read(_BLOCK)
            for magic, kind in _OTHERS.items():
                if first.startswith(magic):
                    raise FileError(self.path, "", kind, "a bundle: .tar or .tar.gz", "unpack it and pack it as one")
            chunks = iter(lambda: file.read(MIB), b"")
            if first.startswith(GZIP_MAGIC):
                self._kind = ".tar.gz"
                yield from self._unzipped(_after(first, chunks))
            else:
                self._kind = ".tar"
                yield from _after(first, chunks)

    def _unzipped(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        unpacked = unzipped(chunks, self.path, MAX_BUNDLE_BYTES)
        while True:
            try:
                chunk = next(unpacked, None)
            except FileError as problem:
                if problem.found.startswith("more than"):
                    raise
                raise FileError(self.path, "", f"not a whole .tar.gz: {problem.found}", "a bundle as it was sent", AGAIN) from None
            if chunk is None:
                return
            yield chunk

    def _read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing > 0:
            self._buffer = self._buffer or next(self._chunks, b"")
            if not self._buffer:
                raise self._cut()
            parts.append(self._buffer[:missing])
            self._buffer = self._buffer[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def _cut(self) -> FileError:
        if self._total == 0:
            return _no_bundle(self.path)
        return FileError(self.path, "", f"not a whole {self._kind}: it ends too early", "a bundle as it was sent", AGAIN)

    def members(self) -> Iterator[tuple[str, int | None]]:
        """(name, bytes) of every file, None for the bytes of a folder. What follows the end must be zeros."""
        long_name = None
        while True:
            header = self._header()
            if header is None:
                return self._drain()
            kind = header.type
            if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                text = self._extra(header)
                if kind == tarfile.GNUTYPE_LONGNAME:
                    long_name = self._text(text.rstrip(b"\0"))
                elif kind != tarfile.XGLTYPE:
                    long_name = self._pax_path(text) or long_name
                continue
            name, long_name = (long_name or header.name), None
            if kind == tarfile.DIRTYPE or (kind == tarfile.AREGTYPE and name.endswith("/")):
                yield self._checked(name.rstrip("/") + "/"), None
                continue
            if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise FileError(self.path, name, _KINDS.get(kind, "a member of an unknown kind"), "regular files and folders only")
            if header.size > MAX_FILE_BYTES:
                raise FileError(self.path, name, f"{header.size} bytes", f"at most {MAX_FILE_BYTES} a file")
            self._left, self._size = header.size, header.size
            yield self._checked(name), header.size
            self.content()

    def _header(self) -> tarfile.TarInfo | None:
        block = self._read(_BLOCK)
        first, self._total = self._total == 0, self._total + 1
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.EOFHeaderError:
            return None
        except (tarfile.HeaderError, ValueError):
            if first:
                raise _no_bundle(self.path) from None
            raise FileError(self.path, "", f"not a whole {self._kind}: a broken header", "a bundle as it was sent", AGAIN) from None
        if header.size < 0:
            raise FileError(self.path, header.name, f"a size of {header.size} bytes", "0 or more")
        return header

    def _extra(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _MAX_LONG_NAME:
            raise FileError(self.path, header.name, f"a header of {header.size} bytes", f"at most {_MAX_LONG_NAME}")
        self._left = self._size = header.size
        return self.content()

    def content(self) -> bytes:
        """What is left of the member that was named last, and its padding."""
        data = self._read(self._left)
        self._read(-self._size % _BLOCK if self._left else 0)
        self._left = 0
        return data

    def _pax_path(self, text: bytes) -> str | None:
        """The `path` of an extended header: records of "length key=value\\n"."""
        path = None
        while text:
            length, blank, _ = text.partition(b" ")
            if not blank or not length.isdigit() or not 5 <= int(length[:9]) <= len(text):
                raise FileError(self.path, "", f"not a whole {self._kind}: a broken header", "a bundle as it was sent", AGAIN)
            key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
            if key == b"size" or key.startswith(b"GNU.sparse"):
                raise FileError(self.path, "", f"an extended header with {printable(key.decode('latin-1'))}", "plain files")
            path, text = (self._text(value) if key == b"path" else path), text[int(length) :]
        return path

    def _text(self, name: bytes) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise FileError(self.path, name.decode("latin-1"), "a name that is not UTF-8", "letters of a published file") from None

    def _checked(self, name: str) -> str:
        """Relative, without .. and without a letter that a published name has not; a Mac's leavings may be called as they like."""
        parts = name.removeprefix("./").rstrip("/").split("/")
        wrong = name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or len(name) > 500
        fits = all(re.fullmatch(NAME, part) for part in parts)
        if wrong or not (fits or name in ("./", ".") or is_leaving(name)):
            raise FileError(self.path, name, "a name with other letters, or longer, than published files have", "results/<task>/<fingerprint>/...")
        return name

    def _drain(self) -> None:
        rest = self._buffer.strip(b"\0")
        for chunk in self._chunks:
            rest += chunk.strip(b"\0")[:1]
        if rest:
            raise FileError(self.path, "", "bytes after the end of the archive", "one archive and nothing else", AGAIN)


_KINDS = {tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a FIFO", tarfile.CHRTYPE: "a device",
          tarfile.BLKTYPE: "a device", tarfile.GNUTYPE_SPARSE: "a sparse file", tarfile.GNUTYPE_LONGLINK: "a link"}  # fmt: skip


def _no_bundle(path: Path) -> FileError:
    return FileError(path, "", "a file that is not a bundle", "a .tar or .tar.gz that `suite bundle` wrote", AGAIN)


def _after(first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from chunks
