"""How Python objects hold others: in attributes, containers, closures, defaults, classes, and names in code.

`parts` lists what an object holds directly; `with_parts` copies an object with some of its parts replaced.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from loaders.nested import rebuild

# Longer lists and dicts are data; transforms are held in short ones.
_MANY = 1000
_ATOMS = (str, bytes, bytearray, int, float, complex, bool, type(None), np.dtype, CodeType, range)
# These run before any sample is read.
_BUILDERS = {"__init__", "__new__", "__post_init__", "__setstate__", "__init_subclass__", "__class_getitem__"}
# Folders of installed packages, and packages known by name: neither holds a pipeline of the user.
_INSTALLED = ("site-packages", "dist-packages")
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {
    "loaders",
    "torch",
    "torchvision",
    "numpy",
    "albumentations",
    "datasets",
}


class Part(NamedTuple):
    """An object that another one holds.

    Attributes:
        path: its name, appended to the holder's; for globals and members of classes it is complete.
        value: the object.
        key: for `with_parts`; None if it cannot be replaced.
        local: True if each thread has its own.
    """

    path: str
    value: Any
    key: Any = None
    local: bool = False


def parts(holder: Any, package: str) -> list[Part]:
    """What `holder` holds, except numbers, strings and numeric arrays, which cannot hold a transform.

    Args:
        holder: anything.
        package: top-level package of the user's code. Classes and code of other installed packages are not searched.
    """
    return [part for part in _parts(holder, package) if type(part.value) not in _ATOMS and not _is_data(part.value)]


def _is_data(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def _parts(holder: Any, package: str) -> Iterator[Part]:
    if isinstance(holder, type):
        if _is_users(holder.__module__, package):
            yield from _class_parts(holder, package, f"{holder.__qualname__}.", set())
            yield from _class_parts(type(holder), package, f"{holder.__qualname__}.", set())
        return
    if isinstance(holder, ModuleType):
        return
    if isinstance(holder, FunctionType):
        yield from _function_parts(holder, package)
    elif isinstance(holder, MethodType):
        yield Part("", holder.__self__, "self")
        yield Part("", holder.__func__, "func")
    elif isinstance(holder, (staticmethod, classmethod)):
        yield Part("", holder.__func__)
    elif isinstance(holder, property):
        yield from (Part("", part) for part in (holder.fget, holder.fset))
    elif isinstance(holder, functools.partial):
        yield Part("", holder.func, "func")
        yield from (Part(f"({number})", value, ("args", number)) for number, value in enumerate(holder.args))
        yield from (Part(f"({name}=)", value, ("keywords", name)) for name, value in holder.keywords.items())
    elif isinstance(holder, np.ndarray):
        if holder.size <= _MANY and holder.dtype == object:
            yield from (Part(f"[{number}]", value) for number, value in enumerate(holder.flat))
    elif isinstance(holder, weakref.ref):
        yield Part("", holder())
    elif isinstance(holder, (list, tuple, deque, set, frozenset)):
        if len(holder) <= _MANY:
            yield from (Part(f"[{number}]", value, ("item", number)) for number, value in enumerate(holder))
    elif isinstance(holder, dict):
        if len(holder) <= _MANY:
            yield from (Part(f"[{name!r:.40}]", value, ("item", name)) for name, value in list(holder.items()))
    elif not _has_attributes(holder) and gc.is_tracked(holder):
        # Of a type written in C: a generator, an iterator, a view …
        among = gc.get_referents(holder)
        if len(among) <= _MANY:
            yield from (Part("", value) for value in among if not isinstance(value, (type, ModuleType)))
    yield from _attributes(holder, package)


def _has_attributes(holder: Any) -> bool:
    return isinstance(_dict_of(holder), dict) or any(_slots(type(holder)))


def _dict_of(holder: Any) -> dict[str, Any] | None:
    if isinstance(holder, threading.local):
        return holder.__dict__  # this thread's
    try:
        found = object.__getattribute__(holder, "__dict__")  # not what a proxy returns
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _slots(kind: type[Any]) -> Iterator[tuple[str, MemberDescriptorType]]:
    for each in kind.__mro__:
        if "__slots__" in vars(each):
            yield from (
                (name, member) for name, member in vars(each).items() if isinstance(member, MemberDescriptorType)
            )


def _attributes(holder: Any, package: str) -> Iterator[Part]:
    own = _dict_of(holder) or {}
    local = isinstance(holder, threading.local)
    yield from (Part(f".{name}", value, ("attribute", name), local) for name, value in list(own.items()))
    for name, member in _slots(type(holder)):
        try:
            yield Part(f".{name}", member.__get__(holder), ("attribute", name))
        except AttributeError:
            continue  # not set
    if not isinstance(holder, (FunctionType, MethodType)):
        if type(type(holder)) is not type:
            yield Part("", type(holder))  # for what its metaclass holds
        yield from _class_parts(type(holder), package, ".", set(own))


def _class_parts(kind: type[Any], package: str, before: str, hidden: set[str]) -> Iterator[Part]:
    """What a class and its bases hold: attributes that are not overridden, and the code of methods."""
    for each in kind.__mro__:
        if not _is_users(each.__module__, package):
            continue
        for name, value in list(vars(each).items()):
            if name in hidden:
                continue
            hidden.add(name)
            if isinstance(value, (FunctionType, staticmethod, classmethod, property, functools.cached_property)):
                if name not in _BUILDERS:
                    yield Part(f"{each.__qualname__}.{name}", value)
            elif not (name.startswith("__") or name == "_abc_impl" or isinstance(value, MemberDescriptorType)):
                # Can be replaced on an object: its own attribute takes precedence over that of its class.
                yield Part(f"{before}{name}", value, ("attribute", name) if before == "." else None)


def _function_parts(function: FunctionType, package: str) -> Iterator[Part]:
    code, name = function.__code__, function.__qualname__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if variable == "__class__":
            continue  # for `super()`
        yield Part(f" of {name}, variable {variable}", _content(cell), ("cell", variable))
    for number, value in enumerate(function.__defaults__ or ()):
        yield Part(f" of {name}, default {number}", value, ("default", number))
    for keyword, value in (function.__kwdefaults__ or {}).items():
        yield Part(f" of {name}, default {keyword}", value, ("keyword", keyword))
    for path, value in _names_in(function, package):
        yield Part(path, value)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _names_in(function: FunctionType, package: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of the globals named in a user's function, and of the named attributes of modules among them."""
    module = function.__globals__.get("__name__", "")
    if not _is_users(module, package):
        return
    names = dict.fromkeys(_names_of(function.__code__))
    if names.keys() & {"globals", "getattr", "vars", "eval"}:
        names |= dict.fromkeys(_texts_of(function.__code__))
    spaces: list[tuple[str, dict[str, Any]]] = [(module, function.__globals__)]
    # A module imported inside the function is not among its globals.
    spaces += [(name, vars(sys.modules[name])) for name in names if _is_users(name, package) and name in sys.modules]
    seen = set()
    while spaces:
        module, space = spaces.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in names:
            value = space.get(name)
            if isinstance(value, ModuleType):
                spaces.append((value.__name__, vars(value)))
            elif value is not None:
                yield f"{module}.{name}", value


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)


