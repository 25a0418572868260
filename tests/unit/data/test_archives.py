from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from trainer.data import archives
from trainer.data.archives import Member, locate, members
from trainer.data.source import Archive
from trainer.errors import UserError
from trainer.signals import STOP, Stopped

FILES = {"./set/a.png": b"first", "set/read.me": b"no", "set/B.PNG": b"second" * 100}


def tar(path: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("set")
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_members_are_read_from_any_kind_of_archive_without_unpacking_it(tmp_path: Path, mode: str) -> None:
    path = zipped(tmp_path / "set.zip") if mode == "zip" else tar(tmp_path / "set.tar", mode)
    assert list(members(path, (".png",))) == [Member("set/a.png", b"first"), Member("set/B.PNG", b"second" * 100)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evil.png", tarfile.REGTYPE),
        ("set/../../evil.png", tarfile.REGTYPE),
        ("..\\evil.png", tarfile.REGTYPE),
        ("/evil.png", tarfile.REGTYPE),
        ("../evil.sh", tarfile.REGTYPE),
        ("link.png", tarfile.SYMTYPE),
        ("link.png", tarfile.LNKTYPE),
        ("device.png", tarfile.CHRTYPE),
        ("pipe.png", tarfile.FIFOTYPE),
        ("..", tarfile.DIRTYPE),
        ("set/../..", tarfile.DIRTYPE),
        ("/evil", tarfile.DIRTYPE),
        ("link", tarfile.SYMTYPE),
    ],
)
def test_a_tar_member_that_leaves_its_folder_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/hostname"
        archive.addfile(info)
    with pytest.raises(UserError, match=r"set\.tar: member .* (outside|link)"):
        list(members(path, (".png",)))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../evil.png", 0o100644),
        ("set/../../evil.png", 0o100644),
        ("..\\evil.png", 0),
        ("/evil.png", 0),
        ("../evil/", 0o040755),
        ("link.png", 0o120777),
        ("device.png", 0o020644),
    ],
)
def test_a_zip_member_that_leaves_its_folder_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/hostname")
    with pytest.raises(UserError, match=r"set\.zip: member .* (outside|link)"):
        list(members(path, (".png",)))


def test_a_zip_member_without_a_name_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"nameless")
    with pytest.raises(UserError, match=r"set\.zip is damaged"):
        list(members(path, (".png",)))


def test_a_name_that_is_no_unicode_is_made_readable(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("blüte.png"))
    assert [member.name for member in members(path, (".png",))] == ["bl\\udcfcte.png"]


