"""Frameworks whose own files do not hold both log-probs: what they have, and what to do.

Sources: verl-project/verl 1dda039b9 (2026-08-22), verl/trainer/ppo/ray_trainer.py, _write_generations and fit;
huggingface/trl f2cd57710 (2026-07-24), trl/trainer/grpo_trainer.py, log and _generate_and_score_completions;
OpenRLHF/OpenRLHF 3c3be623 (2026-08-13), openrlhf/trainer/ppo_utils/experience.py; vLLM 0.32.0, vllm/outputs.py.
"""

from __future__ import annotations

from pathlib import Path

from suite.door import FileError

WHAT_TO_DO = {
    "verl": (
        "trainer.rollout_data_dir writes texts and scores, no tokens and no log-probs",
        "set actor_rollout_ref.rollout.calculate_log_probs=True and algorithm.rollout_correction.bypass_mode=False, and write "
        "responses, response_mask, rollout_log_probs and old_log_probs of the batch as rows (suite/dumps/README.md)",
    ),
    "trl": (
        "log_completions writes texts, rewards and advantages, no tokens and no log-probs",
        "with use_vllm=True, write completion_ids, completion_mask, sampling_per_token_logps and old_per_token_logps of "
        "GRPOTrainer._generate_and_score_completions as rows (suite/dumps/README.md)",
    ),
    "openrlhf": (
        "it writes no rollouts; an Experience holds both log-probs in memory",
        "write sequences, action_mask, rollout_log_probs and action_log_probs of Experience as rows (suite/dumps/README.md); entry t "
        "of the last three belongs to token t + 1 of sequences",
    ),
    "vllm": (
        "its outputs hold the sampler's log-probs alone",
        "score the same token_ids with your trainer, and write both as rows (suite/dumps/README.md)",
    ),
}


def refusal(framework: str, path: Path) -> FileError:
    has, todo = WHAT_TO_DO[framework]
    return FileError(path, "", f"a file of {framework}: {has}", "rows with the log-probs of sampler and trainer", todo)
