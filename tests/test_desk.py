"""The desk default: problems whose answers are right, a tokenizer that loses nothing, and a checkpoint that is what it
says it is.
"""

import hashlib
import json
import random

import pytest
import torch

from suite.desk import build
from suite.errors import UserError
from suite.problems import desk as problems
from suite.problems.desk import make_problem, prompt_text, sample_problems

SHIPPED = ("1m", "llama-1m", "qwen3-moe-2m")


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    """(model, tokenizer, training record) of a shipped checkpoint, as a user would load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = build.folder_of(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), json.loads((folder / "training.json").read_text())


# --- problems ---


def test_a_problem_by_hand():
    problem = make_problem((("y", 7), ("z", 8), ("A", 9)))
    assert problem.text == "Sum mod 100: y7z8A9"
    assert prompt_text(problem) == "Sum mod 100: y7z8A9\n<think>\n"
    assert problem.solution == "y7=7\nz8=15\nA9=24\n</think>\n\\boxed{24}"
    assert problem.answer == "24"


def test_the_sum_wraps_at_one_hundred():
    assert make_problem(tuple(("a", 9) for _ in range(12))).answer == "8"


def test_a_slip_is_carried_on():
    lines, answer = problems.solution_lines((("a", 1), ("b", 2), ("c", 3)), group_sizes=[2, 1], slips=[-10, 0])
    assert (lines, answer) == (["a1b2=93", "c3=96"], "96")


def test_groups_that_do_not_cover_the_terms_are_refused():
    with pytest.raises(ValueError, match="add up to 1"):
        problems.solution_lines((("a", 1), ("b", 2)), group_sizes=[1], slips=[0])


def test_the_drawn_problems_are_pinned_and_distinct():
    """A change of this digest changes every desk task's data: bump their versions."""
    drawn = sample_problems(500, (4, 24), seed=7)
    assert len({problem.text for problem in drawn}) == 500
    assert drawn[:20] == sample_problems(20, (4, 24), seed=7)
    assert {len(problem.terms) for problem in drawn} == set(range(4, 25))
    digest = hashlib.sha256("\n".join(problem.text for problem in drawn).encode()).hexdigest()
    assert digest[:16] == "015fa58281478712"


def test_answers_agree_with_a_sum_over_the_text():
    for problem in sample_problems(50, (60, 120), seed=1):
        digits = problem.text.removeprefix("Sum mod 100: ")[1::2]
        assert problem.answer == str(sum(map(int, digits)) % 100)
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}") and problem.solution.count("</think>") == 1


@pytest.mark.parametrize(("num", "num_terms"), [(1, (0, 3)), (1, (5, 4)), (300, (1, 1))])
def test_impossible_requests_are_refused(num, num_terms):
    with pytest.raises(ValueError):
        sample_problems(num, num_terms, seed=0)


def test_training_solutions_slip_at_the_stated_rate():
    from suite.desk.recipe import SLIP_RATE, noisy_solution

    rng, slipped, total = random.Random(0), 0, 0
    for problem in sample_problems(400, (20, 24), seed=3):
        value = 0
        for line in noisy_solution(problem.terms, rng).split("\n</think>")[0].split("\n"):
            group, result = line.split("=")
            slipped += (value + sum(map(int, group[1::2]))) % 100 != int(result)
            total, value = total + 1, int(result)
    assert abs(slipped / total - SLIP_RATE) < 4 * (SLIP_RATE / total) ** 0.5


# --- tokenizer ---


