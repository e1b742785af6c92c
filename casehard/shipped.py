"""The experiments and models that come with casehard, wherever it is installed."""

import difflib
import os
from pathlib import Path

from casehard.metrics.errors import SettingError

PACKAGE = Path(__file__).parent
SHIPPED = ("experiments/", "models/")


def shipped(name: str) -> str:
    """Where ``name`` is read from: a name that starts with ``experiments/`` or ``models/`` comes from the package where the working
    directory has none of that name; every other stands for itself.
    """
    path = PACKAGE / name
    return str(path) if name.startswith(SHIPPED) and not os.path.exists(name) and path.exists() else name


def experiment(name: str, folder: str = "experiments") -> str:
    """The file of an experiment: the user's own first, else one that comes with casehard; ``experiments/`` and ``.yaml`` may be left
    out, so that ``sbr`` and ``attack/quantised`` are names.

    Args:
        name: as the user wrote it.
        folder: where those that come with casehard are.

    Raises:
        SettingError: there is none of that name.
    """
    if os.path.isabs(name) or os.pardir in Path(name).parts:
        names = [name]
    else:
        names = [f"{place}{name}{end}" for place in ("", f"{folder}/") for end in ("", ".yaml")]
    for path in [*map(Path, names), *(PACKAGE / name for name in names if name.startswith(f"{folder}/"))]:
        if path.is_file():
            return str(path)
    raise SettingError(
        f"{name!r} must be a file or the name of one of casehard's own under {folder}/, and it is neither.{_near(name, folder)} "
        "`casehard list` lists those."
    )


def _near(name: str, folder: str) -> str:
    known = [path.relative_to(PACKAGE / folder).with_suffix("") for path in sorted((PACKAGE / folder).rglob("*.yaml"))]
    names = {path.name: str(path) for path in known} | {str(path): str(path) for path in known}
    wanted = name.removeprefix(f"{folder}/").removesuffix(".yaml")
    near = [names[key] for key in difflib.get_close_matches(wanted, names, n=3, cutoff=0.7)]
    return f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
