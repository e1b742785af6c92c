"""Set before anything loads: no network, one thread a process. What loads torch is imported by the workers alone."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core, and a toy model is no faster on two
os.environ["CASEHARD_CHECK_BORROWED"] = "1"  # who borrows a model changes nothing that it did not name

import pytest

# files of long tests, which are begun first, so that both workers end together
LONG = [
    "distributed",
    "attacks",
    "distributed_adapters",
    "cli",
    "device",
    "attack_ranks",
    "study",
    "docs",
    "report",
    "jobs",
    "patcher",
    "sbr",
    "roles",
    "loading_ranks",
    "conformance",
    "memory",
    "compile",
    "dashboard",
    "card",
    "adapters",
    "checkpoint",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model with random weights and the sandbox's tokenizer: two layers of 32, 36 thousand parameters."""
    from toy import save_toy_checkpoint

    folder = tmp_path_factory.mktemp("toy")
    save_toy_checkpoint(folder / "base", seed=2)  # of defenses that compare the model with that before its alignment
    return save_toy_checkpoint(folder / "model")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium as this machine has it."""
    path = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints, run in this process, which spares it the imports; a failing one gives its error."""
    from toy import ROOT

    import casehard

    def called(*args: str, fails: bool = False) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["casehard"])
        try:
            casehard.main(list(args))
            code: object = None
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        assert bool(code) == fails, shown.err
        return shown.err + str(code) if fails else shown.out

    return called


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked gpu is skipped where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, in the order of LONG; workers take the files as they stand."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
