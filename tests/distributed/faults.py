"""Finds every place of the parallel code that communicates, and runs a function with one of them broken.

A site is a call, in megalm/parallel or megalm/engine, of a collective of torch.distributed or of one of our own
functions that lead to one. A broken site's collectives are skipped or doubled, those of its backward pass too; all
other calls of the same collectives stay whole.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megalm/parallel", "megalm/engine")
Fault = Literal["skipped", "doubled"]
FAULTS: tuple[Fault, ...] = ("skipped", "doubled")

_OTHERS = ("barrier", "monitored_barrier", "batch_isend_irecv")
# Every function of torch.distributed that moves data or waits for other ranks.
COLLECTIVES = frozenset(
    name
    for name, value in vars(dist).items()
    if type(value) is FunctionType
    and name.startswith(
        ("all_", "reduce", "broadcast", "scatter", "gather", "send", "recv", "isend", "irecv", *_OTHERS)
    )
)
_LIBRARIES = ("torch.distributed", "deepspeed.comm")
# What our own communicating methods are called on; `tensor.gather` is none of them.
_RECEIVERS = ("self", "stream", "_stream", "comm", "_comm")
# Names too common to be followed: what such a method calls is found by itself.
_NOT_FOLLOWED = ("forward", "backward", "__init__", "__call__")


@dataclass(frozen=True)
class Site:
    """A call that communicates: lines first..last of a file, in a function."""

    path: str
    first: int
    last: int
    function: str
    call: str
    is_alone: bool  # on its lines: then what it calls need not be known by name

    @property
    def name(self) -> str:
        """What is called, without what it is called on."""
        return self.call.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.path}:{self.first} {self.function}: {self.call}"


def find_sites(folders: Sequence[str] = FOLDERS) -> list[Site]:
    """Every site in the source, in its order."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return sites_of({str(path.relative_to(ROOT)): path.read_text() for path in files})


def sites_of(sources: Mapping[str, str]) -> list[Site]:
    """The sites of these files, of which functions of one file may lead to those of another."""
    leading: frozenset[str] = frozenset()
    trees = {path: ast.parse(source) for path, source in sources.items()}
    while True:  # until no further function leads to a collective
        found = {path: _Finder(tree, leading) for path, tree in trees.items()}
        names = leading.union(*(finder.leading for finder in found.values()))
        if names == leading:
            return [site for path, finder in found.items() for site in _sites(path, finder.calls)]
        leading = names


def _sites(path: str, calls: Sequence[tuple[ast.Call, str]]) -> Iterator[Site]:
    lines = Counter(call.lineno for call, _ in calls)
    for call, function in calls:
        last = call.end_lineno or call.lineno
        yield Site(path, call.lineno, last, function, ast.unparse(call.func), lines[call.lineno] == 1)


class _Finder(ast.NodeVisitor):
    """The calls in one file that communicate, given the names of our functions, methods and classes that do."""

    def __init__(self, tree: ast.Module, known: frozenset[str]) -> None:
        self._known = known
        self._scope: list[str] = []
        self._libraries: set[str] = set()
        # Names that a plain call or `name.function` may mean: what the file defines, or imports from megalm.
        self._ours = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        self._called: set[int] = set()
        self.calls: list[tuple[ast.Call, str]] = []
        self.leading: set[str] = set()
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        self._libraries |= {alias.asname or alias.name for alias in node.names if alias.name in _LIBRARIES}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if f"{node.module}.{alias.name}" in _LIBRARIES:
                self._libraries.add(alias.asname or alias.name)
            if str(node.module).startswith("megalm"):
                self._ours.add(alias.asname or alias.name)
            hidden = str(node.module).startswith(_LIBRARIES) and alias.name in COLLECTIVES
            assert not hidden, f"import torch.distributed, not {alias.name} of it: sites are found by the module's name"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()

    def visit_Call(self, node: ast.Call) -> None:
        if self._communicates(node.func):
            self._called.add(id(node.func))
            self.calls.append((node, ".".join(self._scope)))
            if self._scope and self._scope[-1] not in _NOT_FOLLOWED:
                self.leading.add(self._scope[-1])
            elif len(self._scope) > 1:
                self.leading.add(f"{self._scope[-2]}.apply")  # what an autograd function does
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        passed_on = self._is_library_collective(node) and id(node) not in self._called
        assert not passed_on, f"line {node.lineno}: {ast.unparse(node)} is not called where it is named: a hidden site"
        self.generic_visit(node)

    def _is_library_collective(self, node: ast.Attribute) -> bool:
        return node.attr in COLLECTIVES and ast.unparse(node.value) in self._libraries

    def _communicates(self, function: ast.expr) -> bool:
        if isinstance(function, ast.Name):
            return function.id in self._ours and function.id in self._known
        if not isinstance(function, ast.Attribute):
            return False
        if self._is_library_collective(function):
            return True
        receiver = ast.unparse(function.value).split(".")
        if function.attr == "apply":
            return receiver[0] in self._ours and f"{receiver[-1]}.apply" in self._known
        ours = receiver[-1] in _RECEIVERS or (len(receiver) == 1 and receiver[0] in self._ours)
        return ours and function.attr in self._known


