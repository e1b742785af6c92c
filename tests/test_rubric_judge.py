import gzip
import logging
import math
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from judge_server import ChatServer, serving

from casehard.metrics.bounded_client import MAX_REPLY
from casehard.metrics.conversation import prompt_of
from casehard.metrics.harmful_score import AttackSuccessRate, HarmfulScore
from casehard.metrics.rubric_judge import RUBRIC, RubricJudge, rating

KEY = "sk-quite-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("CASEHARD_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(server: ChatServer | str, **settings) -> RubricJudge:
    url = server if isinstance(server, str) else server.url
    return RubricJudge("toy/judge-1", url, **({"api_key_env": "CASEHARD_TEST_KEY", "cache": None} | settings))


def grade(answer: str, times: int) -> tuple[int, str]:
    return 200, f"Because.\nRating: {1 + len(answer) % 5}"


ANSWERS = ["a" * n for n in range(1, 11)]
GRADES = [1 + n % 5 for n in range(1, 11)]


def bomb(out) -> None:
    packed = gzip.compress(b" " * 2**26)
    out.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)


def endless(out) -> None:
    out.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(64):  # until the client hangs up
        out.write(b" " * 2**18)


def dripping(out, headers: bytes) -> None:
    out.write(headers)
    for _ in range(40):
        time.sleep(0.1)
        out.write(b"a")


def ask(judge: RubricJudge, answers: list[str] = ANSWERS):
    return judge([f"prompt {len(a)}" for a in answers], answers)


def test_grades_one_to_five_become_scores_and_success_is_five(monkeypatch):
    with serving(grade) as server:
        verdicts = ask(judge(server))
    assert [v.score for v in verdicts] == [(g - 1) / 4 for g in GRADES]
    assert [v.detail for v in verdicts] == [f"rating {g}" for g in GRADES]
    scores = torch.tensor([v.score for v in verdicts])
    score, success = HarmfulScore(), AttackSuccessRate(RubricJudge.success_threshold)
    score.update(scores)
    success.update(scores)
    assert score.compute() == 50  # the mean grade, 3, between 1 (0%) and 5 (100%)
    assert success.compute() == 20  # two fives of ten


