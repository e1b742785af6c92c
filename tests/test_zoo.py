"""Every method is a small file of its own: the seams carry the rest."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import ROOT

import casehard

ZOO = [
    "lightning_modules/booster.py", "lightning_modules/vaccine.py", "lightning_modules/repnoise.py", "lightning_modules/tar.py",
    "lightning_modules/lisa.py", "lightning_modules/safe_lora.py", "lightning_modules/sdd.py",
    "callbacks/quantised.py", "callbacks/jailbreak_tuning.py", "callbacks/encoded.py", "callbacks/selected_benign.py", "callbacks/refusal_ablation.py", "callbacks/embedding.py",
    "callbacks/preference.py",
    "callbacks/capability.py",
    "callbacks/latent.py",
    "callbacks/relearning.py",
    "callbacks/policy_gradient.py", "callbacks/kernel_ablation.py", "callbacks/delta.py", "callbacks/round_trip.py", "callbacks/virus.py",
]  # fmt: skip
MOST_LINES = 60
OUT_OF_REACH = {"trainer", "dist", "DTensor"}  # the framework's to know


@pytest.fixture(params=ZOO)
def file(request) -> Path:
    path = ROOT / request.param
    if not path.exists():
        pytest.skip(f"{request.param} is not there")
    return path


@pytest.fixture(scope="module")
def named() -> set[str]:
    """Every class that an experiment names."""
    configs = (ROOT / "experiments").rglob("*.yaml")
    return {path for config in configs for path in class_paths(yaml.load(config.read_text(), yaml.CSafeLoader))}


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold code: docstrings, comments, imports and blank lines do not count."""
    tree, left_out = ast.parse(source), set()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        for part in [node.body[0]] if documented else [node] if isinstance(node, ast.Import | ast.ImportFrom) else []:
            left_out |= set(range(part.lineno, part.end_lineno + 1))
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in nothing for line in range(t.start[0], t.end[0] + 1)}
    return code - left_out


def names(source: str) -> set[str]:
    """Every name that code uses, defines, imports or asks an object for."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(text := getattr(node, field, None), str):
                found |= set(text.split("."))
    return found


@cache
def underscores(file: Path) -> set[str]:
    """Underscore names that the classes of a file define in their bodies or set on ``self``."""
    found, tree = set(), ast.parse(file.read_text())
    for node in (node for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for node in ast.walk(owner)):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if name.startswith("_") and name != "_" and not name.startswith("__")}


def class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (value["class_path"] for _ in [0] if isinstance(value.get("class_path"), str))
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from class_paths(part)


def test_a_line_of_code_is_one_that_says_something():
    source = '"""A file."""\n\nimport os  # why\nfrom a import (\n    b,\n)\n\n\ndef f(x):  # so\n    """One."""\n    # two\n    return g(\n        """three\nfour""",\n\n    )\n'
    assert lines_of_code(source) == {9, 12, 13, 14, 16}


def test_a_method_takes_at_most_sixty_lines(file):
    assert len(lines_of_code(file.read_text())) <= MOST_LINES


def test_a_method_knows_nothing_of_trainers_and_ranks(file):
    assert not names(file.read_text()) & OUT_OF_REACH


def test_a_method_overrides_no_underscore_of_ours(file):
    others = [other for room in ("lightning_modules", "callbacks") for other in (ROOT / room).glob("*.py") if other != file]
    assert not underscores(file) & set().union(*map(underscores, others))


def test_an_experiment_names_the_method(file, named):
    module = f"casehard.{file.parent.name}.{file.stem}"
    classes = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    assert named & ({f"{module}.{name}" for name in classes} | {f"casehard.{name}" for name in {*classes} & {*casehard.__all__}})
