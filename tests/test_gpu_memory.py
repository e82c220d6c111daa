"""The memory model against what is known of models, and what a plan refuses before anything starts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from suite.cli.layout import distinct_needs, hour_lines, launch_lines, rows
from suite.machine import doctor
from suite.machine.hours import CARDS, gpu_hours, seconds_per_step
from suite.machine.memory import FITS, GIB, REST_GIB, need_of, num_ranks, sampler_parts, trainer_parts, why_not
from suite.spec.checkout import find_repo
from suite.spec.plan import Cell, ResolvedTask
from suite.spec.shapes import SHAPES, Shape, shape_of
from suite.spec.validate_trainer import trainer_errors

# What the page of each model on the hub shows (the sum over its safetensors files).
PARAMETERS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "OctoThinker/OctoThinker-3B-Hybrid-Base": 3_212_749_824,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-14B-Base": 14_768_307_200,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
}
TRAIN = {"engine": "dense", "score_batch_size": 4, "micro_batch_size": 4, "head_chunk_tokens": 2048, "gradient_checkpointing": True,
         "optimizer": {"lr": 1e-6}, "parallel": {"data": 8}}  # fmt: skip
ROLLOUT = {"max_tokens": 8192, "max_model_len": 9472, "samples_per_prompt": 8, "gpu_memory_utilization": 0.6}
R1D = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def cell(model=R1D, rollout=(), train=(), precision="bf16", **more) -> Cell:
    settings = {
        "model": {"id": model}, "data": {}, "rollout": ROLLOUT | dict(rollout), "train": TRAIN | dict(train),
        "precision": {"rollout": precision, "train": precision}, "schedule": {"steps": 100, "prompts_per_step": 64},
    }  # fmt: skip
    return Cell("t", 1, precision, (), 0, settings | more)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_the_table_has_the_parameters_that_its_page_shows(name):
    assert SHAPES[name].parameters == PARAMETERS[name]


def test_an_embedded_checkpoint_has_the_parameters_of_its_shape():
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    folder = find_repo() / "baselines/desk/qwen2-1m"
    with safe_open(folder / "model.safetensors", "np") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]
    assert shape_of({"path": "baselines/desk/qwen2-1m"}).parameters == sum(_product(size) for size in sizes)


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def test_three_billion_of_thirty_are_at_work_for_a_token():
    assert SHAPES["Qwen/Qwen3-30B-A3B-Base"].active_parameters == pytest.approx(3.0e9, rel=0.05)
    dense = SHAPES["Qwen/Qwen3-14B-Base"]
    assert dense.parameters - dense.active_parameters == dense.vocab * dense.hidden + dense.hidden, "embedding and last norm"


def test_a_hand_worked_model():
    """2 layers of 8 channels, 2 heads of 4, one of them for keys, MLP of 16, 10 tokens; bf16 on 2 ranks, 3 tokens a pass."""
    shape = Shape(2, 8, 16, 10, 2, 1, 4)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    outer = 2 * 10 * 8 + 8
    assert shape.parameters == 2 * layer + outer
    train = TRAIN | {"micro_batch_size": 1, "head_chunk_tokens": 2}
    parts = trainer_parts(shape, train, {"train": "bf16", "rollout": "bf16"}, 3, 2)
    assert parts["masters"] == 4 * shape.parameters / 2 and parts["optimizer"] == 8 * shape.parameters / 2
    assert parts["gathered weights"] == 2 * (outer + 2 * layer)
    assert parts["gradients"] == 4 * shape.parameters / 2
    one_layer = 2 * (8 + 2) * 8 + 4 * 2 * 8 + 4 * 2 * 16
    assert parts["activations"] == 3 * (2 * 8 * 2 + one_layer) and "head" not in parts, "in a layer, where the head is done"
    assert parts["gradients in hand"] == 2 * 10 * 8 + (2 + 4) * layer
    wide = trainer_parts(shape, train | {"head_chunk_tokens": 1000}, {"train": "bf16", "rollout": "bf16"}, 300, 2)
    assert wide["activations"] > 300 * 10 * (2 + 4 + 4 + 4 + 2), "the head is smaller than a layer here"
    vast = replace(shape, vocab=10_000)
    at_head = trainer_parts(vast, train | {"head_chunk_tokens": 1000}, {"train": "bf16", "rollout": "bf16"}, 300, 2)
    assert at_head["head"] == 300 * 10_000 * 16 and at_head["activations"] == 300 * 2 * 8 * 2
    at_end = trainer_parts(vast, train, {"train": "bf16", "rollout": "bf16"}, 1, 2)
    assert at_end["gradients in hand"] == 6 * (2 * 10_000 * 8 + 8) and "activations" not in at_end


def test_without_recomputation_every_layer_keeps_its_activations():
    shape, train = SHAPES[R1D], TRAIN | {"head_chunk_tokens": 16}
    with_, without = (
        trainer_parts(shape, train | {"gradient_checkpointing": on}, {"train": "bf16"}, 9216, 8)["activations"] for on in (True, False)
    )
    assert 10 < without / with_ < shape.layers


MEASURED = json.loads((find_repo() / "baselines/memory.json").read_text())


@pytest.mark.parametrize("one", MEASURED["measured"], ids=lambda one: f"{one['peak_mib']:g} MiB")
def test_a_measured_peak_is_within_a_fifth_of_what_the_model_says(one):
    hidden, layers, intermediate, vocab, heads, kv_heads = one["shape"]
    shape = Shape(layers, hidden, intermediate, vocab, heads, kv_heads, hidden // heads, attention_bias=True)
    train = {"optimizer": {"lr": 1e-5}, "gradient_checkpointing": True, "micro_batch_size": MEASURED["rows"],
             "head_chunk_tokens": MEASURED["head_chunk_tokens"]}  # fmt: skip
    parts = trainer_parts(shape, train, {"train": "fp32"}, MEASURED["length"], 1)
    assert sum(parts.values()) / 2**20 == pytest.approx(one["peak_mib"], rel=0.2)


def test_sharding_divides_what_is_held_and_nothing_else():
    one, eight = (trainer_parts(SHAPES[R1D], TRAIN, {"train": "fp16"}, 9216, ranks) for ranks in (1, 8))
    assert one["masters"] == 8 * eight["masters"] and one["optimizer"] == 8 * eight["optimizer"]
    assert one["activations"] == eight["activations"] and one["gathered weights"] == eight["gathered weights"]


def test_adapters_have_masters_and_optimizer_of_their_own_size():
    lora = {"rank": 32, "alpha": 64, "targets": ["q_proj", "down_proj"]}
    parts = trainer_parts(SHAPES[R1D], TRAIN | {"lora": lora}, {"train": "bf16"}, 4096, 1)
    assert parts["optimizer"] == 8 * 28 * 32 * ((1536 + 1536) + (8960 + 1536))
    assert parts["masters"] == parts["optimizer"] / 2 + 2 * PARAMETERS[R1D]


def test_gradients_summed_in_16_bits_wait_whole_for_the_last_micro_batch():
    fp32, bf16 = (trainer_parts(SHAPES[R1D], TRAIN, {"train": "bf16", "gradient_reduction": x}, 9216, 8)["gradients"] for x in ("fp32", "bf16"))
    assert bf16 - fp32 == 2 * PARAMETERS[R1D]


def test_the_cache_is_what_a_share_of_the_card_leaves():
    parts, tokens = sampler_parts(SHAPES[R1D], ROLLOUT, {"rollout": "bf16"}, 80)
    assert sum(parts.values()) == pytest.approx(0.6 * 80 * GIB)
    assert tokens == int(parts["KV cache"] // (28 * 1024)), "2 x 28 layers x 2 heads x 128 numbers of two bytes: 28 KiB a token"
    _, said = sampler_parts(SHAPES[R1D], {"kv_cache_gib": 28.0}, {"rollout": "bf16"}, 80)
    assert said == 2**20
    _, fp32 = sampler_parts(SHAPES[R1D], {"kv_cache_gib": 28.0}, {"rollout": "fp32"}, 80)
    assert fp32 == said // 2


def test_a_sampler_that_takes_the_card_leaves_no_room_for_the_trainer_and_the_plan_says_how_much_it_may_take():
    assert why_not(need_of(cell(), 80), 80) is None
    why = why_not(need_of(cell(rollout={"gpu_memory_utilization": 0.9}), 80), 80)
    assert why.startswith("found 86.4 GiB on each GPU of 80 (trainer 12.4, sampler 72.0, rest 2)")
    share = float(why.partition("gpu_memory_utilization ")[2][:4])
    assert why_not(need_of(cell(rollout={"gpu_memory_utilization": share}), 80), 80) is None, "what it allows fits"
    assert why_not(need_of(cell(rollout={"gpu_memory_utilization": share + 0.02}), 80), 80)


def test_a_trainer_that_is_too_large_for_the_card_alone_is_told_to_spread():
    why = why_not(need_of(cell("Qwen/Qwen3-14B-Base", train={"parallel": {"data": 1}}), 80), 80)
    assert "more ranks" in why and "-" not in why.partition("allowed")[2], "no negative room is offered"
    assert why_not(need_of(cell("Qwen/Qwen3-14B-Base", rollout={"gpu_memory_utilization": 0.55}, train={"parallel": {"data": 64},
                                "micro_batch_size": 1, "score_batch_size": 1}), 80), 80) is None  # fmt: skip


def test_a_cache_in_which_no_sequence_fits_is_refused_too():
    why = why_not(need_of(cell(rollout={"kv_cache_gib": 0.1}), 80), 80)
    assert why.startswith("found room for 3744 tokens in the sampler's KV cache") and "9216" in why


def test_a_model_of_unknown_shape_is_planned_without_memory():
    assert need_of(cell("nobody/knows"), 80) is None and need_of(replace(cell(), settings={"model": None}), 80) is None
    assert seconds_per_step(cell("nobody/knows"), 80, CARDS[0]) is None


def test_the_parts_add_up_to_the_whole():
    need = need_of(cell(), 80)
    assert sum(size for _, size in rows(need)) == pytest.approx(need.total_gib) and rows(need)[-1][1] == REST_GIB
    assert need.total_gib < FITS * 80


def task(cells, gpus=8, nodes=1, gib=80, cpu_ok=False):
    resources = SimpleNamespace(gpus=gpus, nodes=nodes, gpu_mem_gib=gib, cpu_ok=cpu_ok, disk_gib=0)
    return ResolvedTask(SimpleNamespace(id="a-task", file="a.yaml", protocol="rl", resources=resources), tuple(cells), {})


def test_doctor_names_the_first_cell_of_every_need_that_does_not_fit():
    wide = {"gpu_memory_utilization": 0.9}
    cells = [cell(), cell(rollout=wide), cell(rollout=wide, precision="fp16"), cell(rollout=wide, precision="fp32")]
    reason = doctor.memory_reason(task(cells))
    assert reason.count("found") == 2 and reason.startswith("bf16.s0: found 86.4 GiB") and "fp32.s0: found 93.6 GiB" in reason
    assert doctor.memory_reason(task(cells[:1])) is None
    assert doctor.memory_reason(task(cells, gpus=0)) is doctor.memory_reason(task(cells, cpu_ok=True)) is None
    assert reason in doctor.can_run(task(cells), {"gpus": [], "disk_free_gib": 1, "packages": {}, "num_nodes": 1, "torch_build": None})


@pytest.mark.parametrize(("parallel", "gpus", "nodes", "key", "found", "allowed"), [
    ({"data": 8}, 8, 2, "data", 8, "16: resources has 16 GPUs"),
    ({"data": 8, "tensor": 2}, 8, 1, "data", 8, "4: resources has 8 GPUs"),
    ({"data": 2, "tensor": 4}, 8, 1, "tensor", 4, "a divisor of the 2 key-value heads"),
    ({"data": 1, "pipeline": 8}, 8, 1, "pipeline", 8, "a divisor of the 28 layers"),
    ({"data": 8, "expert": 3}, 8, 1, "expert", 3, "a divisor of train.parallel.data, 8"),
])
def test_a_layout_that_does_not_divide_is_refused(parallel, gpus, nodes, key, found, allowed):
    errors = trainer_errors(task([], gpus, nodes).task, [cell(train={"parallel": parallel, "engine": "moe"}, model=R1D)])
    error = errors[f"train.parallel.{key}"]
    assert error.found == found and error.allowed.startswith(allowed)


def test_experts_are_dealt_out_whole():
    moe = {"engine": "moe", "parallel": {"data": 48, "expert": 48}}
    error = trainer_errors(task([], 48).task, [cell("Qwen/Qwen3-30B-A3B-Base", train=moe)])["train.parallel.expert"]
    assert error.allowed == "a divisor of the 128 experts of the model"


def test_a_layout_that_divides_is_let_through():
    for parallel, gpus in (({"data": 8}, 8), ({"data": 4, "tensor": 2}, 8), (None, 1)):
        assert trainer_errors(task([], gpus).task, [cell(train={"parallel": parallel})]) == {}
    assert num_ranks(cell(train={"parallel": {"data": 4, "tensor": 2, "expert": 2}})) == 8


def test_the_lines_that_start_the_ranks_name_them_all():
    assert launch_lines(task([], 8).task, [cell()]) == ["start: torchrun --standalone --nproc-per-node 8 -m suite run a-task"]
    (line,) = launch_lines(task([], 8, 8).task, [cell(train={"parallel": {"data": 64}})])
    assert line.startswith("start: srun --nodes 8 --ntasks-per-node 1 torchrun --nnodes 8 --nproc-per-node 8 ")
    assert launch_lines(task([], 1).task, [cell(train={"parallel": None})]) == ["start: suite run a-task"]


def test_needs_that_are_the_same_are_shown_once():
    cells = [cell(), cell(precision="fp16"), cell(precision="fp32")]
    assert [one.arm for one, _ in distinct_needs(cells, 80)] == ["bf16", "fp32"]


def test_hours_are_seconds_of_all_steps_on_all_gpus_and_fp32_takes_longer():
    seconds, hours = seconds_per_step(cell(), 80, CARDS[0]), gpu_hours([cell(), cell(precision="fp16")], 80, CARDS[0])
    assert hours == pytest.approx(2 * seconds * 100 * 8 / 3600)
    assert 100 < seconds < 250
    assert seconds_per_step(cell(precision="fp32"), 80, CARDS[0]) > 3 * seconds
    assert seconds_per_step(cell(), 80, CARDS[1]) < seconds
    assert len(hour_lines([cell()], 80)) == 3 and hour_lines([cell("nobody/knows")], 80) == []
