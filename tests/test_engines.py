"""The real engines against each other: vLLM, the HF sampler and the dense trainer compute one function."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

from small_models import EOS, OPTIMIZER, ROLLOUT, TRAIN, VOCABULARY, as_sequences, some_requests, write_model  # noqa: E402

from suite.engines.batch import Request  # noqa: E402
from suite.engines.samplers.load import load_sampler  # noqa: E402
from suite.engines.sync import Probe, SyncError, prove_sync  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.spec.precision import contract_breaches  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vllm_fp32(model):
    sampler = load_sampler(model, ROLLOUT, "fp32", [EOS])
    yield sampler
    sampler.close()


def hf_sampler(model, dtype="fp32", **changes):
    return load_sampler(model, ROLLOUT | {"engine": "hf"} | changes, dtype, [EOS])


def gap(scores, rollouts):
    reported = np.concatenate([rollout.rollout_logprobs for rollout in rollouts]).astype(float)
    return np.abs(np.concatenate(scores) - reported)


def test_each_sampler_agrees_with_the_other_on_its_tokens_in_fp32(model, vllm_fp32):
    hf = hf_sampler(model)
    for sampler, scorer in ((vllm_fp32, hf), (hf, vllm_fp32)):
        rollouts = sampler.sample(some_requests(24))
        difference = gap(scorer.score(as_sequences(rollouts)), rollouts)
        assert difference.size > 300
        assert difference.mean() <= 1e-5 and difference.max() <= 1e-3


def test_the_trainer_agrees_with_vllm_to_the_fp32_floor(model, vllm_fp32):
    rollouts = vllm_fp32.sample(some_requests())
    trainer = load_trainer(model, TRAIN, {"rollout": "fp32", "train": "fp32"}, 1.0)
    r = np.concatenate(trainer.score(as_sequences(rollouts))).astype(float) - np.concatenate(
        [rollout.rollout_logprobs for rollout in rollouts]
    )
    assert (np.expm1(r) - r).mean() < 1e-9


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_sampler_says_which_token_was_the_most_probable_where_each_was_drawn(model, vllm_fp32, engine):
    sampler = vllm_fp32 if engine == "vllm" else hf_sampler(model)
    rollouts = sampler.sample(some_requests(3))
    drawn_first = 0
    for rollout, full in zip(rollouts, sampler.distributions(as_sequences(rollouts)), strict=True):
        assert rollout.argmax_token_ids == full.argmax(axis=1).tolist()
        drawn_first += sum(map(int.__eq__, rollout.argmax_token_ids, rollout.response_token_ids))
    assert 0 < drawn_first < sum(map(len, (rollout.response_token_ids for rollout in rollouts)))


def test_whole_distributions_agree_and_contain_the_scores(model, vllm_fp32):
    sequences = as_sequences(vllm_fp32.sample(some_requests(3)))
    trainer = load_trainer(model, TRAIN, {"rollout": "fp32", "train": "fp32"}, 1.0)
    three = [engine.distributions(sequences) for engine in (vllm_fp32, hf_sampler(model), trainer)]
    for vllm, hf, pi, (tokens, num_prompt), score in zip(*three, sequences, trainer.score(sequences), strict=True):
        assert vllm.shape == (len(tokens) - num_prompt, VOCABULARY)
        np.testing.assert_allclose(np.exp(vllm).sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(vllm, hf, atol=1e-4)
        np.testing.assert_allclose(vllm, pi, atol=1e-4)
        np.testing.assert_allclose(pi[np.arange(len(score)), tokens[num_prompt:]], score, atol=1e-5)


def test_a_used_engine_repeats_its_rollouts_byte_for_byte(vllm_fp32):
    first = vllm_fp32.sample(some_requests())
    vllm_fp32.sample(some_requests(seed=5))
    again = vllm_fp32.sample(some_requests())
    for a, b in zip(first, again, strict=True):
        assert a.response_token_ids == b.response_token_ids
        assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()


def test_the_sampler_samples_from_the_distribution_it_reports(model):
    """2,000 draws of the first token after one prompt: the frequencies follow exp of the reported log-probs."""
    sampler = hf_sampler(model, max_tokens=1)
    prompt = tuple(range(5, 15))
    rollouts = sampler.sample([Request("p", i, prompt, 1000 + i) for i in range(2000)])
    reported = {r.response_token_ids[0]: float(np.exp(r.rollout_logprobs[0])) for r in rollouts}
    counts = {token: 0 for token in reported}
    for rollout in rollouts:
        counts[rollout.response_token_ids[0]] += 1
    for token, probability in reported.items():
        sigma = np.sqrt(probability * (1 - probability) / 2000)
        assert abs(counts[token] / 2000 - probability) < 5 * sigma + 1e-3


def test_no_room_for_a_response_gives_an_empty_one(model, vllm_fp32):
    """A prompt as long as the context: nothing can be sampled, nothing crashes, and the others are as before."""
    long = Request("long", 0, tuple(5 + i % 50 for i in range(ROLLOUT["max_model_len"])), 1)
    for sampler in (vllm_fp32, hf_sampler(model)):
        rollouts = sampler.sample([long, *some_requests(2)])
        assert rollouts[0].response_token_ids == [] and rollouts[0].finish_reason == "length"
        assert rollouts[0].rollout_logprobs.shape == (0,)
        assert all(rollout.num_response_tokens > 0 for rollout in rollouts[1:])


def test_16_bit_engines_run_in_the_dtype_that_was_asked_for(model):
    asked = {"rollout": "bf16", "train": "fp16"}
    sampler = load_sampler(model, ROLLOUT, "bf16", [EOS])
    trainer = load_trainer(model, TRAIN, asked, 1.0)
    trainer.score(as_sequences(sampler.sample(some_requests(4))))
    executed = sampler.executed() | trainer.executed()
    sampler.close()
    assert contract_breaches(asked, executed) == []
    assert contract_breaches({"rollout": "fp16", "train": "fp16"}, executed), "the same engines breach another contract"
    assert executed["checkpoint"] == "fp32" and executed["kv_cache"] == "bf16"


class WithoutOneTensor:
    """A sampler that drops one tensor of every reload."""

    def __init__(self, sampler):
        self._sampler = sampler

    def load_weights(self, named_tensors):
        self._sampler.load_weights([pair for pair in named_tensors if "layers.1.mlp.down_proj" not in pair[0]])

    def __getattr__(self, name):
        return getattr(self._sampler, name)


@pytest.mark.skipif(not __import__("torch").cpu._is_avx512_supported(), reason="vLLM's CPU kernels need AVX-512 for a cache of 8 bits")
def test_a_cache_of_8_bits_is_read_back_from_the_live_engine_and_moves_the_log_probs(model):
    asked = {"rollout": "fp32", "train": "fp32", "kv_cache": "fp8_e5m2"}
    sampler = load_sampler(model, ROLLOUT, "fp32", [EOS], kv_cache="fp8_e5m2")
    rollouts = sampler.sample(some_requests(24))
    executed = sampler.executed()
    trainer = load_trainer(model, TRAIN | {"optimizer": OPTIMIZER}, asked, 1.0)
    probe = Probe(as_sequences(rollouts[:8]), "fp32", cache="fp8_e5m2")
    assert prove_sync(trainer, sampler, "fp32", probe).logprob_diff_mean < 1e-4, "the cache's own rounding is not in the floor"
    with pytest.raises(SyncError, match="stale weights"):
        prove_sync(trainer, WithoutOneTensor(sampler), "fp32", probe)
    sampler.close()
    assert executed["kv_cache"] == "fp8_e5m2" and executed["rollout_weights"] == "fp32"
    assert contract_breaches(asked, executed) == [] and contract_breaches(asked | {"kv_cache": None}, executed)
    assert 1e-3 < gap(trainer.score(as_sequences(rollouts)), rollouts).mean() < 1, "in fp32 it is below 1e-5"


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(engine):
    """With the same seeds the responses are those without stop strings, cut after the first one; log-probs included."""
    from suite.engines.models import load_tokenizer
    from suite.problems.data import load_prompts, token_ids
    from suite.spec.checkout import find_repo

    folder = find_repo() / "baselines/desk/qwen2-1m"
    tokenizer = load_tokenizer(folder)
    prompts = load_prompts({"id": "desk", "template": "desk", "num_prompts": 12, "num_terms": [4, 8]})
    requests = [Request(p.prompt_id, 0, tuple(token_ids(p, tokenizer)), 7 + i) for i, p in enumerate(prompts)]
    stop = ("=3", "</think>")  # two tokens of one byte each, and one token of eight

    def sampled(**changes):
        sampler = load_sampler(folder, ROLLOUT | {"engine": engine, "max_tokens": 128} | changes, "fp32", [257])
        try:
            return sampler.sample(requests)
        finally:
            sampler.close()

    endings = set()
    for whole, cut in zip(sampled(), sampled(stop=stop), strict=True):
        text, num = tokenizer.decode(cut.response_token_ids), len(cut.response_token_ids)
        (end,) = (string for string in stop if text.endswith(string))
        assert sum(text.count(string) for string in stop) == 1 and cut.finish_reason == "stop"
        assert cut.response_token_ids == whole.response_token_ids[:num] and num < len(whole.response_token_ids)
        np.testing.assert_allclose(cut.rollout_logprobs, whole.rollout_logprobs[:num], atol=1e-5)
        endings.add(end)
    assert endings == set(stop)
