"""Archives: located in a folder or downloaded, then read member by member without unpacking to disk."""

from __future__ import annotations

import bz2
import gzip
import http.client
import lzma
import os
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from filelock import FileLock, Timeout

from trainer.data.card import sha256
from trainer.data.source import Archive
from trainer.errors import UserError
from trainer.signals import STOP

MAX_MEMBER_BYTES = 256 * 2**20  # far above any image or annotation file; a decompression bomb exceeds it
TIMEOUT_S = 20
POLL_S = 0.2  # a waiting process notices a stop request within this time
CHUNK_BYTES = 2**20


class Member(NamedTuple):
    """A file in an archive: its name and its bytes."""

    name: str
    data: bytes


@contextmanager
def locked(path: Path, waiting: str, log: Callable[[str], None]) -> Iterator[None]:
    """Holds a file lock; logs `waiting` once if another process holds it.

    The operating system releases the lock however its process ends.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(waiting)
        while not lock.is_locked:
            STOP.raise_if_asked()
            with suppress(Timeout):
                lock.acquire(timeout=POLL_S)
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- finding


def locate(
    archives: Sequence[Archive], data_dir: Path, archives_dir: Path | None, log: Callable[[str], None] = print
) -> dict[str, Path]:
    """Finds each archive in `archives_dir`, else in `<data_dir>/downloads`, else downloads it there.

    Raises:
        UserError: archives are missing (one message lists them all, and where to put them), or a checksum is wrong.
    """
    if archives and archives_dir and not archives_dir.is_dir():
        raise UserError(
            f"{archives_dir} is not a folder; set --archives (or TRAINER_ARCHIVES) to the folder with the archives"
        )
    downloads = data_dir / "downloads"
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for archive in archives:
        places = [folder / archive.name for folder in (archives_dir, downloads) if folder]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            path, reasons = _download(archive, downloads, log)
            if path is None:
                missing.append("\n".join([f"  {archive.name}", *(f"    {reason}" for reason in reasons)]))
                continue
        elif archive.sha256 and (digest := sha256(path)) != archive.sha256:
            raise UserError(
                f"{path} is not the official archive: its SHA-256 is {digest}, not {archive.sha256}; delete or "
                "replace it"
            )
        paths[archive.name] = path
    if missing:
        where = (
            str(archives_dir)
            if archives_dir
            else f"the folder given by --archives (or TRAINER_ARCHIVES), or into {downloads}"
        )
        raise UserError(
            "\n".join([f"these archives are missing and could not be downloaded; put them into {where}:", *missing])
        )
    return paths


def _download(archive: Archive, folder: Path, log: Callable[[str], None]) -> tuple[Path | None, list[str]]:
    """Tries each URL; returns the file, or None and the reason why each URL failed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    reasons: list[str] = []
    with locked(folder / f".{archive.name}.lock", f"waiting for another process to download {archive.name}", log):
        if path.is_file():  # another process has downloaded it
            return path, reasons
        for url in archive.urls:
            log(f"downloading {url}")
            try:
                _fetch(url, part, log)
            except (OSError, http.client.HTTPException) as error:
                part.unlink(missing_ok=True)
                reasons.append(f"{url}: {getattr(error, 'reason', None) or error}")
                continue
            if archive.sha256 and sha256(part) != archive.sha256:
                part.unlink()
                reasons.append(f"{url}: the downloaded file is not the official archive (its SHA-256 differs)")
                continue
            part.replace(path)
            return path, reasons
    return None, reasons


def _fetch(url: str, part: Path, log: Callable[[str], None]) -> None:
    """Downloads one file; logs its progress every few seconds."""
    # Some servers reject urllib's default user agent.
    request = urllib.request.Request(url, headers={"User-Agent": "recipe-trainer"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response, part.open("wb") as file:
        expected = int(response.headers.get("Content-Length") or 0)
        logged = time.monotonic()
        while chunk := response.read(CHUNK_BYTES):
            STOP.raise_if_asked()
            file.write(chunk)
            if time.monotonic() - logged > 5:
                logged = time.monotonic()
                total = f" of {expected / 2**20:.0f}" if expected else ""
                log(f"  {file.tell() / 2**20:.0f}{total} MiB")
        if expected and file.tell() != expected:
            raise urllib.error.URLError(f"the connection closed after {file.tell()} of {expected} bytes")
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- reading


def members(path: Path, suffixes: tuple[str, ...]) -> Iterator[Member]:
    """Yields the files whose names end in one of `suffixes` (any case), in the archive's order.

    Nothing is written to disk. Names are relative, with `/`, without a leading `./`.

    Raises:
        Stopped: a stop was requested.
        UserError: the archive is damaged or truncated; a member points outside the archive, is a link or a device, or
            is larger than `MAX_MEMBER_BYTES`.
    """
    with _damage_reported(path):
        if zipfile.is_zipfile(path):
            yield from _zip_members(path, suffixes)
        else:
            yield from _tar_members(path, suffixes)


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    # zipfile raises RuntimeError for encrypted members and unknown compression, LookupError for a member without a
    # name.
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} is damaged or incomplete ({error}); delete it or replace it with the official archive"
        ) from error


def _tar_members(path: Path, suffixes: tuple[str, ...]) -> Iterator[Member]:
    with _decompressed(path) as stream, tarfile.open(fileobj=cast(IO[bytes], _Bounded(stream)), mode="r:") as archive:
        for info in archive:
            STOP.raise_if_asked()
            if info.size < 0:  # tarfile would loop forever (CVE-2025-8194)
                raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes")
            name = _checked(path, info.name, info.isreg() or info.isdir())
            if info.isreg() and name.lower().endswith(suffixes):
                _check_size(path, name, info.size)
                content = archive.extractfile(info)
                assert content is not None, "a regular file has content"
                yield Member(name, content.read())
        # tarfile treats truncation, or garbage after a member, as the end.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
        while stream.read(CHUNK_BYTES):  # a compressed file has its checksum at the end
            STOP.raise_if_asked()


def _zip_members(path: Path, suffixes: tuple[str, ...]) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            STOP.raise_if_asked()
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archive is from a system without file types
            name = _checked(path, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if not info.is_dir() and name.lower().endswith(suffixes):
                _check_size(path, name, info.file_size)
                yield Member(name, archive.read(info))


def _checked(path: Path, name: str, plain: bool) -> str:
    """Normalises the name of a member; `plain`: it is a regular file or a folder."""
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(
            f"{path}: member {name!r} points outside the archive; replace the file with the official archive"
        )
    if not plain:
        raise UserError(f"{path}: member {name!r} is a link or a device; replace the file with the official archive")
    return str(relative).encode("utf-8", "backslashreplace").decode()  # Parquet stores Unicode only


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{path}: member {name!r} has {size / 2**20:.0f} MiB, more than {MAX_MEMBER_BYTES / 2**20:.0f} MiB; "
            "replace the file with the official archive"
        )


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    openers: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    return next(
        (opener(path, "rb") for start, opener in openers.items() if magic.startswith(start)), None
    ) or path.open("rb")


class _Bounded:
    """A stream that refuses huge or negative reads, since tarfile reads header extensions of any size at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.stream.read(size)
