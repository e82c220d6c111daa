"""An output head in fp32 on a 16-bit model: what vLLM runs, that weights reach it, and where it is refused."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import EOS, OPTIMIZER, ROLLOUT, TRAIN, as_sequences, some_requests, write_model  # noqa: E402

from suite.engines.samplers.load import load_sampler  # noqa: E402
from suite.engines.sync import Probe, prove_sync, sync_weights  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.spec.precision import contract_breaches  # noqa: E402

BOTH = {"rollout": "bf16", "train": "bf16", "rollout_logits": "fp32", "trainer_head": "fp32"}


@pytest.mark.engine
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_forms_logits_in_fp32_and_its_head_follows_the_trainer(tmp_path, tied):
    pytest.importorskip("vllm")
    folder = write_model(tmp_path, tied=tied)
    sampler = load_sampler(folder, ROLLOUT, "bf16", [EOS], head="fp32")
    trainer = load_trainer(folder, TRAIN | {"optimizer": OPTIMIZER}, BOTH, 1.0)
    try:
        sequences = as_sequences(sampler.sample(some_requests(6)))
        trainer.score(sequences)
        executed = sampler.executed() | trainer.executed()
        assert executed["sampler_runner"].endswith("ModelRunner") and executed["sampler_fp32_dot"]
        assert executed["rollout_logits"] == "fp32" == executed["trainer_head"] and executed["rollout_weights"] == "bf16"
        assert contract_breaches(BOTH, {name: executed[name] for name in ("rollout_logits", "trainer_head", "rollout_weights")}) == []
        sync_weights(trainer, sampler, "bf16")
        prove_sync(trainer, sampler, "bf16", Probe(sequences, "bf16", wire="bf16"))
        with_head = np.concatenate(sampler.score(sequences))
    finally:
        sampler.close()
    plain = load_sampler(folder, ROLLOUT, "bf16", [EOS])
    try:
        without = np.concatenate(plain.score(sequences))
        assert plain.executed()["rollout_logits"] == "bf16" and 0 < np.abs(with_head - without).mean() < 0.05
    finally:
        plain.close()


def test_a_plain_sampler_has_no_head_of_its_own(tmp_path):
    folder = write_model(tmp_path)
    with pytest.raises(UserError, match="precision.rollout_logits: found fp32 with rollout.engine hf, allowed: bf16"):
        load_sampler(folder, ROLLOUT | {"engine": "hf"}, "bf16", [EOS], head="fp32")
    load_sampler(folder, ROLLOUT | {"engine": "hf"}, "fp32", [EOS], head="fp32").close()
