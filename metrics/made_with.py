"""What an object was made with, as its name tells it: two of other settings are never taken for one."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

OWN = ("casehard",)  # where casehard's own classes are


class MadeWith:
    """Remembers the arguments that it was made with, whatever its subclass does with them."""

    name: str
    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "_given", _named(cls, args, kwargs))
        return made

    def settings(self) -> dict[str, Any]:
        """All that its result depends on besides what it is given: by default, what it was made with; of files, a hash."""
        return {name: _content(value) for name, value in self._given.items()}

    def defaults(self) -> dict[str, Any]:
        """Of ``settings``; one that has none here always counts."""
        return {name: default for name, default in _defaults(type(self)).items() if name in self.settings()}

    def named(self) -> str:
        """Its ``name``, ``marked`` with ``settings`` that are not ``defaults``."""
        settings, defaults = _told(self.settings()), _told(self.defaults())
        changed = {name: settings[name] for name in sorted(settings) if name not in defaults or settings[name] != defaults[name]}
        return marked(self.name, changed | self.derived())

    def derived(self) -> dict[str, Any]:
        """What tells a class that somebody derived from one of casehard's from that one: its name and own arguments."""
        bases = [kind for kind in type(self).__mro__ if issubclass(kind, MadeWith) and MadeWith not in (kind, *kind.__bases__)]
        foreign = [kind for kind in bases if kind.__module__.partition(".")[0] not in OWN]
        if not foreign or len(foreign) == len(bases):
            return {}
        known = {p.name for kind in bases if kind not in foreign for p in _parameters(kind)}
        own = {name: _content(value) for name, value in self._given.items() if name not in known}
        return _told({"class": f"{foreign[0].__module__}.{foreign[0].__qualname__}"} | own)


def marked(name: str, changed: Mapping[str, Any]) -> str:
    """A ``name``, and a short hash of the settings ``changed`` from their defaults if any: ``guard:x@1a2b3c4d``."""
    return f"{name}@{hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]}" if changed else name


def _named(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor by their names, those of ``**settings`` among them."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    try:
        found = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:  # the constructor will say so
        return {}
    flat: dict[str, Any] = {}
    for name, value in list(found.items())[1:]:
        flat |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return flat


def _parameters(kind: type) -> list[inspect.Parameter]:
    return list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]


def _defaults(kind: type) -> dict[str, Any]:
    """Of all constructors from the first class down to this."""
    return {p.name: p.default for base in reversed(kind.__mro__) for p in _parameters(base) if p.default is not p.empty}


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` as JSON has them."""
    found = {}
    for name, value in settings.items():
        try:
            found[name] = json.loads(json.dumps(value, default=_shown))
        except (TypeError, ValueError):  # keys that are no text, or a value that holds itself
            found[name] = _shown(value)
    return found


def _content(value: Any) -> Any:
    """A file's hash for its name."""
    if isinstance(value, (str, Path)) and len(str(value)) < 1024 and str(value) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _shown(value: Any) -> str:
    """An object in words that are the same in every process."""
    if isinstance(value, MadeWith):
        return value.named()
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
