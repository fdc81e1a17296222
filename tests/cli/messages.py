"""What the sources say to users, and which of it a function can come to say.

The walk follows names: a function reaches every function, class and constant of the package that its source names, a
class with all its methods. That is more than can happen, and never less but where something is called by a text.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import longfit

PACKAGE = Path(longfit.__file__).parent
Symbol = tuple[str, str]  # module, name


class Module:
    """One file: what it defines, and what it imports from the package."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.defined: dict[str, ast.AST] = {}
        for node in self.tree.body:
            self._define(node)
        self.imported: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longfit"):
                self.imported |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {a.asname: (a.name, None) for a in node.names if a.asname is not None}

    def _define(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            self.defined |= dict.fromkeys(names, node)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for inner in ast.iter_child_nodes(node):
                self._define(inner)


@cache
def modules() -> dict[str, Module]:
    """Every file of the package, by the name that it is imported by."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["longfit", *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def _resolve(module: str, name: str) -> tuple[str, str | None] | None:
    """What a name means in a module: a symbol, or a module (then without a name)."""
    if name in modules()[module].defined:
        return module, name
    if f"{module}.{name}" in modules():
        return f"{module}.{name}", None
    source, inner = modules()[module].imported.get(name, ("", None))
    if source not in modules() or source == module:
        return None
    return (source, None) if inner is None else _resolve(source, inner)


def _named(module: str, node: ast.AST) -> Iterator[Symbol]:
    for inner in ast.walk(node):
        chain: list[str] = []
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        found = _resolve(module, inner.id) if isinstance(inner, ast.Name) else None
        while found is not None and found[1] is None and chain:
            found = _resolve(found[0], chain.pop(0))
        if found is not None and found[1] is not None:
            yield found[0], found[1]


@cache
def _mentions(symbol: Symbol) -> frozenset[Symbol]:
    return frozenset(_named(symbol[0], modules()[symbol[0]].defined[symbol[1]]))


def reachable(module: str, name: str) -> set[Symbol]:
    """Every function, class and constant of the package that a function can come to."""
    seen: set[Symbol] = set()
    todo = [(module, name)]
    while todo:
        symbol = todo.pop()
        if symbol not in seen:
            seen.add(symbol)
            todo += _mentions(symbol)
    return seen


def texts_of(symbol: Symbol) -> list[tuple[str, str]]:
    """The texts that a symbol holds, each with its place."""
    return _texts(symbol[0], modules()[symbol[0]].defined[symbol[1]])


def messages() -> Iterator[tuple[str, str]]:
    """Every text in the sources that is no docstring, with its place."""
    for name, module in modules().items():
        yield from _texts(name, module.tree)


def _texts(name: str, root: ast.AST) -> list[tuple[str, str]]:
    # A text that stands alone is a docstring, or what a setting means.
    skipped = {id(node.value) for node in ast.walk(root) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(root):
        place = f"{name.removeprefix('longfit.')}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.JoinedStr):  # what is filled in stands for itself: data.{name}
            skipped |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append((place, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            found.append((place, node.value))
    return found
