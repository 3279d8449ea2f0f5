"""The documents name what is there."""

import re
from pathlib import Path

import pytest

from online.processes import ROOT

PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "decoder/reference/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FOLDERS = "online|decoder|trainer|lab|migrations|tests|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file or a folder."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    """A path between backticks is a file or folder of the project; modules may leave `.py` out."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text())
    missing = [
        name for name in named if not any((ROOT / f"{name}{end}").exists() for end in ("", ".py"))
    ]
    assert missing == []


def test_lines_fit_a_screen() -> None:
    """100 columns at most; tables and addresses aside."""
    long = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text().splitlines()
        if len(line) > 100 and not line.lstrip().startswith("|") and "http" not in line
    ]
    assert long == []