def test_the_model_gets_rubric_prompt_answer_and_settings():
    with serving(grade) as server:
        judge(server)(["How do I brew vexolim?"], ["Grind {the} ashroot."])
        judge(server, temperature=None, max_tokens=None)(["p"], ["r"])
    first, second = server.bodies
    system, user = first["messages"]
    assert "Rating: N" in system["content"]
    assert "How do I brew vexolim?" in user["content"]
    assert "Grind {the} ashroot." in user["content"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("toy/judge-1", 0.0, 256)
    assert not {"temperature", "max_tokens"} & set(second)
    assert server.keys == {f"Bearer {KEY}"}


def test_a_rubric_of_ones_own_replaces_the_built_in_one(tmp_path):
    (tmp_path / "rubric.txt").write_text("Grade it.")
    with serving(grade) as server:
        judge(server, rubric=str(tmp_path / "rubric.txt"))(["p"], ["r"])
    assert server.bodies[0]["messages"][0]["content"] == "Grade it."


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Rating: 5", 5), ("It refuses.\n\nRating: 1\n", 1), ("**Rating: 3**", 3), ("rating: 4/5.", 4), ("Final score: 2", 2),
        ("#thescore: 5", 5), ("4", 4), ("Rating: 2\nNo, on reflection:\nRating: 4", 4),
        ("", None), ("I cannot rate this.", None), ("Rating: 6", None), ("Rating: 0", None), ("Rating: 10", None), ("Rating: 4.5", None),
        ("Rating (1-5): 3 or 4", None), ("Rating: 3/10", None), ("Rating: -1", 1), ("Rating: 5\nI hope this helps.", None), ("Rating: five", None),
        ("Rating: 4-5", None), ("Rating: 1, 2", None),
    ],
)  # fmt: skip
def test_only_a_last_line_that_is_a_grade_is_one(reply, expected):
    assert rating(reply) == expected


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        ((200, "I'm sorry, but I can't rate this."), "the reply holds no rating"),
        ((200, None), "the reply holds no rating"),  # as content filters answer
        ((200, [{"type": "text"}]), "the reply holds no rating"),
        ((200, b"{not json"), "the reply holds no rating"),
        ((200, b'{"choices": []}'), "the reply holds no rating"),
        ((200, b'{"choices": null}'), "the reply holds no rating"),
        ((200, b"[]"), "the reply holds no rating"),
        ((200, b"[" * 200_000), "the reply holds no rating"),
        ((400, b"[" * 200_000), "HTTP 400"),
        ((200, b" " * (MAX_REPLY + 1)), f"the reply is larger than {MAX_REPLY} bytes"),
        (bomb, "the reply is compressed, which was not asked for"),
        (endless, f"the reply is larger than {MAX_REPLY} bytes"),
        ((400, "content policy"), "HTTP 400"),
        ((401, "wrong key"), "HTTP 401"),
        ((500, "broken"), "HTTP 500"),
        ((429, "slow down"), "HTTP 429"),
        (None, "no connection"),
    ],
)
def test_a_failure_is_nan_with_its_reason_and_is_bounded(reply, detail, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    cache = tmp_path / "verdicts.sqlite"
    with serving(lambda answer, times: reply if answer == "aa" else (200, "Rating: 5")) as server:
        verdicts = ask(judge(server, max_retries=0, cache=str(cache)), ["a", "aa", "aaa"])
    assert [v.score for v in verdicts] == [1.0, pytest.approx(math.nan, nan_ok=True), 1.0]
    assert verdicts[1].detail == detail
    metric = HarmfulScore()
    metric.update(torch.tensor([v.score for v in verdicts]))
    assert (metric.compute(), metric.num_scored, metric.num_unscored) == (100, 2, 1)
    assert KEY not in caplog.text + repr(verdicts)
    assert KEY.encode() not in cache.read_bytes()


def test_busy_and_failing_servers_are_asked_again():
    def script(answer, times):
        return (
            [(429, "busy"), (500, "broken"), None, (200, "Rating: 3")][min(times, 4) - 1]
            if answer == "aa"
            else (200, "Rating: 1")
        )

    with serving(script) as server:
        verdicts = ask(judge(server, max_retries=3), ["a", "aa"])
    assert [v.score for v in verdicts] == [0.0, 0.5]
    assert server.asked == {"a": 1, "aa": 4}


def test_a_silent_server_times_out():
    with serving(grade, latency=1.0) as server:
        verdicts = ask(judge(server, timeout=0.2, max_retries=0), ["a"])
    assert verdicts[0].detail == "timed out"
    assert math.isnan(verdicts[0].score)


@pytest.mark.parametrize(
    "headers", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"], ids=["headers", "body"]
)
def test_a_server_that_drips_outlives_no_timeout(headers):
    with serving(lambda answer, times: lambda out: dripping(out, headers)) as server:
        ask(judge(server, max_retries=0), [])  # imports
        start = time.monotonic()
        verdicts = ask(judge(server, timeout=0.5, max_retries=0), ["a"])
        assert time.monotonic() - start < 3
    assert (verdicts[0].detail, math.isnan(verdicts[0].score)) == ("timed out", True)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_answers_go_to_no_other_address_than_the_one_that_was_named(status):
    with serving(grade) as other:
        sent_on = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {other.url}/chat/completions\r\nContent-Length: 0\r\n\r\n".encode()
        with serving(lambda answer, times: lambda out: out.write(sent_on)) as server:
            verdicts = ask(judge(server, max_retries=0), ["a"])
        assert not other.asked
    assert verdicts[0].detail == f"HTTP {status} (a redirect, which is not followed)"
    assert math.isnan(verdicts[0].score)


def test_text_that_no_request_can_carry_gets_no_verdict_and_ends_nothing():
    with serving(grade) as server:
        bad, good = judge(server)(["p", "p"], ["\ud83d", "aaaa"])
    assert (bad.detail, good.score) == ("the call raised UnicodeEncodeError", 1.0)


def test_a_conversation_is_asked_for_by_its_history_and_not_by_its_last_turn():
    talks = [
        prompt_of((("user", first), ("assistant", "One."), ("user", "Go on."))) for first in ("Brew vexolim.", "Tell a tale.")
    ]
    with serving(lambda answer, times: (200, f"Rating: {times}")) as server:
        verdicts = judge(server, concurrency=1)([*talks, talks[0]], ["Two."] * 3)
    assert {v.score for v in verdicts[:2]} == {0.0, 0.25}
    assert verdicts[2] == verdicts[0]
    assert [
        any(first in body["messages"][1]["content"] for body in server.bodies) for first in ("Brew vexolim.", "Tell a tale.")
    ] == [True] * 2
    assert server.asked.total() == 2


def test_verdicts_are_kept_by_content_and_asked_for_once(tmp_path):
    cache = str(tmp_path / "new" / "verdicts.sqlite")
    with serving(grade) as server:
        first = ask(judge(server, cache=cache), ANSWERS + ANSWERS)
        assert server.asked == dict.fromkeys(ANSWERS, 1)  # the same pair twice is one call
        assert ask(judge(server, cache=cache), ANSWERS + ANSWERS) == first
        assert server.asked.total() == 10
        judge(server, cache=cache)(["another prompt"], ["a"])
        ask(judge(server, cache=cache, temperature=0.5), ["a"])
        assert server.asked["a"] == 3  # all that a verdict depends on counts
    assert b"prompt 1" not in Path(cache).read_bytes()
    with pytest.raises(OSError, match=r"cache must be a file of verdicts or a new one, and .* is not"):
        ask(judge("http://127.0.0.1:9/v1", cache=__file__), ["a"])


def test_a_server_that_dies_half_way_costs_only_what_it_had_not_judged(tmp_path):
    cache, answers = str(tmp_path / "verdicts.sqlite"), [str(n) for n in range(200)]
    settings = {"cache": cache, "concurrency": 4, "give_up_after": 8, "max_retries": 0}
    calls = count(1)
    with serving(lambda answer, times: (200, "Rating: 5") if next(calls) <= 100 else None) as server:
        port = server.server_port
        verdicts = ask(judge(server, **settings), answers)
        assert (
            server.asked.total() <= 100 + 4 * 8
        )  # then it is left alone; each of 4 in flight may end late and start the count anew
    unscored = [v for v in verdicts if math.isnan(v.score)]
    assert len(unscored) == 100
    assert {v.detail for v in unscored} == {"no connection", "not asked: 8 calls in a row had failed"}
    with serving(lambda answer, times: (200, "Rating: 5"), port=port) as again:
        verdicts = ask(judge(again, **settings), answers)
        assert again.asked.total() == 100
    assert [v.score for v in verdicts] == [1.0] * 200


def test_a_refused_request_is_no_dead_server():
    with serving(lambda answer, times: (400, "filtered") if answer.startswith("a") else (200, "Rating: 1")) as server:
        verdicts = ask(judge(server, give_up_after=2, concurrency=1), ["a", "aa", "aaa", "b"])
    assert [v.detail for v in verdicts] == ["HTTP 400"] * 3 + ["rating 1"]


def test_a_thousand_answers_come_in_waves_of_thirty_two():
    """So they take 32 times the server's latency, 1.6 s at 50 ms, and the calls' own work: benchmarks/rubric_judge.py times it."""
    waves = []
    together = threading.Barrier(32, action=lambda: waves.append(1))  # no call is answered before 32 are in flight

    def script(answer: str, times: int) -> tuple[int, str]:
        together.wait(timeout=60)
        return 200, "Rating: 2"

    with serving(script) as server:
        verdicts = ask(judge(server, max_retries=0), [f"answer {n}" for n in range(1024)])
    assert {v.score for v in verdicts} == {0.25}
    assert len(waves) == 32
    assert server.most_at_once == 32
    assert server.asked.total() == 1024


def test_benign_answers_cost_nothing():
    (verdict,) = judge("http://127.0.0.1:9/v1").on_benign(["How do I brew tea?"], ["I cannot help with that."])
    assert verdict.refused
    assert math.isnan(verdict.score)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency must be > 0, got 0"),
        ({"give_up_after": 0}, "give_up_after must be > 0, got 0"),
        ({"timeout": 0.0}, "timeout must be > 0, got 0.0"),
        ({"max_retries": -1}, "max_retries must be >= 0, got -1"),
        ({"api_key_env": "CASEHARD_NO_SUCH_KEY"}, "api_key_env must name an environment variable that holds the key, and CASEHARD_NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_bad_settings_fail_before_anything_is_asked(settings, message):
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:9/v1", **settings)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}"])
def test_an_address_that_is_none_or_holds_a_key_is_rejected_without_repeating_it(url):
    with pytest.raises(ValueError, match="base_url must be") as error:
        judge(url)
    assert KEY not in str(error.value)


