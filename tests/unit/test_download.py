"""download-coco against a local server: resume, a server without Range, wrong and unsafe archives, no space."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import logging
import shutil
import socket
import stat
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.config import UserError
from app.core.os_errors import only_one
from app.data import download
from app.data.download import ARCHIVES, Archive, download_coco
from tests.support.download_server import Server

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_WAITS_S", (0.01, 0.01))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def serve(server: Server, folder: str, members: dict[str, bytes] | bytes) -> Archive:
    body = members if isinstance(members, bytes) else zip_of(members)
    server.files[f"{folder}.zip"] = body
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        n_files = sum(not member.is_dir() for member in archive.infolist())
    md5 = hashlib.md5(body).hexdigest()  # noqa: S324
    return Archive(server.url(f"{folder}.zip"), len(body), md5, folder, n_files, 10_000)


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".download.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


VAL = {"val2017/": b"", "val2017/1.jpg": b"\xff\xd8one", "val2017/2.jpg": b"two" * 1000}
VAL_FILES = {name: content for name, content in VAL.items() if content}


def test_fresh_download_unpacks_and_removes_the_archives(server: Server, tmp_path: Path) -> None:
    table = (serve(server, "val2017", VAL), serve(server, "annotations", {"annotations/a.json": b"{}"}))
    download_coco(tmp_path / "new" / "coco", archives=table)
    assert tree(tmp_path / "new" / "coco") == VAL_FILES | {"annotations/a.json": b"{}"}
    assert server.ranges == [None, None]


def test_second_run_asks_the_server_for_nothing(server: Server, tmp_path: Path) -> None:
    table = (serve(server, "val2017", VAL),)
    download_coco(tmp_path, archives=table)
    download_coco(tmp_path, archives=table)
    assert server.ranges == [None]


def test_folder_with_all_its_files_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "val2017").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "val2017" / name).write_text("")
    download_coco(tmp_path, archives=(Archive("http://127.0.0.1/val2017.zip", 10, "0" * 32, "val2017", 2, 10),))
    assert caplog.messages == [f"{tmp_path / 'val2017'} is there already"]


def test_kept_archive_is_unpacked_again_without_a_request(server: Server, tmp_path: Path) -> None:
    table = (serve(server, "val2017", VAL),)
    download_coco(tmp_path, keep_archives=True, archives=table)
    assert (tmp_path / "val2017.zip").read_bytes() == server.files["val2017.zip"]
    shutil.rmtree(tmp_path / "val2017")
    download_coco(tmp_path, archives=table)
    assert tree(tmp_path) == VAL_FILES
    assert server.ranges == [None]


def test_empty_folder_counts_as_missing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert tree(tmp_path) == VAL_FILES


@pytest.mark.parametrize("cut", [0, 2, len(VAL["val2017/2.jpg"]) - 1])
def test_half_unpacked_folder_is_completed(server: Server, tmp_path: Path, cut: int) -> None:
    """An interrupted `unzip` has left a file out, and another cut off; a file of the user's is kept."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "2.jpg").write_bytes(VAL["val2017/2.jpg"][:cut])
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert tree(tmp_path) == VAL_FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == [".download.lock", "val2017"]


def test_files_of_somebody_else_are_kept(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "val2017"
    folder.mkdir()
    (folder / "2.jpg").write_bytes(b"mine")
    archive = serve(server, "val2017", VAL)
    with pytest.raises(UserError, match=r"val2017/2\.jpg is not the file of .*val2017\.zip, and is kept: move it away"):
        download_coco(tmp_path, archives=(archive,))
    assert tree(folder) == {"2.jpg": b"mine"}
    (folder / "2.jpg").rename(folder / "mine.png")
    download_coco(tmp_path, archives=(archive,))
    assert tree(tmp_path) == VAL_FILES | {"val2017/mine.png": b"mine"}
    assert server.ranges == [None]


def test_lock_file_that_is_a_link_is_not_followed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / ".download.lock").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"cannot write to .*coco \(Too many levels of symbolic links\)"):
        download_coco(tmp_path / "coco", archives=(serve(server, "val2017", VAL),))
    assert (tmp_path / "other").read_text() == "kept"


def test_cut_connections_are_resumed_where_they_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [100, 50, 7, 1]  # more cuts than tries without progress are allowed
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert server.ranges == [None, "bytes=100-", "bytes=150-", "bytes=157-", "bytes=158-"]
    assert tree(tmp_path) == VAL_FILES


@pytest.mark.parametrize("left", ["val2017.zip.part", "val2017.zip"])
def test_half_archive_of_an_earlier_process_is_resumed(server: Server, tmp_path: Path, left: str) -> None:
    archive = serve(server, "val2017", VAL)
    (tmp_path / left).write_bytes(server.files["val2017.zip"][:321])
    download_coco(tmp_path, archives=(archive,))
    assert server.ranges == ["bytes=321-"]
    assert tree(tmp_path) == VAL_FILES


def test_server_without_range_starts_the_file_over(server: Server, tmp_path: Path) -> None:
    server.knows_range, server.cuts = False, [100]
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert server.ranges == [None, "bytes=100-"]
    assert tree(tmp_path) == VAL_FILES


def test_server_without_range_that_always_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    server.knows_range, server.cuts = False, [100] * 10
    with pytest.raises(UserError, match=r"val2017\.zip cannot be fetched .*ended early.*gave up after 3 tries"):
        download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert len(server.ranges) == 3


def test_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert tree(tmp_path) == VAL_FILES


