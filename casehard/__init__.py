"""Casehard's public names, each imported when it is asked for; ``__init__.pyi`` lists them, for type checkers too.

What is not listed goes by its module, such as ``casehard.lightning_modules.sbr.SBRModule``.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
MODULES = {name.name: str(line.module) for line in _STUB.body if isinstance(line, ast.ImportFrom) for name in line.names}
__all__ = sorted(MODULES)


def __getattr__(name: str) -> Any:
    """The public name, from the module that has it."""
    if name not in MODULES:
        raise AttributeError(f"module 'casehard' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
