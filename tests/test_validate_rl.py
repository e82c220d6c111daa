"""Checks of RL tasks across keys: each refused with its key, what was found, and what is allowed."""

import pytest
from fakes import OFFLINE, RL, block, claim, event_grade, task_of

from suite.spec.strict_yaml import TaskErrors
from suite.spec.validate import check

GRADE = block("reward_mean", "arm: fp16", "[0.95, 1.0]", "reducer: epoch_mean, window: 4")


def errors_of(tmp_path, kind: str, grade: str, old: str = "", new: str = "") -> list[str]:
    text = RL.replace(old, new) if old else RL
    assert text != RL or not old
    return [str(error) for error in check(task_of(tmp_path, text, claim(kind, grade)))[0]]



def test_a_good_task_has_no_errors(tmp_path):
    assert errors_of(tmp_path, "threshold", GRADE) == []


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("name: GRPO, cap: 3.0", "algorithm.cap: found 3.0, allowed: nothing: GRPO has no cap"),
        ("name: Grpo", "algorithm.name: found 'Grpo', allowed: one of GRPO"),
        ("name: GRPO, clip_low: 2.0", "algorithm.clip_low: found 2.0, allowed: a number in (0, 1]"),
        ("name: GRPO, dual_clip: 0.5", "algorithm.dual_clip"),
        ("name: GRPO, aggregation: mean", "algorithm.aggregation: found 'mean', allowed: one of sum_over_length"),
        ("name: PG-Seq-IS, log_ratio_limit: 100.0", "algorithm.log_ratio_limit"),
        ("name: GSPO, aggregation_length: 64", "algorithm.aggregation_length"),
    ],
)
def test_an_algorithm_that_does_not_resolve_is_refused(tmp_path, algorithm, said):
    found = errors_of(tmp_path, "threshold", GRADE, "name: GRPO", algorithm)
    assert len(found) == 1 and said in found[0] and "tiny.yaml" in found[0]


@pytest.mark.parametrize(
    "algorithm",
    ["name: GRPO, shuffle_rewards: true", "name: DAPO, dual_clip: 5.0", "name: PG-Seq-IS, log_ratio_limit: 10.0",
     "name: GRPO, aggregation: token_mean", "name: GRPO, advantage: reward, aggregation_length: 64"],
)  # fmt: skip
def test_every_override_of_a_row_can_be_said(tmp_path, algorithm):
    assert errors_of(tmp_path, "threshold", GRADE, "name: GRPO", algorithm) == []


@pytest.mark.parametrize("new", ["temperature: 0.6, top_p: 1.0", "temperature: 1.0, top_p: 0.95", "temperature: 1.0, top_p: 1.0, top_k: 20"])
def test_sampling_that_the_trainer_does_not_know_is_refused(tmp_path, new):
    name, value = next(part.split(": ") for part in new.split(", ") if part not in ("temperature: 1.0", "top_p: 1.0"))
    (error,) = errors_of(tmp_path, "threshold", GRADE, "temperature: 1.0, top_p: 1.0", new)
    assert f"rollout.{name}: found {value}, allowed: {'0' if name == 'top_k' else '1.0'} in protocol rl" in error


def test_adapters_are_refused_where_nothing_is_trained(tmp_path):
    lora = "train: {{engine: dense, score_batch_size: 4, lora: {{rank: 2, alpha: 4, targets: [q_proj]}}}}"
    text = OFFLINE.replace("train: {{engine: dense, score_batch_size: 4}}", lora)
    task = task_of(tmp_path, text, claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}"))
    (error,) = check(task)[0]
    assert (error.key, error.found, error.allowed) == ("train.lora", "rank 2", "nothing, outside protocol rl")


@pytest.mark.parametrize(("edits", "said"), [
    ([("engine: dense", "engine: moe")], "model.family: found 'qwen2', allowed: qwen3_moe with train.engine moe"),
    ([("engine: dense", "engine: moe\n  attention: eager"), ("family: qwen2", "family: qwen3_moe")], "train.attention: found 'eager', allowed: sdpa"),
    ([("engine: dense", "engine: moe\n  lora: {{rank: 2, alpha: 4, targets: [q_proj]}}"), ("family: qwen2", "family: qwen3_moe")],
     "train.lora: found 'rank 2', allowed: nothing with train.engine moe"),
    ([("engine: dense", "engine: moe\n  parallel: {{data: 4, expert: 3}}"), ("family: qwen2", "family: qwen3_moe")],
     "train.parallel.expert: found 3, allowed: a divisor of train.parallel.data, 4"),
    ([("engine: dense", "engine: dense\n  parallel: {{data: 4, expert: 2}}")], "train.parallel.expert: found 2, allowed: 1 with train.engine dense"),
    ([("engine: dense", "engine: dense\n  routing_replay: rollout")], "train.routing_replay: found 'rollout', allowed: nothing with train.engine dense"),
])  # fmt: skip
def test_what_a_trainer_cannot_do_is_refused(tmp_path, edits, said):
    text = RL
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    found = [str(error) for error in check(task_of(tmp_path, text, claim("threshold", GRADE)))[0]]
    assert len(found) == 1 and said in found[0], found


