"""Run a function once a module of another library has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if a module is imported already, else right after its import.

    Args:
        name: the module's full name.
        action: what to call, once.

    Example:
        >>> after_import("json", lambda: print("json is imported"))
        json is imported
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and adds an action to the end of its import. It stays until it is imported:
    programs also ask for the specs of modules that they do not import."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action
        self.is_asking = False  # for the module's spec; the import system lets one thread at a time import a module

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the module, whose loader also calls the action; None for other modules."""
        if fullname != self.name or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run_module = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            """Run the module, then the action."""
            loader.exec_module = run_module
            run_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        loader.exec_module = exec_module
        return spec
