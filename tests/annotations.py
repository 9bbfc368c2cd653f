"""Checks the annotations of the whole package while the tests run: shapes where there are arrays, plain types
elsewhere.

jaxtyping's own import hook checks the same, but treats every function as one with arrays, and makes the checker of a
function within another anew whenever the outer one runs. That was a third of the suite's time.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

PACKAGE = "tl_circuits"
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # the settings that callers get
arrays = jaxtyped(typechecker=_beartype)


def plain(made: Any) -> Any:
    """A function or class that checks types, but for names that only type checkers import."""
    if isinstance(made, type):
        made.__init__ = plain(made.__init__)  # its methods have checkers of their own
        return made
    written = made.__annotations__
    made.__annotations__ = {name: _looked_up(hint, made.__globals__) for name, hint in written.items()}
    call = _beartype(made)
    made.__annotations__ = call.__annotations__ = written
    return call


def _looked_up(hint: Any, names: dict[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except (NameError, AttributeError):
        return Any


def install() -> None:
    """Check every module of the package that is imported from now on."""
    assert PACKAGE not in sys.modules, f"{PACKAGE} is imported already, so its annotations would not be checked"
    sys.meta_path.insert(0, _Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        return compile(checked_source(ast.parse(source)), self.path, "exec", dont_inherit=True)


def checked_source(module: ast.Module) -> ast.Module:
    """The module with a checker on each of its functions, methods and dataclasses that has annotations."""
    names = {
        name.asname or name.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for name in node.names
    }
    names |= {  # such as Pieces = Int[Tensor, "piece context"]
        target.id
        for node in module.body
        if isinstance(node, ast.Assign)
        and any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    _Checkers(names).visit(module)
    head = 0
    while head < len(module.body) and (_is_docstring(module.body[head]) or _is_future(module.body[head])):
        head += 1
    module.body.insert(head, ast.parse("import tests.annotations as _annotations").body[0])
    return ast.fix_missing_locations(module)


class _Checkers(ast.NodeTransformer):
    """Puts checkers on functions and classes; ``arrays``: names of array types in this module."""

    def __init__(self, arrays: set[str]) -> None:
        self.arrays, self.inside = arrays, False

    def _has_arrays(self, annotations: Sequence[ast.AST | None]) -> bool:
        names = (node for annotation in annotations if annotation is not None for node in ast.walk(annotation))
        return any(isinstance(node, ast.Name) and node.id in self.arrays for node in names)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        given = node.args
        annotations = [
            a.annotation for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a
        ]
        has_arrays = self._has_arrays([*annotations, node.returns])
        decorators = [_name_of(decorator) for decorator in node.decorator_list]
        if has_arrays and "checked" not in decorators:  # which checks the same itself
            node.decorator_list.append(_checker("arrays", node))
        elif not has_arrays and not self.inside and (any(annotations) or node.returns) and "overload" not in decorators:
            node.decorator_list.append(_checker("plain", node))
        outer, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        outer, self.inside = self.inside, False
        self.generic_visit(node)
        self.inside = outer
        fields = [statement.annotation for statement in node.body if isinstance(statement, ast.AnnAssign)]
        if "dataclass" in map(_name_of, node.decorator_list) and self._has_arrays(fields):
            node.decorator_list.insert(0, _checker("arrays", node))
        elif "dataclass" in map(_name_of, node.decorator_list):
            node.decorator_list.insert(0, _checker("plain", node))
        return node


def _checker(name: str, at: ast.stmt) -> ast.expr:
    made = ast.parse(f"_annotations.{name}", mode="eval").body
    for node in ast.walk(made):
        ast.copy_location(node, at)
    return made


def _name_of(decorator: ast.expr) -> str:
    found = decorator.func if isinstance(decorator, ast.Call) else decorator
    return found.id if isinstance(found, ast.Name) else getattr(found, "attr", "")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"
