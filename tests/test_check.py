"""suite check: what lies at MODEL, the task that is made of it, the numbers, the bars and the page. No engine."""

import argparse
import hashlib
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from suite.check import checkpoint, dumped, memory, prompts, template
from suite.check.bars import NO, NO_LIMIT, NO_VALUE, YES, answers, bars, chosen_bars
from suite.check.measures import BANDS, SAMPLE_MEAN, Launch, arm_estimates, by_arm, estimate, ratio
from suite.check.page import page
from suite.check.result import Result, number
from suite.check.template import Options
from suite.check.verb import check, options_of
from suite.cli.main import build_parser, main
from suite.door import FileError
from suite.errors import UserError
from suite.spec.reading import load_task
from suite.spec.validate import require_valid

CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "max_position_embeddings": 128}
OPTIONS = Options(("bf16", "fp16"), None, 2, 16, (0, 1), "vllm", "sdpa")


def checkpoint_in(folder, config=CONFIG, elements=24):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(elements, np.float32)}, folder / "model.safetensors")
    return folder


def refusal(call, *args) -> str:
    with pytest.raises(FileError) as found:
        call(*args)
    return str(found.value)


# --- what lies at MODEL -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_from_its_headers(tmp_path):
    model = checkpoint.read("m", checkpoint.find(str(checkpoint_in(tmp_path / "m"))))
    assert (model.family, model.vocabulary, model.context, model.num_parameters, model.sizes) == ("qwen3", 64, 128, 24, {"F32": 24})
    assert not model.has_tokenizer


def test_the_sizes_of_a_model_with_images_are_those_of_its_text_part(tmp_path):
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 7, "max_position_embeddings": 9}}
    model = checkpoint.read("m", checkpoint_in(tmp_path, config))
    assert (model.vocabulary, model.context) == (7, 9)


@pytest.mark.parametrize("name, content, says", [
    ("model.gguf", b"GGUF\x03\0\0\0", "a GGUF file"), ("weights", b"GGUF\x03\0\0\0", "a GGUF file"), ("notes.txt", b"hello", "a file notes.txt"),
])  # fmt: skip
def test_a_file_is_no_checkpoint_and_a_gguf_file_is_called_one(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    text = refusal(checkpoint.find, str(tmp_path / name))
    assert says in text and "a folder with config.json and *.safetensors" in text
    assert ("llama.cpp" in text) == ("GGUF" in says)


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path):
    assert "no such folder" in refusal(checkpoint.find, str(tmp_path / "absent"))
    assert "no such folder" in refusal(checkpoint.find, "./absent") and "llama.cpp" in refusal(checkpoint.find, "absent.gguf")
    assert checkpoint.find("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def folder_without(name):
    def make(folder):
        checkpoint_in(folder)
        (folder / name).unlink()
    return make


def with_config(**more):
    return lambda folder: checkpoint_in(folder, CONFIG | more)


def broken_weights(content):
    def make(folder):
        checkpoint_in(folder)
        (folder / "model.safetensors").write_bytes(content((folder / "model.safetensors").read_bytes()))
    return make


def only(name, also_config=False):
    def make(folder):
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        if also_config:
            (folder / "config.json").write_text(json.dumps(CONFIG))
    return make


def with_index(folder):
    checkpoint_in(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))


@pytest.mark.parametrize("make, says", [
    (lambda folder: folder.mkdir(), "a folder with no config.json, but nothing"),
    (only("readme.md"), "a folder with no config.json, but readme.md"),
    (only("q4.gguf"), "a folder of GGUF files"),
    (only("adapter_config.json"), "merge it into its model first"),
    (only("pytorch_model.bin", also_config=True), "weights in pytorch_model.bin and no *.safetensors"),
    (folder_without("model.safetensors"), "a folder with no *.safetensors, but config.json"),
    (with_config(model_type=None), "model_type: found None"),
    (with_config(vocab_size=None), "vocab_size: found nothing"),
    (with_config(quantization_config={"quant_method": "awq"}), "weights quantised with awq"),
    (with_config(final_logit_softcapping=30.0), "final_logit_softcapping: found 30.0"),
    (with_config(logits_scaling=8.0), "logits_scaling: found 8.0"),
    (with_index, "1 of 2 files absent, such as model-2.safetensors"),
    (broken_weights(lambda data: data[:-4]), "as its header says"),
    (broken_weights(lambda data: b"version https://git-lfs.github.com/spec/v1"), "no header of a safetensors file"),
    (broken_weights(lambda data: data[:8] + b"x" * (len(data) - 8)), "a broken header"),
    (broken_weights(lambda data: b""), "no header of a safetensors file"),
])  # fmt: skip
def test_a_folder_that_no_engine_takes_is_refused_with_what_was_found(tmp_path, make, says):
    make(tmp_path / "m")
    assert says in refusal(checkpoint.read, "m", tmp_path / "m")


