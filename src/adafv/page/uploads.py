"""The folder of uploads, and reading from it.

A browser that has uploaded a picture names it by its path on the server, so anybody may send any path. What is read is a
regular file inside the folder, reached without following a link, and nothing else. Every refusal reads the same, so
that nobody can find out which files there are.
"""

import os
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

from adafv.errors import ImageError

MEGABYTE = 2**20
MAX_BYTES = 10 * MEGABYTE
"""Of an uploaded picture."""
MAX_ARCHIVE = 64 * MEGABYTE
"""Of an uploaded file of any kind: a zip of pictures is the largest."""
MAX_FOLDER = 1024 * MEGABYTE
MAX_FILES = 10_000
"""Bytes and files of all uploads together."""
KEPT_SECONDS = 3600
"""After which an upload is deleted."""
# None of the two exists on Windows, which has neither FIFOs nor device files among its paths.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


class Uploads:
    """One folder; any number of threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def open(self, path: Any, what: str = "picture") -> BinaryIO:
        """The file at `path`, whatever that is. Never waits: a FIFO or a device is refused without being read.

        Args:
            what: it should be, for the message.

        Raises:
            ImageError: it is no regular file of this folder.
        """
        return open(self._opened(path, what), "rb")

    def read(self, path: Any) -> bytes:
        """The bytes of the picture at `path`.

        Raises:
            ImageError: it is no regular file of this folder, or too large.
        """
        with self.open(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ImageError(
                f"the picture is larger than {MAX_BYTES // MEGABYTE} MB; scale it down, or save it as JPEG or WebP"
            )
        return data

    def holds(self, path: Any) -> bool:
        """Whether `path` is a regular file of this folder."""
        try:
            os.close(self._opened(path))
        except ImageError:
            return False
        return True

    def has_room(self) -> bool:
        """Whether another file may come. Deletes what broken-off uploads have left behind, which Gradio forgets."""
        size = count = 0
        for parent, _, names in os.walk(self._folder):
            for name in names:
                try:
                    status = os.lstat(os.path.join(parent, name))
                    if parent == str(self._folder) and time.time() - status.st_ctime > KEPT_SECONDS:
                        os.unlink(os.path.join(parent, name))
                        continue
                except OSError:  # deleted in between
                    continue
                size, count = size + status.st_size, count + 1
        return size + MAX_ARCHIVE <= MAX_FOLDER and count < MAX_FILES

    def _opened(self, path: Any, what: str = "picture") -> int:
        """A descriptor of the regular file at `path`.

        Raises:
            ImageError: there is none in this folder; the same message whatever the reason.
        """
        try:
            if not isinstance(path, str):
                raise ValueError("not a path")
            *parents, name = self._parts(path)
            if os.open in os.supports_dir_fd:
                return self._descend(parents, name)
            # Windows: no descriptors of folders, and links only for administrators.
            whole = self._folder.joinpath(*parents, name)
            if whole.resolve(strict=True) != self._folder.resolve().joinpath(*parents, name):
                raise ValueError("a link")
            return _regular(os.open(whole, os.O_RDONLY | _NO_LINK | _NO_WAITING))
        except (OSError, ValueError) as error:
            raise ImageError(f"the {what} is no longer there; choose or upload it again") from error

    def _parts(self, path: str) -> list[str]:
        """The names that lead from the folder to `path`, without a look at the disk."""
        start, parts = self._folder.parts, Path(path).parts
        if parts[: len(start)] != start or len(parts) == len(start) or ".." in parts:
            raise ValueError("outside")
        return list(parts[len(start) :])

    def _descend(self, parents: list[str], name: str) -> int:
        """Step by step from the folder: a name swapped for a link in between is not followed either."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for parent in parents:
                deeper = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK, dir_fd=folder)
                os.close(folder)
                folder = deeper
            return _regular(os.open(name, os.O_RDONLY | _NO_LINK | _NO_WAITING, dir_fd=folder))
        finally:
            os.close(folder)


def _regular(descriptor: int) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor
