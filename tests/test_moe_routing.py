"""Which experts are chosen: read from every engine, compared, and followed by the trainer where a task says so."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from small_models import EOS, ROLLOUT, write_model  # noqa: E402
from test_dense_trainer import BF16, FP16, minibatch, sequences  # noqa: E402
from test_moe_trainer import trainer  # noqa: E402

from suite.engines.samplers.hf import HfSampler  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.measure.routing import OWN, RouteBook, disagreement, replay, routing_disagreement  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402

LAYERS, K, EXPERTS = 2, 2, 4  # of write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("moe"), experts=True)


def planted(rows, seed=0):
    """Experts drawn at random for every token and layer."""
    draw = np.random.default_rng(seed)
    return [np.sort(draw.permuted(np.tile(np.arange(EXPERTS), (len(t), LAYERS, 1)), axis=-1)[..., :K], -1) for t, _ in rows]


def plain_forced_logprobs(folder, rows, choices):
    """A plain transformers forward per sequence whose routers are told their experts."""
    from transformers import AutoModelForCausalLM

    reference, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []

    def forced(layer):
        def hook(gate, args, output):
            logits, experts = output[0], torch.from_numpy(told[0][:, layer])
            weights = logits.softmax(-1).gather(1, experts)
            return logits, weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights, experts

        return hook

    for number, layer in enumerate(reference.model.layers):
        layer.mlp.gate.register_forward_hook(forced(number))
    scores = []
    for (tokens, num_prompt), one in zip(rows, choices, strict=True):
        told[:] = [one]
        logits = reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, num_prompt - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens[num_prompt:])[:, None])[:, 0].detach().numpy())
    return scores


def test_the_experts_chosen_are_those_of_transformers_whatever_the_batch(model):
    rows = sequences(6)
    sampler = HfSampler(model, ROLLOUT | {"engine": "hf"}, "fp32", [EOS])
    found = trainer(model, optimizer=None, score_batch_size=4).expert_choices(rows)
    for (tokens, _), ours, expected in zip(rows, found, sampler.expert_choices(rows), strict=True):
        assert ours.shape == (len(tokens), LAYERS, K) and np.array_equal(ours, expected)


def test_a_model_without_experts_has_no_choices(tmp_path):
    assert HfSampler(write_model(tmp_path), ROLLOUT | {"engine": "hf"}, "fp32", [EOS]).expert_choices(sequences(1)) is None


def test_the_hf_sampler_takes_every_expert_of_a_sync(model):
    sampler, rows, ours = HfSampler(model, ROLLOUT | {"engine": "hf"}, "fp32", [EOS]), sequences(4), trainer(model)
    before = np.concatenate(sampler.score(rows))
    with ours.moved_weights(lambda named: [tensor.mul_(1.1) for _, tensor in named]):
        sampler.load_weights(ours.named_weights(torch.float32))
        found, expected = np.concatenate(sampler.score(rows)), np.concatenate(ours.score(rows))
    assert np.abs(found - before).mean() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_disagreement_is_the_share_of_token_layer_pairs_with_another_set():
    ours = [np.array([[[0, 1], [2, 3]], [[0, 1], [0, 3]]]), np.zeros((0, 2, 2), int)]  # two tokens, two layers; no token
    theirs = [np.array([[[0, 1], [2, 3]], [[0, 2], [0, 3]]]), np.zeros((0, 2, 2), int)]
    assert disagreement(ours, theirs) == 0.25 and disagreement(ours, ours) == 0
    assert disagreement(ours[1:], theirs[1:]) is None and disagreement([], []) is None
    with pytest.raises(ValueError, match="allowed: one shape"):
        disagreement(ours[:1], theirs[1:])


def test_only_positions_that_predict_a_response_token_are_compared():
    class Trainer:
        def expert_choices(self, sequences):
            return [np.array([[[0, 1]], [[0, 1]], [[0, 1]], [[0, 1]]])]

    rows, other = [([5, 6, 7, 8], 2)], [0, 2]  # positions 1 and 2 predict the response
    for position, share in enumerate((0.0, 0.5, 0.5, 0.0)):
        sampled = np.array([[[0, 1]]] * 4)
        sampled[position, 0] = other
        assert routing_disagreement(rows, [sampled], Trainer()) == {"routing_disagreement": share}
    assert routing_disagreement(rows, None, Trainer()) == {}


def test_the_share_of_a_run_weights_its_batches_by_their_tokens():
    from suite.protocols.offline import _routing

    rows = [{"routing_disagreement": 0.1, "num_response_tokens": 30}, {"routing_disagreement": 0.5, "num_response_tokens": 10},
            {"routing_disagreement": None, "num_response_tokens": 0}]  # fmt: skip
    assert _routing(rows) == {"routing_disagreement": pytest.approx(0.2)}
    assert _routing([{"num_response_tokens": 30}]) == {}, "a model without experts"


# --- routing replay ---


def test_a_row_takes_the_choices_of_the_longest_sequence_it_begins_with():
    one, longer = np.full((2, 1, 1), 3), np.full((3, 1, 1), 1)
    book = RouteBook([([5, 6], 1), ([5, 6, 7], 1)], [one, longer])
    rows = book.rows(np.array([[5, 6, 7, 0], [5, 6, 8, 9], [6, 5, 7, 0]]), 1, 1)[..., 0, 0]
    assert rows.tolist() == [[1, 1, 1, OWN], [3, 3, OWN, OWN], [OWN] * 4]
    assert not RouteBook()


def test_the_sampler_s_choices_where_they_agree_change_nothing(model):
    rows = sequences(6)
    free, bound = trainer(model), trainer(model)
    bound.follow(rows, free.expert_choices(rows))
    for a, b in zip(free.score(rows), bound.score(rows), strict=True):
        assert np.array_equal(a, b)
    reports = [ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO")) for ours in (free, bound)]
    assert reports[0] == reports[1]
    assert all(torch.equal(p, bound.masters.masters[name]) for name, p in free.masters.masters.items())


@pytest.mark.parametrize("normalised", [False, True])
def test_a_planted_choice_is_followed_in_every_token_and_layer_and_is_what_is_scored(tmp_path, normalised):
    model, rows = write_model(tmp_path, experts=True), sequences(6)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"norm_topk_prob": normalised}))
    told = planted(rows)
    ours = trainer(model, score_batch_size=4)
    free = ours.score(rows)
    assert routing_disagreement(rows, told, ours)["routing_disagreement"] > 0.5
    replay({"routing_replay": "rollout"}, rows, told, ours)
    assert routing_disagreement(rows, told, ours) == {"routing_disagreement": 0.0}
    for a, b in zip(ours.score(rows), plain_forced_logprobs(model, rows, told), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    replay({"routing_replay": "rollout"}, [], [], ours)
    for a, b in zip(ours.score(rows), free, strict=True):
        assert np.array_equal(a, b), "nothing is followed any more"


def test_the_gradient_of_a_followed_step_is_that_of_the_followed_policy(model):
    """By finite differences of the loss in one expert's weight, which the free router would use for other tokens."""
    rows = sequences(4)
    ours, told = trainer(model), planted(rows)
    ours.follow(rows, told)
    batch, seen = minibatch(rows, ours.score(rows)), {}
    step, name = ours.masters.step, "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    ours.masters.step = lambda *args: seen.update(gradient=ours.masters.masters[name].grad.clone()) or step(*args)
    direction = torch.randn(ours.masters.masters[name].shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for sign in (1, -1):
        with ours.moved_weights(lambda named, sign=sign: [t.add_(sign * 1e-3 * direction) for n, t in named if n == name]):
            logprobs = ours.score(rows)
            ratio = [np.exp(new - old).astype(np.float64) for new, old in zip(logprobs, batch.old_trainer_logprobs, strict=True)]
        losses.append(-sum(a * r.sum() for a, r in zip(batch.advantages, ratio, strict=True)) / (len(rows) * 32))
    ours.update(batch, resolve("GRPO", clip_low=1.0, clip_high=1e9))
    assert (seen["gradient"] * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2)


def test_layers_run_again_in_the_backward_pass_follow_too(model):
    rows, reports = sequences(6), []
    for again in (False, True):
        ours = trainer(model, FP16, gradient_checkpointing=again, micro_batch_size=2)
        ours.follow(rows, planted(rows))
        reports.append(ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO")))
    assert reports[1]["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=1e-4)


def test_sequences_that_nobody_told_of_are_routed_by_the_model(model):
    rows = sequences(6)
    ours = trainer(model, BF16)
    expected = ours.score(rows)
    ours.follow(rows[:3], planted(rows[:3]))
    found = ours.score(rows)
    assert all(not np.array_equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    for a, b in zip(found[3:], expected[3:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_sampler_that_does_not_tell_is_refused():
    with pytest.raises(UserError, match="train.routing_replay: found 'rollout'.*does not tell.*allowed: a mixture of experts, on a CPU"):
        replay({"routing_replay": "rollout"}, [([1, 2], 1)], None, None)
    replay({"routing_replay": None}, [([1, 2], 1)], None, None)
