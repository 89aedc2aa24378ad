"""Write the asynchronous client from the synchronous one: `make aio`.

Each public method of `Session` and `Client` becomes one that awaits it in a thread, with the same signature and the
same docstring. So there is one implementation, and what is added to it is missing nowhere; a test compares.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
CLIENT = ROOT / "client" / "stepwire"
TARGET = CLIENT / "aio" / "surface.py"

# What is no method of the asynchronous classes: `close` is written by hand, and asyncio has its own way of doing what
# the others are for.
NOT_AWAITED = {"apply", "close", "shards", "step_async"}

# The ways of methods that a worker does not merely run.
_WAYS = {"step": "step", "create_session": "create", "fork": "create"}

HEADER = '''"""The asynchronous client: generated from the synchronous one by `make aio`; do not edit.

See `stepwire.aio`. Every method awaits the one of the same name of `Client` or `Session`, in a thread.
"""

from __future__ import annotations

import functools
'''

SESSION = '''
class AsyncSession(SessionBase):
    """One optimizer on the server, for asyncio; see `stepwire.Session`. Made by `AsyncClient`.

    Calls are taken one after another in the order in which they are made, in a thread that is the session's own. A call
    whose await is cancelled before its turn is never made; one that is under way goes on, see `settled`. As an
    asynchronous context manager it ends the session on the server.
    """
'''

CLIENT_CLASS = '''
class AsyncClient(ClientBase):
    """A connection to one server, or several, for asyncio; see `stepwire.Client`. Made by `stepwire.aio.connect`.

    Its calls are taken one after another in a thread of its own; those of its sessions have theirs. An asynchronous
    context manager; closes twice without complaint.
    """
'''


def written() -> str:
    """Return the module, formatted."""
    modules = ("session", "session_state", "client", "connecting")
    session, state, client, connecting = (_parsed(name) for name in modules)
    connect = next(node for node in connecting.body if isinstance(node, ast.FunctionDef) and node.name == "connect")
    parts = [
        SESSION,
        *(_method(node, "session") for node in _public(session, "Session")),
        *(_method(node, "session") for node in _public(state, "StateCalls")),
        CLIENT_CLASS,
        *(_method(node, "client") for node in _public(client, "Client")),
        _function(connect),
    ]
    body = "\n".join(parts)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    imports = {
        "from collections.abc import AsyncIterator",
        "from stepwire.aio.base import ClientBase, SessionBase",
        "from stepwire.connecting import connect as connect_client",
        *_imports(session, "stepwire.session", used),
        *_imports(state, "stepwire.session_state", used),
        *_imports(client, "stepwire.client", used),
        *_imports(connecting, "stepwire.connecting", used),
    }
    names = '__all__ = ["AsyncClient", "AsyncSession", "connect"]\n'
    return _formatted("\n".join([HEADER, *sorted(imports), "", names, body]))


def _parsed(name: str) -> ast.Module:
    return ast.parse((CLIENT / f"{name}.py").read_text(encoding="utf-8"))


def _public(module: ast.Module, name: str) -> Iterator[ast.FunctionDef]:
    found = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in NOT_AWAITED:
            yield node


def _method(node: ast.FunctionDef, wrapped: str) -> str:
    """Return a method that awaits that of the wrapped object."""
    doc, own = _docstring(node), f"self.blocking.{node.name}"
    if any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
        return _lines("@property", f"def {node.name}(self) -> {_returns(node)}:", f"    {doc}", f"    return {own}")
    call = f"functools.partial({', '.join([own, *_passed_on(node.args)])})"
    returns, way = _returns(node), _WAYS.get(node.name, "run")
    if returns.startswith("Iterator["):
        return _lines(
            f"async def {node.name}({ast.unparse(node.args)}) -> Async{returns}:",
            f"    {doc}",
            f"    async for each in self._worker.iterate({call}):",
            "        yield each",
        )
    options = ", kept=request_id is not None" if way == "create" else ""
    awaited = f"await self._worker.{way}({call}{options})"
    if returns in ("Session", "Self"):
        returns, awaited = "AsyncSession", f"self._adopt(AsyncSession({awaited}))"
    return _lines(
        f"async def {node.name}({ast.unparse(node.args)}) -> {returns}:",
        f"    {doc}",
        f"    {'' if returns == 'None' else 'return '}{awaited}",
    )


def _function(node: ast.FunctionDef) -> str:
    """Return the function that makes a client; it waits for nothing, so it is not awaited."""
    passed = ", ".join(_passed_on(node.args))
    head = f"def {node.name}({ast.unparse(node.args)}) -> AsyncClient:"
    return "\n".join(["\n", head, f"    {_docstring(node)}", f"    return AsyncClient(connect_client({passed}))", ""])


def _passed_on(arguments: ast.arguments) -> Iterator[str]:
    """Yield the arguments of a call with the parameters of the caller."""
    assert not arguments.posonlyargs and arguments.vararg is None and arguments.kwarg is None
    yield from (each.arg for each in arguments.args if each.arg != "self")
    yield from (f"{each.arg}={each.arg}" for each in arguments.kwonlyargs)


def _docstring(node: ast.FunctionDef) -> str:
    """Return the docstring as it is written, quotes and indentation included."""
    first = node.body[0]
    assert isinstance(first, ast.Expr), f"{node.name} has no docstring"
    assert isinstance(first.value, ast.Constant), f"{node.name} has no docstring"
    assert isinstance(first.value.value, str), f"{node.name} has no docstring"
    assert "\\" not in first.value.value, f"{node.name} has a docstring with escapes"
    return f'"""{first.value.value}"""'


def _returns(node: ast.FunctionDef) -> str:
    assert node.returns is not None, f"{node.name} has no return annotation"
    return ast.unparse(node.returns)


def _lines(*lines: str) -> str:
    return "\n".join(["", *(f"    {line}" for line in lines)])


def _imports(module: ast.Module, name: str, used: set[str]) -> Iterator[str]:
    """Yield the imports of used names, as a module has them, and of names that are its own."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) in used and node.module != "__future__":
                    yield f"from {node.module} import {ast.unparse(alias)}"
        elif isinstance(node, ast.Import):
            yield from (f"import {ast.unparse(each)}" for each in node.names if (each.asname or each.name) in used)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                f"from {name} import {each.id}" for each in targets if isinstance(each, ast.Name) and each.id in used
            )


def _formatted(text: str) -> str:
    """Sort the imports and format, as `make lint` wants it."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        done = subprocess.run(
            [*ruff, *command, "--stdin-filename", str(TARGET), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        text = done.stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(written(), encoding="utf-8")