@pytest.mark.parametrize("neutral", [{"final_logit_softcapping": None}, {"logits_scaling": 1.0}, {"logit_scale": 1}])
def test_a_step_after_the_head_that_does_nothing_is_no_obstacle(tmp_path, neutral):
    assert checkpoint.read("m", checkpoint_in(tmp_path / "m", CONFIG | neutral)).family == "qwen3"


def test_a_model_fits_where_both_engines_do(tmp_path):
    model = checkpoint.read("m", checkpoint_in(tmp_path / "m"))
    rest = memory.CACHE_BYTES + memory.ENGINE_BYTES
    assert memory.needed_bytes(1000, [("bf16", "bf16"), ("fp32", "bf16")]) == 6000 + rest
    memory.require_fit(model, [("bf16", "fp32")], 24 * 6 + rest)
    text = refusal(memory.require_fit, model, [("bf16", "bf16"), ("bf16", "fp32")], 24 * 6 + rest - 1)
    assert "a sampler in bf16 and a trainer in fp32" in text and "what this machine has free" in text


# --- prompts and the task ----------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single bytes."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + list(text.encode())

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>" * add_generation_prompt


class Chatting(Letters):
    chat_template = "yes"


@pytest.fixture
def model(tmp_path):
    return checkpoint.read("m", checkpoint_in(tmp_path / "m", CONFIG | {"vocab_size": 256, "max_position_embeddings": 4096}))


def test_a_text_is_given_as_it_stands_and_messages_go_through_the_chat_template(tmp_path, model):
    (tmp_path / "p.txt").write_text("ab\n\ncd\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"messages": [{"role": "u", "content": "x"}]})
                                      + "\n" + json.dumps({"token_ids": [3, 4]}))  # fmt: skip
    assert prompts.load(str(tmp_path / "p.txt"), model, Letters(), None) == [[1, 97, 98], [1, 99, 100]]
    assert prompts.load(str(tmp_path / "p.jsonl"), model, Chatting(), None) == [[1, 97, 98], list(b"<u>x<assistant>"), [3, 4]]
    pq.write_table(prompts.as_table([[3, 4], [5]]), tmp_path / "p.parquet")
    assert prompts.load(str(tmp_path / "p.parquet"), model, None, None) == [[3, 4], [5]]


@pytest.mark.parametrize("name, text, says", [
    ("p.txt", "\n\n", "no prompts"), ("p.csv", "a", "a file called p.csv"), ("p.jsonl", "[1]", "row 1: found nothing"),
    ("p.jsonl", '{"prompt": "a", "token_ids": [1]}', "found prompt, token_ids, allowed: exactly one of"),
    ("p.jsonl", '{"question": "a"}', "found question"), ("p.jsonl", '{"prompt": 3}', "row 1: prompt: found int"),
    ("p.jsonl", '{"messages": [{"role": "user"}]}', "a list of {role, content}"), ("p.jsonl", '{"token_ids": [1, 256]}', "token id 256"),
    ("p.jsonl", '{"token_ids": []}', "without tokens"), ("p.jsonl", '{"token_ids": ["1"]}', "a list of whole numbers"),
    ("p.txt", "abcdefghijk", "a prompt of 12 tokens"), ("p.jsonl", "{", "line 1"),
])  # fmt: skip
def test_a_file_of_prompts_that_cannot_be_used_is_refused_by_row(tmp_path, model, name, text, says):
    (tmp_path / name).write_text(text)
    assert says in refusal(prompts.load, str(tmp_path / name), model, Chatting(), 10)


def test_without_a_tokenizer_builtin_prompts_are_ids_and_texts_are_refused(tmp_path, model):
    drawn = prompts.load("builtin", model, None, None)
    assert len(drawn) == 16 and all(0 <= one < model.vocabulary for ids in drawn for one in ids)
    (tmp_path / "p.txt").write_text("ab")
    assert "the checkpoint has no tokenizer" in refusal(prompts.load, str(tmp_path / "p.txt"), model, None, None)