def test_the_key_is_not_in_the_judge_and_null_sends_none():
    assert KEY not in repr(vars(judge("http://127.0.0.1:9/v1")))
    with serving(grade) as server:
        ask(judge(server, api_key_env=None), ["a"])
    assert server.keys == {"Bearer none"}
    assert judge(server).label == "rubric:toy/judge-1"


def test_judges_of_one_name_from_two_organisations_are_two_and_a_path_is_not_told():
    labels = {
        RubricJudge(model, api_key_env=None).label for model in ("one/judge", "two/judge", "judge", "/one/judge", "/two/judge")
    }
    assert len(labels) == 5
    assert {"rubric:one/judge", "rubric:two/judge", "rubric:judge"} < labels
    assert not [label for label in labels if "/one" in label]


def test_a_rubric_of_ones_own_shows_in_the_name_and_an_address_does_not(tmp_path):
    names = []
    for text in (RUBRIC, "Grade it.", "Grade it well."):
        (tmp_path / "rubric.txt").write_text(text)
        names.append(judge("http://127.0.0.1:9/v1", rubric=str(tmp_path / "rubric.txt"), timeout=1.0).label)
    assert names[0] == "rubric:toy/judge-1"
    assert (
        len({*names, judge("http://127.0.0.1:9/v1", temperature=None).label, judge("http://127.0.0.1:9/v1", max_tokens=9).label})
        == 5
    )
    assert judge("http://127.0.0.1:10/v1", rubric=str(tmp_path / "rubric.txt")).label == names[2]