class Watch:
    """While entered, sees every collective that this process calls, and under which of `sites` it does.

    Attributes:
        met: the sites met, and by which collectives; a maximum is called "maximum".
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._busy = False  # a collective may be made of others
        self._in_backward: list[Site] = []
        self.met: dict[Site, set[str]] = {}

    def __enter__(self) -> Watch:
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(dist, name, self._around(name, original))
        self._apply = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(self._around_apply)  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        torch.autograd.Function.apply = self._apply

    def do(self, name: str, original: Callable[..., Any], arguments: Any, options: Any, sites: Sequence[Site]) -> Any:
        """Make the call; a subclass may do otherwise. `sites`: those that it was made under, if any."""
        return original(*arguments, **options)

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*arguments: Any, **options: Any) -> Any:
            if self._busy:
                return original(*arguments, **options)
            sites = [*self._under(name), *self._in_backward]
            for site in sites:
                self.met.setdefault(site, set()).add("maximum" if options.get("op") == dist.ReduceOp.MAX else name)
            self._busy = True
            try:
                return self.do(name, original, arguments, options, sites)
            finally:
                self._busy = False

        return collective

    def _around_apply(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """An autograd function called under a site communicates there in its backward pass, too."""
        result = self._apply.__func__(function, *arguments, **options)
        sites = self._under("apply")
        node = (result[0] if isinstance(result, tuple) else result).grad_fn if sites else None
        if node is not None:
            node.register_prehook(lambda _: self._in_backward.extend(sites))
            node.register_hook(lambda *_: self._in_backward.clear())
        return result

    def _under(self, callee: str) -> list[Site]:
        """The sites whose call is under way; `callee` is what the innermost of our frames has called."""
        found = []
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            found += [site for site in self._sites if path.endswith(site.path) and _is_at(site, frame.f_lineno, callee)]
            callee, frame = frame.f_code.co_name, frame.f_back
        return found


class Broken(Watch):
    """While entered, the collectives under some sites are skipped or doubled."""

    def __init__(self, sites: Sequence[Site], fault: Fault) -> None:
        super().__init__(sites)
        self._fault = fault

    def do(self, name: str, original: Callable[..., Any], arguments: Any, options: Any, sites: Sequence[Site]) -> Any:
        if not sites:
            return original(*arguments, **options)
        return (_skip if self._fault == "skipped" else _double)(name, original, arguments, options)


# One end without the other only waits: both are broken together.
_PEER_TO_PEER = ("send", "recv", "isend", "irecv", "_receive")


_IMMEDIATE = ("isend", "irecv")  # under way when they return


def _is_at(site: Site, line: int, callee: str) -> bool:
    if callee in _PEER_TO_PEER and site.name in _PEER_TO_PEER:
        return True
    return site.first <= line <= site.last and (site.is_alone or callee == site.name)


class _Works:
    """Collectives under way, or none."""

    def __init__(self, *works: Any) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _skip(name: str, original: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a rank has if the call is not there; a result that only the call makes is its own part, else zeros."""
    if name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        result, source = arguments
        group = options["group"]
        parts, own = dist.get_world_size(group), dist.get_rank(group)
        if name == "reduce_scatter_tensor":
            result.copy_(source.view(parts, *result.shape)[own])
        else:
            result.zero_().view(parts, *source.shape)[own].copy_(source)
    elif name in ("all_to_all_single", "recv", "irecv"):
        arguments[0].zero_()
    return _Works() if options.get("async_op") or name in _IMMEDIATE else None


def _double(name: str, original: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The call made twice; of a sum that leaves its addends as they were, the result counted twice."""
    if name in _IMMEDIATE:
        return _Works(*(original(*arguments, **options) for _ in range(2)))
    original(*arguments, **{**options, "async_op": False} if "async_op" in options else options)
    if name == "reduce_scatter_tensor":
        arguments[0].mul_(2)
        return _Works() if options.get("async_op") else None
    return original(*arguments, **options)