def test_builtin_prompts_are_turns_of_a_chat_where_the_model_chats(model):
    plain, chat = (prompts.load("builtin", model, one, None) for one in (Letters(), Chatting()))
    assert len(plain) == len(chat) >= 12 and plain[0][0] == 1 and bytes(chat[0]).startswith(b"<user>")


def made(model, options, runs, given=((1, 2, 3), (4, 5))):
    given = [list(one) for one in given]
    return template.task_of(model, options, hashlib.sha256(repr(given).encode()).hexdigest(), given, {"sha256": "1" * 64, "files_sha256": "2" * 64}, runs, False)


def test_the_task_of_a_check_is_valid_and_says_what_was_chosen(tmp_path, model):
    task = made(model, Options(("bf16", "fp16", "fp32"), None, 2, 16, (4, 7), "hf", "eager"), tmp_path)
    file = tmp_path / f"{task['id']}.yaml"
    file.write_text(template.as_text(task, file, tmp_path))
    read = require_valid(load_task(file)).task
    assert list(read.arms) == ["bf16", "fp16", "fp32"] and read.seeds == (4, 7) and read.settings["rollout"]["engine"] == "hf"
    assert read.settings["rollout"]["max_model_len"] == 3 + 16 and read.settings["train"]["attention"] == "eager"
    ratios = [claim.id for claim in read.claims if "-over-" in claim.id]
    assert "bf16-over-fp16-k3_nats_per_token" in ratios and "fp16-over-fp32-prob_diff_mean" in ratios
    assert read.settings["data"]["path"] == str(tmp_path / task["id"] / "prompts.parquet")


def test_a_trainer_in_another_dtype_gives_arms_named_after_both(tmp_path, model):
    task = made(model, Options(("bf16", "fp16"), "bf16", 2, 16, (0,), "vllm", "sdpa"), tmp_path)
    assert task["arms"] == {"bf16": {"precision": {"rollout": "bf16", "train": "bf16"}}, "bf16-fp16": {"precision": {"rollout": "fp16", "train": "bf16"}}}


def test_the_context_is_no_longer_than_the_model_was_made_for(tmp_path):
    model = checkpoint.read("m", checkpoint_in(tmp_path / "m", CONFIG | {"max_position_embeddings": 10}))
    assert template.context_of(model, 6, 100) == 10 and template.context_of(model, 6, 2) == 8


def test_another_choice_is_another_task_and_another_runs_folder_is_not(tmp_path, model):
    first = made(model, OPTIONS, tmp_path)["id"]
    assert made(model, OPTIONS, tmp_path / "elsewhere")["id"] == first
    others = [made(model, Options(("bf16", "fp16"), None, 2, 17, (0, 1), "vllm", "sdpa"), tmp_path), made(model, OPTIONS, tmp_path, ((1, 2, 3), (4, 6, 7)))]
    assert first not in [one["id"] for one in others]


def test_prompts_that_are_ids_need_a_protocol_without_rewards(tmp_path, model):
    task = made(model, OPTIONS, tmp_path) | {"protocol": "offline_accuracy", "train": None}
    for grade in task["grade"].values():
        grade["estimand"] = "response_tokens_mean"
    task |= {"metrics": []}
    file = tmp_path / f"{task['id']}.yaml"
    file.write_text(yaml.safe_dump(task))
    with pytest.raises(UserError, match="data.template: found 'tokens'"):
        require_valid(load_task(file))


@pytest.mark.parametrize("flags, says", [
    (["--precision", "int8"], "--precision: found 'int8'"), (["--precision", "bf16,bf16"], "each once"), (["--trainer-dtype", "tf32"], "--trainer-dtype"),
    (["--seeds", "0,0"], "--seeds: found 0,0"), (["--seeds=-1"], "--seeds: found -1"), (["--precision", ","], "found nothing"),
])  # fmt: skip
def test_a_choice_that_makes_no_task_is_refused(flags, says):
    with pytest.raises(UserError, match=says):
        options_of(build_parser().parse_args(["check", "m", *flags]))


# --- numbers and bars --------------------------------------------------------------------------------------------------


def launch(arm, seed, *pairs, prompt="p"):
    """One response per (mu, pi), both log-probs."""
    one = Launch(arm, seed)
    for i, (mu, pi) in enumerate(pairs):
        one.add([f"{prompt}{i}"], [len(mu)], np.array(mu), np.array(pi))
    return one


