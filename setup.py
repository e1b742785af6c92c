"""What pyproject.toml cannot say: a wheel knows the git revision that it was built from."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    """Writes ``casehard/REVISION`` beside the modules; an editable install asks git instead."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            revision = runpy.run_path(str(ROOT / "casehard" / "version.py"))["revision"]
            Path(self.build_lib, "casehard", "REVISION").write_text(revision(ROOT) + "\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildPy})
