"""Functions compiled by numba, kept on disk under a hash of everything that the machine code was made from.

numba's own cache (`cache=True`) looks at the one file in which a function stands: an edit of a helper in another file,
or of a constant there, changes nothing. It also fails at import where neither the package nor HOME can be written to.
Here the name of a kept file is a hash of bytecode and constants of the function and of all that it names, of its types,
the processor and the versions. So stale code cannot be loaded, checkouts of equal code share what was compiled, and
nodes with different processors can share the folder. Nothing is compiled before the first call.
"""

import hashlib
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import llvmlite
import numba
import numpy as np
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from xlstm_distill.contract.files import write_bytes_atomic

F = TypeVar("F", bound=Callable[..., Any])


def kernel(**options: Any) -> Callable[[F], F]:
    """Decorator: `numba.njit(nogil=True, **options)`, whose machine code is kept."""

    def compiled(function: F) -> F:
        dispatcher = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = _Kept(dispatcher)
        return dispatcher  # type: ignore[no-any-return]

    return compiled


def fingerprint(function: Any) -> str:
    """Hash of what a jitted function's machine code is made from, types and processor aside.

    Raises:
        TypeError: it names something of which no value can be told (a module but numpy, an object).
    """
    return hashlib.sha256(repr(_parts(function)).encode()).hexdigest()


def _parts(value: Any) -> Any:
    if isinstance(value, Dispatcher):
        return _parts(value.py_func), sorted(value.targetoptions.items())
    if isinstance(value, FunctionType) and not value.__closure__:
        named = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        return _code(value.__code__), value.__defaults__, [(name, _parts(named[name])) for name in sorted(named)]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, bool | int | float | str | tuple):
        return value
    if isinstance(value, ModuleType) and value.__name__ == "numpy":
        return value.__version__
    raise TypeError(f"a kernel names {value!r}, of which nothing tells whether it changed")


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _code(code: CodeType) -> Any:
    constants = [_code(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


@cache
def folder() -> Path | None:
    """Where machine code is kept: below the user's cache folder, else below the temporary one, else nowhere.

    Both must be the user's own and closed to others' writing, because what lies there is executed.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(home, "xdl", "numba"), Path(tempfile.gettempdir(), f"xdl-numba-{os.getuid()}")):
        try:
            if not place.is_absolute():
                continue
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.lstat()
        except OSError:
            continue
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if own and os.access(place, os.W_OK | os.X_OK):
            return place
    return None


class _Kept(NullCache):  # type: ignore[misc]
    """What numba asks for machine code before it compiles, and hands it to afterwards."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        if not (file := self._file(signature, context)):
            return None
        try:
            return CompileResult._rebuild(context, *pickle.loads(file.read_bytes()))
        except Exception:  # absent or damaged: it is compiled
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        file = self._file(signature, result.target_context)
        if file and not result.library.has_dynamic_globals:
            with suppress(OSError):  # a full disk costs the next process a compilation, this one nothing
                write_bytes_atomic(file, dumps(result._reduce()), durable=False)

    def _file(self, signature: Any, context: Any) -> Path | None:
        function = self._dispatcher.py_func
        versions = numba.__version__, llvmlite.__version__, sys.implementation.cache_tag
        whole = fingerprint(self._dispatcher), str(signature), context.codegen().magic_tuple(), versions
        key = hashlib.sha256(repr(whole).encode()).hexdigest()[:24]
        return place / f"{function.__module__}.{function.__name__}-{key}.nbc" if (place := folder()) else None
