"""Every check that needs a GPU, in one call of at most eight minutes: each part has a cap, what was found stays, a table is last.

`README.md` says what each part means. Nothing but the standard library is imported here: a server imports the rest, once, and a
part is a process forked from it, which so begins at once. It needs no network and no installation: a stock image with torch,
transformers, lightning, peft and pytest, and a folder of the pure-Python wheels that the image lacks (`--wheels_for` makes it).
"""

import argparse
import faulthandler
import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from device_plan import LIMIT, ROOT, STAGES, Part, judged
from device_table import table

HERE = Path(__file__).resolve().parent
SAY_WHERE = 0.95  # of its cap: when a part says what it is at
LACKING = ["jsonargparse", "docstring_parser", "typeshed_client", "datasets", "dill", "multiprocess", "gguf", "liger_kernel"]
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "pytest",
    "casehard.cli.lightning_cli",
]
# ---- processes


def run_part(call: str, settings: dict[str, Any], log: str, path: list[str], cap: float) -> None:
    """In a process of its own: call the part, all that it prints in a file, and where it stands shortly before its cap."""
    os.setsid()  # a group, to be killed with all that it starts
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(cap * SAY_WHERE, file=2)
    os.chdir(ROOT)
    sys.path[:0] = [entry for entry in path if entry not in sys.path]
    script, _, function = call.partition(":")
    getattr(import_module(script), function)(**settings)


