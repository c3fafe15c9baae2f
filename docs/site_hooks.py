"""What makes one text serve GitHub and the site, which mkdocs builds from docs/ alone.

Links on the pages are relative, as GitHub wants them: `../kernels/README.md`, `../examples/ddp.py`.
The site takes those files in: a page or a program becomes a page of the site, anything else is
copied. Then each link is turned to where its target lies there. A link to what does not exist
stays as it is, and `make docs` fails on it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
# Outside docs/ and on the site all the same: where it lies there.
TAKEN_IN = {
    "kernels/README.md": "kernels.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    **{
        f"examples/{path.name}": f"examples/{path.stem}.md"
        for path in sorted((ROOT / "examples").glob("*.py"))
    },
}
CODE = re.compile(r"^(```+)[^`\n]*\n.*?^\1\s*$|(`+)[^`].*?\2", re.M | re.S)
# The reference, which only mkdocstrings can read: GitHub shows no comments.
REFERENCE = re.compile(r"^<!--\n(:::.*?)^-->$", re.M | re.S)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, those inside code left out."""
    return [match[2] for match in LINK.finditer(CODE.sub("", text))]


def target(source: str, link: str) -> str | None:
    """The file of the repository that a link of the page `source` leads to, None for addresses."""
    path = urlsplit(link).path
    if urlsplit(link).scheme or not path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def place(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return TAKEN_IN.get(path) or path.removeprefix("docs/")


def as_page(path: str) -> str:
    """The text of a page that is not in docs/."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".py"):
        return text
    return f"# {path}\n\n````python\n{text}````\n"


def turned(text: str, turn: Callable[[str], str]) -> str:
    """A page's text with `turn` of each link and picture, those inside code left as they are."""

    def turn_all(piece: str) -> str:
        return LINK.sub(lambda match: f"{match[1]}{turn(match[2])}{match[3]}", piece)

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [turn_all(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, turn_all(text[end:])])


def moved(text: str, source: str) -> str:
    """A page's text with its links turned to where their targets lie on the site."""
    here = posixpath.dirname(place(source))

    def turn(link: str) -> str:
        path = target(source, link)
        if path is None or not (ROOT / path).is_file():
            return link
        fragment = urlsplit(link).fragment
        return f"{posixpath.relpath(place(path), here or '.')}{'#' * bool(fragment)}{fragment}"

    return turned(text, turn)


# --- what mkdocs calls ---


def on_files(files: Any, config: Any) -> Any:
    """Take in what lies outside docs/: the pages, and whatever a page links to."""
    from mkdocs.structure.files import File

    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, uri in TAKEN_IN.items():
        pages[path] = as_page(path)
        files.append(File.generated(config, uri, content=pages[path]))
    for source, text in pages.items():
        for link in links(text):
            path = target(source, link) or ""
            is_new = files.get_file_from_path(place(path)) is None
            if is_new and path and (ROOT / path).is_file():
                files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links, and let mkdocstrings see the reference."""
    origins = {uri: path for path, uri in TAKEN_IN.items()}
    uri = page.file.src_uri
    return REFERENCE.sub(r"\1", moved(markdown, origins.get(uri, f"docs/{uri}")))