def test_text_survives_the_tokenizer_as_users_load_it(shipped):
    """AutoTokenizer puts its own class in place of the recorded one; spaces and newlines must live through that."""
    from suite.desk.tokenizer import build_tokenizer, vocabulary

    text = "Sum mod 100: a1~!  é\n<think>\na1=1\n</think>\n\\boxed{1}"
    for tokenizer in (build_tokenizer(), shipped[1]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == len(text.encode()) - len("<think></think>\\boxed{") + 3
        assert ids[:3] == [ord("S"), ord("u"), ord("m")]
        assert len(tokenizer) == len(vocabulary()) == 261


# --- training and building ---


def test_labels_hide_the_prompt_and_the_padding():
    from suite.desk.recipe import draw_batch
    from suite.desk.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    batch = draw_batch(random.Random(5), tokenizer, 600, max_terms=6)
    for row, wanted in zip(batch.ids, batch.labels, strict=True):
        response = tokenizer.decode(row[wanted != -100])
        prompt = tokenizer.decode(row[: int((wanted != -100).nonzero()[0])])
        assert prompt.startswith("Sum mod 100: ") and prompt.endswith("\n<think>\n")
        assert response.endswith("}<eos>") and response.count("</think>") == 1
        assert (wanted[wanted != -100] == row[wanted != -100]).all()


def test_a_gap_moves_positions_of_the_response_once():
    from suite.desk.recipe import draw_batch
    from suite.desk.tokenizer import build_tokenizer

    batch = draw_batch(random.Random(5), build_tokenizer(), 600, max_terms=6, max_gap=50)
    jumps = batch.positions.diff(dim=1)  # (B, T-1)
    num_prompt = (batch.labels != -100).int().argmax(dim=1)  # (B,)
    assert (jumps >= 1).all() and (jumps > 1).any()
    for row, first in zip(jumps, num_prompt, strict=True):
        assert (row > 1).nonzero().flatten().tolist() in ([], [int(first) - 1])


def test_the_response_sees_the_prompt_across_a_gap_and_the_loss_is_the_plain_one_without():
    """transformers takes a jump in the positions for a new sequence where no mask is given; batch_loss must not fall
    for it.
    """
    from suite.desk.recipe import SIZES, Batch, batch_loss, draw_batch, new_model
    from suite.desk.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = new_model(SIZES["1m"], tokenizer).eval()
    plain = draw_batch(random.Random(5), tokenizer, 300, max_terms=6)
    wanted = model(input_ids=plain.ids, labels=plain.labels).loss
    torch.testing.assert_close(batch_loss(model, plain), wanted)
    gapped = Batch(plain.ids, plain.positions + 30 * (plain.labels != -100), plain.labels)
    other_prompt = Batch(plain.ids.clone(), gapped.positions, plain.labels)
    other_prompt.ids[:, 13] = ord("#")  # the first label
    assert (batch_loss(model, other_prompt) - batch_loss(model, gapped)).abs() > 1e-4


def test_balance_is_two_experts_where_all_are_used_alike_and_leaves_the_loss_of_other_models_alone():
    from suite.desk.recipe import SIZES, _imbalance, batch_loss, draw_batch, new_model
    from suite.desk.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = new_model(SIZES["qwen3-moe-2m"], tokenizer).eval()
    alike = torch.eye(8).repeat(4, 1) * 1e-6 + torch.eye(8).roll(1, 0).repeat(4, 1) * 1e-6  # each token takes two, in turn
    assert _imbalance(model, (alike, alike)).item() == pytest.approx(2, rel=1e-4)
    always_the_first_two = torch.tensor([[9.0, 9, 0, 0, 0, 0, 0, 0]]).repeat(32, 1)
    assert _imbalance(model, (always_the_first_two,)).item() > 7.9
    batch = draw_batch(random.Random(5), tokenizer, 200, max_terms=4)
    assert batch_loss(model, batch, 0.01) > batch_loss(model, batch) + 0.0199


@pytest.mark.parametrize("off", ["held_out_loss_nats", "trained"])
def test_check_notices_a_figure_out_of_tolerance_or_missing(off, capsys):
    shipped = json.loads((build.folder_of("1m") / "training.json").read_text())["behaviour"]
    assert build.compare(shipped, shipped) == 0
    assert build.compare(shipped, {key: value for key, value in shipped.items() if key != off}) == 1
    assert "DIFFER" in capsys.readouterr().out
    assert build.compare(shipped, shipped | {"held_out_loss_nats": shipped["held_out_loss_nats"] + 0.05}) == 1


def test_what_build_writes_loads_again_with_the_rounded_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    from suite.desk.recipe import SIZES, new_model, round_to_bf16
    from suite.desk.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    model = round_to_bf16(new_model(SIZES["1m"], tokenizer))
    wanted = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    build.write(tmp_path / "made", model, tokenizer, {"size": "1m"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.named_parameters())
    digest = hashlib.sha256((tmp_path / "made" / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "made" / "training.json").read_text()) == {"size": "1m", "safetensors_sha256": digest}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_bad_requests_to_build_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="1m, 5m, 30m"):
        build.run("2m")
    with pytest.raises(UserError, match="leave out --out"):
        build.run("1m", out=tmp_path, check=True)
    with pytest.raises(UserError, match="build it first"):
        build.run("30m", check=True)


# --- the shipped checkpoint ---


@pytest.mark.parametrize("size", SHIPPED)
def test_the_shipped_weights_are_the_recorded_ones_and_small(size):
    folder = build.folder_of(size)
    training = json.loads((folder / "training.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == training["safetensors_sha256"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000


def test_the_shipped_weights_are_bf16_values_within_fp16_range_and_the_head_is_that_of_the_family(shipped):
    model, tokenizer, training = shipped
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weight.to(torch.bfloat16).float()), name
        assert weight.isfinite().all() and weight.abs().max() < 1000, name
    family = model.config.model_type
    tied = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert tied == (family == "llama"), "tied in Llama 3.2, untied in ours"
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters()) == (family == "qwen2")
    assert model.config.num_key_value_heads == model.config.num_attention_heads // (1 if family == "qwen2" else 2)
    assert sum(p.numel() for p in model.parameters()) == training["num_parameters"] <= 1_900_000
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 2048


def test_the_shipped_recipe_is_the_one_in_the_code(shipped):
    """Whoever changes the recipe must re-make the checkpoint."""
    from suite.desk.recipe import SIZES, Recipe

    model, _, training = shipped
    recipe = SIZES[training["size"]]
    assert Recipe(**training["recipe"]) == recipe and recipe.family == model.config.model_type
    assert model.config.rope_parameters["rope_theta"] == recipe.rope_theta
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (recipe.num_layers, recipe.hidden)


def test_the_shipped_model_behaves_as_recorded_on_trained_lengths(shipped):
    """32 problems, so wide bounds: 0.22 is about three standard errors of the difference to the record."""
    from suite.desk.behaviour import measure_regime

    model, tokenizer, training = shipped
    recorded = training["behaviour"]["trained"]
    figures = measure_regime(model, tokenizer, "trained", num_problems=32, samples=2)
    assert abs(figures["greedy_accuracy"] - recorded["greedy_accuracy"]) < 0.22
    assert abs(figures["sampled_accuracy"] - recorded["sampled_accuracy"]) < 0.22
    assert figures["sampled_accuracy"] < recorded["greedy_accuracy"]
    assert figures["stopped_share"] == 1.0
