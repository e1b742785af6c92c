"""The experiments and models that come with casehard, wherever it is installed."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
SHIPPED = ("experiments/", "models/")


def shipped(name: str) -> str:
    """Where ``name`` is read from: a name that starts with ``experiments/`` or ``models/`` comes from the package where the working
    directory has none of that name; every other stands for itself.
    """
    path = PACKAGE / name
    return str(path) if name.startswith(SHIPPED) and not os.path.exists(name) and path.exists() else name