@pytest.mark.parametrize("kind", ["tar", "zip", "header"])
def test_a_bomb_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100_000)
    path, zeros = tmp_path / "bomb", bytes(200_000)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", zeros)
    else:
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("a.png")
            info.pax_headers = {"comment": "0" * 200_000} if kind == "header" else {}
            info.size = 0 if kind == "header" else len(zeros)
            archive.addfile(info, io.BytesIO(zeros))
    with pytest.raises(UserError, match="bomb"):
        list(members(path, (".png",)))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_member_of_negative_size_is_refused_and_not_read_for_ever(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("a.png")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    path = tmp_path / "set.tar"
    path.write_bytes(tarfile.TarInfo("first").tobuf() + bytes(block) + bytes(10240))
    with pytest.raises(UserError, match=r"set\.tar is damaged .* -512 bytes"):
        list(members(path, (".png",)))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_an_archive_cut_anywhere_is_an_error_that_names_it_and_never_a_smaller_set(tmp_path: Path, mode: str) -> None:
    whole = (zipped(tmp_path / "set.zip") if mode == "zip" else tar(tmp_path / "set.tar", mode)).read_bytes()
    content = whole.rstrip(b"\0") if mode == "w" else whole  # a tar's padding may be cut
    for end in range(0, len(content), max(1, len(content) // 80)):
        path = tmp_path / "cut"
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"cut is damaged or incomplete .* delete it or replace it"):
            list(members(path, (".png",)))


def test_a_tar_cut_between_two_members_is_an_error(tmp_path: Path) -> None:
    whole = tar(tmp_path / "set.tar", "w").read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(whole[: 3 * 512])  # the folder, and a.png with its padding
    with pytest.raises(UserError, match="its end is missing"):
        list(members(path, (".png",)))


def test_a_changed_byte_is_noticed_at_the_latest_at_the_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "set.tgz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the checksum
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        list(members(path, (".png",)))


# ---------------------------------------------------------------- finding


def published(tmp_path: Path, content: bytes = b"official") -> str:
    path = tmp_path / "server.tgz"
    path.write_bytes(content)
    return path.as_uri()


def test_an_archive_in_the_folder_is_taken_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "set.tgz").write_bytes(b"mine")
    found = locate([Archive("set.tgz", (published(tmp_path),))], tmp_path / "data", folder)
    assert found == {"set.tgz": folder / "set.tgz"}
    assert not (tmp_path / "data" / "downloads" / "set.tgz").exists()


def test_what_the_folder_lacks_is_downloaded_once(tmp_path: Path) -> None:
    archive = Archive("set.tgz", ((tmp_path / "gone").as_uri(), published(tmp_path)))
    path = locate([archive], tmp_path, None)["set.tgz"]
    assert (path, path.read_bytes()) == (tmp_path / "downloads" / "set.tgz", b"official")
    published(tmp_path, b"another")
    assert locate([archive], tmp_path, None)["set.tgz"].read_bytes() == b"official"


def test_a_download_with_another_checksum_is_not_kept(tmp_path: Path) -> None:
    archive = Archive("set.tgz", (published(tmp_path, b"a web page"),), hashlib.sha256(b"official").hexdigest())
    with pytest.raises(UserError, match="not the official archive"):
        locate([archive], tmp_path, None)
    assert not list((tmp_path / "downloads").glob("set.tgz*"))


def test_a_file_with_another_checksum_in_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.tgz").write_bytes(b"another")
    with pytest.raises(UserError, match=r"set\.tgz is not the official archive.*delete or replace it"):
        locate([Archive("set.tgz", (), hashlib.sha256(b"official").hexdigest())], tmp_path / "data", tmp_path)


def test_one_error_names_every_missing_archive_where_to_put_it_and_what_was_tried(tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    wanted = [Archive(name, ((tmp_path / "gone" / name).as_uri(),)) for name in ("a.tgz", "b.tgz")]
    with pytest.raises(UserError) as raised:
        locate(wanted, tmp_path / "data", folder)
    for expected in ("a.tgz", "b.tgz", str(folder), *wanted[0].urls, *wanted[1].urls, "No such file"):
        assert expected in str(raised.value)


@pytest.mark.parametrize("silent", ["before it answers", "in the middle"])
def test_a_stop_is_not_held_up_by_a_server_that_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    over = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if silent == "in the middle":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"half")
                self.wfile.flush()
                while not (tmp_path / "downloads" / "set.tgz.part").exists():
                    time.sleep(0.01)
                time.sleep(0.2)  # the client opens its file and waits for the rest
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(60)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(STOP, "signal_name", None)
    before = signal.signal(signal.SIGTERM, STOP._handle)
    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(archives, "TIMEOUT_S", 3600)
    with pytest.raises(Stopped), STOP.at_once():
        locate([Archive("set.tgz", (f"http://127.0.0.1:{server.server_port}/set.tgz",))], tmp_path, None)
    signal.signal(signal.SIGTERM, before)
    over.set()
    server.server_close()
    assert not (tmp_path / "downloads" / "set.tgz").exists()


def test_a_stop_is_noticed_between_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tar(tmp_path / "set.tgz"), zipped(tmp_path / "set.zip")):
        monkeypatch.setattr(STOP, "signal_name", None)
        found = members(path, (".png",))
        next(found)
        STOP.signal_name = "SIGTERM"
        with pytest.raises(Stopped):
            next(found)


def test_of_two_downloads_of_an_archive_one_waits_and_logs_it(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    lock = FileLock(tmp_path / "downloads" / ".set.tgz.lock")
    lock.acquire()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            (tmp_path / "downloads" / "set.tgz").write_bytes(b"official")
            lock.release()

    assert (
        locate([Archive("set.tgz", (published(tmp_path),))], tmp_path, None, say)["set.tgz"].read_bytes() == b"official"
    )
    assert said == ["waiting for another process to download set.tgz"]


def test_a_connection_that_breaks_leaves_no_archive(tmp_path: Path) -> None:
    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(UserError, match="after 4 of 100 bytes"):
        locate([Archive("set.tgz", (f"http://127.0.0.1:{server.server_port}/set.tgz",))], tmp_path, None)
    server.server_close()
    assert not list((tmp_path / "downloads").glob("set.tgz*"))


def test_a_generated_set_needs_no_archives_folder(tmp_path: Path) -> None:
    assert locate([], tmp_path, tmp_path / "gone") == {}


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone is not a folder"):
        locate([Archive("set.tgz")], tmp_path, tmp_path / "gone")
