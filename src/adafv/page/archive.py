"""Unpacking a zip of pictures that a stranger sent.

Nothing in it is taken on trust. Its list of contents is bounded before it is read, sizes are those that come out and not
those that are claimed, and names that lead elsewhere, links, devices, encrypted members, archives inside and names that are
there twice end it. What is no picture by its name (a list of questions, a system's own files) is left in the zip.
"""

import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adafv.errors import AdaFVError
from adafv.page.uploads import MAX_ARCHIVE, MAX_BYTES, MEGABYTE
from adafv.printable import shortened

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
"""How the name of a picture ends."""
MAX_MEMBERS = 2_000
"""Of a zip, folders included."""
MAX_UNPACKED = 256 * MEGABYTE
"""Bytes of all pictures of a zip together."""
_MAX_CONTENTS = 2**20
"""Bytes of a zip's list of contents, which is read whole; 500 a member."""
_MAX_NAME, _MAX_DEPTH = 200, 8
"""Bytes of a member's name, and folders in it."""
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".jar")
_ARCHIVE_STARTS = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"Rar!",
    b"(\xb5/\xfd",
)
_END = struct.Struct("<4s4H2LH")
"""The last record of a zip: signature, 4 counts, size and place of the list of contents, length of a comment."""
_ZIP64 = b"PK\x06\x07"
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_CHUNK = 2**16


class ArchiveError(AdaFVError):
    """The zip is not unpacked."""


def unpack(file: BinaryIO, folder: Path) -> int:
    """Write the pictures of a zip into an empty folder.

    Returns:
        How many there are.

    Raises:
        ArchiveError: it is no zip, or one that is refused; some pictures may be written by then.
    """
    _check_end(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = _checked(archive.infolist())
            left = MAX_UNPACKED
            for member in members:
                left -= _written(archive, member, folder, left)
            return len(members)
    except ArchiveError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ArchiveError(f"the zip is damaged ({reason}); make it again") from error


def _check_end(file: BinaryIO) -> None:
    """Look at the last record before anything is read that it points to: a list of contents could fill the memory."""
    length = file.seek(0, os.SEEK_END)
    if length > MAX_ARCHIVE:
        raise ArchiveError(f"the zip is larger than {MAX_ARCHIVE // MEGABYTE} MB; scale the pictures down")
    if length < _END.size:
        raise ArchiveError("the file with the pictures is no zip; put the pictures into one")
    file.seek(max(0, length - _END.size - 20))
    end = file.read(20 + _END.size)
    signature, _, _, _, count, size, place, comment = _END.unpack(end[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        raise ArchiveError("the file with the pictures is no zip, or has something behind its end; make a zip of them")
    if end[:4] == _ZIP64 or 0xFFFF in (count,) or 0xFFFFFFFF in (size, place):
        raise ArchiveError("the zip is of the kind for more than 4 GB or 65,535 files (zip64); make a smaller one")
    if count > MAX_MEMBERS or size > _MAX_CONTENTS:
        raise ArchiveError(f"the zip has more than {MAX_MEMBERS:,} members; leave some out")
    file.seek(0)


def _checked(members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The pictures among them.

    Raises:
        ArchiveError: a member is refused, or there are too many, or no picture.
    """
    if len(members) > MAX_MEMBERS:
        raise ArchiveError(f"the zip has more than {MAX_MEMBERS:,} members; leave some out")
    names: set[str] = set()
    chosen = []
    for member in members:
        name = _checked_name(member)
        shown = shortened(name)
        # As a disk might that knows no upper case.
        same = unicodedata.normalize("NFC", name.rstrip("/")).casefold()
        if same in names:
            raise ArchiveError(f"the zip has the name {shown} twice; give every picture its own")
        names.add(same)
        mode = member.external_attr >> 16
        if stat.S_ISLNK(mode):
            raise ArchiveError(f"the zip has the link {shown}; put the picture itself there")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f"the zip has {shown}, which is no file; leave it out")
        if member.flag_bits & _ENCRYPTED:
            raise ArchiveError(f"{shown} of the zip is encrypted; make a zip without a password")
        if name.lower().endswith(_ARCHIVES):
            raise ArchiveError(f"the zip has the archive {shown}; unpack it, and put its pictures there")
        if member.is_dir() or not name.lower().endswith(KINDS) or _of_a_system(name):
            continue
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(
                f"{shown} of the zip is packed in an unusual way; make a zip with the usual one (deflate)"
            )
        if member.file_size > MAX_BYTES:
            raise ArchiveError(f"{shown} of the zip is larger than {MAX_BYTES // MEGABYTE} MB; scale it down")
        chosen.append(member)
    if sum(member.file_size for member in chosen) > MAX_UNPACKED:
        raise _too_large()
    if not chosen:
        raise ArchiveError(f"the zip has no picture ({', '.join(KINDS)}); put some into it")
    return chosen


def _checked_name(member: zipfile.ZipInfo) -> str:
    """The name of a member, which leads to a place inside.

    Raises:
        ArchiveError: it may lead elsewhere, or no disk would take it.
    """
    name = member.orig_filename
    parts = PurePosixPath(name).parts
    wrong = (
        not parts
        or name.startswith("/")
        or ".." in parts
        or any(letter in name for letter in '\\:*?"<>|')
        or any(ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in name)
        or any(part.endswith((" ", ".")) for part in parts)
    )
    if wrong:
        raise ArchiveError(
            f"the zip has the name {shortened(name)}, which may lead out of it or is none on some disks; rename it"
        )
    if len(name.encode()) > _MAX_NAME or len(parts) > _MAX_DEPTH:
        raise ArchiveError(f"the zip has the long name {shortened(name)}; shorten it")
    return name


def _of_a_system(name: str) -> bool:
    """Whether it is what a Mac puts beside a picture."""
    parts = PurePosixPath(name).parts
    return parts[0] == "__MACOSX" or parts[-1].startswith("._")


def _written(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, most: int) -> int:
    """Write a picture down; its size in bytes."""
    path = folder / member.orig_filename
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    # Never over what is there, and never through a link.
    made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with archive.open(member) as source, open(made, "wb") as target:
        while piece := source.read(_CHUNK):
            if not size and piece.startswith(_ARCHIVE_STARTS):
                raise ArchiveError(f"{shortened(member.orig_filename)} of the zip is an archive; unpack it first")
            size += len(piece)
            if size > MAX_BYTES or size > most:
                raise _too_large()
            target.write(piece)
    return size


def _too_large() -> ArchiveError:
    return ArchiveError(
        f"the pictures of the zip have more than {MAX_UNPACKED // MEGABYTE} MB unpacked; leave some out, or scale them down"
    )
