"""Compiled loops in a hostile world: damaged and planted cache entries, compilers that misbehave,
folders that cannot be used. Whatever it is, training goes on: by compiled loops where they can be
had, else by blocks of ATen operations and one warning that says why.

Every case is a process of its own, with real files and with shell scripts as compilers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedaccum.backends.compiled import store
from tests.forked import Forked

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler to begin with")

# Two updates of bf16 parameters through the public API. What it prints is what each test asserts.
PROGRAM = """
import hashlib, json, os, sys, time, warnings
import torch, fusedaccum
from fusedaccum.backends import compiler, native, store
from fusedaccum.commands.machine import cpu_path

def train():
    params = [torch.nn.Parameter(torch.arange(n) / 7) for n in (3, 70_000)]
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    opt = fusedaccum.FusedAccumOptimizer(
        torch.optim.AdamW(params, lr=0.1), gradient_accumulation_steps=2, max_grad_norm=1.0
    )
    for i in range(4):
        torch.autograd.backward([p.view_as(p) for p in params], [p.detach() + i for p in params])
        opt.step()
        opt.zero_grad()
    digest = hashlib.sha256()
    for p in params:
        digest.update(p.detach().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    digest = train()
said = [str(w.message) for w in caught if "fusedaccum" in str(w.message)]
path = cpu_path(torch.bfloat16)[0]
{after}
print(json.dumps({{"digest": digest, "path": path, "warnings": said}}))
"""


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[Forked]:
    global _forked
    _forked = Forked()
    yield _forked
    _forked.close()


_forked: Forked


def run_all(copies: int, before: str, after: str, **environment: str | None) -> list[Any]:
    """What each copy of the program printed; None takes a variable out of its environment."""
    program = PROGRAM.format(before=textwrap.dedent(before), after=textwrap.dedent(after))
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    results = _forked.run(program, variables, copies)
    for result in results:
        assert result.status == 0, result.output[-3000:]
    return [json.loads(result.output.splitlines()[-1]) for result in results]


def run(before: str = "", after: str = "", **environment: str | None) -> Any:
    """The same of one."""
    (printed,) = run_all(1, before, after, **environment)
    return printed


@pytest.fixture(scope="module")
def right() -> str:
    """The parameters that the updates lead to, from blocks of ATen operations."""
    printed = run(FUSEDACCUM_CC="0")
    assert printed["path"] == "ATen blocks" and printed["warnings"] == []
    return str(printed["digest"])


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return str(path)


# In a shell script: the name behind -o.
OUTPUT = 'for a; do [ "$before" = -o ] && out=$a; before=$a; done\n'
COUNT = f'[ "$1" = --version ] || echo x >> "$0.count"\nexec {CC} "$@"\n'


def compiles(compiler: str) -> int:
    """How often a compiler that has `COUNT` as its text compiled."""
    count = Path(f"{compiler}.count")
    return len(count.read_text().split()) if count.exists() else 0


def good(printed: dict[str, Any], right: str) -> bool:
    return printed == {"digest": right, "path": "compiled C loops", "warnings": []}


def fell_back(printed: dict[str, Any], right: str, *words: str) -> bool:
    """By blocks, the right result, and one warning that has all of these words."""
    (warning,) = printed["warnings"]
    is_right = printed["digest"] == right and printed["path"] == "ATen blocks"
    return is_right and all(word in warning for word in (*words, "falls back to blocks"))


VERSION = '[ "$1" = --version ] && exec echo fake 1\n'
COMPILERS = {
    "fails": ("echo no licence >&2; exit 3", ("failed", "no licence")),
    "fails without a word": ("exit 3", ("exit status 3",)),
    "writes nothing": ("exit 0", ("made no library",)),
    "writes an empty file": (': > "$out"', ("0 bytes",)),
    "writes text": ('echo hello > "$out"', ("6 bytes",)),
    "writes half": (f'{CC} "$@"; truncate -s 9000 "$out"', ("9000 bytes",)),
    "writes another library": (
        f'echo "int x;" > "$out.c"; {CC} -shared -fPIC -o "$out" "$out.c"',
        ("without the loops",),
    ),
    "prints Latin-1": ("printf 'fa\\374l\\377' >&2; exit 1", ("failed: fa\ufffdl\ufffd",)),
    "hangs": ("sleep 1000", ("did not end within 1 seconds",)),
    "hangs in a child": ("sleep 1000 & sleep 1000 & wait", ("did not end within 1 seconds",)),
    "waits for its input": ("cat; exit 1", ("exit status 1",)),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiler_that_misbehaves_is_no_compiler(name: str, tmp_path: Path, right: str) -> None:
    text, words = COMPILERS[name]
    compiler = script(tmp_path / "cc", VERSION + OUTPUT + text)
    printed = run(
        before=f"compiler.SECONDS = {1 if 'hangs' in name else 60}",
        FUSEDACCUM_CC=compiler,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path),
    )
    assert fell_back(printed, right, *words), printed
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("fusedaccum-")] == []
    assert not list(tmp_path.glob("cache/*/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ $1 = --version ] && exec sleep 1000", ("did not end within 1 seconds",)),
        (None, ("Exec format error",)),
    ],
    ids=["hangs when asked for its version", "cannot be run"],
)
def test_a_compiler_that_does_not_start(
    text: str | None, words: tuple[str, ...], tmp_path: Path, right: str
) -> None:
    path = tmp_path / "cc"
    script(path, text or "")
    if text is None:
        path.write_bytes(b"\x00\x01\x02 no program")
    environment = {"FUSEDACCUM_CC": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = run(before="compiler.SECONDS = 1", **environment)
    assert fell_back(printed, right, *words), printed


def test_a_compiler_that_says_nothing_sound_of_itself_is_used(tmp_path: Path, right: str) -> None:
    text = f"[ $1 = --version ] && printf '\\377\\376' && exit 1\nexec {CC} \"$@\""
    compiler = script(tmp_path / "cc", text)
    assert good(run(FUSEDACCUM_CC=compiler, XDG_CACHE_HOME=str(tmp_path)), right)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("{folder}/a b/cc", None),
        ("env {cc}", None),
        ("'{folder}/a b/cc' -O1", None),
        ("  {cc} ", None),
        ("{folder}/a b/cc -O1", ("names no program", "quotation marks")),
        ("'{folder}/a b/cc", ("names no program",)),
        ("{folder}", ("names no program",)),
        ("no-such-compiler -O1", ("FUSEDACCUM_CC='no-such-compiler -O1' names no program",)),
    ],
)
def test_the_command_of_a_compiler(
    command: str, words: tuple[str, ...] | None, tmp_path: Path, right: str
) -> None:
    (tmp_path / "a b").mkdir()
    script(tmp_path / "a b" / "cc", f'exec {CC} "$@"')
    wanted = command.format(folder=tmp_path, cc=CC)
    printed = run(FUSEDACCUM_CC=wanted, XDG_CACHE_HOME=str(tmp_path / "cache"))
    if words is None:
        assert good(printed, right), printed
    else:
        assert fell_back(printed, right, *words), printed


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
def test_a_damaged_entry_is_built_once_more(name: str, tmp_path: Path, right: str) -> None:
    compiler = script(tmp_path / "cc", COUNT)
    environment = {"FUSEDACCUM_CC": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert good(run(**environment), right)
    folder = tmp_path / "cache" / "fusedaccum"
    entries, built = sorted(folder.iterdir()), compiles(compiler)
    assert built == len(entries) == 2  # the accumulation's and the step's
    for entry in entries:
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
        DAMAGES[name](entry)
    assert good(run(**environment), right)
    assert compiles(compiler) == 2 * built
    if name != "a folder":  # which stays, and costs a compile in each process
        assert good(run(**environment), right)
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
def test_a_planted_library_never_runs(planted: str, tmp_path: Path, right: str) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "FUSEDACCUM_CC": None}
    assert good(run(**environment), right)
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
        assert good(printed, right) and mark.exists()
        return
    assert not mark.exists()
    assert printed["digest"] == right and printed["path"] == "compiled C loops"
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


def test_the_folder_is_closed_to_others(tmp_path: Path, right: str) -> None:
    """One that an older version left open as well."""
    folder = tmp_path / "fusedaccum"
    folder.mkdir()
    folder.chmod(0o777)
    assert good(run(XDG_CACHE_HOME=str(tmp_path)), right)
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


def test_folders_mounted_noexec(tmp_path: Path, right: str) -> None:
    """As the loader answers there. One of the two places is enough."""
    cache, temporary = str(tmp_path / "cache"), str(tmp_path / "tmp")
    Path(temporary).mkdir()
    environment = {"XDG_CACHE_HOME": cache, "TMPDIR": temporary}
    for folders in ([cache], [temporary]):
        assert good(run(NO_EXEC.format(folders=folders), **environment), right)
    printed = run(NO_EXEC.format(folders=[cache, temporary]), **environment)
    assert fell_back(printed, right, "cannot be loaded", "failed to map"), printed
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


def test_folders_that_cannot_be_used(tmp_path: Path, right: str) -> None:
    (tmp_path / "file").touch()
    blocked, cache = str(tmp_path / "file" / "x"), str(tmp_path / "cache")
    no_tmp = NO_TMP.format(folder=blocked)
    assert good(run(NO_HOME, XDG_CACHE_HOME=None, HOME=None), right)
    assert good(run(HOME=str(tmp_path / "file"), XDG_CACHE_HOME=None), right)
    assert good(run(XDG_CACHE_HOME=blocked), right)
    assert good(run(no_tmp, XDG_CACHE_HOME=cache), right)
    printed = run(no_tmp, XDG_CACHE_HOME=blocked)
    assert fell_back(printed, right, "Not a directory"), printed


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert store.folder() == tmp_path / ".cache" / "fusedaccum"
    monkeypatch.setenv("HOME", "here")
    assert store.folder() is None and "no home directory" in str(store.why_not())


def test_an_entry_that_is_cut_while_it_is_in_use(tmp_path: Path, right: str) -> None:
    """Nothing that this process runs is mapped from the cache."""
    cut = """
    for entry in store.folder().iterdir():
        os.truncate(entry, 0)
    assert train() == digest
    """
    assert good(run(after=cut, XDG_CACHE_HOME=str(tmp_path)), right)


def test_processes_that_build_at_the_same_time(tmp_path: Path, right: str) -> None:
    compiler = script(tmp_path / "cc", COUNT.replace("exec", "sleep 1; exec"))
    environment = {"FUSEDACCUM_CC": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for printed in run_all(3, "", "", **environment):
        assert good(printed, right)
    assert compiles(compiler) > 2  # more than one process built
    assert len(list((tmp_path / "cache" / "fusedaccum").iterdir())) == 2
    built = compiles(compiler)
    assert good(run(**environment), right)
    assert compiles(compiler) == built


def test_threads_that_need_a_loop_at_the_same_time(tmp_path: Path, right: str) -> None:
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
    assert good(run(threads, FUSEDACCUM_CC=compiler, XDG_CACHE_HOME=cache), right)
    assert compiles(compiler) == 2
    failing = script(tmp_path / "failing", VERSION + "sleep 1; exit 3")
    printed = run(threads, FUSEDACCUM_CC=failing, XDG_CACHE_HOME=cache)
    assert fell_back(printed, right, "exit status 3"), printed


def test_forked_processes(tmp_path: Path, right: str) -> None:
    """After loops ran on several threads, and while another thread waits for the compiler."""
    forks = """
    import signal, threading
    os.register_at_fork(after_in_child=lambda: setattr(native, "_is_forked", True))
    acc, grad = torch.zeros(1 << 18), torch.ones(1 << 18).bfloat16()
    def forked():
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            fusedaccum.functional.accumulate_([acc], [grad], 0.5)
            os._exit(0 if bool((acc.numpy() == 0.5).all()) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    """
    torch_alone = "torch.set_num_threads(1)\n"  # torch's own operations may hang in a fork
    used = """
    torch.set_num_threads(4)
    big, ones = torch.zeros(1 << 18), torch.ones(1 << 18)
    fusedaccum.functional.accumulate_([big], [ones])
    assert native._openmp() is not None
    """
    compiler = script(tmp_path / "cc", COUNT.replace("exec", "sleep 2; exec"))
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
    assert good(run(before, after, **environment), right)
