"""A user's own package: what it declares is listed and known by short names, and none can break casehard."""

import sys
import time
import warnings
from importlib import import_module

import pytest

from casehard.cli import plugins
from casehard.cli.listing import KINDS, listed
from casehard.cli.parsing import meant
from casehard.cli.signatures import folder_of
from casehard.cli.yaml_texts import safe
from casehard.metrics.errors import SettingError

CODE = '''
import casehard
from casehard.callbacks.attack import Attack

from . import deep
from .deep import Held


class OwnDefense(Held):
    """Stays close. More of it."""

    def recover(self, start): ...


class OwnAttack(Attack):
    """Halves. More."""


class OwnJudge(casehard.Judge):
    """Counts letters."""

    name = "letters"

    def __init__(self, words: int = 1) -> None:
        self.words = words

    def __call__(self, prompts, responses):
        return [casehard.Verdict(float(len(r) > self.words), False, False) for r in responses]


class Exact(casehard.Metric):
    """Exactly right."""

    name = "exact"

    def of(self, answers):
        return float("nan")


class OwnHelper:
    """None of them."""
'''
DEEP = '''
import casehard


class Held(casehard.SBRModule):
    """A base of its own."""
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An installed package that declares classes, and one that cannot be imported. What was imported stays: its classes do."""
    site = tmp_path_factory.mktemp("site")
    for name, text in {
        "ownlab/__init__.py": CODE,
        "ownlab/deep.py": DEEP,
        "brokenlab.py": "raise RuntimeError('no such luck')",
        "ownlab-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: own-lab\nVersion: 1.0\n",
        "ownlab-1.0.dist-info/entry_points.txt": "[casehard]\n"
        + "".join(f"{kind} = ownlab:{kind}\n" for kind in ("OwnDefense", "OwnAttack", "OwnJudge", "Exact"))
        + "LoRAAttack = ownlab:OwnAttack\nbySomeName = ownlab:OwnAttack\nClash = ownlab:OwnHelper\n",
        "brokenlab-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-lab\nVersion: 1.0\n",
        "brokenlab-1.0.dist-info/entry_points.txt": "[casehard]\nBrokenJudge = brokenlab:BrokenJudge\nClash = brokenlab:Clash\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site


@pytest.fixture
def package(site, tmp_path, monkeypatch):
    """Both, to a process that knows no packages yet; gives the warnings."""
    monkeypatch.chdir(tmp_path)
    caches = (plugins.plugins, plugins.known_as, folder_of)
    for cached in caches:
        cached.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said
    for cached in caches:
        cached.cache_clear()


def test_what_packages_declare_is_listed_by_its_sources_and_nothing_is_imported(package):
    text = listed([])
    assert "OwnDefense  (finetuning+post_finetuning | own-lab | ownlab.OwnDefense)\n      Stays close. Adaptive" in text
    assert "OwnAttack  (service or open weights | own-lab | ownlab.OwnAttack)\n      Halves.\n" in text
    assert "OwnJudge  (own-lab | ownlab.OwnJudge)" in text
    assert "ownlab" not in sys.modules
    assert [text.index(f"{kind}:\n") for kind in KINDS] == sorted(text.index(f"{kind}:\n") for kind in KINDS)
    offers = {str(one.message).partition(",")[0].partition(" offers ")[2] for one in package}
    assert offers == {"LoRAAttack", "Clash"}  # the first stays casehard's, of the second one counts


def test_casehards_own_are_listed_with_their_stages_threat_models_and_files(package):
    text = listed([])
    for line in (
        "  SBRModule  (finetuning | casehard | casehard.SBRModule)",
        "  TARModule  (alignment | casehard | casehard.TARModule)",
        "  SafeLoRAModule  (post_finetuning | casehard | casehard.SafeLoRAModule)",
        "  Defense  (undefended | casehard | casehard.Defense)",
        "  EmbeddingAttack  (open_weight | casehard | casehard.EmbeddingAttack)",
        "  QuantisedAttack  (service or open weights | casehard | casehard.callbacks.quantised.QuantisedAttack)",
        "  RubricJudge  (casehard | casehard.RubricJudge)",
        "  TaskLoss  (casehard | casehard.TaskLoss)",
        "  attack/quantised  (casehard | experiments/attack/quantised.yaml)",
    ):
        assert f"{line}\n" in text
    bases = ("Attack", "FineTuning", "TwoRoles", "CachedJudge", "Judge", "Metric", "InnerAttacker", "HarmfulScore", "Evaluate")
    assert not any(f"  {base}  (" in text for base in bases)
    assert listed(["judges"]).startswith("judges:\n")
    assert "defenses" not in listed(["judges"])


def test_a_list_takes_little_time(package):
    began = time.process_time()
    listed([])
    assert time.process_time() - began < 2


def test_a_package_that_declares_nothing_can_be_listed_too(package, tmp_path):
    (tmp_path / "mine.py").write_text(
        CODE.replace("from . import deep\nfrom .deep import Held\n", "").replace("(Held)", "(casehard.Defense)")
    )
    sys.path.insert(0, str(tmp_path))
    try:
        text = listed(["defenses", "metrics"], "mine")
    finally:
        sys.path.remove(str(tmp_path))
    assert "mine.OwnDefense  (post_finetuning | mine | mine.OwnDefense)" in text
    assert "mine.Exact  (mine | mine.Exact)" in text
    assert "OwnHelper" not in text
    with pytest.raises(SettingError, match="package must be one that Python finds, and 'nolab' is none"):
        listed([], "nolab")
    with pytest.raises(
        SettingError,
        match=r"kind must be one of defenses, attacks, judges, metrics, experiments, got 'defence'\. Did you mean defenses",
    ):
        listed(["defence"])


def test_short_names_of_a_package_stand_for_its_classes_wherever_a_class_may(package, tmp_path, call):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "model: {class_path: OwnDefense}\n"
        "data: {judge: OwnJudge, evaluation: {metrics: [Exact]}}\n"
        "trainer: {callbacks: [{class_path: bySomeName, init_args: {threat_model: open_weight}}]}\n"
    )
    line = ["fit", "--config", str(config), "--data.judge.words", "3", "--run.experiment", "OwnJudge", "--print_config"]
    shown = call(*line)
    for path in ("OwnDefense", "OwnJudge", "Exact", "OwnAttack"):
        assert f"class_path: ownlab.{path}\n" in shown
    assert "words: 3" in shown
    assert "experiment: OwnJudge\n" in shown  # a name that is no class stays


@pytest.mark.parametrize("text", ["OwnJudge", "data: {judge: OwnJudge}", "metrics: [Exact, OwnJudge]", "{class_path: OwnJudge}"])
def test_a_package_is_imported_where_one_of_its_names_stands(package, monkeypatch, text):
    imported = []
    monkeypatch.setattr(plugins, "import_module", lambda name: imported.append(name) or import_module(name))
    safe("a: [LoRAAttack, nobody]")
    assert imported == []
    safe(text)
    assert set(imported) == {"ownlab"}


def test_a_package_that_cannot_be_imported_is_warned_of_once_and_breaks_nothing(package, call):
    for _ in range(2):
        assert "import path string: BrokenJudge" in call("fit", "--data.judge", "BrokenJudge", fails=True)
    said = [str(one.message) for one in package if "BrokenJudge" in str(one.message)]
    assert said == [
        "BrokenJudge of broken-lab is left out: brokenlab.BrokenJudge cannot be imported (RuntimeError: no such luck)."
    ]
    assert "SandboxJudge" in call("fit", "--print_config")


def test_a_misspelt_short_name_of_a_package_gets_a_guess(package):
    assert meant("Expected a dot import path string: OwnJudg") == ". Did you mean OwnJudge?"
