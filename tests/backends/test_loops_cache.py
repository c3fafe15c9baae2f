"""The cache of compiled loops in a hostile world: damaged and planted entries, folders that cannot
be used, processes and threads that build at the same time. Whatever it is, training goes on: by
compiled loops where they can be had, else by blocks of ATen operations and one warning.

Every case is a process of its own, with real files and with shell scripts as compilers.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusedaccum.backends.compiled import store
from tests.hostile import CC, COUNT, VERSION, compiles, fell_back, good, right, run, run_all, script

pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler to begin with")


def _replace(entry: Path, make: Callable[[Path], Any]) -> None:
    entry.unlink()
    make(entry)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda entry: entry.write_bytes(b""),
    "cut": lambda entry: os.truncate(entry, entry.stat().st_size // 2),
    "one bit": lambda entry: entry.write_bytes(
        (content := entry.read_bytes())[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    ),
    "text": lambda entry: entry.write_text("hello"),
    "no library": lambda entry: write_entry(entry, b"no library"),
    "a folder": lambda entry: _replace(entry, Path.mkdir),
    "a FIFO": lambda entry: _replace(entry, os.mkfifo),
    "a link": lambda entry: _replace(entry, lambda path: path.symlink_to("/etc/passwd")),
    "a broken link": lambda entry: _replace(entry, lambda path: path.symlink_to("/no/such")),
    "writable by all": lambda entry: entry.chmod(0o666),
}


def write_entry(entry: Path, code: bytes) -> None:
    """An entry as `store.write` makes it, for any code."""
    entry.write_bytes(store.MAGIC + hashlib.sha256(code).digest() + code)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_built_once_more(name: str, tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", COUNT)
    environment = {"FUSEDACCUM_CC": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert good(run(**environment))
    folder = tmp_path / "cache" / "fusedaccum"
    entries, built = sorted(folder.iterdir()), compiles(compiler)
    assert built == len(entries) == 2  # the accumulation's and the step's
    for entry in entries:
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
        DAMAGES[name](entry)
    assert good(run(**environment))
    assert compiles(compiler) == 2 * built
    if name != "a folder":  # which stays, and costs a compile in each process
        assert good(run(**environment))
        assert compiles(compiler) == 2 * built
    assert sorted(folder.iterdir()) == entries


def _plant(tmp_path: Path, entries: list[Path]) -> Path:
    """Give each entry a library whose constructor leaves a mark, and return the mark."""
    mark = tmp_path / "mark"
    source = tmp_path / "planted.c"
    source.write_text(
        "#include <fcntl.h>\n__attribute__((constructor)) static void f(void) "
        f'{{ open("{mark}", O_CREAT | O_WRONLY, 0600); }}\n'
    )
    assert CC is not None
    subprocess.run([CC, "-shared", "-fPIC", source, "-o", tmp_path / "planted.so"], check=True)
    for entry in entries:
        write_entry(entry, (tmp_path / "planted.so").read_bytes())
    return mark


@pytest.mark.parametrize("planted", ["by this user", "file writable by others", "other's folder"])
def test_a_planted_library_never_runs(planted: str, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "FUSEDACCUM_CC": None}
    assert good(run(**environment))
    folder = tmp_path / "cache" / "fusedaccum"
    mark = _plant(tmp_path, sorted(folder.iterdir()))
    before = ""
    if planted == "file writable by others":
        for entry in folder.iterdir():
            entry.chmod(0o620)
    if planted == "other's folder":
        before = "user = os.geteuid(); os.geteuid = lambda: user + 1"
    printed = run(before, **environment)
    if planted == "by this user":  # the control: who can write this user's files can do anything
        assert good(printed) and mark.exists()
        return
    assert not mark.exists()
    assert printed["digest"] == right() and printed["path"] == "compiled C loops"
    if planted == "other's folder":
        (warning,) = printed["warnings"]
        assert f"{folder} belongs to user" in warning and "is not used" in warning
    else:
        assert printed["warnings"] == []


def test_who_may_have_written_a_file(tmp_path: Path) -> None:
    status = list(tmp_path.stat())
    for mode, uid, words in (
        (0o100600, os.geteuid(), None),
        (0o100644, os.geteuid(), None),
        (0o100620, os.geteuid(), "written by others (mode 620)"),
        (0o100602, os.geteuid(), "written by others (mode 602)"),
        (0o100600, os.geteuid() + 1, f"belongs to user {os.geteuid() + 1}"),
    ):
        status[0], status[4] = mode, uid
        fault = store.fault(os.stat_result(status))
        assert fault is None if words is None else words in str(fault)


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    """One that an older version left open as well."""
    folder = tmp_path / "fusedaccum"
    folder.mkdir()
    folder.chmod(0o777)
    assert good(run(XDG_CACHE_HOME=str(tmp_path)))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 2


NO_EXEC = """
import ctypes
real = ctypes.CDLL
def refuse(path, *args, **kwargs):
    if any(str(path).startswith(folder) for folder in {folders!r}):
        raise OSError(f"{{path}}: failed to map segment from shared object")
    return real(path, *args, **kwargs)
