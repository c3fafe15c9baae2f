"""`python docs/address.py ADDRESS FOLDER`: write a repository's address into what is released.

The project's files name no address, so that any copy of the repository is whole. PyPI needs it: it
shows README.md, where a relative picture or link leads nowhere, and the links of `[project.urls]`.
`make release-check ADDRESS=https://github.com/OWNER/NAME` runs this over the copy that it builds.

It changes FOLDER/pyproject.toml and FOLDER/README.md, for the tag of the version that stands in the
first. It raises an error where an address is no https:// one, or a link leads to no file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from site_hooks import target, turned

PICTURES = (".png", ".svg")


def urls(address: str, tag: str) -> dict[str, str]:
    """What `[project.urls]` says."""
    return {
        "Homepage": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Source": f"{address}/tree/{tag}",
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
    }


def absolute(text: str, address: str, tag: str, folder: Path) -> str:
    """Markdown of FOLDER's top level with absolute links, and pictures as files."""

    def turn(link: str) -> str:
        path = target("README.md", link)
        if path is None:
            return link
        if not (folder / path).exists():
            raise SystemExit(f"README.md links to {path}, and there is no such file")
        return f"{address}/{'raw' if path.endswith(PICTURES) else 'blob'}/{tag}/{link}"

    return turned(text, turn)


def main(address: str, where: str) -> None:
    address, folder = address.removesuffix("/").removesuffix(".git"), Path(where)
    if not re.fullmatch(r"https://[^/\s]+/[^\s]+", address):
        raise SystemExit(f"{address!r} is no address such as https://github.com/OWNER/NAME")
    project, page = folder / "pyproject.toml", folder / "README.md"
    text = project.read_text("utf-8")
    tag = "v" + re.findall(r'^version = "(.*)"', text, re.MULTILINE)[0]
    lines = ["", "[project.urls]", *(f'{key} = "{url}"' for key, url in urls(address, tag).items())]
    page.write_text(absolute(page.read_text("utf-8"), address, tag, folder), "utf-8")
    project.write_text(text + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
