"""Classes that other packages offer to casehard by their short names: entry points of the group ``casehard``.

A package is imported where one of its names is asked for, and not before: what is installed costs no start anything.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import casehard

GROUP = "casehard"


@dataclass(frozen=True)
class Plugin:
    """A class of another package.

    Args:
        name: the short one.
        module: that has it.
        kind: its name there.
        package: that declares it.
    """

    name: str
    module: str
    kind: str
    package: str

    @property
    def class_path(self) -> str:
        """As a config has it."""
        return f"{self.module}.{self.kind}"


@cache
def plugins() -> dict[str, Plugin]:
    """By name, what the packages that are installed declare. Casehard's own names stay casehard's; of two the first counts."""
    found: dict[str, Plugin] = {}
    for point in entry_points(group=GROUP):
        module, _, kind = point.value.partition(":")
        offered = Plugin(point.name, module.strip(), kind.strip(), point.dist.name if point.dist else "an unknown package")
        other = found.get(offered.name)
        if offered.name in casehard.__all__ or (other is not None and other.class_path != offered.class_path):
            whose = "casehard" if other is None else other.package
            _warn(f"{offered.package} offers {offered.name}, and that is a name of {whose}: write {offered.class_path}.")
        else:
            found[offered.name] = offered
    return found


@cache
def known_as(name: str) -> str:
    """The path of the class that ``name`` is short for, once that is imported; ``name`` itself where it is short for none.

    A package that cannot be imported is warned of, once.
    """
    plugin = plugins().get(name)
    if plugin is None:
        return name
    try:
        getattr(import_module(plugin.module), plugin.kind)
    except Exception as error:  # whatever a package of somebody's does when it is imported
        _warn(
            f"{name} of {plugin.package} is left out: {plugin.class_path} cannot be imported ({type(error).__name__}: {error})."
        )
        return name
    return plugin.class_path


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
