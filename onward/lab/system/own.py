"""A file of the user's own, `path/to/file.py:name`: found, run, and its errors told with their line.

One loader for all that may be given in this way: a network, an algorithm, data.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils import _device

from onward.errors import UsageError, unknown
from onward.lab.system import memory, surroundings
from onward.parallel.shards import ProcessLost

WANTED = {
    "--model": ("function", "makes the network", "make_model"),
    "--algorithm": ("class", "is the algorithm", "MyRule"),
    "--data": ("function", "returns the data", "make_data"),
}
"""By flag: what is named in the file, what that does, and a name to give as an example."""
MARK = " (your own)"
"""Ends the name of a module that is such a file, so that it hides no other module."""


class OwnError(UsageError):
    """A file of the user's own fails; the message has its line, or that of a file beside it."""


class Own(NamedTuple):
    """An object in a file of the user's own."""

    flag: str
    """The option that names it, such as "--model"."""
    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.flag} {self.path}:{self.name}"


def named(flag: str, text: str) -> Own | None:
    """The object that an option's text names; None if the text names no .py file.

    Raises:
        UsageError: the text does not say which object of the file, or the file is not there.

    >>> named("--model", "mlp")
    >>> named("--model", "nets/small.py")
    Traceback (most recent call last):
    onward.errors.UsageError: --model nets/small.py: say which function of the file makes the network, such as \
nets/small.py:make_model
    """
    kind, does, example = WANTED[flag]
    if text.endswith(".py"):
        raise UsageError(f"{flag} {text}: say which {kind} of the file {does}, such as {text}:{example}")
    path, _, name = text.rpartition(":")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        raise UsageError(f"{flag} {text}: there is no file {path}: give path/to/file.py:{kind}")
    return Own(flag, Path(path), name)


