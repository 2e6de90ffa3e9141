"""What the source of a module's class says about its forward pass: read, not run, so it is a guess, but one that costs nothing.

A module whose source cannot be read is taken for what most modules are: one tensor from another.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

_SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)
"""Modules of PyTorch that return several values."""


class _Method(NamedTuple):
    """A method as it is written."""

    tree: ast.FunctionDef
    me: str
    """What it calls its module: self."""
    names: Mapping[str, Any]
    """What the names that it takes from outside stand for."""


@cache
def _read(function: Any) -> _Method | None:
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return None
    return _Method(tree, tree.args.args[0].arg, function.__globals__)


def _method(module: nn.Module, name: str = "forward") -> _Method | None:
    function = getattr(type(module), name, None)
    return _read(function) if inspect.isfunction(function) else None


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called, which a ModuleList cannot."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def is_chain(module: nn.Module) -> bool:
    """Whether a module is its children, one after the other."""
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def returns_tensor(module: nn.Module) -> bool:
    """Whether a module returns one tensor, not a tuple, a dict or an object of several.

    >>> returns_tensor(nn.Linear(2, 2)), returns_tensor(nn.LSTM(2, 2))
    (True, False)
    """
    if isinstance(module, _SEVERAL):
        return False
    if is_chain(module):
        *_, last = [nn.Identity(), *module.children()]
        return returns_tensor(last)
    return _returns_tensor(module, "forward", frozenset())


def _returns_tensor(module: nn.Module, name: str, within: frozenset[str]) -> bool:
    """Whether that method of a module returns one tensor; ``within`` are the methods that call it."""
    method = _method(module, name)
    if method is None or name in within:
        return True
    returns: list[ast.Return] = []
    values: dict[str, list[tuple[int, ast.expr]]] = {}
    for node in _own_nodes(method.tree):
        match node:
            case ast.Return():
                returns.append(node)
            case ast.Assign(targets=[ast.Name(id=target)], value=given):
                values.setdefault(target, []).append((node.lineno, given))
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as given):
                values.setdefault(target, []).append((node.lineno, given))
            case ast.AugAssign(target=ast.Name(id=target) as before, op=operator, value=more):
                values.setdefault(target, []).append((node.lineno, ast.BinOp(before, operator, more)))

    def is_tensor(value: ast.expr | None, line: int) -> bool:
        match value:
            case ast.Tuple() | ast.List() | ast.Dict() | ast.ListComp() | ast.DictComp() | ast.GeneratorExp():
                return False
            case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
                return is_tensor(one, line) and is_tensor(other, line)
            case ast.Name(id=variable):  # what it was last given
                before = [pair for pair in values.get(variable, ()) if pair[0] < line]
                return not before or is_tensor(before[-1][1], before[-1][0])
            case ast.Call(func=ast.Attribute(value=ast.Name(id=method.me), attr=called)):
                child = module._modules.get(called)
                if child is not None:
                    return returns_tensor(child)
                return _returns_tensor(module, called, within | {name})
            case ast.Call(func=called):
                return not _makes_several(_stands_for(called, method.names))
        return True

    return all(is_tensor(node.value, node.lineno) for node in returns)


def _own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function in the order in which they are written, without those of functions inside it."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
            yield from _own_nodes(node)


def _stands_for(name: ast.expr, names: Mapping[str, Any]) -> Any:
    match name:
        case ast.Name(id=variable):
            return names.get(variable, {"tuple": tuple, "list": list, "dict": dict}.get(variable))
        case ast.Attribute(value=owner, attr=attribute):
            return getattr(_stands_for(owner, names), attribute, None)
    return None


def _makes_several(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, (tuple, list, Mapping)) or is_dataclass(kind))


class Child(NamedTuple):
    """A child of a module; ``once``: whether, as far as one can read, it runs once, and nothing goes around it."""

    name: str
    module: nn.Module
    once: bool


def children(module: nn.Module) -> list[Child]:
    """The children of a module in the order in which its forward pass mentions them, or else in which they were made."""
    named = [(name, child) for name, child in module._modules.items() if child is not None]
    places = Counter(id(child) for _, child in named)
    method = None if is_chain(module) else _method(module)
    read = {} if method is None else {"forward": method}
    runs: Counter[str] = Counter()
    for name, times in [] if method is None else _mentions(module, method, read):
        runs[name] += times
    unlikely = {name for name, times in runs.items() if times > 1}.union(*(_gone_around(one) for one in read.values()))
    if runs and not any(_is_dynamic(one) for one in read.values()):
        unlikely |= {name for name, _ in named if name not in runs}
    order = list(runs)
    if all(name in runs or name in unlikely for name, child in named if any(True for _ in child.parameters())):
        named.sort(key=lambda pair: order.index(pair[0]) if pair[0] in runs else len(order))
    return [Child(name, child, places[id(child)] == 1 and name not in unlikely) for name, child in named]


def order(module: nn.Module, prefix: str = "") -> list[str]:
    """The names of all modules inside one in the order in which they end, as far as one can read."""
    names = [name for child in children(module) for name in order(child.module, f"{prefix}{child.name}.")]
    return [*names, prefix.rstrip(".")]


def _mentions(module: nn.Module, method: _Method, read: dict[str, _Method]) -> Iterator[tuple[str, int]]:
    """The children that a method names, as they are reached, with how often it surely runs them there: 0, 1, or 2 for more.

    ``read`` takes in the methods that it calls.
    """

    def visit(node: ast.AST, times: int, counters: frozenset[str]) -> Iterator[tuple[str, int]]:
        match node:
            case ast.Call(func=ast.Name(id="len" | "isinstance" | "hasattr")):
                return
            case ast.Call(func=called, args=args, keywords=keywords):  # arguments come before what is called with them
                for part in (*args, *keywords):
                    yield from visit(part, times, counters)
                match called:
                    case ast.Attribute(value=ast.Name(id=method.me), attr=name):
                        yield from mention(name, times)
                    case ast.Subscript(value=ast.Attribute(value=ast.Name(id=method.me), attr=name), slice=index):
                        chosen = {part.id for part in ast.walk(index) if isinstance(part, ast.Name)}
                        yield from mention(name, times if times > 1 and not chosen & counters else 0)
                    case _:
                        yield from visit(called, times, counters)
            case ast.Attribute(value=ast.Name(id=method.me), attr=name):
                yield from mention(name, 0)
            case ast.Assign(targets=targets, value=value):
                for part in (value, *targets):
                    yield from visit(part, times, counters)
            case ast.If() | ast.IfExp():  # which of several runs is not known
                for part in ast.iter_child_nodes(node):
                    yield from visit(part, 0, counters)
            case ast.For(target=target) | ast.comprehension(target=target):
                counters = counters | {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
                for part in ast.iter_child_nodes(node):
                    yield from visit(part, 2 * times, counters)
            case ast.While() | ast.ListComp() | ast.GeneratorExp() | ast.DictComp():
                for part in ast.iter_child_nodes(node):
                    yield from visit(part, 2 * times, counters)
            case _:
                for part in ast.iter_child_nodes(node):
                    yield from visit(part, times, counters)

    def mention(name: str, times: int) -> Iterator[tuple[str, int]]:
        if name in module._modules:
            yield name, times
        elif name not in read and (inner := _method(module, name)) is not None:
            read[name] = inner
            yield from _mentions(module, inner, read)

    for statement in method.tree.body:
        yield from visit(statement, 1, frozenset())


def _is_dynamic(method: _Method) -> bool:
    """Whether a method may run children that it does not mention."""
    reads = {"getattr", "super", "children", "named_children", "modules", "named_modules", "get_submodule", "_modules"}
    return any(reads & {getattr(node, "id", None), getattr(node, "attr", None)} for node in _own_nodes(method.tree))


_OF_SIZE = ("shape", "size", "dim", "ndim", "device", "dtype")


def _gone_around(method: _Method) -> set[str]:
    """The children whose input goes on beside them, as h does beside f in ``z = self.f(h); h = h + z`` or ``h + self.f(h)``."""
    nodes = list(_own_nodes(method.tree))
    sizes = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _OF_SIZE}
    sizes |= {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and _name(node.func) == "len"}
    read = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in sizes]
    given = [(node.lineno, node.id) for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    found = set()
    for node in nodes:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=result)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=method.me), attr=child), args=[ast.Name(id=h), *_]),
            ) if result != h:
                replaced = min((line for line, name in given if name == h and line > node.lineno), default=math.inf)
                last = getattr(node, "end_lineno", node.lineno)
                if any(name.id == h and last < name.lineno <= replaced for name in read):
                    found.add(child)
            case (
                ast.BinOp(op=ast.Add(), left=ast.Name(id=h), right=other)
                | ast.BinOp(op=ast.Add(), left=other, right=ast.Name(id=h))
            ):
                match other:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=method.me), attr=child), args=[ast.Name(id=given_to), *_]
                    ) if given_to == h:
                        found.add(child)
    return found


def runs_in_turn(module: nn.Module) -> bool:
    """Whether a module hands something through a list of layers, one after the other: ``for f in self.layers: h = f(h)``."""
    method = _method(module)
    for loop in _own_nodes(method.tree) if method is not None else ():
        if not isinstance(loop, ast.For):
            continue
        lists = [
            node.attr
            for node in ast.walk(loop.iter)
            if isinstance(node, ast.Attribute) and isinstance(module._modules.get(node.attr), nn.ModuleList)
        ]
        layers = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)} if lists else set()
        for node in _own_nodes(loop):
            match node:
                case ast.Assign(
                    targets=[ast.Name(id=after)], value=ast.Call(func=ast.Name(id=layer), args=[ast.Name(id=before), *_])
                ) if after == before and layer in layers:
                    return True
    return False


def _name(value: ast.expr) -> str | None:
    return value.id if isinstance(value, ast.Name) else None