def test_the_statistics_of_one_launch_are_their_formulas():
    mu, r = np.array([-1.0, -2.0, -0.5]), np.array([0.0005, -0.02, 0.3])
    one = launch("bf16", 0, (mu[:2], mu[:2] + r[:2]), (mu[2:], mu[2:] + r[2:]))
    assert one.value("k1_nats_per_token") == pytest.approx(-r.mean(), rel=1e-12)
    assert one.value("k3_nats_per_token") == pytest.approx(np.mean(np.exp(r) - 1 - r), rel=1e-9)
    assert one.value("prob_diff_mean") == pytest.approx(np.abs(np.exp(mu + r) - np.exp(mu)).mean(), rel=1e-9)
    assert one.value("mult_prob_error") == pytest.approx(np.exp(np.abs(r)).mean(), rel=1e-12)
    assert one.value("out_of_band_share") == pytest.approx(1 / 3)
    assert one.value(SAMPLE_MEAN) == pytest.approx((np.abs(r[:2]).mean() + 0.3) / 2, rel=1e-12)  # over responses, not tokens
    assert [one.value(name) for name in BANDS] == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_folding_in_parts_changes_nothing():
    rng = np.random.default_rng(0)
    mu, pi, lengths = -rng.random(50), -rng.random(50), [20, 0, 30]
    whole, parts = Launch("a", 0), Launch("a", 0)
    whole.add(["x", "y", "x"], lengths, mu, pi)
    parts.add(["x", "y"], lengths[:2], mu[:20], pi[:20])
    parts.add(["x"], lengths[2:], mu[20:], pi[20:])
    assert {name: whole.value(name) for name in ("k3_nats_per_token", SAMPLE_MEAN, *BANDS)} == pytest.approx(
        {name: parts.value(name) for name in ("k3_nats_per_token", SAMPLE_MEAN, *BANDS)}, rel=1e-12
    )


def shifted(arm, seed, r, num=4):
    return launch(arm, seed, *[(np.array([-1.0]), np.array([-1.0 + r * (1 + 0.1 * i)])) for i in range(num)])


def test_the_interval_is_over_launches_and_of_one_launch_over_prompts():
    three = estimate([shifted("a", seed, 0.01 + 0.001 * seed) for seed in range(3)], "prob_diff_mean")
    assert three.method == "Student's t over 3 launches" and three.interval[0] < three.value < three.interval[1]
    one = estimate([shifted("a", 0, 0.01)], "prob_diff_mean")
    assert one.method == "bootstrap over 4 prompts of one launch" and one.interval[0] < one.value < one.interval[1]
    assert estimate([launch("a", 0, ([-1.0], [-1.1]))], "prob_diff_mean").interval is None


def test_launches_that_agree_exactly_have_no_interval_and_say_why():
    same = estimate([shifted("a", seed, 0.01) for seed in range(3)], "k3_nats_per_token")
    assert same.interval is None and "agree exactly" in same.method
    assert "above 0" in estimate([shifted("a", seed, 0.0) for seed in range(2)], "k3_nats_per_token").method


def test_a_share_of_nothing_is_zero_and_not_a_hair_above():
    assert estimate([shifted("a", seed, 0.001, num=3 + seed) for seed in range(3)], "out_of_band_share").value == 0.0


def test_a_ratio_is_taken_seed_by_seed_and_undefined_where_nothing_differs():
    top, bottom = [shifted("a", seed, 0.08) for seed in (0, 1)], [shifted("b", seed, 0.01 if seed else 0.02) for seed in (0, 1, 2)]
    found = ratio(top, bottom, "prob_diff_mean")
    values = [t.value("prob_diff_mean") / b.value("prob_diff_mean") for t, b in zip(top, bottom)]
    assert found.value == pytest.approx(math.sqrt(values[0] * values[1])) and found.num == 2
    assert ratio(top, [shifted("b", 0, 0.0)], "prob_diff_mean") is None and ratio(top, [shifted("b", 9, 0.01)], "prob_diff_mean") is None


