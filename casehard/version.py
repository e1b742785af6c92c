"""Which casehard this is."""

import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BUILT = PACKAGE / "REVISION"  # of a wheel, which setup.py writes


def revision(root: Path = PACKAGE.parent) -> str:
    """The git revision of this code: of its checkout, with ``-dirty`` behind it where files differ, else of the checkout that the
    wheel was built from; "unknown" where neither is known.

    Args:
        root: of the checkout.
    """
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
    return BUILT.read_text(encoding="utf-8").strip() if BUILT.exists() else "unknown"


def version_of(package: str) -> str:
    """The version of a package that is installed; casehard's own where it is not: that of the checkout that this is."""
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "casehard":
            raise
        project: str = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        return project


def described() -> str:
    """Version and revision, as ``casehard --version`` prints them."""
    return f"casehard {version_of('casehard')}, git revision {revision()}"
