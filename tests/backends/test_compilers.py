"""C compilers that misbehave: training goes on by blocks of ATen operations, with one warning that
says why. And how a compiler's command is read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import CC, OUTPUT, VERSION, fell_back, good, run, script

pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler to begin with")

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
def test_a_compiler_that_misbehaves_is_no_compiler(name: str, tmp_path: Path) -> None:
    text, words = COMPILERS[name]
    compiler = script(tmp_path / "cc", VERSION + OUTPUT + text)
    printed = run(
        before=f"compiler.SECONDS = {1 if 'hangs' in name else 60}",
        FUSEDACCUM_CC=compiler,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path),
    )
    assert fell_back(printed, *words), printed
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
    text: str | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "cc"
    script(path, text or "")
    if text is None:
        path.write_bytes(b"\x00\x01\x02 no program")
    environment = {"FUSEDACCUM_CC": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = run(before="compiler.SECONDS = 1", **environment)
    assert fell_back(printed, *words), printed


def test_a_compiler_that_says_nothing_sound_of_itself_is_used(tmp_path: Path) -> None:
    text = f"[ $1 = --version ] && printf '\\377\\376' && exit 1\nexec {CC} \"$@\""
    compiler = script(tmp_path / "cc", text)
    assert good(run(FUSEDACCUM_CC=compiler, XDG_CACHE_HOME=str(tmp_path)))


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
    command: str, words: tuple[str, ...] | None, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    script(tmp_path / "a b" / "cc", f'exec {CC} "$@"')
    wanted = command.format(folder=tmp_path, cc=CC)
    printed = run(FUSEDACCUM_CC=wanted, XDG_CACHE_HOME=str(tmp_path / "cache"))
    if words is None:
        assert good(printed), printed
    else:
        assert fell_back(printed, *words), printed
