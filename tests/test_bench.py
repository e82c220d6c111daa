"""suite bench: ratios and targets by hand, sides that live alone, and both scoring sides on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from suite.bench import moe_step, pairs, rl_step, scoring, tables
from suite.bench import verbs as bench
from suite.bench.pairs import Side, SideFailed, in_turn, paired_ratios, spread, target, with_range
from suite.bench.worker import PeakMemory
from suite.errors import UserError
from suite.machine import environment

# --- arithmetic, by hand ----------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_repetition_and_not_of_the_medians():
    ours, theirs = [1.0, 10.0, 1.0], [1.5, 20.0, 4.0]  # the machine was ten times slower in the second repetition
    assert paired_ratios(theirs, ours) == [1.5, 2.0, 4.0]
    assert spread([1.5, 4.0, 2.0]) == {"median": 2.0, "min": 1.5, "max": 4.0}
    assert with_range(spread([1.5, 4.0, 2.0]), ".1f") == "2.0 (1.5 to 4.0)"
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("wanted", "at_bound", "above", "below"),
    [("at least", True, True, False), ("at most", True, False, True), ("below", False, False, True)],
)
def test_a_target_knows_its_bound(wanted, at_bound, above, below):
    assert [target("x", found, wanted, 0.5)["met"] for found in (0.5, 0.6, 0.4)] == [at_bound, above, below]
    assert target("x", 0.5, wanted, 0.5)["wanted"] == f"{wanted} 0.5"


def alone(peak_bytes, mean_logprob=-4.0):
    return [{"peak_bytes": peak_bytes, "mean_logprob": mean_logprob}]


def scoring_row(precision="fp32", vocabulary=151_936, ours=(2.0, 2.0), plain=(2.0, 2.4), peaks=(100, 1000)):
    turns = [{"ours": a, "plain": b} for a, b in zip(ours, plain, strict=True)]
    compared = scoring.compare(alone(peaks[0]), alone(peaks[1]), turns, 600, precision)
    return {"vocabulary": vocabulary, "precision": precision, "sequences": 3, "repetitions": len(ours)} | compared


def test_a_scoring_row_counts_scored_tokens_and_divides_plain_time_by_ours():
    row = scoring_row()
    assert row["tokens_per_second"]["ours"]["median"] == 300 and row["tokens_per_second"]["plain"]["min"] == 250
    assert row["speed_ratio"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.2})
    assert row["peak_ratio"] == 0.1


def test_speed_is_judged_on_the_fastest_repetition_of_either_side():
    (speed, _) = scoring.targets([scoring_row(ours=(2.0, 1.9, 2.0), plain=(4.0, 1.71, 4.0))])
    assert speed["found"] == pytest.approx(0.9) and not speed["met"], "two slow plain passes would have hidden it"


def test_sides_that_scored_different_things_are_not_compared():
    with pytest.raises(ValueError, match="differ by 0.5 nats"):
        scoring.compare(alone(1, -4.0), alone(1, -4.5), [{"ours": 1, "plain": 1}], 600, "fp32")
    with pytest.raises(ValueError, match="nan"):
        scoring.compare(alone(1, float("nan")), alone(1), [{"ours": 1, "plain": 1}], 600, "fp32")


def test_scoring_targets_judge_speed_in_fp32_and_memory_at_a_large_vocabulary():
    rows = [scoring_row(), scoring_row("bf16", 64), scoring_row(vocabulary=64, plain=(1.8, 1.8), peaks=(3, 2)),
            {"vocabulary": 151_936, "precision": "fp16", "sequences": 2, "not_run": "too little memory"}]  # fmt: skip
    judged = {one["what"]: (round(one["found"], 3), one["met"]) for one in scoring.targets(rows)}
    assert judged == {
        "speed, ours / plain, fastest of each, vocabulary 151936, fp32": (1.0, True),
        "peak memory, ours / plain, vocabulary 151936, fp32": (0.1, True),
        "speed, ours / plain, fastest of each, vocabulary 64, fp32": (0.9, False),
    }


def rl_turns(seconds, score=0.25, train=0.5, rest=0.1):
    split = {"sample": 0.5, "score": score, "train": train, "sync": 0.25, "rest": rest}
    return [{"seconds": s, "response_tokens": 1000, **split} for s in seconds]


def trl_turns(seconds):
    return [{"seconds": s, "response_tokens": 990} for s in seconds]


def rl_row(precision, beside, ours, theirs):
    return {"size": "1m", "precision": precision, "beside": beside, "repetitions": 2} | rl_step.compare(ours, theirs)


def test_rl_targets_judge_speed_beside_trl_fp16_beside_fp32_and_the_rest_everywhere():
    rows = [
        rl_row("fp32", "TRL", rl_turns([2.0, 2.0]), trl_turns([2.4, 2.4])),
        rl_row("fp16", "ours, fp32", rl_turns([2.0, 2.0], train=1.0, rest=0.4), rl_turns([1.6, 1.6])),
    ]
    assert "score_and_train_ratio" not in rows[0], "TRL does not say where its time goes"
    judged = {one["what"]: (round(one["found"], 3), one["met"]) for one in rl_step.targets(rows)}
    assert judged == {
        "speed, ours / TRL, 1m, fp32: not slower": (1.2, True),
        "speed, ours / TRL, 1m, fp32": (1.2, False),
        "rest of our step, share, 1m, fp32": (0.05, True),
        "score + train, fp16 / fp32, 1m": (1.667, False),  # (0.25 + 1.0) / (0.25 + 0.5)
        "rest of our step, share, 1m, fp16": (0.2, False),
    }


def test_what_no_phase_accounts_for_is_rest():
    row = {"t_sample_s": 1.0, "t_score_s": 0.5, "t_train_s": 0.25, "t_sync_s": 0.125, "t_rest_s": 0.01}
    split = rl_step._split(row | {"num_response_tokens": 7}, seconds=2.0)
    assert split["rest"] == 0.125 and split["response_tokens"] == 7, "writing the record is in no lap and counts"


# --- both sides do the same work --------------------------------------------------------------------------------------


def test_trl_gets_the_batch_and_the_updates_of_our_step():
    job = {"precision": "fp32", "model": "m", "batch": vars(rl_step.Batch())}
    theirs, ours = SimpleNamespace(**rl_step.trl_settings(job)), rl_step.cell_settings(job)
    rollouts = ours["schedule"]["prompts_per_step"] * ours["rollout"]["samples_per_prompt"]
    assert theirs.generation_batch_size == rollouts == 256 and theirs.num_generations == 8
    per_update = theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps
    assert rollouts // per_update == ours["schedule"]["minibatches"] == 4
    assert theirs.max_completion_length == ours["rollout"]["max_tokens"] == 72
    assert (theirs.learning_rate, theirs.max_grad_norm) == (1e-6, ours["train"]["grad_clip"])
    assert not theirs.gradient_checkpointing and theirs.beta == 0.0 and not theirs.bf16


def test_the_step_is_one_that_a_task_could_ask_for():
    from suite.spec import settings

    for precision in ("fp32", "bf16", "fp16"):
        cell = rl_step.cell_settings({"precision": precision, "model": "m", "batch": vars(rl_step.Batch())})
        sections = {
            "model": settings.Model, "data": settings.Data, "rollout": settings.Rollout, "train": settings.Train,
            "precision": settings.PrecisionSettings, "algorithm": settings.Algorithm, "schedule": settings.Schedule,
        }  # fmt: skip
        assert set(cell) == set(sections)
        for name, section in sections.items():
            section.model_validate_json(json.dumps(cell[name]))


class FakeTurns:
    """Hears the answers of a side in this process and sends it home after two."""

    def __init__(self, job):
        self.job, self.answers = job, []

    def answer(self, **figures):
        self.answers.append(figures)
        if len(self.answers) == 2:
            raise SystemExit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("transformers")
    shape = scoring.Shape(hidden=32, num_layers=1, num_heads=2, num_sequences=3, sequence_tokens=32, prompt_tokens=5)
    folder = tmp_path_factory.mktemp("model")
    scoring.write_model(folder, 50, shape)
    return {"model": str(folder), "vocabulary": 50, "shape": vars(shape), "min_turn_seconds": 0.0}


@pytest.mark.parametrize("precision", scoring.PRECISIONS)
def test_both_scoring_sides_score_the_same_tokens(tiny, precision):
    heard = {}
    for name, side in scoring.SIDES.items():
        turns = FakeTurns(tiny | {"precision": precision})
        with pytest.raises(SystemExit):
            side(turns)
        heard[name] = turns.answers
    row = scoring.compare(*heard.values(), 3 * 27, precision)
    assert row["mean_logprob_difference_nats"] < scoring.MEAN_LOGPROB_TOLERANCE_NATS[precision]
    assert -5 < heard["scoring-ours"][0]["mean_logprob"] < -3, "near -log(50), as random weights give"
    assert all(answer["ours"] > 0 and answer["plain"] > 0 for answer in heard["scoring-both"])
    assert [list(answer) for answer in heard["scoring-both"]] == [["ours", "plain"], ["plain", "ours"]]


def test_the_tolerance_of_the_scored_numbers_would_see_one_prompt_token_too_many(tiny):
    job = tiny | {"precision": "fp32"}
    shifted = job | {"shape": tiny["shape"] | {"prompt_tokens": 6}}
    heard = []
    for name, this_job in (("scoring-ours", job), ("scoring-plain", shifted)):
        turns = FakeTurns(this_job)
        with pytest.raises(SystemExit):
            scoring.SIDES[name](turns)
        heard.append(turns.answers)
    with pytest.raises(ValueError, match="differ"):
        scoring.compare(*heard, [{"ours": 1, "plain": 1}], 3 * 27, "fp32")


def test_peak_memory_sees_what_was_given_back():
    pytest.importorskip("torch")
    memory = PeakMemory()
    memory.reset()
    assert memory.growth() < 8 * 2**20
    block = np.ones(64 * 2**20, np.uint8)
    del block
    assert 60 * 2**20 < memory.growth() < 80 * 2**20


# --- processes --------------------------------------------------------------------------------------------------------


def test_one_side_lives_at_a_time(monkeypatch):
    heard = []

    class Fake:
        def __init__(self, job):
            self.name = job
            heard.append(f"{job} warms up")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            heard.append(f"{self.name} ends")

        def turn(self):
            heard.append(self.name)
            return {"side": self.name, "at": len(heard)}

    monkeypatch.setattr(pairs, "Side", Fake)
    ours, theirs = in_turn("a", "b", 2)
    life = {name: [f"{name} warms up", name, name, f"{name} ends"] for name in "ab"}
    assert heard == life["a"] + life["b"]
    assert [turn["side"] for turn in ours] == ["a"] * 2 and [turn["at"] for turn in theirs] == [6, 7]


def test_a_side_that_dies_says_why():
    with pytest.raises(SideFailed, match="(?s)no-such-side ended with exit code 1.*KeyError"):
        Side({"side": "no-such-side"})


# --- what is shown and kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scoring", "rl"])
def test_a_result_is_written_with_its_machine_and_command(name, tmp_path):
    if name == "scoring":
        rows = [scoring_row(), {"vocabulary": 64, "precision": "fp16", "sequences": 3, "repetitions": 3, "not_run": "no room"}]
        settings, targets = {"vocabularies": [64, 151_936]}, scoring.targets(rows)
    else:
        rows = [rl_row("fp32", "TRL", rl_turns([2.0, 2.0]), trl_turns([2.4, 2.4]))]
        settings, targets = {"sizes": ["1m"]}, rl_step.targets(rows)
    result = bench._heading(name, settings) | {"rows": rows, "targets": targets}
    bench.write(result, tmp_path / "out")
    (page,) = (tmp_path / "out").glob(f"{name}-*.md")
    text = page.read_text()
    assert json.loads(page.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    command = "suite bench scoring --vocab 64,151936" if name == "scoring" else "suite bench rl --sizes 1m"
    assert f"`{command}`" in text and result["fingerprint"] in text and "cores" in text
    assert "1.10 (1.00 to 1.20)" in text if name == "scoring" else "1.20 (1.20 to 1.20)" in text
    assert ("not run: no room" in text) == (name == "scoring")
    assert ("MISSED speed, ours / TRL, 1m, fp32: 1.200, aim: at least 1.5" in text) == (name == "rl")
    assert tables.terminal(result).count("repetitions") == 1


def test_the_exit_code_says_whether_targets_were_met(monkeypatch, tmp_path, capsys):
    for plain, code in (((2.0, 2.0), 0), ((1.0, 1.0), 1)):
        rows = [scoring_row(plain=plain)]
        monkeypatch.setattr(scoring, "measure", lambda vocabularies, say, rows=rows: ({}, rows, scoring.targets(rows)))
        assert bench.run(["scoring"], out=tmp_path) == code
        assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_an_aim_that_is_missed_does_not_fail_the_run(monkeypatch, tmp_path):
    rows = [rl_row("fp32", "TRL", rl_turns([2.0, 2.0]), trl_turns([2.4, 2.4]))]
    monkeypatch.setattr(rl_step, "check", lambda sizes: None)
    monkeypatch.setattr(rl_step, "measure", lambda sizes, say: ({}, rows, rl_step.targets(rows)))
    assert not all(one["met"] for one in rl_step.targets(rows)) and bench.run(["rl"], out=tmp_path) == 0


def test_unusable_choices_are_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="--vocab: found 2"):
        scoring.check([64, 2])
    if environment.package_version("trl") is None:
        pytest.skip("trl is not installed")
    with pytest.raises(UserError, match="--sizes: found '7b', allowed: 1m, 5m"):
        rl_step.check(["1m", "7b"])


# --- the mixture of experts -------------------------------------------------------------------------------------------


def moe_turn(ours=(1.0, 2.0), transformers=(1.0, 5.0), norms=(0.5, 0.5)):
    times = {f"{side}_{phase}": value for side, pair in (("ours", ours), ("transformers", transformers)) for phase, value in zip(("score", "train"), pair, strict=True)}
    return times | {"ours_grad_norm": norms[0], "transformers_grad_norm": norms[1]}


def test_a_moe_row_divides_whole_steps_pair_by_pair_and_its_target_is_transformers_speed():
    row = {"precision": "fp32", "repetitions": 2} | moe_step.compare([moe_turn(), moe_turn(transformers=(1.0, 2.0))], "fp32")
    assert row["speed_ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0} and row["train_ratio"]["max"] == 2.5
    (judged,) = moe_step.targets([row])
    assert judged["met"] and judged["wanted"] == "at least 1"
    assert moe_step.tables([row])[0][1][0]["speed, ours / transformers"] == "1.50 (1.00 to 2.00)"


def test_two_mixtures_that_took_different_steps_are_not_compared():
    with pytest.raises(ValueError, match="fp32: the two sides' gradient norms are 0.5 and 0.6"):
        moe_step.compare([moe_turn(norms=(0.5, 0.6))], "fp32")


def test_the_moe_bench_s_rows_are_problems_with_their_solutions():
    rows = moe_step.rows_of(moe_step.Batch(num_sequences=4))
    assert len(rows) == 4 and rows == moe_step.rows_of(moe_step.Batch(num_sequences=4))
    assert all(0 < num_prompt < len(tokens) for tokens, num_prompt in rows)
