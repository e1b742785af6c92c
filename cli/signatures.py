"""What casehard's classes and functions take, read off their sources: importing them costs five seconds of torch."""

import ast
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import docstring_parser

import casehard
from casehard.shipped import PACKAGE

Node = ast.ClassDef | ast.FunctionDef
ABSTRACT = ("ABC", "Protocol")


@dataclass(frozen=True)
class Setting:
    """What a class or a function takes: a name, its annotation and default as they are written, and what the docstring says."""

    name: str
    kind: str
    default: str | None  # None: it must be given
    what: str
    module: str  # where it is written

    @property
    def group(self) -> "Source | None":
        """The dataclass whose fields it holds, if it holds one."""
        names = [] if "[" in self.kind else self.kind.split(" | ")
        return next((found for name in names if (found := find(self.module, name)) and found.is_dataclass), None)


@dataclass(frozen=True)
class Source:
    """A class or function, and the module that defines it."""

    module: str
    node: Node

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        return first_sentence(self.text.partition("\n\n")[0])

    @property
    def text(self) -> str:
        """Its docstring up to the settings."""
        return inspect.cleandoc(ast.get_docstring(self.node) or "").partition("\nArgs:")[0].strip()

    @property
    def is_dataclass(self) -> bool:
        """Whether its settings are its fields."""
        return any("dataclass" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    @property
    def is_abstract(self) -> bool:
        """Whether only what derives from it can be made."""
        return any(name in ABSTRACT for name in self.base_names()) or bool(
            re.search(r"@abstractmethod|raise NotImplementedError", ast.unparse(self.node))
        )

    def base_names(self) -> list[str]:
        """The classes that it derives from, without their modules."""
        return [ast.unparse(base).rpartition(".")[2] for base in self.node.bases] if isinstance(self.node, ast.ClassDef) else []

    def bases(self) -> list["Source"]:
        """Those of them that are casehard's."""
        packages = ("casehard", self.module.partition(".")[0])
        return [base for name in self.base_names() if (base := find(self.module, name, packages))]

    def is_a(self, base: str) -> bool:
        """Whether it is, or derives from, the class that casehard calls ``base``, or one of that name where casehard has none."""
        known = find(casehard.MODULES.get(base, ""), base)
        return base in (self.node.name, *self.ancestors()) if known is None else known in (self, *self.lineage())

    def lineage(self) -> Iterator["Source"]:
        """All classes that it derives from and that are casehard's."""
        for base in self.bases():
            yield base
            yield from base.lineage()

    def ancestors(self) -> Iterator[str]:
        """Names of all classes that it derives from, as far as casehard's sources tell."""
        yield from self.base_names()
        for base in self.bases():
            yield from base.ancestors()

    def settings(self) -> list[Setting]:
        """What it takes, with what ``**settings`` passes on to the class that it derives from."""
        doc = docstring_parser.parse(ast.get_docstring(self.node) or "", docstring_parser.DocstringStyle.GOOGLE)
        said = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
        return [setting if setting.what else replace(setting, what=said.get(setting.name, "")) for setting in self._settings()]

    def names(self, prefix: str = "") -> list[str]:
        """Names of all that it takes, of groups of settings those within them."""
        named = [(f"{prefix}{setting.name}", setting.group) for setting in self.settings()]
        return [part for name, group in named for part in (group.names(f"{name}.") if group else [name])]

    def _settings(self) -> list[Setting]:
        function = self.node if isinstance(self.node, ast.FunctionDef) else _constructor(self.node)
        if function is None:
            return self._fields() if self.is_dataclass else self._of_base([], [])
        skipped = 0 if function is self.node else 1  # self
        arguments, given = function.args.args[skipped:], function.args.defaults
        defaults = [*[None] * (len(arguments) - len(given)), *given, *function.args.kw_defaults]
        own = [
            self._setting(a.arg, a.annotation, d) for a, d in zip([*arguments, *function.args.kwonlyargs], defaults, strict=True)
        ]
        if function.args.kwarg is None or function is self.node:
            return own
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
        passed = [part for call in calls for part in (*range(len(call.args)), *(k.arg for k in call.keywords if k.arg))]
        return own + self._of_base([setting.name for setting in own], passed)

    def _fields(self) -> list[Setting]:
        fields = [part for part in self.node.body if isinstance(part, ast.AnnAssign)]
        return [self._setting(ast.unparse(field.target), field.annotation, field.value) for field in fields]

    def _of_base(self, own: list[str], passed: list[int | str]) -> list[Setting]:
        """Those of the class that it derives from, but for its own and those that its constructor gives it by itself."""
        settings = [(number, setting) for base in self.bases()[:1] for number, setting in enumerate(base.settings())]
        return [s for number, s in settings if s.name not in own and s.name not in passed and number not in passed]

    def _setting(self, name: str, annotation: ast.expr | None, value: ast.expr | None) -> Setting:
        kind = "" if annotation is None else ast.unparse(annotation)
        return Setting(name, kind, None if value is None else self._default(ast.unparse(value)), "", self.module)

    def _default(self, text: str) -> str:
        made = re.fullmatch(r"field\(default_factory=(?:lambda: )?(.*)\)", text)
        text = {"list": "[]", "dict": "{}"}.get(made[1], made[1]) if made else text
        constants = {
            ast.unparse(line.targets[0]): ast.unparse(line.value)
            for line in _parsed(_file(self.module)).body
            if isinstance(line, ast.Assign)
        }
        return re.sub(r"\b[A-Z][A-Z_]+\b", lambda found: constants.get(found[0], found[0]), text)


def first_sentence(text: str) -> str:
    """Of a text, in one line."""
    return re.split(r"(?<=[^.]\.)\s(?=[A-Z`])", " ".join(text.split()))[0]


def find(module: str, name: str, packages: Collection[str] = ("casehard",)) -> Source | None:
    """What a name means in a module of casehard's, or of other ``packages``; None where it is of none of them.

    Nothing is imported. A name of casehard itself (``casehard.Defense``) is found wherever it is used.
    """
    if module.partition(".")[0] not in packages:
        return None
    if module == "casehard":
        return find(casehard.MODULES.get(name, ""), name)
    for node in _parsed(_file(module)).body:
        if isinstance(node, Node) and node.name == name:
            return Source(module, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(_imported(module, node), alias.name, packages)
    return find("casehard", name) if module.partition(".")[0] != "casehard" else None


def _imported(module: str, node: ast.ImportFrom) -> str:
    """The module that a line imports from, also where it is given from here on."""
    package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
    above = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def classes(module: str) -> list[Source]:
    """All classes that a module defines, but for those whose names begin with an underscore."""
    return [Source(module, n) for n in _parsed(_file(module)).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def of_lightning(file: Path, name: str) -> list[Setting]:
    """What a class of Lightning's takes; its constructor has the docstring."""
    node = next(node for node in _parsed(file).body if isinstance(node, ast.ClassDef) and node.name == name)
    constructor = _constructor(node)
    assert constructor is not None
    constructor.args.args = constructor.args.args[1:]
    return Source("", constructor).settings()


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


def _file(module: str) -> Path:
    """The source of a module, wherever its package is; a path that is not there where it has none."""
    top, *rest = module.split(".")
    path = (PACKAGE if top == "casehard" else folder_of(top)).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def folder_of(package: str) -> Path:
    """The folder of a package, or its only file without ``.py``; nothing is imported."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return Path(package)
    return Path(next(iter(spec.submodule_search_locations or [str(spec.origin).removesuffix(".py")])))


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")