def load(own: Own) -> Any:
    """Run the file anew and return its object of that name.

    Raises:
        UsageError: the file fails, or defines no such function or class.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "small.py")
    >>> _ = path.write_text("def make_model(): return 'a network'")
    >>> load(Own("--model", path, "make_model"))()
    'a network'
    """
    with errors(own, elsewhere=True):
        module = _run(own)
    found = getattr(module, own.name, None)
    if not callable(found):
        here = {n: value for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        there = [n for n, value in here.items() if callable(value)]
        raise unknown(f"{WANTED[own.flag][0]} of {own.path}", own.name, there)
    return found


def digest(own: Own | None) -> str | None:
    """A hexadecimal number of what is in the file, which changes when the file does; None without a file."""
    try:
        return hashlib.sha256(own.path.read_bytes()).hexdigest() if own else None
    except OSError:  # whoever loads it is told
        return None


@contextmanager
def errors(owns: Own | Sequence[Own | None] | None, when: str = "", *, elsewhere: bool = False) -> Iterator[None]:
    """Tell an error in these files, or in one beside them, as an :class:`OwnError` with its line; `when` follows the line.

    If the error passed through several of the files, the last one is named. Unless `elsewhere` is set, an error is left as it
    is if it was raised in other files, or says itself what to do: a UsageError, a lost process, exhausted memory. What the
    body changes for the whole program (folder, streams, PyTorch's default type and device) is changed back. Without a file
    nothing is done.
    """
    files = [own.path for own in ([owns] if isinstance(owns, Own) else owns or ()) if own]
    if not files:
        yield
        return
    try:
        with _undisturbed():
            yield
    except (Exception, SystemExit) as error:
        where = _line(error, files)
        speaks = isinstance(error, UsageError | ProcessLost) or memory.exhausted(error)
        if isinstance(error, OwnError) or (not elsewhere and (where is None or speaks)):
            raise
        said = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        raise OwnError(f"{where or files[0]}{when}: {type(error).__name__}: {said}") from error


def _line(error: BaseException, files: Sequence[Path]) -> str | None:
    """The last line of these files that the error passed through, or else the last one of a file beside them."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    homes = {path.resolve(): path for path in files}
    folders = {home.parent for home in homes}
    lines = [(homes[home], line) for file, line in places if (home := Path(file).resolve()) in homes]
    beside = [(file, line) for file, line in places if Path(file).resolve().parent in folders]
    return "{}, line {}".format(*(lines or beside)[-1]) if lines or beside else None


class _AsItIs(SourceFileLoader):
    """Compile what is in the file now: bytecode that Python keeps is taken for it if size and second of the change agree."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run(own: Own) -> ModuleType:
    """The file as a module, run with its own folder on the import path, as `python file.py` does.

    It is run anew each time, so that its own random generators start at the same place. But what it registers with PyTorch
    can be registered only once: if it fails now and the same text was run before without an error, the module of then is taken.
    """
    path = own.path.resolve()
    name = path.stem + MARK
    spec = importlib.util.spec_from_file_location(name, own.path, loader=_AsItIs(name, str(own.path)))
    assert spec is not None
    assert spec.loader is not None
    source = path.read_bytes()
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with _beside(own.flag, str(path.parent)):
        try:
            spec.loader.exec_module(module)
        except Exception:
            earlier, found = _ran.get(path, (None, module))
            if earlier != source:
                raise
            module = sys.modules[spec.name] = found
    _ran[path] = source, module
    return module


_ran: dict[Path, tuple[bytes, ModuleType]] = {}
"""What the files held when they were last run without an error, and the modules that this made."""

# Where modules beside the files are imported from. Folders may hold namesakes: a model's utils.py, and a rule's.
_folders: dict[str, str] = {}
"""By flag, the folder of its file that was run last."""
_added: set[str] = set()
"""Folders that were put on the import path."""
_earlier: dict[str, frozenset[str]] = {}
"""By folder, what had been imported before a file in it was run: none of it belongs to the file."""
_kept: dict[str, dict[str, ModuleType]] = {}
"""By folder, the modules in it that the files have imported."""


@contextmanager
def _beside(flag: str, folder: str) -> Iterator[None]:
    """Let the body import what is beside a file, and not the namesakes beside other files; afterwards, what is beside the
    files of other flags can be imported too, where it has no namesake here."""
    others = set(_folders.values()) - {folder}
    for other in others:
        found = [name for name, module in sys.modules.items() if _is_in(other, name, module)]
        _kept[other] |= {name: sys.modules.pop(name) for name in found}
    if folder not in _earlier:
        _earlier[folder] = frozenset(name.partition(".")[0] for name in sys.modules)
    sys.modules.update(_kept.setdefault(folder, {}))
    _folders[flag] = folder
    for left in _added - set(_folders.values()):
        _added.remove(left)
        with suppress(ValueError):
            sys.path.remove(left)
    if folder in _added and folder in sys.path:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
        _added.add(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        here = {name.partition(".")[0] for name in sys.modules}
        for other in set(_folders.values()) - {folder}:
            modules = _kept[other].items()
            sys.modules.update({name: module for name, module in modules if name.partition(".")[0] not in here})


def _is_in(folder: str, name: str, module: ModuleType) -> bool:
    """Whether a module came from that folder, since a file in it was run."""
    top = name.partition(".")[0]
    if top in _earlier[folder] or name.endswith(MARK):
        return False
    found = sys.modules.get(top, module)
    paths = [*getattr(found, "__path__", ())] or [getattr(found, "__file__", None)]
    return any(path and os.path.realpath(os.path.dirname(path)) == folder for path in paths)  # noqa: PTH120


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Undo what the body does to the working folder, the standard streams, and PyTorch's default type and device."""
    try:
        folder = os.getcwd()  # noqa: PTH109 (at every step)
    except OSError:  # it is gone
        folder = None
    streams = sys.stdin, sys.stdout, sys.stderr
    dtype, device = torch.get_default_dtype(), _device.CURRENT_DEVICE  # None if none was set
    try:
        yield
    finally:
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)
        surroundings.mend(streams)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if device != _device.CURRENT_DEVICE:
            torch.set_default_device(device)
