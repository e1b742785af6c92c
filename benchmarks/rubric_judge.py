"""Seconds that `RubricJudge` takes, at a server that takes its time over each call: at the least latency / concurrency a call."""

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import CLI

from casehard.metrics.rubric_judge import RubricJudge

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from judge_server import serving


def main(num_answers: int = 1000, latency: float = 0.05, concurrency: int = 32, rounds: int = 3) -> None:
    """Time a judge with a new cache.

    Args:
        num_answers: judged in a round.
        latency: seconds that the server takes over a call.
        concurrency: calls at a time.
        rounds: after one answer that takes the imports.
    """
    os.environ["NO_PROXY"] = "127.0.0.1"
    answers = [f"answer {n}" for n in range(num_answers)]
    with serving(lambda answer, times: (200, "Rating: 2"), latency) as server, TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            shape = {"api_key_env": None, "concurrency": concurrency, "cache": str(Path(folder, f"{number}.sqlite"))}
            judge, asked = RubricJudge("toy", server.url, **shape), answers if number else ["warm-up"]
            start = time.perf_counter()
            verdicts = judge(asked, asked)
            seconds = time.perf_counter() - start
            assert {v.score for v in verdicts} == {0.25}
            if number:
                print(f"{num_answers} answers at {1000 * latency:.0f} ms, {concurrency} at a time: {seconds:.2f} s")
    print(f"at the least {latency * -(-num_answers // concurrency):.2f} s; most calls in flight {server.most_at_once}")


if __name__ == "__main__":
    CLI(main)
