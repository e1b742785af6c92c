"""``casehard list``: what there is to choose from, casehard's own and other packages', read off their sources."""

import ast
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import casehard
from casehard.cli.plugins import plugins
from casehard.cli.signatures import Source, classes, find, first_sentence, folder_of
from casehard.metrics.errors import SettingError
from casehard.metrics.names import guess
from casehard.shipped import PACKAGE

BASES = {"defenses": "Defense", "attacks": "Attack", "judges": "Judge", "metrics": "Metric"}
KINDS = (*BASES, "experiments")
ROOMS = ("lightning_modules", "callbacks", "datamodules", "metrics")  # those that have them


@dataclass(frozen=True)
class Entry:
    """What may be chosen.

    Args:
        name: short where it has a short one.
        where: the class path, or the file.
        whose: the package that it is of.
        acts: stages of a defense, threat models of an attack.
        what: the first sentence of its docstring, or of the comment at its top.
    """

    name: str
    where: str
    whose: str
    acts: str
    what: str


def listed(kinds: list[str], package: str | None = None) -> str:
    """The lists, as the terminal has them.

    Args:
        kinds: which; all where there are none.
        package: one more to look into, which declares no entry points.

    Raises:
        SettingError: no such kind or package.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise SettingError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.{guess(kind, KINDS)}")
    if package is not None and not (folder_of(package).is_dir() or folder_of(package).with_suffix(".py").is_file()):
        raise SettingError(f"package must be one that Python finds, and {package!r} is none. Add its folder to PYTHONPATH.")
    width = min(shutil.get_terminal_size((100, 24)).columns, 130)
    lines: list[str] = []
    for kind in kinds or KINDS:
        lines += [f"{kind}:"]
        for entry in _experiments() if kind == "experiments" else _classes(BASES[kind], package):
            beside = " | ".join(filter(None, (entry.acts, entry.whose, entry.where)))
            lines += [f"  {entry.name}  ({beside})"]
            lines += textwrap.wrap(entry.what.replace("``", "`"), width, initial_indent="      ", subsequent_indent="      ")
        lines += [""]
    return "\n".join(lines).rstrip()


def _classes(base: str, package: str | None) -> Iterator[Entry]:
    stages = _stage_of() if base == "Defense" else {}
    found = list(_sources(package))
    bases = [base for _, source, whose in found if whose == "casehard" for base in source.lineage() if not _is_public(base)]
    for name, source, whose in found:
        if source.is_a(base) and not source.is_abstract and source not in bases:
            acts = "+".join(_stages(source, stages)) or "undefended" if stages else _threats(source) if base == "Attack" else ""
            adaptive = _adaptive(source) if stages else ""
            what = source.summary + (f" Adaptive attacker: --config {adaptive}." if adaptive else "")
            where = f"casehard.{name}" if _is_public(source) else f"{source.module}.{source.node.name}"
            yield Entry(name, where, whose, acts, what)


def _is_public(source: Source) -> bool:
    return casehard.MODULES.get(source.node.name) == source.module


def _sources(package: str | None) -> Iterator[tuple[str, Source, str]]:
    """Every class of casehard's rooms, and of other packages those that they declare; all of ``package``."""
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("*.py")):
            for source in classes(f"casehard.{room}.{file.stem}"):
                yield source.node.name, source, "casehard"
    for plugin in plugins().values():
        if found := find(plugin.module, plugin.kind, (plugin.module.partition(".")[0],)):
            yield plugin.name, found, plugin.package
    if package is not None:
        folder = folder_of(package)
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        declared = {plugin.class_path for plugin in plugins().values()}
        for file in files:
            module = ".".join([package, *file.relative_to(folder.parent).with_suffix("").parts[1:]]).removesuffix(".__init__")
            for source in classes(module):
                if f"{module}.{source.node.name}" not in declared:
                    yield f"{module}.{source.node.name}", source, package


def _stage_of() -> dict[str, str]:
    """The stage that a method acts in, as the base class of every defense has it."""
    tree = ast.parse((PACKAGE / "lightning_modules" / "defense.py").read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "STAGE_OF" and n.value)
    stages: dict[str, str] = ast.literal_eval(found.value)  # type: ignore[arg-type]
    return stages


def _stages(source: Source, stage_of: dict[str, str]) -> list[str]:
    """Stages of a defense, in order of time: of the methods that it has, or that it declares."""
    acts: set[str] = set()
    for kind in (source, *source.lineage()):
        if kind.node.name == "Defense":
            break
        acts |= {stage_of[part.name] for part in kind.node.body if isinstance(part, ast.FunctionDef) and part.name in stage_of}
        declared = [part for part in kind.node.body if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "stages"]
        acts |= {stage for part in declared for stage in stage_of.values() if f"'{stage}'" in ast.unparse(part)}
    return [stage for stage in dict.fromkeys(stage_of.values()) if stage in acts]


def _adaptive(source: Source) -> str:
    """The attacker that a defense names; "" where it names none."""
    for part in (part for kind in (source, *source.lineage()) for part in kind.node.body if isinstance(part, ast.Assign)):
        if ast.unparse(part.targets[0]) == "adaptive":
            return str(ast.literal_eval(part.value))
    return ""


def _threats(source: Source) -> str:
    """Threat models of an attack: the only one where it has a default."""
    setting = next((setting for setting in source.settings() if setting.name == "threat_model"), None)
    return "service or open weights" if setting is None or setting.default is None else setting.default.strip("'\"")


def _experiments() -> Iterator[Entry]:
    """Those that come with casehard, and those of the working directory."""
    for folder, whose in ((Path("experiments"), "here"), (PACKAGE / "experiments", "casehard")):
        if folder.resolve() == (PACKAGE / "experiments").resolve() and whose == "here":
            continue
        for file in sorted(folder.rglob("*.yaml")):
            name = str(file.relative_to(folder).with_suffix(""))
            if name != "default":
                yield Entry(name, str(Path("experiments", f"{name}.yaml")), whose, "", _comment(file))


def _comment(file: Path) -> str:
    """The first sentence of the comment at a file's top."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8", errors="replace").splitlines())
    return first_sentence(" ".join(line.lstrip("# ") for line in lines))