class Running:
    """A part that runs.

    Args:
        part: which.
        settings: its arguments.
        scratch: where it leaves its log and figures.
        how: forkserver or spawn.
    """

    def __init__(self, part: Part, settings: dict[str, Any], scratch: Path, how: str) -> None:
        self.part = part
        self.log, self.figures = scratch / f"{part.name}.log", scratch / f"{part.name}.json"
        self.figures.unlink(missing_ok=True)
        self.looked_at = 0
        args = (part.call, {**settings, "figures": str(self.figures)}, str(self.log), sys.path, part.cap)
        self.process = mp.get_context(how).Process(target=run_part, args=args)  # type: ignore[attr-defined]
        self.process.start()  # the first one waits for the server's imports
        self.begun = time.monotonic()

    def has_news(self) -> bool:
        """Whether it has left other figures since it was last asked."""
        before = self.looked_at
        self.looked_at = self.figures.stat().st_mtime_ns if self.figures.exists() else 0
        return self.looked_at != before

    def kill(self) -> None:
        """It and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it had no group yet
        self.process.join()

    def found(self, status: str) -> dict[str, Any]:
        """What is known of it so far, and the last that it printed."""
        figures = json.loads(self.figures.read_text()) if self.figures.exists() else {}
        text = self.log.read_bytes().decode(errors="replace") if self.log.exists() else ""
        lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]  # of a bar, where it stood last
        seconds = round(time.monotonic() - self.begun, 1)
        return {"status": status, "seconds": seconds, "figures": figures, "printed": [line[:300] for line in lines if line][-60:]}


@contextmanager
def ended_with_this() -> Iterator[list[Running]]:
    """Whatever ends this process ends those too that the block adds to the list."""

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    running: list[Running] = []
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield running
    finally:
        for each in running:
            each.kill()
        signal.signal(signal.SIGTERM, before)


# ---- a call


class Check:
    """What a call has found so far, on disk at all times.

    Args:
        out: folder of ``device.json`` and ``device.log``.
        tiny: whether parts are so.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        self.file, self.log = out / "device.json", out / "device.log"
        out.mkdir(parents=True, exist_ok=True)
        kept = json.loads(self.file.read_text()) if self.file.exists() else {"tiny": tiny, "parts": {}}
        if kept["tiny"] != tiny:
            sys.exit(f"--out must be a folder of calls that agree on --tiny, and {out} is of other ones. Choose another folder.")
        self.parts: dict[str, dict[str, Any]] = kept["parts"]
        self.tiny = tiny

    def planned(self, part: Part, chosen: Collection[str], given: Mapping[str, str | None]) -> tuple[Part, dict[str, Any]] | None:
        """A part that is to run, with its settings; None where it is not. Says which."""
        settings, missing = filled({**part.settings, **part.tiny} if self.tiny else part.settings, given)
        if part.package is not None and not self.tiny and find_spec(part.package) is None:
            missing.append(part.package)
        again = part.name in ("machine", "smollm2")  # which the others need
        plan = f"at most {part.cap} s"
        if part.name not in chosen or (missing and again):
            plan = "left out"
        elif missing:
            plan = f"left out: needs {', '.join(missing)}"
            self.put(part.name, {"status": plan, "seconds": 0.0})
        elif self.parts.get(part.name, {}).get("status") == "done" and not again:
            plan = "done before"
        say(f"  {part.name:20} {plan}")
        return (part, settings) if plan.startswith("at most") else None

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Keep what is known of a part."""
        self.parts[name] = found
        whole = {"tiny": self.tiny, "goals": judged(self.parts, self.tiny), "parts": self.parts}
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(whole, indent=1))
        beside.replace(self.file)

    def close(self, each: Running, status: str) -> None:
        """A part has ended."""
        self.put(each.part.name, found := each.found(status))
        with self.log.open("a") as file:
            text = each.log.read_text(errors="replace") if each.log.exists() else ""
            file.write(f"==== {each.part.name}: {status}, {found['seconds']} s\n{text}\n")
        say(f"{each.part.name}: {status}, {found['seconds']} s")
        for line in found["printed"][-3:] if status != "done" else []:
            say(f"    {line}")

    def run(self, stage: list[tuple[Part, dict[str, Any]]], scratch: Path, how: str, deadline: float) -> None:
        """The parts of a stage, side by side, until the last has ended or had its time."""
        with ended_with_this() as running:
            for part, settings in stage:
                running.append(Running(part, settings, scratch, how))
            while running:
                for each in list(running):
                    ends = min(each.begun + each.part.cap, deadline)
                    if (status := each.process.exitcode) is not None:
                        each.kill()  # what it may have left behind
                        self.close(each, "failed" if status else "done")
                    elif time.monotonic() > ends:
                        each.kill()
                        self.close(each, "cut off at its cap" if ends < deadline else "cut off at the end of the call")
                    else:
                        if each.has_news():
                            self.put(each.part.name, each.found("running"))
                        continue
                    running.remove(each)
                time.sleep(0.1)


def say(text: str) -> None:
    print(text, flush=True)


def filled(settings: Mapping[str, Any], given: Mapping[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Settings with what was given, and what they need that was not."""
    full, missing = dict(settings), []
    for name, value in settings.items():
        if isinstance(value, str) and (asked := re.fullmatch(r"{(\w+)}", value)):
            full[name] = given[asked[1]]
            missing += [f"--{asked[1]}"] if given[asked[1]] is None else []
    return full, missing


def placed(smollm2: str | None, data: str | None, rows: str | None, scratch: Path) -> dict[str, str | None]:
    """What was given, by the names that ``device_plan.Part`` fills in, its paths good in any folder."""
    model = smollm2 and str(Path(smollm2).resolve())
    gguf = model if model and model.endswith(".gguf") else None
    folder = data and str(Path(data).resolve())
    source = str(Path(rows).resolve()) if rows and Path(rows).exists() else rows
    return {
        "smollm2": str(scratch / "smollm2") if gguf else model,
        "gguf": gguf,
        "data": folder,
        "rows": source or (folder and f"{folder}/sst2_beavertails_train.json"),
    }


