"""Guards of the pages: their size, headings, sentences and links, the picture of the floors, the first example."""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.guards.source import ROOT
from tests.guards.test_layers import CLIENT_LAYERS, SERVER_LAYERS

DESIGN = ROOT / "docs" / "design.md"
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

MOST_DESIGN_LINES = 200
QUESTION_WORDS = {"what", "who", "which", "whose"}
# Words of former vocabularies: CONTRIBUTING.md has the one word that replaced each.
RETIRED = re.compile(
    r"\b(worker slots?|slot 0|SessionPlan|StepOrder|StepRecord|WorkerSlot|ReplySink|StepQueue|ballots?|verdicts?)\b",
    re.IGNORECASE,
)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) +")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’)]*\s+")


@functools.cache
def text_of(page: pathlib.Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: pathlib.Path) -> list[str]:
    """Return the headings of a page, without marks."""
    return [CODE.sub(lambda found: found[0].strip("`"), heading) for heading in HEADING.findall(text_of(page))]


def blocks(page: pathlib.Path) -> Iterator[str]:
    """Yield the paragraphs and list items of a page: no headings, no tables, no comments, no indented code."""
    block: list[str] = []
    for line in [*text_of(page).splitlines(), ""]:
        item = ITEM.match(line)
        outside = not line.strip() or line.lstrip().startswith(("#", "|", "<!--", "!["))
        if (outside or item) and block:
            yield " ".join(block)
            block = []
        if not outside and (block or item or not line.startswith("    ")):
            block.append(line[item.end() :] if item else line.strip())


def sentences(page: pathlib.Path) -> Iterator[str]:
    """Yield the sentences of a page, with a word in the place of each piece of code and of each link its text."""
    for block in blocks(page):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", CODE.sub("code", block))
        yield from (sentence for sentence in SENTENCE_END.split(plain.replace("*", "")) if sentence)


def first_word(text: str) -> str:
    """Return the first word of a sentence or heading, in lower case."""
    found = re.search(r"[\w’']+", text)
    return found[0].lower() if found else ""


def anchor_of(heading: str) -> str:
    """Return the fragment by which a heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_design_is_one_page() -> None:
    assert len(DESIGN.read_text(encoding="utf-8").splitlines()) <= MOST_DESIGN_LINES


def test_the_picture_of_the_floors_is_the_list_of_the_guard() -> None:
    """Two columns, the server's rooms and the client's, each from the roof down."""
    picture = re.search(r"^```\nstepwire_server/.*?^```$", DESIGN.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert picture is not None
    title, *lines = picture[0].splitlines()[1:-1]
    middle = title.index("stepwire/")
    columns = [[line[:middle] for line in lines], [line[middle:] for line in lines]]
    server, client = (
        [found[1] for line in column if (found := re.match(r" +([a-z_0-9]+)(?: |$)", line))] for column in columns
    )
    assert (server, client) == (SERVER_LAYERS, CLIENT_LAYERS)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_heading_asks(page: pathlib.Path) -> None:
    assert [heading for heading in headings(page) if first_word(heading) in QUESTION_WORDS] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_sentence_begins_with_a_question_word(page: pathlib.Path) -> None:
    assert [sentence for sentence in sentences(page) if first_word(sentence) in QUESTION_WORDS] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_retired_words_are_gone(page: pathlib.Path) -> None:
    assert RETIRED.findall(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    broken = []
    for target in LINK.findall(text_of(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (fragment and fragment not in map(anchor_of, headings(file))):
            broken.append(target)
    assert broken == []


def test_the_first_example_runs_as_it_stands() -> None:
    """In a Python of its own, and prints what the page says it does."""
    page = README.read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert example is not None
    said = re.search(r"It prints `([^`]+)`", page)
    assert said is not None
    done = subprocess.run(
        [sys.executable, "-c", example[1]], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert said[1] in done.stdout.splitlines()