def test_a_moe_trainer_of_a_mixture_is_accepted(tmp_path):
    text = RL.replace("engine: dense", "engine: moe\n  parallel: {{data: 4, expert: 2}}").replace("family: qwen2", "family: qwen3_moe")
    assert check(task_of(tmp_path, text, claim("threshold", GRADE)))[0] == []


def test_a_batch_shape_must_be_said(tmp_path):
    found = errors_of(tmp_path, "threshold", GRADE, "  score_batch_size: 4\n", "")
    assert any("train.score_batch_size: found 'nothing', allowed: a value (rl needs it)" in line for line in found)


def test_an_override_in_an_arm_is_named_there(tmp_path):
    arm = "fp16: {{algorithm: {{cap: 3.0}}, precision"
    found = errors_of(tmp_path, "threshold", GRADE, "fp16: {{precision", arm)
    assert any("arms.fp16.algorithm.cap: found 3.0" in line for line in found)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("threshold", "reducer: epoch_mean", "window: found 'nothing', allowed: the iterations of one full pass"),
        ("threshold", "reducer: epoch_mean, window: 101", "window: found 101, allowed: a window that fits into 100"),
        ("threshold", "reducer: last_k_mean, window: 20, until: 10", "window: found 20"),
        ("threshold", "reducer: last_k_mean, window: 5, until: 200", "until: found 200, allowed: at most schedule"),
        ("threshold", "reducer: log_ratio, window: 51", "window: found 51"),
        ("threshold", "reducer: time_to_event, window: 4", "reducer: found 'neither'"),
        ("threshold", "reducer: last_k_mean, window: 4, level: 0.9", "level: found 0.9"),
    ],
)
def test_windows_and_horizons_must_fit_into_the_run(tmp_path, kind, more, said):
    found = errors_of(tmp_path, kind, block("reward_mean", "arm: fp16", "[0.2, 0.9]", more))
    assert len(found) == 1 and said in found[0] and "grade.C1-x" in found[0]


def test_an_event_that_could_not_show_is_refused(tmp_path):
    found = errors_of(tmp_path, "event", event_grade("bf16", "collapses", hold=60, window=41))
    assert len(found) == 1 and "window 41 + hold 60" in found[0]
    assert errors_of(tmp_path, "event", event_grade("bf16", "collapses", hold=60, window=40)) == []


def test_more_mini_batches_than_prompts_are_refused(tmp_path):
    found = errors_of(tmp_path, "threshold", GRADE, "minibatches: 1", "minibatches: 65")
    assert len(found) == 1 and "schedule.minibatches: found 65, allowed: at most" in found[0]


def test_mini_batches_of_responses_may_be_more_than_prompts_but_not_than_responses(tmp_path):
    assert errors_of(tmp_path, "threshold", GRADE, "minibatches: 1", "minibatches: 9, minibatch_of: responses") == []
    found = errors_of(tmp_path, "threshold", GRADE, "minibatches: 1", "minibatches: 1000, minibatch_of: responses")
    assert len(found) == 1 and "schedule.minibatches: found 1000, allowed: at most the" in found[0]


def with_reduction(text: str, **of_arm: str) -> str:
    for arm, dtype in of_arm.items():
        text = text.replace(f"train: {arm}}}}}}}}}", f"train: {arm}, gradient_reduction: {dtype}}}}}}}}}")
    return text.replace("vary: [precision.rollout, precision.train]", "vary: [precision]")


@pytest.mark.parametrize(("asked", "wrong"), [("fp32", []), ("fp16", []), ("bf16", ["arms.fp16.precision.gradient_reduction"])])
def test_gradients_are_summed_in_fp32_or_in_the_trainers_own_dtype(tmp_path, asked, wrong):
    errors = check(task_of(tmp_path, with_reduction(RL, fp16=asked), claim("threshold", GRADE)))[0]
    assert [(error.key, error.allowed) for error in errors] == [(key, "fp32 or fp16, the trainer's own dtype") for key in wrong]


def test_what_acts_on_training_alone_is_refused_elsewhere(tmp_path):
    text = with_reduction(OFFLINE, bf16="bf16", fp16="fp16")
    task = task_of(tmp_path, text, claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}"))
    (error,) = check(task)[0]
    assert (error.key, error.allowed) == ("precision.gradient_reduction", "nothing, outside protocol rl")


