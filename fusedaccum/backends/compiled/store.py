"""Compiled code kept on disk, in a folder that nobody but this user can write.

Whoever writes machine code that this process loads is this process. So the folder must belong to
this user and is closed to others, and an entry is read only if it belongs to this user and others
cannot write it. An entry starts with a digest of its code: one that a full disk, a crash or a
stray write left incomplete is no entry. No entry is loaded from where it lies: `libraries.py`
loads a private copy of the bytes that were checked here.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAGIC = b"fusedaccum code 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Untrusted(OSError):
    """The folder or an entry may have been written by another user."""


def folder() -> Path | None:
    """Where code is kept, or None where the environment names no home directory."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG specification ignores a relative path
        try:
            root = str(Path.home() / ".cache")
        except RuntimeError:  # neither HOME nor an entry in the password file
            return None
    return Path(root, "fusedaccum") if os.path.isabs(root) else None


def why_not() -> str | None:
    """Why code cannot be kept, in words for people, or None if it can."""
    where = folder()
    if where is None:
        return "there is no home directory, so compiled code cannot be kept"
    try:
        with _opened(create=True) as descriptor:
            name = f"{os.getpid()}.try"
            os.close(_create(name, descriptor))
            os.unlink(name, dir_fd=descriptor)
    except Untrusted as error:
        return str(error)
    except OSError as error:
        return f"{where} cannot be written ({error.strerror or error})"
    return None


def read(name: str) -> bytes | None:
    """The code of the entry `name`, or None where there is no sound one.

    Raises:
        Untrusted: if somebody else may have written the folder.
    """
    try:
        with _opened(create=False) as descriptor:
            return _checked(_contents(name, descriptor))
    except Untrusted:
        raise
    except OSError:
        return None


def write(name: str, code: bytes) -> None:
    """Keep `code` under `name`. Other processes see all of it or the entry before.

    Raises:
        OSError: if that cannot be done. `Untrusted` is one.
    """
    with _opened(create=True) as descriptor:
        unfinished = f"{name}.{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with open(_create(unfinished, descriptor), "wb") as file:
                file.write(MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(unfinished, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=descriptor)
            raise


def fault(status: os.stat_result) -> str | None:
    """Why a file or folder may be somebody else's work, or None if it is this user's alone."""
    if sys.platform == "win32":
        return "has no owner that can be checked here"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid} and this process runs as user {os.geteuid()}"
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@contextmanager
def _opened(*, create: bool) -> Iterator[int]:
    """A descriptor of the folder. All that follows goes through it, so that another folder that
    is put in its place meanwhile is never read."""
    where = folder()
    if where is None or sys.platform == "win32":
        raise FileNotFoundError("there is no folder for compiled code")
    if create:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
            with suppress(OSError):
                os.fchmod(descriptor, 0o700)
            status = os.fstat(descriptor)
        if reason := fault(status):
            raise Untrusted(f"the cache folder {where} {reason}")
        yield descriptor
    finally:
        os.close(descriptor)


def _create(name: str, directory: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def _contents(name: str, directory: int) -> bytes:
    """The bytes of a plain file of this user's. Without O_NONBLOCK a FIFO would wait."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or fault(status):
        os.close(descriptor)
        raise FileNotFoundError(name)
    with open(descriptor, "rb") as file:
        return file.read()


def _checked(contents: bytes) -> bytes | None:
    """The code of an entry, None where its digest says that this is not what was written."""
    start = len(MAGIC) + _DIGEST_BYTES
    digest, code = contents[len(MAGIC) : start], contents[start:]
    sound = contents.startswith(MAGIC) and hashlib.sha256(code).digest() == digest
    return code if sound else None