def test_missing_archive_ends_at_once(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    with pytest.raises(UserError, match=r"val2017\.zip: the server answers 404 Not Found: check the network"):
        download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert len(server.ranges) == 1


def test_silent_server_ends_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_WAITS_S", (0.01,))
    monkeypatch.setattr(download, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/val2017.zip"
        start = time.monotonic()
        with pytest.raises(UserError, match=r"timed out.*gave up after 2 tries"):
            download_coco(tmp_path, archives=(Archive(url, 10, "0" * 32, "val2017", 1, 10),))
    assert time.monotonic() - start < 5  # two tries of 0.1 s; the rest is slack for a busy machine
    with pytest.raises(UserError, match=r"refused.*check the network"):  # the port is closed now
        download_coco(tmp_path, archives=(Archive(url, 10, "0" * 32, "val2017", 1, 10),))


def test_wrong_archive_is_named_and_deleted(server: Server, tmp_path: Path) -> None:
    archive = serve(server, "val2017", VAL)
    right = server.files["val2017.zip"]
    server.files["val2017.zip"] = right[:200] + bytes([right[200] ^ 1]) + right[201:]
    with pytest.raises(UserError, match=r"val2017\.zip: what came is not the official archive \(MD5 .*deleted"):
        download_coco(tmp_path, archives=(archive,))
    assert tree(tmp_path) == {}
    server.files["val2017.zip"] = right
    download_coco(tmp_path, archives=(archive,))
    assert tree(tmp_path) == VAL_FILES


def test_no_more_is_taken_than_the_archive_has(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(download, "BLOCK_BYTES", 64)
    monkeypatch.setattr(download, "_check_md5", lambda archive, path: sizes.append(path.stat().st_size))
    archive = dataclasses.replace(serve(server, "val2017", VAL), n_bytes=128)
    download.fetch(archive, tmp_path)
    assert sizes == [128]


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    ["../outside.jpg", "val2017/../../outside.jpg", "/outside.jpg", "other/1.jpg", "val2017\\..\\..\\outside.jpg",
     link("val2017/link")],
    ids=str,
)  # fmt: skip
def test_unsafe_member_is_refused_before_anything_is_unpacked(
    server: Server, tmp_path: Path, member: str | zipfile.ZipInfo
) -> None:
    buffer = io.BytesIO(zip_of(VAL))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(member, b"/etc")
    target_dir = tmp_path / "a" / "coco"
    with pytest.raises(UserError, match="is a link or lies outside val2017/, nothing was unpacked"):
        download_coco(target_dir, archives=(serve(server, "val2017", buffer.getvalue()),))
    assert list(tree(tmp_path)) == ["a/coco/val2017.zip"]


def test_damaged_archive_leaves_no_folder(server: Server, tmp_path: Path) -> None:
    body = zip_of(VAL).replace(b"twotwotwo", b"twotwoTwo", 1)  # no longer what the member's CRC says
    with pytest.raises(UserError, match=r"val2017\.zip is damaged .*delete it"):
        download_coco(tmp_path, archives=(serve(server, "val2017", body),))
    assert list(tree(tmp_path)) == ["val2017.zip"]


def test_interrupted_unpacking_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".val2017.part" / "val2017").mkdir(parents=True)
    (tmp_path / ".val2017.part" / "val2017" / "old.jpg").write_bytes(b"half")
    download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert tree(tmp_path) == VAL_FILES


def test_space_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 30 * 2**30))
    with pytest.raises(UserError, match=r"not enough space .*38\.3 GiB needed .*30\.0 GiB free: make room, or .*--to"):
        download_coco(tmp_path / "coco")
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_the_disk_already_is_not_counted_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = serve(server, "val2017", VAL)
    (tmp_path / "val2017.zip.part").write_bytes(server.files["val2017.zip"][:1000])
    needed = archive.n_bytes - 1000 + archive.n_unpacked_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(UserError, match="not enough space"):
        download_coco(tmp_path, archives=(archive,))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    download_coco(tmp_path, archives=(archive,))
    assert tree(tmp_path) == VAL_FILES


def test_disk_that_fills_up_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = serve(server, "val2017", VAL)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", fail)
        with pytest.raises(UserError, match=r"no space left in .*make room and start the same command again"):
            download_coco(tmp_path, archives=(archive,))
    assert list(tree(tmp_path)) == ["val2017.zip"]
    with monkeypatch.context() as patch:
        patch.setattr(download, "track", fail)  # stands for the write of a block
        (tmp_path / "val2017.zip").unlink()
        with pytest.raises(UserError, match="no space left in"):
            download_coco(tmp_path, archives=(archive,))


def test_second_download_into_a_folder_is_refused(server: Server, tmp_path: Path) -> None:
    with only_one(tmp_path, "download"), pytest.raises(UserError, match=r"another download into .* is running"):
        download_coco(tmp_path, archives=(serve(server, "val2017", VAL),))
    assert server.ranges == []


def test_target_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/coco .*--to DIR"):
        download_coco(tmp_path / "file" / "coco", archives=(Archive("http://127.0.0.1/a.zip", 1, "", "a", 1, 1),))


def test_table_is_the_official_one() -> None:
    assert [(a.name, a.n_bytes, a.md5, a.n_files) for a in ARCHIVES] == [
        ("annotations_trainval2017.zip", 252907541, "f4bbac642086de4f52a3fdda2de5fa2c", 6),
        ("val2017.zip", 815585330, "442b8da7639aecaf257c1dceb8ba8c80", 5000),
        ("train2017.zip", 19336861798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118287),
    ]