def test_a_drift_may_be_bounded_on_one_side(tmp_path):
    grade = block("prob_diff_mean", "arm: fp16", "[null, 0.405]", "reducer: log_ratio")
    assert errors_of(tmp_path, "threshold", grade) == []


COARSE = "  fp32-m3: {{precision: {{rollout: m3, rollout_rounded: weights, train: fp32}}}}\n"


@pytest.mark.parametrize(("old", "new", "said"), [
    ("rollout_rounded: weights, ", "", "rollout_rounded: found 'nothing', allowed: weights (precision.rollout is m3)"),
    ("m3, rollout_rounded: weights", "m30, rollout_rounded: weights", "precision.rollout: found 'm30', allowed: fp32, bf16, fp16, m0, m1"),
    ("m3, rollout_rounded: weights", "m3, rollout_rounded: products", "rollout_rounded: found 'products', allowed: weights"),
    ("{{rollout: m3, rollout_rounded", "{{rollout: m2, rollout_rounded", "found 'm2', allowed: m3 (the arm's name says so)"),
    ("rollout: m3, rollout_rounded: weights", "rollout: fp16, rollout_rounded: weights", "allowed: nothing, unless precision.rollout is one of m0 to m22"),
    ("train: fp32}}}}", "train: fp32}}, train: {{lora: {{rank: 2, alpha: 4, targets: [q_proj]}}}}}}", "allowed: fp32, bf16, fp16 with train.lora"),
])  # fmt: skip
def test_a_coarse_sampler_that_cannot_be_is_refused(tmp_path, old, new, said):
    text = RL.replace("vary: [precision", COARSE.replace(old, new) + "vary: [train, precision")
    found = [str(error) for error in _errors(tmp_path, text)]
    assert any(said in error for error in found), found


def test_a_coarse_sampler_is_accepted(tmp_path):
    assert _errors(tmp_path, RL.replace("vary: [precision", COARSE + "vary: [precision.rollout_rounded, precision")) == []


@pytest.mark.parametrize(("old", "new", "said"), [
    ("engine: hf", "engine: vllm", None),
    ("engine: hf", "engine: hf", "precision.kv_cache: found 'fp8_e5m2', allowed: nothing with rollout.engine hf; fp8_e4m3, fp8_e5m2 with vllm"),
    ("engine: hf", "engine: auto", "precision.kv_cache: found 'fp8_e5m2', allowed: nothing with rollout.engine auto"),
    ("kv_cache: fp8_e5m2", "kv_cache: fp8", "precision.kv_cache: found 'fp8', allowed: fp32, bf16, fp16, fp8_e4m3 or fp8_e5m2"),
])  # fmt: skip
def test_a_cache_of_8_bits_is_for_vllm_alone(tmp_path, old, new, said):
    arm = "  fp32-e5m2: {{precision: {{rollout: fp32, kv_cache: fp8_e5m2, train: fp32}}}}\n"
    text = RL.replace("vary: [precision", arm + "vary: [precision.kv_cache, precision")
    assert old in text
    found = [str(error) for error in _errors(tmp_path, text.replace(old, new))]
    assert found == [] if said is None else any(said in error for error in found), found


@pytest.mark.parametrize(("held_out", "every", "said"), [
    ("held_out: {{num_prompts: 4, seed: 1}}, ", "", "schedule.eval_every: found 'nothing'"),
    ("", "eval_every: 5, ", "data.held_out: found 'nothing'"),
    ("held_out: {{num_prompts: 4, seed: 1}}, ", "eval_every: 5, ", None),
])  # fmt: skip
def test_evaluation_needs_problems_and_a_cadence(tmp_path, held_out, every, said):
    text = RL.replace("data: {{", "data: {{" + held_out).replace("schedule: {{", "schedule: {{" + every)
    found = [str(error) for error in _errors(tmp_path, text)]
    assert found == [] if said is None else said in found[0]


DRAWN = block("drawn_reward_mean", "arm: fp16", "[0.95, 1.0]", "reducer: epoch_mean, window: 4")


def test_a_claim_about_what_dynamic_sampling_drew_needs_it_in_its_arm(tmp_path):
    (error,) = errors_of(tmp_path, "threshold", DRAWN)
    assert "grade.C1-x.estimand: found 'drawn_reward_mean', allowed: only of arms with schedule.dynamic_sampling, which fp16 has not" in error
    assert errors_of(tmp_path, "threshold", DRAWN, "schedule: {{", "schedule: {{dynamic_sampling: {{max_rounds: 3}}, ") == []
    evaluated = DRAWN.replace("drawn_reward_mean", "eval_reward_mean")
    assert "only of arms with schedule.eval_every" in errors_of(tmp_path, "threshold", evaluated)[0]


