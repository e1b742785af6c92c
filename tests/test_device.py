"""`benchmarks/device.py`: every part runs on the CPU, and what one part does to itself does not touch the others."""

import json
import math
import os
import signal
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from toy import ROOT, start_fork_server

FAKES = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

def good(figures, **settings):
    import from_a_wheel
    Path(figures).write_text(json.dumps({"at": time.time_ns(), "wheel": from_a_wheel.NAME, **settings}))
    print("good")

def bad(figures, fixed="/nowhere"):
    print("\\r 1%\\r 99%")
    if not Path(fixed).exists():
        raise ValueError("no such thing")

def endless(figures):
    Path(figures).write_text(json.dumps({"so_far": 1}))
    child = subprocess.Popen(["sleep", "59.731"])
    print(child.pid, flush=True)
    time.sleep(60)

def reader(figures, file):
    while True:
        found = json.loads(Path(file).read_text())["parts"].get("endless", {})
        if (found.get("status"), found.get("figures")) == ("running", {"so_far": 1}):
            break
        time.sleep(0.02)

def ends_all(figures, whose):
    os.kill(whose, signal.SIGTERM)
    time.sleep(60)

def not_forked(figures, here):
    (Path(here) / "tried").open("a").write("x")
    if (Path(here) / "tried").read_text() != "xx":
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
"""


@pytest.fixture
def device(monkeypatch):
    start_fork_server()
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with mock.patch.dict(os.environ):
        import device

        yield device


@pytest.fixture
def fakes(device, monkeypatch, tmp_path):
    """Parts of a fake script take the place of the real ones; a wheel that a part needs stands in ``wheels``."""
    (tmp_path / "fakes.py").write_text(FAKES)
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/from_a_wheel-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("from_a_wheel.py", "NAME = 'wheel'\n")
    sys.path.insert(0, str(tmp_path))

    def put(*stages: list[tuple]) -> None:
        parts = [[device.Part(name, cap, f"fakes:{call}", *given) for name, cap, call, *given in stage] for stage in stages]
        monkeypatch.setattr(device, "STAGES", parts)

    def call(**settings) -> int:
        return device.main(str(tmp_path / "out"), str(tmp_path / "wheels"), **settings)

    return put, call, lambda: json.loads((tmp_path / "out/device.json").read_text())["parts"]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_fails_or_outstays_its_cap_is_said_so_and_the_rest_goes_on(fakes, tmp_path, capsys):
    put, call, kept = fakes
    file = str(tmp_path / "out/device.json")

    def stages(*endless: object) -> list[list[tuple]]:
        side_by_side = [
            ("first", 30, "good", {"value": 1}),
            ("bad", 30, "bad", {"fixed": str(tmp_path / "fixed")}),
            ("endless", *endless, {}),
            *([("reader", 4, "reader", {"file": file})] if endless == (1, "endless") else []),
        ]
        last = [
            ("last", 30, "good", {"value": 2}, {}, "from_a_wheel"),
            ("needy", 30, "good", {"model": "{smollm2}"}),
            ("poor", 30, "good", {}, {}, "no_such_package"),
        ]
        return [[("machine", 30, "good", {})], side_by_side, last]

    put(*stages(1, "endless"))
    assert call() == 1
    found = kept()
    assert {name: each["status"] for name, each in found.items()} == {
        "machine": "done",
        "first": "done",
        "bad": "failed",
        "endless": "cut off at its cap",
        "reader": "done",  # so what endless had found was on disk while it ran
        "last": "done",
        "needy": "left out: needs --smollm2",
        "poor": "left out: needs no_such_package",
    }
    assert [found[name]["figures"]["value"] for name in ("first", "last")] == [1, 2]
    assert found["last"]["figures"]["wheel"] == "wheel"
    assert found["endless"]["figures"] == {"so_far": 1}
    assert 1 <= found["endless"]["seconds"] < 3
    assert any(", line " in line and " in endless" in line for line in found["endless"]["printed"])  # where it stood
    assert not is_alive(int(found["endless"]["printed"][0]))  # its child, killed with it
    assert found["bad"]["printed"][0] == " 99%"
    assert found["bad"]["printed"][-1] == "ValueError: no such thing"
    shown = capsys.readouterr().out
    assert "\nendless: cut off at its cap, 1." in shown
    assert "    ValueError: no such thing\n" in shown
    assert "ValueError: no such thing" in (tmp_path / "out/device.log").read_text()

    (tmp_path / "fixed").touch()
    put(*stages(30, "good"))
    assert call() == 0
    again = kept()
    assert {each["status"] for name, each in again.items() if name not in ("needy", "poor")} == {"done"}
    assert [again[name]["figures"] for name in ("first", "last")] == [found[name]["figures"] for name in ("first", "last")]
    assert "  first                done before\n" in capsys.readouterr().out
    assert call(smollm2=str(tmp_path), parts=["needy"]) == 0
    assert kept()["needy"]["figures"]["model"] == str(tmp_path)


def test_a_call_ends_in_time_and_says_what_it_had_none_for(fakes):
    put, call, kept = fakes
    put([("machine", 30, "good", {})], [("endless", 30, "endless", {})], [("last", 30, "good", {})])
    assert call(seconds=1) == 1
    assert {name: each["status"] for name, each in kept().items()} == {
        "machine": "done",
        "endless": "cut off at the end of the call",
        "last": "no time left",
    }


def test_whatever_ends_the_call_ends_its_parts(fakes):
    put, call, _ = fakes
    put([("machine", 30, "good", {})], [("endless", 30, "endless", {}), ("ends_all", 30, "ends_all", {"whose": os.getpid()})])
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 128 + signal.SIGTERM
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and is_ours(int(pid))]


def is_ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text() == "sleep\x0059.731\x00" and is_alive(pid)
    except OSError:
        return False


@pytest.mark.parametrize("works", [True, False])
def test_where_a_forked_process_cannot_use_the_device_parts_import_for_themselves(fakes, tmp_path, capsys, works):
    put, call, kept = fakes
    (tmp_path / "tried").write_text("" if works else "-")
    put([("machine", 30, "not_forked", {"here": str(tmp_path)})], [("first", 30, "good", {})])
    assert call() == int(not works)
    assert (tmp_path / "tried").read_text() == ("xx" if works else "-xx")
    assert "a forked process cannot use the device" in capsys.readouterr().out
    assert [each["status"] for each in kept().values()] == (["done", "done"] if works else ["failed"])


@pytest.mark.parametrize("named", ["parts", "skip"])
def test_only_parts_that_are_there_can_be_named(device, named, tmp_path):
    with pytest.raises(SystemExit, match=r"must name parts, of machine, tests, main_job, .* got nonsense"):
        device.main(str(tmp_path), **{named: ["nonsense"]})


def test_parts_fit_into_the_call_and_what_is_timed_runs_alone(device):
    from device_plan import LIMIT, STAGES, START

    assert LIMIT == 480
    assert START + sum(max(part.cap for part in stage) for stage in STAGES[1:]) <= LIMIT
    for stage in STAGES:
        assert len(stage) == 1 or not any(part.name.startswith(("scale", "training_step", "generation")) for part in stage)


def test_what_is_given_is_found_from_any_folder(device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").touch()
    found = device.placed("m.gguf", "data", None, tmp_path / "scratch")
    assert found == {
        "smollm2": f"{tmp_path}/scratch/smollm2",
        "gguf": f"{tmp_path}/m.gguf",
        "data": f"{tmp_path}/data",
        "rows": f"{tmp_path}/data/sst2_beavertails_train.json",
    }
    assert device.placed("model", None, "mine.json", tmp_path) == {
        "smollm2": f"{tmp_path}/model", "gguf": None, "data": None, "rows": f"{tmp_path}/mine.json",
    }  # fmt: skip
    assert device.placed(None, None, "sandbox:test/mood", tmp_path)["rows"] == "sandbox:test/mood"
    assert set(device.placed(None, None, None, tmp_path).values()) == {None}


def test_wheels_are_of_the_versions_that_the_tests_passed_with(device):
    fixed = {line.partition("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(device.LACKING) - {"liger_kernel"} <= fixed  # which no test here can use


def test_a_goal_is_judged_by_the_fastest_variant_that_has_its_figure(device):
    from device_plan import judged

    def scale(share: float, **over_sft: float) -> dict:
        kinds = {
            kind: {"over_sft": [over], "limit": 2.75, "share_of_peak": share} for kind, over in {"SFT": 1.0, **over_sft}.items()
        }
        return {"figures": {"kinds": kinds}}

    parts = {"machine": {"figures": {"gib": 80}}, "scale": scale(0.4, SBR=1.1, Patcher=2.8), "scale_liger": scale(0.45, SBR=1.02)}
    parts |= {"scale_fsdp2": scale(0.51), "scale_compiled": {"status": "left out: needs --x"}}
    parts["training_step"] = {
        "figures": {"precisions": {"float32": {"ratios": [0.5, 0.6, 0.7]}, "bfloat16": {"ratios": [0.4, 0.3, 2.0]}}}
    }
    parts["training_step_graphs"] = {"figures": {"precisions": {"bfloat16": {"ratios": [0.7, 0.7]}}}}
    assert judged(parts, tiny=False) == {
        "tests marked gpu that fail": (pytest.approx(math.nan, nan_ok=True), "not measured"),
        "SFT of Qwen2.5-1.5B, share of peak": (0.51, "met"),
        "SBR over SFT, seconds a step": (1.02, "met"),
        "Patcher over SFT, over its limit": (pytest.approx(2.8 / 2.75), "met"),
        "SmolLM2 on real rows over plain, median": (0.6, "met"),
        "SmolLM2 on real rows over plain, worst step": (2.0, "missed"),
        "SmolLM2, a token over the memory bound": (pytest.approx(math.nan, nan_ok=True), "not measured"),
        "Qwen2.5-1.5B, a token over the memory bound": (pytest.approx(math.nan, nan_ok=True), "not measured"),
    }


def test_every_part_runs_on_the_cpu_and_its_figures_are_there(device, tmp_path, capsys):
    assert device.main(str(tmp_path), tiny=True) == 0
    whole = json.loads((tmp_path / "device.json").read_text())
    shown = capsys.readouterr().out
    figures = {name: part["figures"] for name, part in whole["parts"].items()}
    assert sorted(figures) == sorted(part.name for stage in device.STAGES for part in stage if part.name != "smollm2")
    assert all(f"\n{name:16} done, " in shown for name in figures)

    assert len(figures["tests"]["skipped"]) == 2
    assert [row["step"] for row in figures["main_job"]["cpu"]["scores"]] == [0, 1]
    for name in ("scale", "scale_compiled", "scale_liger", "scale_fsdp2"):
        assert list(figures[name]["kinds"]) == ["SFT", "SBR", "Patcher"]
    kernels = figures["scale"]["kinds"]["SFT"]["kernels"]
    assert len(kernels) == 10
    assert kernels == sorted(kernels, key=lambda kernel: -kernel["ms"])
    assert sum(kernel["share"] for kernel in kernels) < 1
    for kind, says in figures["scale"]["kinds"].items():
        assert f"\n    {kind:8} {says['seconds'][0]:.4f} s a step, over SFT {says['over_sft'][0]:.2f}" in shown
    for name in ("training_step", "training_step_graphs"):
        assert {key: len(says["ratios"]) for key, says in figures[name]["precisions"].items()} == {"float32": 2, "bfloat16": 2}
    for name in ("generation", "generation_liger", "generation_1_5b"):
        assert figures[name]["over_bound"] > 1
    assert [(run["kind"], [each["step"] for each in run["scores"]]) for run in figures["patcher"]["runs"]] == [
        ("SFT", [0, 1, 2]),
        ("Patcher", [0, 1, 2]),
    ]
    assert {verdict for _, verdict in whole["goals"].values()} == {"not measured"}

    from device_plan import judged

    on_gpu = whole["parts"] | {
        "machine": {"figures": {"gib": 80}},
        "tests": {"figures": {"passed": ["a"], "failed": {}}},
    }
    assert {verdict for _, verdict in judged(on_gpu, tiny=True).values()} == {"not measured"}
    values = judged(on_gpu, tiny=False)
    assert not [what for what, (value, _) in values.items() if math.isnan(value)]
    assert values["tests marked gpu that fail"] == (0, "met")
    assert values["SFT of Qwen2.5-1.5B, share of peak"][1] == "missed"
    assert f"{values['SmolLM2, a token over the memory bound'][0]:.1f} times the time" in shown
