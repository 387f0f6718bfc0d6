"""Downloads the official COCO 2017 archives, resuming broken downloads; checks them and unpacks them atomically."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import logging
import math
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from app.coco.dataset import ANNOTATIONS, OFFICIAL_SIZES, SPLITS
from app.core.config import UserError
from app.core.files import new_folder
from app.core.os_errors import FULL_DISK_ERRNOS, explain_os_errors, free_bytes, only_one
from app.core.progress import track

log = logging.getLogger(__name__)
BLOCK_BYTES = 2**20
TIMEOUT_S = 60.0  # longest silence of the server
RETRY_WAITS_S = (2.0, 5.0, 15.0, 30.0, 60.0, 120.0)  # after requests that have brought no new byte
DISK_REMEDY = "make room and start the same command again, it goes on from there"


@dataclass(frozen=True)
class Archive:
    """One official archive. All its `n_files` lie in `folder`; `n_unpacked_bytes` is their total size, rounded up."""

    url: str
    n_bytes: int
    md5: str
    folder: str
    n_files: int
    n_unpacked_bytes: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


# The small ones come first. Plain http, because this host's certificate is for another name; the MD5 is checked.
ARCHIVES = (
    Archive(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c", ANNOTATIONS, 6, 900_000_000,
    ),
    Archive(
        "http://images.cocodataset.org/zips/val2017.zip",
        815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", SPLITS["val"], OFFICIAL_SIZES[SPLITS["val"]], 850_000_000,
    ),
    Archive(
        "http://images.cocodataset.org/zips/train2017.zip",
        19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", SPLITS["train"], OFFICIAL_SIZES[SPLITS["train"]],
        20_000_000_000,
    ),
)  # fmt: skip


def download_coco(target_dir: Path, keep_archives: bool = False, archives: tuple[Archive, ...] = ARCHIVES) -> None:
    """Fills `target_dir` with the folders of `archives`; a folder that has all its files is left alone.

    A new folder gets its final name when it is complete. Where somebody else has unpacked a part, files that are
    missing or cut off are added. The archive is removed after that.

    Raises:
        UserError: no space, no connection, a wrong or unsafe archive, or another download into the same folder.
    """
    missing = []
    for archive in archives:
        folder = target_dir / archive.folder
        n_there = _count_files(folder)
        if n_there >= archive.n_files:
            log.info("%s is there already", folder)
            continue
        missing.append(archive)
        if n_there:
            log.info("%s has %s of %s files: the others are added", folder, f"{n_there:,}", f"{archive.n_files:,}")
    if not missing:
        return
    check_space(missing, target_dir, keep_archives)
    with only_one(target_dir, "download"), explain_os_errors(target_dir, DISK_REMEDY):
        for archive in missing:
            zip_path = fetch(archive, target_dir)
            unpack(zip_path, target_dir / archive.folder)
            if not keep_archives:
                zip_path.unlink()


def _count_files(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(entry.is_file() for entry in entries)


def check_space(missing: list[Archive], target_dir: Path, keep_archives: bool) -> None:
    """Raises a UserError if the peak of archives and unpacked files together is larger than the free space."""
    used = peak = 0
    for archive in missing:
        path = target_dir / archive.name
        n_downloaded = max(_size(path), _size(_part(path)))
        used += archive.n_bytes + archive.n_unpacked_bytes - n_downloaded
        peak = max(peak, used)
        if not keep_archives:
            used -= archive.n_bytes
    free = free_bytes(target_dir)
    if free < peak:
        names = ", ".join(archive.name for archive in missing)
        raise UserError(
            f"not enough space for {names} in {target_dir}: {peak / 2**30:,.1f} GiB needed to download and unpack, "
            f"{free / 2**30:,.1f} GiB free: make room, or give another folder with --to DIR"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def fetch(archive: Archive, target_dir: Path) -> Path:
    """Downloads and checks an archive; resumes the unfinished download of an earlier start, or of the user."""
    path = target_dir / archive.name
    part_path = _part(path)
    if path.exists():
        path.replace(part_path)
    _receive_all(archive, part_path)
    _check_md5(archive, part_path)
    return part_path.replace(path)


def _receive_all(archive: Archive, part_path: Path) -> None:
    """Sends requests until the file has its full length; gives up after several in a row that bring no new byte."""
    if _size(part_path) > archive.n_bytes:
        part_path.unlink()
    longest, waits_s = _size(part_path), iter(RETRY_WAITS_S)
    while _size(part_path) < archive.n_bytes:
        reason = _receive(archive, part_path)
        if _size(part_path) > longest:
            longest, waits_s = _size(part_path), iter(RETRY_WAITS_S)
        if _size(part_path) < archive.n_bytes:
            wait_s = next(waits_s, None)
            if wait_s is None:
                raise UserError(
                    f"{archive.url} cannot be fetched ({reason}), gave up after {len(RETRY_WAITS_S) + 1} tries: "
                    "check the network and start the same command again, it goes on from there"
                )
            log.info("%s: %s; trying again in %g s", archive.name, reason, wait_s)
            time.sleep(wait_s)


def _receive(archive: Archive, part_path: Path) -> str:
    """Sends one request for the missing bytes and appends them to the file; returns why it ended, for a message."""
    have = _size(part_path)
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(archive.url, headers=headers)  # noqa: S310  the table above has http only
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response, open(part_path, "ab") as file:  # noqa: S310
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server ignores Range and sends the whole file
                file.truncate(0)
                have = 0
            n_blocks = math.ceil((archive.n_bytes - have) / BLOCK_BYTES)
            blocks = itertools.islice(iter(partial(response.read, BLOCK_BYTES), b""), n_blocks)
            for block in track(blocks, archive.name, n_blocks, "MiB"):
                file.write(block)
    except urllib.error.HTTPError as error:
        if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.FORBIDDEN, http.HTTPStatus.GONE):
            raise UserError(
                f"{archive.url}: the server answers {error.code} {error.reason}: check the network and its proxy"
            ) from error
        return f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"no connection ({error.reason})"
    except http.client.HTTPException as error:
        return f"the connection broke ({error!r})"
    except OSError as error:
        if error.filename or error.errno in FULL_DISK_ERRNOS:
            raise
        return f"the connection broke ({error})"
    return "the connection ended early"


def _check_md5(archive: Archive, path: Path) -> None:
    """Deletes the archive and raises a UserError if it is not the official one; the next start downloads it again."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        blocks = iter(partial(file.read, BLOCK_BYTES), b"")
        for block in track(blocks, f"checking {archive.name}", math.ceil(_size(path) / BLOCK_BYTES), "MiB"):
            digest.update(block)
    if digest.hexdigest() != archive.md5:
        path.unlink()
        raise UserError(
            f"{archive.url}: what came is not the official archive (MD5 {digest.hexdigest()}, should be {archive.md5}) "
            "and was deleted: start the same command again to fetch it anew"
        )


