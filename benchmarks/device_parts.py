"""What `device.py` checks that no other script measures: the tests marked gpu, and the main job."""

import json
import os
import platform
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import attacked, fits

from casehard.lightning_modules.backbone import Backbone
from casehard.records.files import write_whole
from casehard.version import revision

ROOT = Path(__file__).parent.parent
SLOW = 40  # seconds after which a test says where it stands


def machine(device: str, figures: str) -> None:
    """What this is, and whether the device works."""
    found = {name: import_module(name).__version__ for name in ("torch", "transformers", "lightning", "peft")}
    found |= {"python": platform.python_version(), "revision": revision(), "cpus": os.cpu_count(), "device": device}
    torch.ones(8, device=device).sum().item()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    write_whole(Path(figures), json.dumps(found))
    print(", ".join(f"{name} {value}" for name, value in found.items()))


def smollm2(checkpoint: str, folder: str, figures: str) -> None:
    """Leave the model of a GGUF file as a Hugging Face folder, which loads at once."""
    model = Backbone().load(checkpoint)
    model.save_pretrained(folder)
    Backbone().load_tokenizer(checkpoint).save_pretrained(folder)
    write_whole(Path(figures), json.dumps({"parameters": model.num_parameters()}))


class Outcomes:
    """A plugin of pytest that keeps the outcome of every test once it is known."""

    def __init__(self, figures: str) -> None:
        self.figures = figures
        self.found: dict[str, Any] = {"passed": [], "failed": {}, "skipped": [], "seconds": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.found["seconds"][name] = self.found["seconds"].get(name, 0.0) + report.duration
        if report.failed:
            self.found["failed"][name] = report.longreprtext.strip().splitlines()[-1]
        elif report.skipped:
            self.found["skipped"].append(name)
        elif report.when == "call":
            self.found["passed"].append(name)
        write_whole(Path(self.figures), json.dumps(self.found))


def tests(files: list[str], workers: int, figures: str) -> None:
    """Run the tests marked gpu. What another version of a package warns of fails none of them.

    Args:
        files: with the tests; all that have some where there is none.
        workers: processes that share them; 0 for this one.
        figures: file that gets what is known so far.
    """
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of tests that run this
        del os.environ[name]
    named = [str(ROOT / file) for file in files] or [
        str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    shared = ["-n", str(workers), "--dist", "load", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    settings = ["-m", "gpu", "-W", "default", "-rfE", "-c", str(ROOT / "pyproject.toml"), "-o", f"faulthandler_timeout={SLOW}"]
    sys.exit(pytest.main([*settings, *shared, *named], plugins=[Outcomes(figures)]))


def main_job(devices: list[str], settings: list[str], figures: str) -> None:
    """The README's first command on every device, side by side: how long each takes, and what the attacks come to.

    Args:
        devices: accelerators by Lightning's names.
        settings: further words of the command lines.
        figures: file that gets what is known so far.
    """
    begun, took = time.perf_counter(), dict.fromkeys(devices, float("nan"))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        def look(ended: dict[str, int | None]) -> None:
            for device, status in ended.items():
                if status is None:
                    took[device] = time.perf_counter() - begun
            jobs = {device: {"seconds": took[device], "ended": status} for device, status in ended.items()}
            write_whole(Path(figures), json.dumps({d: job | {"scores": attacked(root / "job" / d)} for d, job in jobs.items()}))

        words = ["--config", str(ROOT / "experiments/sbr.yaml"), f"--run.root={scratch}", "--run.experiment=job", *settings]
        runs = {device: [*words, f"--run.version={device}", f"--trainer.accelerator={device}"] for device in devices}
        if failed := fits(runs, root, look):
            sys.exit("\n".join(f"{device} {why}" for device, why in failed.items()))