def test_a_group_of_one_response_cannot_disagree(tmp_path):
    text = RL.replace("samples_per_prompt: 8", "samples_per_prompt: 1").replace("schedule: {{", "schedule: {{dynamic_sampling: {{max_rounds: 3}}, ")
    (error,) = check(task_of(tmp_path, text, claim("threshold", DRAWN)))[0]
    assert "rollout.samples_per_prompt: found 1, allowed: at least 2 with schedule.dynamic_sampling" in str(error)


@pytest.mark.parametrize("setting", ["dynamic_sampling: {{max_rounds: 2}}", "whole_rows_per_step: 8"])
def test_settings_of_the_training_loop_are_refused_where_nothing_is_trained(tmp_path, setting):
    text = OFFLINE + f"schedule: {{{{{setting}}}}}\n"
    errors = check(task_of(tmp_path, text, claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}")))[0]
    assert any(f"schedule.{setting.partition(':')[0]}" in str(error) and "nothing, outside protocol rl" in str(error) for error in errors)


def _errors(tmp_path, text):
    from suite.spec.strict_yaml import TaskErrors

    try:
        return check(task_of(tmp_path, text, claim("threshold", GRADE)))[0]
    except TaskErrors as found:
        return found.errors


@pytest.mark.parametrize(("algorithm", "said"), [
    ("GRPO-Token-TIS, cap: 1.0e+9, perturb: {{name: permuted, format: m1}}", None),
    ("GRPO, perturb: {{name: aligned}}", None),
    ("GRPO-Token-TIS, perturb: {{name: permuted}}", "perturb.format: found 'nothing', allowed: one of m0, m1"),
    ("GRPO-Token-TIS, perturb: {{name: biased-low, format: m1}}", "perturb.format: found 'm1', allowed: nothing: biased-low rounds nothing"),
    ("GRPO, perturb: {{name: rounded, format: m1}}", "perturb.name: found 'rounded with GRPO', allowed: an algorithm that weighs tokens"),
    ("GRPO, perturb: {{name: louder}}", "perturb.name: found 'louder', allowed: rounded, permuted"),
])  # fmt: skip
def test_a_perturbation_that_cannot_act_is_refused(tmp_path, algorithm, said):
    found = [str(error) for error in _errors(tmp_path, RL.replace("name: GRPO", f"name: {algorithm}"))]
    assert found == [] if said is None else any(said in error for error in found), found


SCHEDULE = "warmup_steps: 0, lr_schedule: {{{{{}}}}}"


@pytest.mark.parametrize("keys", ["kind: constant", "kind: linear, steps: 10, final: 0.0", "kind: step, every: 4, factor: 0.5"])
def test_every_schedule_of_the_learning_rate_can_be_said(tmp_path, keys):
    assert errors_of(tmp_path, "threshold", GRADE, "warmup_steps: 0", SCHEDULE.format(keys)) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("kind: step, every: 4", "lr_schedule.factor: found 'nothing', allowed: a value (kind step needs it)"),
        ("kind: linear, final: 0.1", "lr_schedule.steps: found 'nothing', allowed: a value (kind linear needs it)"),
        ("kind: linear, final: 0.1, steps: 9, every: 4", "lr_schedule.every: found 4, allowed: with kind linear nothing: it has steps, final"),
        ("kind: constant, factor: 0.5", "lr_schedule.factor: found 0.5, allowed: with kind constant nothing: it has no further key"),
    ],
)  # fmt: skip
def test_a_schedule_has_the_keys_of_its_kind(tmp_path, keys, said):
    (error,) = errors_of(tmp_path, "threshold", GRADE, "warmup_steps: 0", SCHEDULE.format(keys))
    assert said in error and "train.optimizer" in error and "tiny.yaml" in error


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("kind: cosine", "lr_schedule.kind: found 'cosine', allowed: constant, linear or step"),
        ("kind: step, every: 0, factor: 0.5", "lr_schedule.every: found 0"),
        ("kind: step, every: 4, factor: 1.0", "lr_schedule.factor: found 1.0"),
        ("kind: step, evry: 4, factor: 0.5", "did you mean every?"),
    ],
)
def test_a_schedule_out_of_range_is_refused_where_it_is_read(tmp_path, keys, said):
    with pytest.raises(TaskErrors) as caught:
        errors_of(tmp_path, "threshold", GRADE, "warmup_steps: 0", SCHEDULE.format(keys))
    assert said in str(caught.value)