def unpack(zip_path: Path, folder: Path) -> None:
    """Unpacks an archive whose members all lie in a folder named like `folder`; an interrupted try is started over.

    Of a folder that holds a part already, files are added, and replaced where they are the beginning of their member.

    Raises:
        UserError: a member is a link or would land outside the folder, the archive is damaged, or the folder holds
            another file under the name of a member.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive, new_folder(folder, alone=True) as part_dir:
            members = archive.infolist()
            for member in members:
                _put_into(folder.name, member, zip_path)
            files = [member for member in members if not member.is_dir() and not _has(folder, archive, member)]
            for member in track(files, f"unpacking {zip_path.name}", len(files), "files"):
                archive.extract(member, part_dir)
            for member in files if folder.is_dir() else []:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(part_dir / member.filename, target)
            os.sync()  # the caller deletes the archive, so its content must be on the disk
    except zipfile.BadZipFile as error:
        raise UserError(f"{zip_path} is damaged ({error}): delete it and start the same command again") from error


def _has(folder: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Whether the folder has a member already; raises a UserError if a file of its name is not the beginning of it."""
    path = folder / member.filename
    n_there = _size(path)
    if path.is_file() and n_there == member.file_size:
        return True
    with archive.open(member) as content:
        is_beginning = not path.exists() or (n_there < member.file_size and content.read(n_there) == path.read_bytes())
    if not is_beginning:
        raise UserError(
            f"{path} is not the file of {archive.filename}, and is kept: move it away, or give another folder with --to"
        )
    return False


def _put_into(folder_name: str, member: zipfile.ZipInfo, zip_path: Path) -> None:
    """Makes the path of `member` relative to the folder; raises a UserError if it leads out of it or is a link."""
    parts = PurePosixPath(member.filename.replace("\\", "/")).parts
    is_inside = parts[:1] == (folder_name,) and ".." not in parts and (member.is_dir() or len(parts) > 1)
    if not is_inside or stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"{zip_path}: member '{member.filename}' is a link or lies outside {folder_name}/, nothing was unpacked: "
            "delete the archive and take the official one"
        )
    if not member.is_dir():
        member.filename = "/".join(parts[1:])
