"""A function or a class of a user's file, looked at without running the file."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmpipe.errors import UserError, near

VALUES = (ast.Constant, ast.JoinedStr, ast.List, ast.Dict, ast.Set, ast.Tuple)
METHODS = {"reset": "(self, row)", "step": "(self, answer)"}  # of an environment


def check_function(path: Path, name: str, keywords: Iterable[str]) -> None:
    """Raises UserError (2) where a file has no function of that name that takes these keywords.

    A name that only running the file could tell of passes, and so do the arguments of what is
    decorated or made by other code.
    """
    node = _node_of(path, name, "function", ast.FunctionDef)
    if node is not None:
        _check_node(node, name, list(keywords))


def check_environment(path: Path, name: str) -> None:
    """Raises UserError (2) where a file has nothing of that name that makes an environment of
    turns, or a class without `reset` and `step`; what is inherited, or a function returns, only
    running the file tells."""
    node = _node_of(path, name, "class", ast.ClassDef, ast.FunctionDef)
    if not isinstance(node, ast.ClassDef):
        if node is not None:
            _check_node(node, name, [], "class")
        return
    methods = dict(_bound(node.body))
    for method, arguments in METHODS.items():
        bound = methods.get(method)
        if isinstance(bound, ast.AsyncFunctionDef):
            problem = f"line {bound.lineno}: {name}.{method} is async, and nobody would await it"
            raise UserError(problem)
        if bound is None and not node.bases and not node.decorator_list:
            problem = f"line {node.lineno}: {name} has no method {method}"
            raise UserError(problem, f"give it one: def {method}{arguments}")


def _node_of(path: Path, name: str, what: str, *kinds: type[ast.stmt]) -> ast.AST | None:
    """What a file binds to a name; None where that cannot be told. `what`, of these kinds, is what
    a user may have meant. Raises UserError (2) where it binds nothing, or needs what is missing."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:  # a NUL is a ValueError
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", error)
        raise UserError(f"line {line}: {reason}", "the file is no Python") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    _check_imports(tree)
    bound = list(_bound(tree.body))
    nodes = [node for other, node in bound if other == name]
    if not nodes and not any(other in ("*", "__getattr__") for other, _ in bound):
        known = [other for other, node in bound if isinstance(node, kinds)]
        hint = f"it has {', '.join(dict.fromkeys(known)) or f'no {what}'}"
        raise UserError(f"the file has no attribute '{name}'{near(name, known)}", hint)
    return nodes[0] if len(nodes) == 1 else None  # of several it cannot be told which will hold


def _check_imports(tree: ast.Module) -> None:
    """Raises UserError for a module that the file needs and that is not here.

    What is imported within a `try` or an `if` may do without; so may one that the file makes a way
    to, by sys.path.
    """
    if any(isinstance(node, ast.Attribute) and node.attr == "path" for node in ast.walk(tree)):
        return
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in {name.partition(".")[0] for name in names}:
            beside = any(os.path.exists(place) for place in (name, f"{name}.py"))
            if name not in sys.modules and not beside and not importlib.util.find_spec(name):
                raise UserError(
                    f"line {node.lineno}: there is no module {name} here",
                    "install what it is in, or mend the name",
                )


def _check_node(node: ast.AST, name: str, keywords: list[str], what: str = "function") -> None:
    line = getattr(node, "lineno", 1)
    if isinstance(node, VALUES):
        raise UserError(f"line {line}: {name} is no {what}")
    if isinstance(node, ast.AsyncFunctionDef):
        raise UserError(f"line {line}: {name} is async, and nobody would await it")
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        _check_arguments(node, name, keywords)


def _check_arguments(node: ast.FunctionDef | ast.Lambda, name: str, keywords: list[str]) -> None:
    arguments = node.args
    if arguments.kwarg or (isinstance(node, ast.FunctionDef) and node.decorator_list):
        return
    taken = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
    if missing := [keyword for keyword in keywords if keyword not in taken]:
        problem = f"line {node.lineno}: {name} does not take {', '.join(missing)}"
        hint = f"it is called with keywords: def {name}({', '.join(keywords)}, **columns)"
        raise UserError(problem, hint)


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that statements bind, and to what; `*` stands for names that cannot be told."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    yield (alias.asname or alias.name.partition(".")[0]), node
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from _assigned(target, node.value)
                    yield from _names_in(target)
                yield from _names_in(node.value)
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value:
                yield name, value
            case _:
                yield from _bound_within(node)


def _assigned(target: ast.expr, value: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for part in ast.walk(target):  # several in `a, b = ...`
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id, value if part is target else part


def _bound_within(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """Names bound by what stands inside an `if`, a `try`, a `with` or a loop, or by a walrus."""
    for _, value in ast.iter_fields(node):
        parts = value if isinstance(value, list) else [value]
        statements = [part for part in parts if isinstance(part, ast.stmt)]
        yield from _bound(statements)
        for part in parts:
            if isinstance(part, ast.ExceptHandler | ast.match_case):
                yield from _bound(part.body)
            elif isinstance(part, ast.expr):
                yield from _names_in(part)
                yield from _assigned(part, part)  # of a loop
            elif isinstance(part, ast.withitem) and part.optional_vars:
                yield from _assigned(part.optional_vars, part.context_expr)


def _names_in(expression: ast.expr) -> Iterator[tuple[str, ast.AST]]:
    """What an expression binds; a call of exec() or globals() may bind anything."""
    for part in ast.walk(expression):
        if isinstance(part, ast.NamedExpr):
            yield part.target.id, part.value
        elif isinstance(part, ast.Name) and part.id in ("exec", "globals", "setattr", "vars"):
            yield "*", part
