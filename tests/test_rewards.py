"""Answers found where the formats put them, compared by value, and never at the cost of the run."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from suite.problems import grader_pool as workers
from suite.problems.data import load_prompts
from suite.problems.grader_pool import START_ATTEMPTS, Workers
from suite.problems.rewards import Reward, RewardPool, desk_reward, extract_answer, quick_verdict

CORRECT, WRONG = Reward(1.0, "correct"), Reward(0.0, "wrong")


@pytest.fixture(scope="module")
def pool():
    with RewardPool("boxed_after_think", timeout_seconds=20, num_workers=1) as pool:
        yield pool


def test_scripts_find_the_pool_under_its_short_name():
    from suite import rewards

    assert rewards.RewardPool is RewardPool and rewards.Reward is Reward


def outcomes(rewards: list[Reward]) -> list[str]:
    return [reward.outcome for reward in rewards]


def thought(answer: str) -> str:
    return "hm </think> so \\boxed{" + answer + "}"


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a</think>\\boxed{7}", "7"),
        ("a</think>\\boxed{1} no, \\boxed{ 2 }", "2"),
        ("a</think>\\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("a</think>\\boxed{x = \\boxed{3}}", "3"),  # the last box is the inner one
        ("\\boxed{7}</think>then nothing", None),  # boxed only while thinking
        ("a</think>\\boxed{7", None),
        ("a</think>\\boxed{7} or \\boxed{8", None),  # the last one counts, and it is not closed
        ("a</think>\\boxed {7}", None),
        ("a</think>\\boxed{}", None),
        ("\\boxed{7}", None),
        ("a</think>b</think>\\boxed{7}", None),
    ],
)
def test_boxed_after_think(text, answer):
    assert extract_answer(text, "boxed_after_think") == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a</think> <answer> 7 </answer>", "7"),
        ("a</think> <answer>it is \\boxed{7}.</answer>", "7"),
        ("a</think> <answer>7</answer> <answer>8</answer>", "8"),
        ("a</think> <answer>\\boxed{7</answer>", None),
        ("a</think><answer>7</answer>", None),  # the tags must be one blank apart
        ("a</think> <answer>7", None),
        ("a <answer>7</answer>", None),
    ],
)
def test_answer_tags(text, answer):
    assert extract_answer(text, "answer_tags") == answer


def test_qwen_math_needs_no_thinking():
    assert extract_answer("so \\boxed{7}, I mean \\boxed{8}.", "qwen_math") == "8"
    assert extract_answer("so 8.", "qwen_math") is None


def test_a_violated_format_is_told_from_a_missing_answer(pool):
    texts = ["\\boxed{7}", "a</think>b</think>\\boxed{7}", "a</think>7", thought("7"), thought("8")]
    assert outcomes(pool.score(texts, ["7"] * 5)) == ["format", "format", "no_answer", "correct", "wrong"]


@pytest.mark.parametrize(
    "text, outcome",
    [
        ("c7=7\n</think>\n\\boxed{7}", "correct"),
        ("</think>\\boxed{07}", "correct"),
        ("</think>\\boxed{8}", "wrong"),
        ("</think>\\boxed{7.0}", "no_answer"),
        ("</think>\\boxed{3+4}", "no_answer"),
        ("</think>\\boxed{" + "9" * 5000 + "}", "no_answer"),
        ("</think>7", "no_answer"),
        ("\\boxed{7}", "format"),
        ("</think></think>\\boxed{7}", "format"),
    ],
)
def test_desk_wants_an_integer(text, outcome):
    assert desk_reward(text, "7") == Reward(float(outcome == "correct"), outcome)


def test_desk_starts_no_process():
    with RewardPool("desk") as pool:
        assert pool.score([thought("7")], [("7",)]) == [CORRECT]
        assert pool.workers._workers == []


def test_truncated_responses_get_zero_only_where_the_setting_says_so():
    texts, golds, cut = [thought("7")] * 2, ["7"] * 2, [True, False]
    with RewardPool("boxed_after_think", zero_truncated=True) as oat, RewardPool("boxed_after_think") as verl:
        assert oat.score(texts, golds, cut) == [Reward(0.0, "truncated"), CORRECT]
        assert verl.score(texts, golds, cut) == [CORRECT, CORRECT]


def test_the_grader_is_the_one_that_is_named():
    texts, golds = [thought("0.333333"), thought("10001_3")], ["\\frac{1}{3}", "10001_2"]
    found = {}
    for grader in (None, "suite", "mathd_sympy", "oat"):
        with RewardPool("boxed_after_think", timeout_seconds=60, num_workers=1, grader=grader) as one:
            found[grader] = [reward.value for reward in one.score(texts, golds)]
    assert found == {None: [0.0, 0.0], "suite": [0.0, 0.0], "mathd_sympy": [0.0, 0.0], "oat": [1.0, 1.0]}


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="allowed with format qwen_math: suite, mathd_sympy, oat"):
        RewardPool("qwen_math", grader="mathd")
    with pytest.raises(ValueError, match="allowed with format desk: desk's own"):
        RewardPool("desk", grader="oat")
    with pytest.raises(ValueError, match="allowed: boxed_after_think"):
        RewardPool("boxed")
    with pytest.raises(ValueError, match="as many"):
        RewardPool("desk").score(["a"], ["1", "2"])


# --- equivalence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, answer, same",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "1/2", True),
        ("\\frac{1}{2}", "\\frac{2}{4}", True),
        ("\\$1,\\!657", "1657", True),
        ("a + b + c", "c+b+a", True),
        ("a + b + c", "a + d", False),  # math-verify alone reads both as the text `a +`
        ("30^\\circ.", "30", True),
        ("\\dfrac{2469}{20,\\!000}", "0.12345", True),
        ("204", "x = 204", True),
        ("204", "204, 205", False),
        ("204", "204 \\text{ or } 205", False),
        ("(1,2)", "(2,1)", False),
        ("(-\\infty, 3)", "(-\\infty, 3]", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("x^2 - 1", "(x - 1)(x + 1)", True),
        ("42", "042", True),
    ],
)
def test_equality_is_that_of_values(pool, gold, answer, same):
    assert pool.score([thought(answer)], [gold]) == [CORRECT if same else WRONG]


def test_any_of_several_golds_counts(pool):
    texts = [thought("\\frac{1}{100}"), thought("0.03")]
    assert pool.score(texts, [("0.02", "0.01")] * 2) == [CORRECT, WRONG]


def test_quick_verdict_leaves_algebra_to_the_workers():
    assert quick_verdict("7", "7") is True and quick_verdict("+7", "007") is True and quick_verdict("7", "8") is False
    assert quick_verdict("\\frac12", "0.5") is None and quick_verdict("7", "7.0") is None
    assert quick_verdict("x" * 1001, "7") is False


# --- the published answers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    folder = os.environ.get("SUITE_DATA_DIR")
    if not folder:
        pytest.skip("SUITE_DATA_DIR is not set: the authors' files are not here")
    data = {"id": "published", "files": [{"name": "math_1460.parquet", "sha256": "unknown"}]}
    return [prompt.gold[0] for prompt in load_prompts(data)]


def repeats(gold: str) -> bool:
    terms = [term.strip() for term in gold.split(",")]
    return len(set(terms)) < len(terms)


def wrong_variants(golds: list[str]) -> list[tuple[str, str]]:
    """50 (gold, wrong answer) pairs for each of four rules, each rule only where it must change the value.

    Left out: thousands separators, unions, text, matrices, equations, answers that list a value twice, and cuts that
    leave a brace open.
    """
    rules = {
        "plus one": (r"(-?\d+)", lambda m: str(int(m[1]) + 1)),
        "other sign": (r"(\d*[1-9]\d*|\\d?frac\{[1-9]\d*\}\{[1-9]\d*\}|\d*\\sqrt\{[1-9]\d*\})", lambda m: "-" + m[1]),
        "upside down": (r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", lambda m: f"{m[1]}\\frac{{{m[3]}}}{{{m[2]}}}"),
        "one term less": (
            r"(.*\d.*[^\s\\^_({,+-])\s*[,+-]\s*[^,+-]*[1-9a-z][^,+-]*?(\s*[)\]])?",
            lambda m: m[1] + (m[2] or ""),
        ),
    }
    awkward = re.compile(r"\d,\\?!?\d{3}|\\cup|infty|text|begin|=")
    simple = [gold for gold in golds if not awkward.search(gold) and not repeats(gold)]
    pairs = []
    for pattern, change in rules.values():
        matches = {gold: re.fullmatch(pattern, re.sub(r"\\(left|right)", "", gold)) for gold in simple}
        changed = [(gold, change(match)) for gold, match in matches.items() if match]
        kept = [(gold, wrong) for gold, wrong in changed if wrong != gold and wrong.count("{") == wrong.count("}")]
        pairs += kept[:50]
    return pairs


@pytest.mark.slow
def test_200_wrong_variants_of_published_answers_do_not_verify(published):
    pairs = wrong_variants(published)
    assert len(pairs) == 200
    with RewardPool("qwen_math", timeout_seconds=60) as pool:
        rewards = pool.score([f"\\boxed{{{wrong}}}" for _, wrong in pairs], [gold for gold, _ in pairs])
    assert [pair for pair, reward in zip(pairs, rewards, strict=True) if reward.outcome != "wrong"] == []


@pytest.mark.slow
def test_all_published_answers_verify_against_themselves(published):
    assert len(published) == 1460
    with Workers(num_workers=2, timeout_seconds=60) as workers:
        results = workers.run([("equivalent", gold, gold) for gold in published])
    assert [gold for gold, result in zip(published, results, strict=True) if result != ("done", True)] == []


# --- the time limit ---------------------------------------------------------------------------------------------------

HOSTILE = {
    "tower of exponents": "9^{9^{9^9}}",
    "factorial": "100000000!",
    "large power": "(x+1)^{100000}",
    "long product": "\\prod_{k=1}^{10^9} k",
    "nested fractions": "\\frac{1}{" * 90 + "3" + "}" * 90,
}


def test_hostile_answers_cost_their_own_reward_and_the_time_limit():
    answers = [*HOSTILE.values(), "\\frac{2}{4}"]
    with RewardPool("boxed_after_think", timeout_seconds=1.0, num_workers=2) as pool:
        pool.score([thought("0.5")], ["\\frac{1}{2}"])  # processes are up
        start = time.monotonic()
        found = outcomes(pool.score([thought(answer) for answer in answers], ["\\frac{1}{2}"] * len(answers)))
        seconds = time.monotonic() - start
    assert found[-1] == "correct" and set(found[:-1]) <= {"timeout", "crashed", "wrong"} and "timeout" in found
    assert seconds < 30  # five limits of 1 s on two workers, and the time to start new ones on a busy machine


def test_huge_answers_are_refused_without_algebra():
    texts = [
        thought("{" * 500_000 + "}" * 500_000),
        thought("{" * 1_000_000),
        thought("\\frac{1}{" * 2000 + "1" + "}" * 2000),
        thought("9" * 1_000_000),
        "\\boxed{" * 100_000 + "</think>" * 100_000,
    ]
    with RewardPool("boxed_after_think") as pool:
        start = time.process_time()
        assert outcomes(pool.score(texts, ["7"] * 5)) == ["wrong", "no_answer", "wrong", "wrong", "format"]
        assert time.process_time() - start < 5
        assert pool.workers._workers == []


def test_a_worker_killed_in_mid_answer_costs_that_answer_only():
    with RewardPool("boxed_after_think", timeout_seconds=60, num_workers=1) as pool:
        pool.score([thought("0.5")], ["\\frac{1}{2}"])
        victim = pool.workers._workers[0].process.pid
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        found = pool.score([thought(HOSTILE["tower of exponents"]), thought("3/6")], ["\\frac{1}{2}"] * 2)
        assert outcomes(found) == ["crashed", "correct"]


def test_a_worker_killed_between_answers_costs_none():
    with RewardPool("boxed_after_think", timeout_seconds=20, num_workers=1) as pool:
        pool.score([thought("0.5")], ["\\frac{1}{2}"])
        worker = pool.workers._workers[0].process
        worker.kill()
        worker.wait()
        assert pool.score([thought("3/6")], ["\\frac{1}{2}"]) == [CORRECT]


def test_a_child_killed_between_answers_costs_none():
    with RewardPool("boxed_after_think", timeout_seconds=20, num_workers=1) as pool:
        pool.score([thought("0.5")], ["\\frac{1}{2}"])
        (worker,) = pool.workers._workers
        os.kill(worker.child, signal.SIGKILL)
        select.select([worker.process.stdout], [], [], 20)  # the next child says its name
        assert pool.score([thought("3/6")], ["\\frac{1}{2}"]) == [CORRECT]


def killed_at_once(monkeypatch, num: int) -> list:
    """The first `num` workers are killed while they start; the list holds all that were started."""
    started, whole = [], workers._Worker

    def start(timeout_seconds):
        started.append(whole(timeout_seconds))
        if len(started) <= num:
            started[-1].process.kill()
        return started[-1]

    monkeypatch.setattr(workers, "_Worker", start)
    return started


def test_a_worker_killed_while_it_starts_is_replaced(monkeypatch):
    started = killed_at_once(monkeypatch, 2)
    with RewardPool("boxed_after_think", timeout_seconds=20, num_workers=1) as pool:
        assert pool.score([thought("3/6")], ["\\frac{1}{2}"]) == [CORRECT]
    assert len(started) == 3


def test_workers_that_are_all_killed_while_they_start_are_an_error(monkeypatch):
    started = killed_at_once(monkeypatch, 1000)
    with RewardPool("qwen_math", num_workers=1) as pool, pytest.raises(RuntimeError, match="exit code -9"):
        pool.score(["\\boxed{1/2}"], ["0.5"])
    assert len(started) == START_ATTEMPTS


def test_a_late_answer_costs_its_limit_once_and_no_new_process():
    late = [thought(HOSTILE["tower of exponents"])]
    with RewardPool("boxed_after_think", timeout_seconds=0.5, num_workers=1) as pool:
        pool.score([thought("0.5")], ["\\frac{1}{2}"])
        process, jobs, run = pool.workers._workers[0].process, [], pool.workers.run
        pool.workers.run = lambda some: jobs.extend(some) or run(some)
        assert [outcomes(pool.score(late, ["\\frac{1}{2}"])) for _ in range(3)] == [["timeout"]] * 3
        assert len(jobs) == 1
        assert pool.score([thought("3/6")], ["\\frac{1}{2}"]) == [CORRECT]
        assert pool.workers._workers[0].process is process


def test_the_limit_holds_in_any_thread():
    found = []
    with RewardPool("boxed_after_think", timeout_seconds=1.0, num_workers=1) as pool:
        texts = [thought(HOSTILE["tower of exponents"]), thought("1/2")]
        thread = threading.Thread(target=lambda: found.extend(pool.score(texts, ["0.5", "0.5"])))
        thread.start()
        thread.join(60)
    assert outcomes(found) == ["timeout", "correct"]


def test_memory_is_capped():
    with Workers(num_workers=1, timeout_seconds=20) as workers:
        workers.run([("parses", "\\boxed{1}")])
        limits = Path(f"/proc/{workers._workers[0].process.pid}/limits")
        if not limits.exists():
            pytest.skip("no /proc on this system")
        row = next(line for line in limits.read_text().splitlines() if line.startswith("Max address space"))
    assert row.split()[3] == str(1 << 30)


def test_no_worker_outlives_its_pool():
    with Workers(num_workers=2, timeout_seconds=20) as workers:
        workers.run([("parses", "\\boxed{1}")] * 4)
        processes = [worker.process for worker in workers._workers]
    assert processes and all(process.poll() is not None for process in processes)


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('taken out for this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RewardPool("qwen_math", num_workers=1) as pool, pytest.raises(RuntimeError, match="could not start"):
        pool.score(["\\boxed{1/2}"], ["0.5"])


def test_workers_load_no_torch():
    heavy = "{'torch', 'transformers', 'pandas', 'datasets'}"
    code = f"import sys, suite.problems.rewards, suite.problems.grader_pool, math_verify; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_worker_whose_caller_was_killed_during_a_job_ends():
    """The answer finds nobody: a worker that forks its next child then would fork for ever, beside the next run's engines."""
    worker = workers._Worker(timeout_seconds=30)
    while not worker.ready:
        select.select([worker.process.stdout], [], [], 30)
        worker.child = next((line["pid"] for line in worker.read() or [] if "pid" in line), None)
    os.kill(worker.child, signal.SIGSTOP)
    worker.give(0, ("equivalent", "1/2", "0.5"), 30)
    worker.process.stdin.close()
    worker.process.stdout.close()
    os.kill(worker.child, signal.SIGCONT)
    assert worker.process.wait(timeout=30) == 0
