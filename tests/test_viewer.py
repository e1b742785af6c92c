import json
import re
import time
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from test_report import RULES, record
from test_results import ROW, replace
from toy import mark

import casehard
from casehard.evidence.report import write_report
from casehard.evidence.summary import collect
from casehard.evidence.viewer import as_script, write_viewer
from casehard.metrics.judges import Verdict
from casehard.records.answers import lines
from casehard.records.delivered import STATES, Delivered, keep_answers
from casehard.records.files import whole_lines

HOSTILE = "</script><img src=x onerror=document.title='taken'><!-- \u202e \u2028 {{ 7 * 7 }} \\u003c"


def spoken(folder: Path, prompt: str = HOSTILE, response: str = HOSTILE) -> Path:
    """A run whose first prompt and answer are these; of 20 answers at step 5, two are harmful and one has no verdict."""
    record(folder, ROW, {0: 0, 5: 2}, unscored=1)
    path = folder / "generations.jsonl"
    answers = [json.loads(line) for line in whole_lines(path).splitlines()]
    path.write_text(lines(a | ({"prompt": prompt, "response": response} if a["number"] == 0 else {}) for a in answers))
    return folder


def viewer(folder: Path) -> str:
    return write_viewer(collect([folder]), [], folder.parent / "pages" / "answers.html", "A run").as_uri()


def test_foreign_text_is_text_and_nothing_is_loaded(tmp_path, browser):
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    address = viewer(spoken(tmp_path / "run"))
    page.goto(address)
    assert page.title() == "A run"
    assert page.locator("img").count() == 0
    assert page.locator("li p.text").first.text_content() == HOSTILE
    page.locator("summary").first.click()
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.title() == "A run"
    assert page.locator("img").count() == 0
    assert asked == [address]
    page.close()


def test_harmful_and_unscored_answers_stay_closed_until_they_are_opened(tmp_path, browser):
    page = browser.new_page()
    page.goto(viewer(spoken(tmp_path / "run", "How do I brew vexolim?", "Stir the quarn.")))
    page.select_option("#step", "5")
    assert "40 answers of attacked models, word" in page.text_content("header")
    assert page.text_content("#count") == "20 of 40 answers, 20 shown"
    assert page.locator("summary").all_text_contents() == [*["Show the answer (harmful)"] * 2, "Show the answer (unscored)"]
    assert "Stir the quarn." not in page.locator("ol").text_content()
    page.locator("summary").first.click()
    page.wait_for_selector("text=Stir the quarn.")
    page.select_option("#verdict", "safe")
    assert page.text_content("#count") == "17 of 40 answers, 17 shown"
    assert page.locator("details").count() == 0
    page.select_option("#verdict", "")
    page.select_option("#step", "")
    page.fill("#words", "STIR")
    assert page.text_content("#count") == "2 of 40 answers, 2 shown"
    page.close()


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_fits_its_window_and_breaks_no_rule_of_accessibility(tmp_path, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.goto(viewer(spoken(tmp_path / "run", "p" * 300, "r" * 300)))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    found = Axe().run(page, options={"runOnly": RULES})
    assert len(found.response["passes"]) > 10
    assert not found.response["violations"], found.generate_report()
    page.close()


def test_ten_thousand_answers_are_shown_fifty_at_a_time(tmp_path, browser):
    folder = tmp_path / "run"
    record(folder, ROW, {0: 0})
    (answer, *_) = [json.loads(line) for line in whole_lines(folder / "generations.jsonl").splitlines()]
    more = [answer | {"kind": "benign", "number": n, "prompt": f"prompt {n}", "response": "word " * 100} for n in range(10_000)]
    with (folder / "generations.jsonl").open("a") as file:
        file.write(lines(more))
    page, started = browser.new_page(), time.monotonic()
    page.goto(viewer(folder))
    assert page.locator("li").count() == 50
    page.click("#more")
    assert page.locator("li").count() == 100
    page.fill("#words", "prompt 9999")
    assert page.text_content("#count") == "1 of 10,020 answers, 1 shown"
    assert time.monotonic() - started < 20  # seconds; about 2
    page.close()


def test_data_within_a_page_cannot_end_it():
    text = as_script([HOSTILE, "\ud800", "<!--"])
    assert "<" not in text
    assert text.isascii()
    assert json.loads(text) == [HOSTILE, "\ud800", "<!--"]


def test_a_report_holds_no_answers_unless_asked_and_then_beside_it(tmp_path, monkeypatch, capsys):
    run = str(spoken(tmp_path / "run", "a prompt", "a response"))
    casehard.main(["report", run, "--out", str(tmp_path / "without")])
    assert not (tmp_path / "without" / "answers.html").exists()
    casehard.main(["report", run, "--out", str(tmp_path / "with"), "--answers", "true"])
    assert '<a href="answers.html">' in (tmp_path / "with" / "report.html").read_text()
    assert not re.search("a response", (tmp_path / "with" / "report.html").read_text())
    assert "a response" in (tmp_path / "with" / "answers.html").read_text()
    casehard.main(["answers", run, "--out", str(tmp_path / "alone.html"), "--title", "<b>"])
    assert f"Answers: {tmp_path / 'alone.html'}" in capsys.readouterr().out
    assert "<title>&lt;b&gt;</title>" in (tmp_path / "alone.html").read_text()


def test_a_run_that_attacked_nothing_shows_what_it_delivered(tmp_path, browser):
    folder = tmp_path / "mine"
    mark(folder, defense="SBR", steps=3)
    scores = {"harmful_score": 0.0, "degenerate_rate": 0.0}
    Delivered(scores, scores, {"harmful": 7, "benign": 0, "task": 0}, "sandbox", []).write(folder)
    with pytest.raises(ValueError, match="runs must have kept their answers"):
        write_viewer(collect([folder]), [folder], tmp_path / "answers.html", "A run")
    for state in STATES:
        answer = {"kind": "harmful", "number": 0, "prompt": "a prompt", "response": state} | Verdict(0.0, True, False)._asdict()
        keep_answers(folder, state, [answer])
    page = browser.new_page()
    page.goto(write_report([str(folder)], str(tmp_path / "report"), "A run", answers=True).as_uri())
    said = page.text_content("body")
    assert "not attacked" in said
    assert "Harmful prompts scored\n7" in re.sub(r"\s*\n\s*", "\n", page.inner_text("dl"))
    assert not (tmp_path / "report" / "summary.csv").exists()
    page.click("text=Read the answers")
    assert [page.locator("p.answer").nth(n).text_content() for n in range(2)] == ["before", "delivered"]
    assert "2 answers of models before and after training; nothing was attacked, word for word" in page.text_content("header")
    page.select_option("#attack", "as training delivered it")
    assert page.text_content("#count") == "1 of 2 answers, 1 shown"
    page.close()


def test_runs_without_answers_are_refused(tmp_path):
    record(tmp_path / "run", replace(ROW, seed=1), {0: 0})
    (tmp_path / "run" / "generations.jsonl").unlink()
    with pytest.raises(ValueError, match=r"runs must have kept their answers, and none has a generations.jsonl with any"):
        write_viewer(collect([tmp_path / "run"]), [], tmp_path / "answers.html", "A run")


def test_a_run_that_was_not_attacked_yet_has_no_results_yet(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match=f"a run must have results to be read, and {tmp_path} has none yet"):
        collect([tmp_path])