def prepare(wheels: str | None, scratch: Path) -> None:
    """Make what is imported importable, here and in all processes: the repository, the scripts here, the wheels unpacked."""
    site = scratch / "site-packages"  # whose modules count as installed
    site.mkdir()
    for wheel in sorted(Path(wheels).glob("*.whl")) if wheels is not None else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path[:0] = paths = [str(site), str(ROOT), str(HERE)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not take it, or nobody could fork afterwards
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
    forkserver.set_forkserver_preload(PRELOADED)


def download(folder: str, python: str) -> None:
    """The wheels that a stock image lacks, in the versions of ``constraints.txt``, for any machine."""
    pure = ["--no-deps", "--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none"]
    where = [f"--python-version={python}", "-c", str(ROOT / "constraints.txt"), "-d", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *pure, *where, *LACKING], check=True)


def main(
    out: str = "device",
    wheels: str | None = None,
    smollm2: str | None = None,
    data: str | None = None,
    rows: str | None = None,
    parts: list[str] | None = None,
    skip: list[str] | None = None,
    seconds: int = LIMIT,
    tiny: bool = False,
    wheels_for: str | None = None,
    python: str = "3.12",
) -> int:
    """Run the parts that are not done yet, and print the table.

    Args:
        out: folder of ``device.json`` and ``device.log``; a second call goes on with what is missing there.
        wheels: folder of wheels, unpacked for this call.
        smollm2: folder of SmolLM2-135M-Instruct, or its GGUF file.
        data: folder of real rows, as ``real_rows.main`` wants them.
        rows: source of real chat rows; null takes ``data``'s SST-2 and BeaverTails.
        parts: names of the only ones to run.
        skip: names of those to leave out.
        seconds: of the whole call.
        tiny: every part on the CPU with the sandbox, to see that it works; nothing is judged.
        wheels_for: make the folder of wheels, and no more.
        python: version that the wheels are for.

    Returns:
        Exit status: 1 where a part failed or was cut off.
    """
    if wheels_for is not None:
        download(wheels_for, python)
        return 0
    deadline = time.monotonic() + seconds
    names = [part.name for stage in STAGES for part in stage]
    for name in [*(parts or []), *(skip or [])]:
        if name not in names:
            sys.exit(f"--parts and --skip must name parts, of {', '.join(names)}, got {name}.")
    check, scratch = Check(Path(out).resolve(), tiny), Path(tempfile.mkdtemp(prefix="casehard_device_"))
    given = placed(smollm2, data, rows, scratch)
    chosen = {"machine", "smollm2", *(name for name in parts or names if name not in (skip or []))}
    say(f"at most {seconds} s; what is found goes to {check.file}")
    how = "forkserver"
    try:
        prepare(wheels, scratch)
        stages = [[each for part in stage if (each := check.planned(part, chosen, given))] for stage in STAGES]
        for stage in stages:
            if time.monotonic() > deadline:
                for part, _ in stage:
                    before = check.parts.get(part.name, {})
                    check.put(part.name, {"figures": {}, **before, "status": "no time left", "seconds": 0.0})
                continue
            check.run(stage, scratch, how, deadline)
            if stage is stages[0] and check.parts["machine"]["status"] == "failed":
                say("a forked process cannot use the device: every part imports for itself")
                how = "spawn"
                check.run(stage, scratch, how, deadline)
                if check.parts["machine"]["status"] == "failed":
                    break
        say("\n" + "\n".join(table(check.parts, judged(check.parts, tiny))))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(any(each["status"].startswith(("failed", "cut off", "no time")) for each in check.parts.values()))


def from_command_line() -> dict[str, Any]:
    """The arguments of ``main``."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheels", "smollm2", "data", "rows", "wheels_for"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--out", default="device")
    parser.add_argument("--parts", nargs="+")
    parser.add_argument("--skip", nargs="+")
    parser.add_argument("--seconds", type=int, default=LIMIT)
    parser.add_argument("--tiny", nargs="?", type=json.loads, const=True, default=False)
    parser.add_argument("--python", default="3.12")
    return vars(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main(**from_command_line()))
