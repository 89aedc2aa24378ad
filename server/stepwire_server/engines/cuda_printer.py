"""Python functions of the subset that `Rule.update` allows, printed as CUDA C.

A function that returns one value becomes one that returns a float; the rule itself, which returns a tuple, stores its
results through references. Every operation is parenthesised, so that C evaluates in the order of Python.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Sequence

from stepwire_server.engines.rule_source import functions_of

__all__ = ["print_function"]

_INTRINSICS = {"sqrt": "sqrtf", "maximum": "maximum"}
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def print_function(function: types.FunctionType, results: Sequence[str] = ()) -> str:
    """Print one function as a device function.

    Args:
        function: a rule's `update`, or a function it calls.
        results: for an `update`, the arguments it returns the next values of, in order.

    Raises:
        SyntaxError: the function uses something outside the subset; the message shows it.
    """
    names = {other.__name__ for other in functions_of(function)}
    return _Printer(function, {**_INTRINSICS, **{name: name for name in names}}).text(results)


class _Printer:
    def __init__(self, function: types.FunctionType, known: dict[str, str]) -> None:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(definition, ast.FunctionDef)
        self.name = function.__name__
        self._definition = definition
        self._known = known
        self._declared = {argument.arg for argument in definition.args.args}

    def text(self, results: Sequence[str]) -> str:
        parameters = [f"float {argument.arg}" for argument in self._definition.args.args]
        parameters += [f"float &{name}_next" for name in results]
        returns = "void" if results else "float"
        lines = [self._statement(node, results) for node in self._body()]
        body = "\n".join(f"    {line}" for line in lines)
        return f"__device__ __forceinline__ {returns} {self.name}({', '.join(parameters)}) {{\n{body}\n}}\n"

    def _body(self) -> list[ast.stmt]:
        has_docstring = ast.get_docstring(self._definition) is not None
        return self._definition.body[1:] if has_docstring else self._definition.body

    def _statement(self, node: ast.stmt, results: Sequence[str]) -> str:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                kind = "" if name in self._declared else "float "
                text = f"{kind}{name} = {self._expression(value)};"
                self._declared.add(name)
                return text
            case ast.Return(value=ast.Tuple(elts=values)) if len(values) == len(results):
                pairs = zip(results, values, strict=True)
                return " ".join(f"{name}_next = {self._expression(value)};" for name, value in pairs)
            case ast.Return(value=ast.expr() as value) if not results:
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
        return SyntaxError(f"{self.name}: {ast.unparse(node)!r} is outside the subset that Rule.update allows")