def test_every_bar_has_a_source_a_date_and_a_statistic_that_is_measured():
    found = arm_estimates(by_arm([shifted("bf16", 0, 0.01)]))["bf16"]
    for bar in bars().values():
        assert bar.statistic in found and bar.source and len(bar.date) == 10 and not (bar.below is not None and bar.most is not None)
    limits = {name: bar.limit for name, bar in bars().items()}
    assert limits["nemo-rl"] == "< 1.05" and limits["prime-rl"] == "< 0.015" and limits["prime-rl-sanity"] == "<= 0.0005"
    assert (limits["verl"], limits["verl-problem"], limits["slime"]) == ("< 0.005", "<= 0.01", "<= 0.1")


def test_a_bar_is_cleared_below_its_limit_and_at_it_only_where_its_author_says_so():
    found = {name: bar.clears(value) for name, value in (("nemo-rl", 1.05), ("slime", 0.1)) for bar in [bars()[name]]}
    assert found == {"nemo-rl": False, "slime": True}
    assert not bars()["slime"].clears(math.nan) and not bars()["nemo-rl"].clears(math.inf)


def test_each_bar_is_answered_for_each_arm_and_a_band_without_a_limit_is_only_shown():
    arms = arm_estimates(by_arm([*(shifted("bf16", s, 0.2 + 0.01 * s) for s in range(3)), *(shifted("fp16", s, 0.001 + 1e-5 * s) for s in range(3))]))
    words = {(one.bar.name, one.arm): one.word for one in answers(arms)}
    assert words["nemo-rl", "bf16"] == NO and words["nemo-rl", "fp16"] == YES and words["maxtext-1pct", "fp16"] == NO_LIMIT
    empty = Launch("bf16", 0)
    assert {one.word for one in answers(arm_estimates({"bf16": [empty]}))} == {NO_VALUE}


def test_a_bar_that_nobody_published_or_that_has_no_limit_cannot_be_chosen():
    assert chosen_bars(["verl", "nemo-rl"]) == ["verl", "nemo-rl"]
    with pytest.raises(UserError, match="--bar: found 'trl', allowed: nemo-rl"):
        chosen_bars(["trl"])
    with pytest.raises(UserError, match="it has no limit"):
        chosen_bars(["maxtext-1pct"])


# --- rollouts that exist -----------------------------------------------------------------------------------------------


def rows_of(arms=("bf16",), seeds=(0,), num=6, length=9, scale=0.01, start=0):
    rng = np.random.default_rng(start)
    for arm in arms:
        for seed in seeds:
            for prompt in range(num):
                mu = np.round(-0.05 - rng.exponential(1.0, length), 6)
                pi = np.round(np.minimum(mu + scale * rng.standard_normal(length), -1e-6), 6)
                yield {"arm": arm, "seed": seed, "prompt_id": prompt, "response_token_ids": rng.integers(5, 999, length).tolist(),
                       "rollout_logprobs": mu.tolist(), "trainer_logprobs": pi.tolist()}  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rollouts_give_the_numbers_of_a_few_lines_of_numpy(tmp_path):
    rows = list(rows_of(("bf16", "fp16"), (0, 1)))
    found = by_arm(dumped.read([written(tmp_path / "r.jsonl", rows)], None, None, None).launches)
    mine = [row for row in rows if row["arm"] == "fp16" and row["seed"] == 1]
    r = np.concatenate([np.subtract(row["trainer_logprobs"], row["rollout_logprobs"]) for row in mine])
    one = found["fp16"][1]
    assert one.value("k3_nats_per_token") == pytest.approx(np.mean(np.exp(r) - 1 - r), rel=1e-6)
    assert one.value("mult_prob_error") == pytest.approx(np.mean(np.exp(np.abs(r))), rel=1e-12)
    assert list(found) == ["bf16", "fp16"] and [launch.seed for launch in found["bf16"]] == [0, 1]


def test_rows_without_arm_and_seed_are_one_launch(tmp_path):
    rows = [{name: value for name, value in row.items() if name not in ("arm", "seed")} for row in rows_of()]
    path = written(tmp_path / "r.jsonl", rows)
    assert [(one.arm, one.seed) for one in dumped.read([path], None, None, None).launches] == [("rollouts", 0)]
    assert [(one.arm, one.seed) for one in dumped.read([path], None, "mine", 3).launches] == [("mine", 3)]


def test_masked_tokens_do_not_count(tmp_path):
    row = next(rows_of()) | {"loss_mask": [1] * 4 + [0] * 5}
    row["trainer_logprobs"][4:] = [None] * 5
    assert dumped.read([written(tmp_path / "r.jsonl", [row])], None, None, None).launches[0].num_tokens == 4