def _texts_of(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts_of(constant)
        elif isinstance(constant, str):
            yield constant


@functools.lru_cache(1024)
def _is_users(module: Any, package: str) -> bool:
    """Whether a module belongs to the program and not to an installed library."""
    if not isinstance(module, str):
        return False
    top = module.partition(".")[0]
    if top in _LIBRARIES or top in ("__main__", "__mp_main__", package):
        return top not in _LIBRARIES
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)
    return not any(folder in str(file) for folder in _INSTALLED)


def with_parts(holder: Any, own: dict[Any, Any]) -> Any:
    """A shallow copy of `holder` with its parts replaced by those in `own`, by key; `holder` if it cannot be copied."""
    try:
        return _with_parts(holder, own)
    except Exception:  # noqa: BLE001  copying runs the user's code; if it fails, the original is shared
        return holder


def _with_parts(holder: Any, own: dict[Any, Any]) -> Any:
    def mine(kind: str, name: Any, value: Any) -> Any:
        return own.get((kind, name), value)

    clone: Any
    if isinstance(holder, MethodType):
        return MethodType(own.get("func", holder.__func__), own.get("self", holder.__self__))
    if isinstance(holder, FunctionType):
        code = holder.__code__
        cells = [
            CellType(own["cell", name]) if ("cell", name) in own else cell
            for name, cell in zip(code.co_freevars, holder.__closure__ or (), strict=True)
        ]
        itself = [number for number, cell in enumerate(cells) if _content(cell) is holder]
        for number in itself:
            cells[number] = CellType()
        defaults = holder.__defaults__ and tuple(mine("default", *pair) for pair in enumerate(holder.__defaults__))
        clone = FunctionType(code, holder.__globals__, holder.__name__, defaults, tuple(cells) or None)
        clone = functools.update_wrapper(clone, holder, updated=())
        for number in itself:
            cells[number].cell_contents = clone
        vars(clone).clear()
        vars(clone).update(vars(holder))
        clone.__kwdefaults__ = {
            name: mine("keyword", name, value) for name, value in (holder.__kwdefaults__ or {}).items()
        } or None
    elif isinstance(holder, functools.partial):
        arguments = [mine("args", *pair) for pair in enumerate(holder.args)]
        keywords = {name: mine("keywords", name, value) for name, value in holder.keywords.items()}
        clone = type(holder)(own.get("func", holder.func), *arguments, **keywords)
        vars(clone).update(vars(holder))
    elif isinstance(holder, tuple):
        clone = rebuild(holder, [mine("item", *pair) for pair in enumerate(holder)])
    elif isinstance(holder, (set, frozenset)):
        clone = type(holder)(mine("item", *pair) for pair in enumerate(holder))
    else:
        clone = copy.copy(holder)
        if clone is holder:
            return holder
        for key, value in own.items():
            if key[0] == "item":
                clone[key[1]] = value
    for key, value in own.items():
        if key[0] == "attribute":
            object.__setattr__(clone, key[1], value)
    return clone
