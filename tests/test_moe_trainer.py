"""The MoE trainer: megatron-core computes the function of transformers, its gradients too, and keeps the trainer's contract."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from safetensors.torch import load_file, save_file  # noqa: E402
from small_models import OPTIMIZER, TRAIN, passed_on, write_model  # noqa: E402
from test_dense_trainer import BF16, FP16, FP32, minibatch, plain_logprobs, sequences  # noqa: E402

from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.engines.trainers.megatron_names import read_shape, read_weights, table  # noqa: E402
from suite.errors import DataError, UserError  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402

MOE = TRAIN | {"engine": "moe", "optimizer": OPTIMIZER, "grad_clip": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("moe"), experts=True)


def trainer(model, precision=FP32, **changes):
    return load_trainer(model, MOE | changes, precision, 1.0)


def steps(ours, rows, seeds):
    for seed in seeds:
        advantages = np.random.default_rng(seed).normal(size=len(rows)).astype(np.float32)
        ours.update(minibatch(rows, ours.score(rows), advantages), resolve("GRPO"))
    return ours


def test_scores_are_those_of_a_plain_transformers_forward(model):
    rows = sequences()
    _, expected = plain_logprobs(model, rows)
    for changes in ({}, {"head_chunk_tokens": 7, "score_batch_size": 3}):
        found = trainer(model, **changes).score(rows)
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b.detach().numpy()).mean() < 1e-5


def test_the_router_s_other_normalisation_is_followed_too(tmp_path):
    folder = write_model(tmp_path, experts=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": not config["norm_topk_prob"]}))
    rows = sequences(4)
    _, expected = plain_logprobs(folder, rows)
    for a, b in zip(trainer(folder).score(rows), expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)


def test_one_step_has_the_gradients_of_transformers(model):
    """REINFORCE with autograd on a plain forward; gradients compared tensor by tensor, in the checkpoint's names."""
    from transformers.core_model_loading import revert_weight_conversion

    rows = sequences(6)
    reference, logprobs = plain_logprobs(model, rows)
    advantages = np.linspace(-1, 1, 6, dtype=np.float32)
    loss = -sum(a * lp.sum() for a, lp in zip(advantages.tolist(), logprobs, strict=True)) / (6 * 32)
    loss.backward()
    expected = revert_weight_conversion(reference, {name: p.grad for name, p in reference.named_parameters()})

    ours = trainer(model, micro_batch_size=2)
    masters, step = ours.masters, ours.masters.step

    def keeping_gradients(*args):
        for master in masters.masters.values():
            master.kept = master.grad.clone()
        return step(*args)

    masters.step = keeping_gradients
    report = ours.update(minibatch(rows, ours.score(rows), advantages), resolve("REINFORCE"))
    masters.masters = {name: master.kept for name, master in masters.masters.items()}
    found = dict(ours.named_weights(torch.float32))
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert set(found) == set(expected)
    difference = sum((found[name] - expected[name]).pow(2).sum() for name in expected)
    assert (difference / sum(one.pow(2).sum() for one in expected.values())).sqrt() < 1e-4
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_comes_back_bit_for_bit(model, dtype):
    """Its weights are bf16 numbers, so both wires give them back as they were."""
    back = dict(trainer(model, BF16).named_weights(dtype))
    on_disk = load_file(model / "model.safetensors")
    assert set(back) == set(on_disk)
    for name, tensor in on_disk.items():
        assert back[name].dtype == dtype and torch.equal(back[name].to(tensor.dtype), tensor), name


def test_shards_are_read_as_one(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    for part in range(2):
        names = sorted(tensors)[part::2]
        save_file({name: tensors[name] for name in names}, tmp_path / f"model-0000{part}.safetensors")
    shape = read_shape(model)
    whole, parts = dict(read_weights(model, shape)), dict(read_weights(tmp_path, shape))
    assert set(whole) == {row.parameter for row in table(shape)} and all(torch.equal(whole[name], parts[name]) for name in whole)


BROKEN = {
    "model.layers.1.mlp.gate.weight: found [3, 64], expected [4, 64]": lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(3, 64)}),
    "model.layers.0.mlp.experts.2.up_proj.weight: found nothing, expected [64, 64]": lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"),
    "model.layers.0.mlp.experts.4.up_proj.weight: found [64, 64], expected no such tensor": lambda t: t.update({"model.layers.0.mlp.experts.4.up_proj.weight": torch.ones(64, 64)}),
    "model.layers.0.mlp.experts.0.down_proj.weight: found [63, 64], expected [64, 64]": lambda t: t.update({"model.layers.0.mlp.experts.0.down_proj.weight": torch.ones(63, 64)}),
    "lm_head.weight: found I8, expected one of F32": lambda t: t.update({"lm_head.weight": torch.ones(64, 64, dtype=torch.int8)}),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_a_wrong_router_expert_or_shape_is_named_with_what_was_expected(model, tmp_path, message):
    tensors = load_file(model / "model.safetensors")
    BROKEN[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError) as error:
        next(read_weights(tmp_path, read_shape(model)))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("key", "value", "allowed"), [
    ("model_type", "qwen2", "'qwen3_moe'"), ("tie_word_embeddings", True, "False"), ("mlp_only_layers", [0], r"\[\]"),
    ("decoder_sparse_step", 2, "1"), ("num_experts_per_tok", None, "a number"), ("rope_scaling", {"type": "yarn"}, "None"),
])  # fmt: skip
def test_a_model_that_the_mapping_does_not_stand_for_is_refused(model, tmp_path, key, value, allowed):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(DataError, match=f"config.json: {key}: found .*allowed.*{allowed}"):
        read_shape(tmp_path)