@pytest.mark.parametrize("change, says", [
    ({"trainer_logprobs": [-9999.0] * 9}, "row 1: trainer_logprobs"), ({"arm": "../bf16"}, "row 1: arm"), ({"arm": 3}, "row 1: arm"),
    ({"seed": -1}, "row 1: seed"), ({"los_mask": [1] * 9}, "unknown columns"),
])  # fmt: skip
def test_a_row_that_cannot_be_used_refuses_the_file(tmp_path, change, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        dumped.read([written(tmp_path / "r.jsonl", [next(rows_of()) | change])], None, None, None)


def test_a_flag_that_the_rows_contradict_is_refused(tmp_path):
    with pytest.raises(UserError, match="arm: found 'bf16', allowed: 'fp16', as --arm says"):
        dumped.read([written(tmp_path / "r.jsonl", rows_of())], None, "fp16", None)


def run(*arguments):
    return check(build_parser().parse_args(["check", *map(str, arguments)]))


def test_the_exit_code_is_that_of_the_chosen_bars(tmp_path, capsys):
    near, far = (written(tmp_path / name, rows_of(scale=scale)) for name, scale in (("near.jsonl", 0.01), ("far.jsonl", 1.0)))
    assert run("--evidence", near, "--bar", "nemo-rl,verl-problem") == 0 and run("--evidence", far) == 0
    assert run("--evidence", far, "--bar", "nemo-rl") == 1
    assert "no" in capsys.readouterr().out


def test_columns_that_are_equal_clear_no_chosen_bar(tmp_path, capsys):
    rows = [row | {"trainer_logprobs": row["rollout_logprobs"]} for row in rows_of(num=40)]
    assert run("--evidence", written(tmp_path / "r.jsonl", rows), "--bar", "nemo-rl") == 1
    assert "doubtful" in capsys.readouterr().out


def test_the_page_is_one_small_file_that_asks_for_nothing(tmp_path, capsys):
    out = tmp_path / "pages" / "check.html"
    assert run("--evidence", written(tmp_path / "r.jsonl", rows_of(("bf16", "fp16"), (0, 1, 2))), "--html", out, "--bar", "verl") == 0
    text = out.read_text()
    assert len(text) < 1_000_000 and "http://" not in text.split("base64")[0] and "<script" not in text and 'src="http' not in text
    for wanted in ("nemo-rl", "2026-09-15", "bf16 / fp16", "figure 5", 'id="bars"', "prefers-color-scheme: dark", "width=device-width"):
        assert wanted in text
    assert f"page: {out}" in capsys.readouterr().out


def test_names_out_of_files_are_text_on_the_page():
    nothing = dict(ratios={}, answers=[], chosen=[], doubts=[], notes=[], commands=["<b>"], figure=None, preflight=None)
    shown = page(Result("<script>alert(1)</script>", [("a", "<i>")], arm_estimates({}), **nothing)).decode()
    assert "<script" not in shown and "&lt;script&gt;" in shown


def test_check_takes_a_model_or_rollouts_and_not_both(tmp_path, capsys):
    path = written(tmp_path / "r.jsonl", rows_of())
    for arguments in ([], ["m", "--evidence", str(path)]):
        assert main(["check", *arguments]) == 2
    assert main(["check", str(tmp_path / "absent" / "model")]) == 2
    said = capsys.readouterr().err
    assert "either MODEL or --evidence FILE" in said and "no such folder" in said


def test_a_number_near_one_keeps_what_lies_beside_it():
    assert [number(value) for value in (1.00674, 1.0, 0.000123456, 61.234)] == ["1.00674", "1", "0.0001235", "61.23"]


def test_the_flags_have_the_defaults_that_the_guide_names():
    args = build_parser().parse_args(["check", "m"])
    assert isinstance(args, argparse.Namespace) and (args.precision, args.seeds, args.samples, args.max_tokens) == (["bf16", "fp16"], [0, 1, 2], 4, 256)


def test_a_model_whose_sizes_have_other_names_has_no_shape_and_is_no_error(tmp_path):
    from suite.spec.shapes import shape_of

    assert shape_of({"path": str(checkpoint_in(tmp_path / "m"))}) is None
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert shape_of({"path": str(checkpoint_in(tmp_path / "n", CONFIG | sizes))}).layers == 2