ctypes.CDLL = refuse
"""


def test_folders_mounted_noexec(tmp_path: Path) -> None:
    """As the loader answers there. One of the two places is enough."""
    cache, temporary = str(tmp_path / "cache"), str(tmp_path / "tmp")
    Path(temporary).mkdir()
    environment = {"XDG_CACHE_HOME": cache, "TMPDIR": temporary}
    for folders in ([cache], [temporary]):
        assert good(run(NO_EXEC.format(folders=folders), **environment))
    printed = run(NO_EXEC.format(folders=[cache, temporary]), **environment)
    assert fell_back(printed, "cannot be loaded", "failed to map"), printed
    assert not list(Path(temporary).iterdir())


NO_HOME = """
from pathlib import Path
def no_home():
    raise RuntimeError("Could not determine home directory.")
Path.home = no_home
"""
NO_TMP = """
import tempfile
tempfile.tempdir = {folder!r}
"""


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked, cache = str(tmp_path / "file" / "x"), str(tmp_path / "cache")
    no_tmp = NO_TMP.format(folder=blocked)
    assert good(run(NO_HOME, XDG_CACHE_HOME=None, HOME=None))
    assert good(run(HOME=str(tmp_path / "file"), XDG_CACHE_HOME=None))
    assert good(run(XDG_CACHE_HOME=blocked))
    assert good(run(no_tmp, XDG_CACHE_HOME=cache))
    printed = run(no_tmp, XDG_CACHE_HOME=blocked)
    assert fell_back(printed, "Not a directory"), printed


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert store.folder() == tmp_path / ".cache" / "fusedaccum"
    monkeypatch.setenv("HOME", "here")
    assert store.folder() is None and "no home directory" in str(store.why_not())


def test_an_entry_that_is_cut_while_it_is_in_use(tmp_path: Path) -> None:
    """Nothing that this process runs is mapped from the cache."""
    cut = """
    for entry in store.folder().iterdir():
        os.truncate(entry, 0)
    assert train() == digest
    """
    assert good(run(after=cut, XDG_CACHE_HOME=str(tmp_path)))


def test_processes_that_build_at_the_same_time(tmp_path: Path) -> None:
    """A compiler that was called once waits until another process has called it too."""
    wait = 'while [ "$(wc -l < "$0.count")" -lt 2 ]; do sleep 0.1; done; exec'
    compiler = script(tmp_path / "cc", VERSION + COUNT.replace("exec", wait))
    environment = {"FUSEDACCUM_CC": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for printed in run_all(3, "", "", **environment):
        assert good(printed)
    assert compiles(compiler) > 2  # more than one process built
    assert len(list((tmp_path / "cache" / "fusedaccum").iterdir())) == 2
    built = compiles(compiler)
    assert good(run(**environment))
    assert compiles(compiler) == built


def test_threads_that_need_a_loop_at_the_same_time(tmp_path: Path) -> None:
    """One compile for each loop, and one warning where it fails."""
    threads = """
    from concurrent.futures import ThreadPoolExecutor
    one = train
    def train():
        with ThreadPoolExecutor(4) as pool:
            (digest,) = set(pool.map(lambda _: one(), range(4)))
        return digest
    """
    compiler = script(tmp_path / "cc", COUNT.replace("exec", "sleep 1; exec"))
    cache = str(tmp_path / "cache")
    assert good(run(threads, FUSEDACCUM_CC=compiler, XDG_CACHE_HOME=cache))
    assert compiles(compiler) == 2
    failing = script(tmp_path / "failing", VERSION + "sleep 1; exit 3")
    printed = run(threads, FUSEDACCUM_CC=failing, XDG_CACHE_HOME=cache)
    assert fell_back(printed, "exit status 3"), printed


def test_forked_processes(tmp_path: Path) -> None:
    """After loops ran on several threads, and while another thread waits for the compiler."""
    forks = """
    import signal, threading
    os.register_at_fork(after_in_child=lambda: setattr(openmp, "_is_forked", True))
    acc, grad = torch.zeros(1 << 18), torch.ones(1 << 18).bfloat16()
    def forked():
        child = os.fork()
        if child == 0:
            signal.alarm(600)
            fusedaccum.functional.accumulate_([acc], [grad], 0.5)
            os._exit(0 if bool((acc.numpy() == 0.5).all()) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    """
    torch_alone = "torch.set_num_threads(1)\n"  # torch's own operations may hang in a fork
    used = """
    torch.set_num_threads(4)
    big, ones = torch.zeros(1 << 18), torch.ones(1 << 18)
    fusedaccum.functional.accumulate_([big], [ones])
    assert openmp.runtime() is not None
    """
    compiler = script(tmp_path / "cc", COUNT.replace("exec", "sleep 1; exec"))
    before = textwrap.dedent(forks) + torch_alone
    before += textwrap.dedent(
        """
        thread = threading.Thread(target=train)
        thread.start()
        while not os.path.exists(compiler.find()[0] + ".count"):
            time.sleep(0.01)
        assert forked() == 0
        thread.join()
        """
    )
    after = textwrap.dedent(used) + "assert forked() == 0\n"
    environment = {"FUSEDACCUM_CC": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert good(run(before, after, **environment))
