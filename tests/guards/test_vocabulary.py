"""Guards of the language: one word a thing, and one class a name. CONTRIBUTING.md has the table."""

from __future__ import annotations

import ast
import collections
import io
import pathlib
import re
import tokenize

import pytest

from tests.guards.source import CLIENT, ROOT, SERVER, modules

# Words of identifiers that another word has replaced.
RETIRED = {
    "answer",
    "answers",
    "arrival",
    "ballot",
    "crew",
    "outcome",
    "piece",
    "pieces",
    "plan",
    "ruling",
    "shares",
    "span",
    "spans",
    "stretch",
    "stretches",
    "verdict",
}
# OpenTelemetry's spans are those of a trace.
TRACING = {"tracing", "trace.py", "trace_context.py", "step_traces.py"}
# `take_over` is the public option for acquiring a worker from its holder, and `slice` is Python's own.
ALLOWED = {"take_over", "slice"}
RETIRED_NAMES = re.compile(
    r"\b(worker_slots?|AttachOpen\.slot|SessionPlan|StepOrder|StepRecord|GroupRecord|WorkerSlot|ReplySink|StepQueue|"
    r"DevicePlaces?|reply_mode|reply_chunk_bytes|lease_seconds = \d+)\b"
)
# Classes of one name on both sides of the wire stand for one thing; torch's own names stand for torch's classes.
FRAMEWORKS = {"torch"}


def words(name: str) -> set[str]:
    """Return the words of an identifier, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("package", [CLIENT, SERVER], ids=["client", "server"])
def test_identifiers_use_the_words_of_the_table(package: pathlib.Path) -> None:
    found = set()
    for path in modules(package):
        retired = RETIRED - ({"span", "spans"} if TRACING & set(path.parts) else set())
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type != tokenize.NAME or token.string in ALLOWED:
                continue
            if words(token.string) & (retired | {"take"}):
                found.add((str(path.relative_to(ROOT)), token.string))
    assert sorted(found) == []


def test_retired_names_are_gone() -> None:
    paths = [*modules(CLIENT), *modules(SERVER), *sorted((ROOT / "proto").rglob("*.proto"))]
    found = [(str(path.relative_to(ROOT)), RETIRED_NAMES.findall(path.read_text())) for path in paths]
    assert [(name, names) for name, names in found if names] == []


@pytest.mark.parametrize("package", [CLIENT, SERVER], ids=["client", "server"])
def test_a_class_name_stands_for_one_class(package: pathlib.Path) -> None:
    homes = collections.defaultdict(list)
    for path in modules(package):
        if path.relative_to(package).parts[0] in FRAMEWORKS:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}