def test_a_perturbed_expert_moves_the_scores_and_a_misspelt_one_is_refused(model):
    rows = sequences(4)
    exact = np.concatenate(trainer(model, optimizer=None).score(rows))
    perturb = {"parameter": "model.layers.0.mlp.experts.1.up_proj.weight", "scale": 1.1}
    moved = np.concatenate(trainer(model, optimizer=None, perturb=perturb).score(rows))
    assert np.abs(moved - exact).mean() > 1e-4
    with pytest.raises(UserError, match="experts.9.*allowed: a tensor of the checkpoint"):
        trainer(model, perturb=perturb | {"parameter": "model.layers.0.mlp.experts.9.up_proj.weight"})


@pytest.mark.parametrize("changes", [{"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]}}, {"attention": "eager"}])
def test_what_this_trainer_does_not_do_is_refused(model, changes):
    with pytest.raises(UserError, match=f"train.{next(iter(changes))}: found .*allowed with train.engine moe"):
        trainer(model, **changes)


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_16_bit_training_rounds_every_product_forward_and_backward(model, precision):
    """A product in an autograd Function's backward would escape the mode, and meet native 16-bit kernels."""
    rows, seen = sequences(4), set()
    ours = trainer(model, precision)
    batch = minibatch(rows, ours.score(rows))

    class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):  # below autograd: sees backward as well
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                seen.add(args[-1].dtype)
            return function(*args, **(kwargs or {}))

    with Dispatched():
        report = ours.update(batch, resolve("GRPO"))
    assert seen == {torch.float32}
    exact = trainer(model)
    expected = exact.update(minibatch(rows, exact.score(rows)), resolve("GRPO"))
    assert report["step_skipped"] == 0
    assert report["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    executed = ours.executed()
    assert executed["compute"] == executed["trainer_head"] == precision["train"]
    assert executed["master_weights"] == executed["optimizer_state"] == executed["gradient_reduction"] == "fp32"
    assert executed["arithmetic"] == "rounded-fp32-accumulate" and executed["trainer_engine"] == "megatron-core"


def test_gradient_checkpointing_head_chunks_and_micro_batches_do_not_change_a_16_bit_step(model):
    rows, reports, calls = sequences(6), [], []
    for changes in ({}, {"gradient_checkpointing": True}, {"head_chunk_tokens": 10}, {"micro_batch_size": 2}):
        ours = trainer(model, FP16, **changes)
        batch = minibatch(rows, ours.score(rows))
        calls.append(0)
        for layer in ours._model.decoder.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        reports.append(ours.update(batch, resolve("GRPO")))
    for report in reports[1:]:
        assert report["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=1e-3)
        assert report["loss"] == pytest.approx(reports[0]["loss"], rel=2e-3)
    assert calls[1] == 2 * calls[0], "every layer a second time"


def test_an_overflowing_gradient_skips_the_step_and_halves_the_scale(model):
    ours = trainer(model, FP16 | {"loss_scaling": {"enabled": True, "init_scale": 2.0**40}})
    before = {name: p.detach().clone() for name, p in ours.masters.masters.items()}
    report = ours.update(minibatch(sequences(), ours.score(sequences())), resolve("GRPO"))
    assert report["step_skipped"] == 1 and ours.scaler.scale_value == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in ours.masters.masters.items())


def test_a_resumed_trainer_goes_on_bit_for_bit(model, tmp_path):
    rows = sequences()
    straight = steps(trainer(model, FP16), rows, range(3))
    resumed = passed_on(steps(trainer(model, FP16), rows, range(1)), trainer(model, FP16), tmp_path)
    steps(resumed, rows, range(1, 3))
    assert all(torch.equal(p, resumed.masters.masters[name]) for name, p in straight.masters.masters.items())
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


def test_moved_weights_come_back_exactly(model):
    ours, rows = trainer(model, FP16), sequences(3)
    before = np.concatenate(ours.score(rows))
    with ours.moved_weights(lambda named: [tensor.mul_(1.5) for _, tensor in named]):
        assert not np.allclose(np.concatenate(ours.score(rows)), before)
    assert np.array_equal(np.concatenate(ours.score(rows)), before)


# --- the CPU shims ---


def test_the_shims_hold_for_megatron_alone_and_refuse_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the shims are not imported")
    from suite.engines.trainers import megatron_cpu

    megatron_cpu.apply()
    megatron_cpu.apply()
    assert megatron_cpu.rotary_pos_embedding.torch.cuda.current_device() == torch.device("cpu")
    assert megatron_cpu.rotary_pos_embedding.torch.float32 is torch.float32
    assert torch.cuda.current_device is not megatron_cpu._CudaOfCpu.current_device, "torch itself stays as it is"
    with pytest.raises(NotImplementedError):
        megatron_cpu.plain_linear(torch.ones(1, 2), torch.ones(3, 2), allreduce_dgrad=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="beside a GPU"):
        megatron_cpu.apply()
