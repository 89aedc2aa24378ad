"""Guards of the shape of the code: rooms, functions and signatures stay small, and privates stay private."""

from __future__ import annotations

import ast
import functools
import pathlib
from collections.abc import Iterator

from tests.guards.source import CLIENT, ROOT, SERVER, modules

MOST_LINES = 400
MOST_FUNCTION_LINES = 40
MOST_PARAMETERS = 6
# Written by `make aio` from the synchronous classes, docstrings included.
GENERATED = {"client/stepwire/aio/surface.py"}
# Constructors that a user calls, and the calls whose keywords are the product: their parameters are options.
OPTIONS = {
    "client/stepwire/client.py": {"create_session", "session"},
    "client/stepwire/session.py": {"step", "step_async"},
    "client/stepwire/session_state.py": {"fork"},
    "client/stepwire/connecting.py": {"connect"},
    "server/stepwire_server/cli/cluster.py": {"up"},
    "server/stepwire_server/cli/sessions.py": {"close_sessions"},
    "server/stepwire_server/cli/state.py": {"import_state"},
    "server/stepwire_server/cli/top.py": {"top"},
}

# The methods of every NamedTuple are public in all but their spelling.
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}
# The count of a tensor's changes, which torch documents under this name alone.
TORCH = {"_version"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def sources() -> tuple[tuple[str, pathlib.Path, ast.Module], ...]:
    """Return every hand-written module of both packages: its path from the root, the path, its tree."""
    paths = [path for package in (CLIENT, SERVER) for path in modules(package)]
    named = [(str(path.relative_to(ROOT)), path) for path in paths]
    return tuple((name, path, ast.parse(path.read_text())) for name, path in named if name not in GENERATED)


def functions(tree: ast.Module) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Yield every function with the class that it is a method of."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, node if isinstance(node, ast.ClassDef) else None


def code_lines(function: Function) -> int:
    """Count the lines of a function's body without its docstring."""
    body = function.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    first = body[1] if documented and len(body) > 1 else body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def parameters(function: Function) -> int:
    """Count what a caller gives."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_rooms_are_small() -> None:
    long = [(name, len(path.read_text().splitlines())) for name, path, _ in sources()]
    assert [(name, lines) for name, lines in long if lines > MOST_LINES] == []


def test_functions_are_short() -> None:
    found = [
        (name, function.name, code_lines(function))
        for name, _, tree in sources()
        for function, _ in functions(tree)
        if code_lines(function) > MOST_FUNCTION_LINES
    ]
    assert found == []


def is_formula(name: str) -> bool:
    """Tell whether a file holds formulas, whose parameters are letters of an equation, or kernels of them."""
    return name.startswith(("server/stepwire_server/rules/", "server/stepwire_server/engines/cpu/numpy_kernels"))


def is_public_constructor(name: str, function: Function, owner: ast.ClassDef | None) -> bool:
    """Tell whether users call a function with options by name."""
    if function.name == "__init__" and owner is not None:
        return name.startswith(("client/stepwire/optimizers/", "client/stepwire/torch/"))
    return function.name in OPTIONS.get(name, set()) or name == "client/stepwire/optax/alias.py"


def test_signatures_are_short() -> None:
    found = [
        (name, function.name, parameters(function))
        for name, _, tree in sources()
        for function, owner in functions(tree)
        if parameters(function) > MOST_PARAMETERS
        and not is_formula(name)
        and not is_public_constructor(name, function, owner)
    ]
    assert found == []


def private_reaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield accesses to a private attribute of something else than self, cls or a class of the same module."""
    local = {name.name for name in tree.body if isinstance(name, ast.ClassDef)}
    own = {
        target.attr
        for node in ast.walk(tree)
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id in ({"self", "cls"} | local)
    }
    own |= {function.name for function, owner in functions(tree) if owner is not None}
    own |= {
        node.target.id
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if node.attr in NAMED_TUPLE | TORCH:
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            continue
        if node.attr not in own:  # two objects of one class may know each other
            yield node.lineno, ast.unparse(node)


def test_no_class_reaches_into_another_modules_privates() -> None:
    found = [(name, line, text) for name, _, tree in sources() for line, text in private_reaches(tree)]
    # torch has no public name for the count of a tensor's changes, and for the indices of one that is not coalesced.
    # gRPC has none for the channel below its own, whose calls need no threads.
    allowed = {"os._exit", "tensor._version", "gradient._indices", "core._channel"}
    assert [(name, line, text) for name, line, text in found if text not in allowed] == []


def inherited_privates(tree: ast.Module, private: dict[str, set[str]]) -> Iterator[tuple[int, str]]:
    """Yield uses of private members that a class inherits from a class of another module."""
    local = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        foreign = [ast.unparse(base) for base in owner.bases if ast.unparse(base).rpartition(".")[2] not in local]
        names = set().union(*(private.get(base.rpartition(".")[2], set()) for base in foreign))
        defined = private.get(owner.name, set()) if owner.name in local else set()
        for node in ast.walk(owner):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
                and node.attr in names - defined
            ):
                yield node.lineno, ast.unparse(node)


def privates_of(tree: ast.Module) -> dict[str, set[str]]:
    """Return the private members that each class of a module defines."""
    found: dict[str, set[str]] = {}
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        members = {function.name for function in owner.body if isinstance(function, Function)}
        for node in ast.walk(owner):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                members.add(node.attr)
        found[owner.name] = {member for member in members if member.startswith("_") and not member.startswith("__")}
    return found


def test_no_subclass_uses_what_its_base_keeps_private() -> None:
    private: dict[str, set[str]] = {}
    trees = [(name, tree) for name, _, tree in sources()]
    for _, tree in trees:
        for owner, members in privates_of(tree).items():
            private.setdefault(owner, set()).update(members)
    found = [(name, line, text) for name, tree in trees for line, text in inherited_privates(tree, private)]
    assert found == []
