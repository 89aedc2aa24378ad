"""Python functions of the subset that `Rule.update` allows, printed as CUDA C.

A function that returns one value becomes one that returns a float; one that returns a tuple, of one element even,
stores its results through references that follow its arguments. Every operation is parenthesised, so that C evaluates
in the order of Python.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types

from stepwire_server.engines.compiled.rule_source import functions_of
from stepwire_server.rules import Stage

__all__ = ["print_call", "print_function"]

# NumPy's names as `prelude` defines them, or CUDA itself.
_INTRINSICS = {
    "absolute": "fabsf",
    "maximum": "maximum",
    "minimum": "minimum",
    "sign": "sign",
    "sqrt": "sqrtf",
}
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def print_function(function: types.FunctionType) -> str:
    """Print one function, of a stage or called by one, as a device function.

    Raises:
        SyntaxError: the function uses something outside the subset; the message shows it.
    """
    names = {other.__name__ for other in functions_of(function)}
    return _Printer(function, {**_INTRINSICS, **{name: name for name in names}}).text()


def print_call(stage: Stage) -> str:
    """Print the statement that runs a stage on variables that are declared."""
    name, arguments = stage.function.__name__, ", ".join(stage.arguments)
    if isinstance(_last(_definition(stage.function)).value, ast.Tuple):
        return f"{name}({arguments}, {', '.join(stage.results)});"
    return f"{stage.results[0]} = {name}({arguments});"


class _Printer:
    def __init__(self, function: types.FunctionType, known: dict[str, str]) -> None:
        self._name = function.__name__
        self._definition = _definition(function)
        self._known = known
        self._declared = {argument.arg for argument in self._definition.args.args}

    def text(self) -> str:
        parameters = [f"float {argument.arg}" for argument in self._definition.args.args]
        match self._definition.body[-1]:
            case ast.Return(value=ast.Tuple(elts=values)):
                returns = "void"
                parameters += [f"float &result_{index}" for index in range(len(values))]
            case ast.Return(value=ast.expr()):
                returns = "float"
            case last:
                raise self._refusal(last)
        body = "\n".join(f"    {self._statement(node)}" for node in self._body())
        return f"__device__ __forceinline__ {returns} {self._name}({', '.join(parameters)}) {{\n{body}\n}}\n"

    def _body(self) -> list[ast.stmt]:
        has_docstring = ast.get_docstring(self._definition) is not None
        return self._definition.body[1:] if has_docstring else self._definition.body

    def _statement(self, node: ast.stmt) -> str:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                kind = "" if name in self._declared else "float "
                text = f"{kind}{name} = {self._expression(value)};"
                self._declared.add(name)
                return text
            case ast.Return(value=ast.Tuple(elts=values)) if node is self._definition.body[-1]:
                results = (f"result_{index} = {self._expression(value)};" for index, value in enumerate(values))
                return " ".join(results)
            case ast.Return(value=ast.expr() as value) if node is self._definition.body[-1]:
                return f"return {self._expression(value)};"
        raise self._refusal(node)

    def _expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self._declared:
                return name
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self._expression(operand)})"
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                return f"({self._expression(left)} {_OPERATORS[type(operator)]} {self._expression(right)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in self._known:
                return f"{self._known[name]}({', '.join(self._expression(argument) for argument in arguments)})"
        raise self._refusal(node)

    def _refusal(self, node: ast.AST) -> SyntaxError:
        return SyntaxError(f"{self._name}: {ast.unparse(node)!r} is outside the subset that Rule.update allows")


@functools.cache
def _definition(function: object) -> ast.FunctionDef:
    assert isinstance(function, types.FunctionType)
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def _last(definition: ast.FunctionDef) -> ast.Return:
    last = definition.body[-1]
    assert isinstance(last, ast.Return)
    return last
