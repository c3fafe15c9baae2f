"""The system's C compiler: found, asked for its version, and run without being trusted to behave.

FUSEDACCUM_CC=0 turns it off; FUSEDACCUM_CC=<command> names one, with arguments if need be
("ccache gcc").
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

VARIABLE = "FUSEDACCUM_CC"
# No FMA contraction: the same bits as the reference. No errno: sqrtf becomes one instruction.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
# A compile takes about 0.2 s. One that takes this long is taken to hang.
SECONDS = 60.0

Command = tuple[str, ...]
# Commands that did not end. Each further loop would wait for them as long again.
hung: set[Command] = set()


class CompilerMissing(RuntimeError):
    """There is no C compiler, or what it makes cannot be used."""


@lru_cache(maxsize=1)
def find() -> Command | None:
    """The C compiler's command, or None where there is none or it is turned off."""
    wanted = os.environ.get(VARIABLE, "").strip()
    if wanted == "0":
        return None
    if not wanted:
        paths = map(shutil.which, ("cc", "gcc", "clang"))
        return next(((path,) for path in paths if path), None)
    if path := shutil.which(wanted):  # the whole is a path, with a space in it maybe
        return (os.path.abspath(path),)
    try:
        program, *arguments = shlex.split(wanted)
    except ValueError:  # a quotation mark without its partner
        return None
    path = shutil.which(program)
    return (os.path.abspath(path), *arguments) if path else None


def require() -> Command:
    """The C compiler's command.

    Raises:
        CompilerMissing: if there is none, saying what was looked for, or if it hung before.
    """
    command = find()
    wanted = os.environ.get(VARIABLE, "").strip()
    if command is None and wanted == "0":
        raise CompilerMissing(f"{VARIABLE}=0")
    if command is None and wanted:
        raise CompilerMissing(
            f"no C compiler was found: {VARIABLE}={wanted!r} names no program that can be run "
            "(a path with spaces needs quotation marks if arguments follow it)"
        )
    if command is None:
        raise CompilerMissing("no C compiler (cc, gcc or clang) was found")
    if command in hung:
        raise _hangs(command)
    return command


def _hangs(command: Command) -> CompilerMissing:
    return CompilerMissing(f"{shlex.join(command)} did not end within {SECONDS:g} seconds")


def version(command: Command, folder: Path) -> str:
    """What a compiler says of itself; nothing where it says nothing. `folder` is for scratch."""
    return _run(command, ("--version",), folder)[1]


def build(command: Command, source: str, folder: Path) -> bytes:
    """The shared library that a compiler makes of a C source, in a scratch folder.

    Raises:
        CompilerMissing: if it fails, hangs, or makes no whole library.
    """
    c_file, so_file = folder / "loops.c", folder / "loops.so"
    c_file.write_text(source, encoding="utf-8")
    arguments = (*FLAGS, str(c_file), "-o", str(so_file), "-lm")
    status, _, messages = _run(command, arguments, folder)
    if status:
        # The scratch folder has another name every time, and a warning is given once.
        said = messages.replace(f"{folder}{os.sep}", "").strip()[-500:]
        raise CompilerMissing(f"{shlex.join(command)} failed: {said or f'exit status {status}'}")
    try:
        code = so_file.read_bytes()
    except FileNotFoundError:
        raise CompilerMissing(f"{shlex.join(command)} made no library, and no error") from None
    if not _is_whole(code):
        raise CompilerMissing(
            f"{shlex.join(command)} made {len(code)} bytes that are no whole library"
        )
    return code


def _run(command: Command, arguments: Command, folder: Path) -> tuple[int, str, str]:
    """Exit status, output and messages of a command.

    They go through files: a program that the compiler leaves behind would keep a pipe open. The
    session is the compiler's own, so that all of its processes can be ended.
    """
    out, messages = folder / "out", folder / "messages"
    with open(out, "wb") as out_file, open(messages, "wb") as messages_file:
        process = subprocess.Popen(
            (*command, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=messages_file,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                hung.add(command)
                raise _hangs(command) from None
            raise
    return status, _text(out), _text(messages)


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_whole(code: bytes) -> bool:
    """Whether all that a loader would map is there: the end of a cut ELF file is a bus error."""
    if sys.platform != "linux":
        return bool(code)
    if len(code) < 64 or code[:4] != b"\x7fELF":
        return False
    if code[4] != 2:  # 32 bits
        return True
    order = "<" if code[5] == 1 else ">"
    (headers,) = struct.unpack_from(f"{order}Q", code, 32)
    size, count = struct.unpack_from(f"{order}HH", code, 54)
    if not count or headers + size * count > len(code):
        return False
    for i in range(count):
        start, *_, length = struct.unpack_from(f"{order}QQQQ", code, headers + i * size + 8)
        if start + length > len(code):
            return False
    return True
