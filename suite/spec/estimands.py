"""Every quantity that a task may name: formula, unit, range, natural scale, and what other systems call it. No numpy,
no torch.

Symbols: r = log pi - log mu per sampled response token, pi the trainer, mu the sampler; mean over all response tokens
of all rollouts unless it says "over sequences"; T_i the response length of sequence i. Peers' names are those of
their public sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scale = Literal["log", "logit", "identity"]


@dataclass(frozen=True)
class Estimand:
    """One row of the table.

    range is that of a level (one arm's value), ends included where finite. scale is where an interval for that level
    is closest to normal: log for positive quantities, logit for shares in [0, 1], identity otherwise; a ratio of two
    arms is always taken as a log-ratio, and is defined only where both are positive. gaps: an iteration may lack it by
    right (the norm of a gradient that was skipped, the slope over responses of one length); of anything else a value that
    is missing leaves the launch without one.
    """

    name: str
    formula: str
    unit: str
    range: tuple[float, float]
    scale: Scale
    peers: tuple[str, ...] = ()
    gaps: bool = False


INF = math.inf
ANY, NON_NEGATIVE, UNIT, SIGNED_UNIT, AT_LEAST_ONE = (-INF, INF), (0.0, INF), (0.0, 1.0), (-1.0, 1.0), (1.0, INF)
NATS, NATS_SEQ, PROB, SHARE = "nats/token", "nats/sequence", "probability", "share"

_ROWS = (
    # token level
    Estimand("k1_nats_per_token", "mean(-r)", NATS, ANY, "identity",
             ("verl rollout_corr/kl", "OpenRLHF vllm_kl", "oat fork kl_sample_train_v1", "slime mismatch_kl",
              "AReaL behave_approx_kl")),
    Estimand("full_vocab_kl_nats_per_token", "mean over positions of sum_v mu_v (log mu_v - log pi_v)", NATS, NON_NEGATIVE, "log", gaps=True),
    Estimand("k2_nats_per_token", "mean(r^2)/2", NATS, NON_NEGATIVE, "log", ("oat fork kl_sample_train_v2",)),
    Estimand("k3_nats_per_token", "mean(e^r - 1 - r)", NATS, NON_NEGATIVE, "log",
             ("verl rollout_corr/k3_kl", "prime-rl mismatch_kl", "NeMo-RL gen_kl_error", "slime mismatch_k3_kl")),
    Estimand("reverse_k3_nats_per_token", "mean(e^-r - 1 + r)", NATS, NON_NEGATIVE, "log",
             ("NeMo-RL policy_kl_error",)),
    Estimand("prob_diff_mean", "mean|pi - mu|", PROB, UNIT, "log",
             ("verl training/rollout_probs_diff_mean", "paper Mean[Abs(pi - mu)]")),
    Estimand("prob_diff_max", "max(pi - mu)", PROB, SIGNED_UNIT, "identity",
             ("paper Max[pi - mu]", "oat fork -sampler_learner_prob_diff_min")),
    Estimand("prob_diff_min", "min(pi - mu)", PROB, SIGNED_UNIT, "identity",
             ("paper Min[pi - mu]", "oat fork -sampler_learner_prob_diff_max")),
    Estimand("prob_diff_p999", "99.9th percentile of |pi - mu|", PROB, UNIT, "log"),
    Estimand("prob_pearson", "Pearson correlation of pi and mu over tokens", "1", SIGNED_UNIT, "identity",
             ("verl training/rollout_actor_probs_pearson_corr",), gaps=True),
    Estimand("logprob_diff_mean", "mean|r|", NATS, NON_NEGATIVE, "log",
             ("TRL sampling/sampling_logp_difference/mean", "SkyRL rollout_train_logprobs_abs_diff_mean",
              "slime train_rollout_logprob_abs_diff (mean over samples first)",
              "open-instruct vllm_vs_local_logprob_diff_mean",
              "torchtitan bit_wise/logprob_diff/mean")),
    Estimand("mult_prob_error", "mean(e^|r|)", "ratio", AT_LEAST_ONE, "log", ("NeMo-RL token_mult_prob_error",)),
    Estimand("out_of_band_share", "share of tokens with pi/mu outside [0.9, 1.1]", SHARE, UNIT, "logit",
             ("NeMo-RL is_oob_ratio", "verl rollout_is_oob_ratio", "SkyRL mask ratio (each with its own band)")),
    Estimand("k3_top_token_share", "max(k3 of one token) / sum(k3)", SHARE, UNIT, "logit", gaps=True),
    Estimand("k3_top_0p1pct_share", "sum of the largest 0.1 % of token k3 / sum(k3)", SHARE, UNIT, "logit", gaps=True),
    Estimand("routing_disagreement", "share of (response token, layer) pairs for which sampler and trainer choose other sets of experts",
             SHARE, UNIT, "logit"),
    # sequence level
    Estimand("seq_kl_k1_nats", "mean over sequences of sum_t -r_t", NATS_SEQ, ANY, "identity",
             ("paper figure 5 KL[mu|pi]",)),
    Estimand("seq_slope_nats_per_1k_tokens", "least-squares slope, with intercept, of sum_t r_t on T_i/1000",
             "nats/1k tokens", ANY, "identity", ("paper figure 5 slope",), gaps=True),
    Estimand("seq_intercept_nats", "intercept of that line", NATS_SEQ, ANY, "identity", gaps=True),
    Estimand("seq_log_ratio_max", "max over sequences of sum_t r_t", NATS_SEQ, ANY, "identity"),
    Estimand("seq_log_ratio_min", "min over sequences of sum_t r_t", NATS_SEQ, ANY, "identity"),
    Estimand("seq_mult_prob_error_max", "max over sequences of mean_t e^|r_t|", "ratio", AT_LEAST_ONE, "log",
             ("NeMo-RL max_seq_mult_prob_error",)),
    Estimand("effective_sample_size", "(sum w)^2 / (N sum w^2), w = exp(sum_t r_t) per sequence, untruncated",
             SHARE, UNIT, "logit", ("verl rollout_is_eff_sample_size (there over tokens, so that long responses weigh more, and of truncated weights)",)),
    Estimand("response_tokens_mean", "mean over sequences of T_i", "tokens", NON_NEGATIVE, "log"),
    Estimand("truncated_share", "share of sequences cut off by the token limit", SHARE, UNIT, "logit"),
    Estimand("reward_mean", "mean over sequences of the reward (0 or 1: the accuracy)", SHARE, UNIT, "logit",
             ("verl critic/rewards/mean", "paper training reward")),
    # series of an RL run, one value per step
    Estimand("entropy_nats", "mean of -log mu over sampled response tokens: an estimate of mu's entropy", NATS, NON_NEGATIVE, "log"),
    Estimand("mismatch_push_positive", "sum over tokens with A > 0 of -(pi/mu - 1) A, per token of the step", "1", ANY, "identity"),
    Estimand("mismatch_push_negative", "sum over tokens with A < 0 of -(pi/mu - 1) A, per token of the step", "1", ANY, "identity"),
    Estimand("bad_update_share_0p5", "share of tokens with A < 0 and pi - mu < -0.5", SHARE, UNIT, "logit"),
    Estimand("bad_update_share_0p2", "share of tokens with A < 0 and pi - mu < -0.2", SHARE, UNIT, "logit"),
    Estimand("argmax_flip_share", "share of response tokens at which sampler and trainer have other most probable tokens", SHARE, UNIT, "logit"),
    Estimand("eval_reward_mean", "mean reward of the trainer's own policy on held-out problems", SHARE, UNIT, "logit", gaps=True),
    Estimand("drawn_reward_mean", "mean reward of all responses that a step drew, also of groups that dynamic sampling left out", SHARE,
             UNIT, "logit"),
    Estimand("sampling_rounds", "rounds of sampling of an iteration", "rounds", NON_NEGATIVE, "identity"),
    Estimand("sampling_limit_reached", "whether max_rounds ended dynamic sampling before enough groups disagreed", SHARE, UNIT,
             "identity"),
    Estimand("disagreeing_groups_share", "share of drawn groups whose rewards differ", SHARE, UNIT, "logit"),
    Estimand("grad_norm", "L2 norm of the unscaled gradient before clipping", "1", NON_NEGATIVE, "log", gaps=True),
    *(Estimand(f"grad_norm_{part}", f"the same of {text} alone", "1", NON_NEGATIVE, "log", gaps=True) for part, text in
      {"embedding": "the embedding", "first_layers": "the first third of the decoder layers",
       "middle_layers": "the middle third", "last_layers": "the last third", "head": "what follows the last layer"}.items()),
    Estimand("learning_rate", "learning rate of the iteration's last update", "1", NON_NEGATIVE, "log"),
    Estimand("loss_scale", "fp16 loss scale in force", "1", NON_NEGATIVE, "log"),
    Estimand("step_skipped", "optimizer steps of an iteration skipped after a non-finite gradient", "steps",
             NON_NEGATIVE, "identity", ("AReaL update_successful (its complement)",)),
    Estimand("loss", "policy loss, mean over the mini-batches of an iteration", "1", ANY, "identity"),
    Estimand("grad_underflow_share", "share of weight-matrix gradient elements that are 0 or subnormal in their dtype",
             SHARE, UNIT, "logit", gaps=True),
    Estimand("grad_scaled_max_abs", "largest |gradient| before unscaling (fp16 ends at 65,504)", "1", NON_NEGATIVE,
             "log"),
    Estimand("activation_max_abs", "largest |output| of a decoder layer (fp16 ends at 65,504)", "1", NON_NEGATIVE,
             "log"),
    Estimand("clip_fraction", "share of response tokens without gradient because of a clip or a trust region",
             SHARE, UNIT, "logit"),
    Estimand("importance_weight_mean", "mean sequence weight prod pi/mu at the update, before any cap (each at most e^20)", "ratio", NON_NEGATIVE, "log"),  # TRL, NeMo-RL and verl log weights before the update, truncated, or per token
    Estimand("importance_weight_max", "largest sequence weight prod pi/mu at the update, before any cap (at most e^20)", "ratio", NON_NEGATIVE, "log"),
    Estimand("truncated_fraction", "share of correction weights set to the cap or the floor", SHARE, UNIT, "logit"),
    Estimand("masked_fraction", "share of correction weights set to 0 outside their bounds", SHARE, UNIT, "logit"),
    Estimand("sync_probe_k3", "k3 between sampler and trainer on probe tokens right after a weight sync",
             NATS, NON_NEGATIVE, "log"),
    Estimand("sync_probe_logprob_diff_mean", "mean|r| on the same tokens", NATS, NON_NEGATIVE, "log"),
    # seconds; never part of bit-equality
    *(Estimand(f"t_{part}_s", f"wall time of {text}", "s", NON_NEGATIVE, "log") for part, text in
      {"sample": "sampling", "score": "scoring with the trainer", "train": "forward, backward and step",
       "sync": "weight sync",
       "rest": "everything else in the step"}.items()),
    # counts of a run or a data set
    *(Estimand(name, text, unit, NON_NEGATIVE, "identity") for name, text, unit in (
        ("num_prompts", "distinct prompts", "prompts"), ("num_rollouts", "rollouts", "rollouts"),
        ("num_response_tokens", "response tokens", "tokens"))),
)  # fmt: skip

ESTIMANDS: dict[str, Estimand] = {row.name: row for row in _ROWS}

# What a run of protocol `filter` gives as a whole (protocols/filter.py).
FILTER_ESTIMANDS: dict[str, Estimand] = {
    row.name: row
    for row in (
        Estimand("num_problems", "problems sampled", "problems", NON_NEGATIVE, "identity"),
        Estimand("num_kept", "problems whose accuracy lies in data.keep_accuracy", "problems", NON_NEGATIVE,
                 "identity"),
        Estimand("kept_share", "num_kept / num_problems", SHARE, UNIT, "logit"),
        Estimand("num_reference", "problems of data.reference", "problems", NON_NEGATIVE, "identity"),
        Estimand("num_overlap", "problems of data.reference that are kept", "problems", NON_NEGATIVE, "identity"),
        Estimand("overlap_share", "num_overlap / num_reference", SHARE, UNIT, "logit"),
        Estimand("accuracy_of_kept", "mean accuracy of the kept problems", SHARE, UNIT, "logit"),
        ESTIMANDS["reward_mean"], ESTIMANDS["truncated_share"], ESTIMANDS["response_tokens_mean"],
    )
}  # fmt: skip

PROMPT_LIMIT_TOKENS = 1024  # the prompt limit of the sanity test, in VeRL and in OAT

# What a run of protocol `dataset` counts (protocols/dataset.py).
DATASET_ESTIMANDS: dict[str, Estimand] = {
    name: Estimand(name, text, unit, NON_NEGATIVE, "identity")
    for name, text, unit in (
        ("num_files_pinned", "files whose sha256 is the one the task names", "files"),
        ("num_rows", "rows of all files", "rows"),
        ("num_unique", "distinct (problem, gold answers)", "problems"),
        ("num_unique_problems", "distinct problem texts", "problems"),
        ("copies_min", "fewest rows of one problem", "copies"),
        ("copies_max", "most rows of one problem", "copies"),
        ("num_blocks", "runs of equal consecutive rows; num_unique if copies stand together", "blocks"),
        ("num_parse_bare", "problems whose gold answer math-verify parses as it stands", "problems"),
        ("num_parse_boxed", "problems whose gold answer math-verify parses inside \\boxed{}", "problems"),
        ("num_parse_expression", "as num_parse_boxed, to a mathematical object and not just to text", "problems"),
        ("num_self_verified", "problems whose gold answer math-verify finds equal to itself", "problems"),
        ("num_golds_graders_differ", "problems over whose gold answer, given as the answer, the graders differ (suite, "
         "mathd_sympy, oat)", "problems"),
        ("num_variants", "gold answers written in another way, or changed: at most 25 for each of 8 rules", "answers"),
        ("num_variants_graders_differ", "of those, the ones over which the graders differ", "answers"),
        ("num_variants_mathd_sympy_differs", "of those, the ones that suite and mathd_sympy judge differently", "answers"),
        ("num_variants_oat_differs", "of those, the ones that suite and oat judge differently", "answers"),
        ("gold_chars_max", "longest gold answer", "characters"),
        ("prompt_chars_mean", "mean length of problem and instruction", "characters"),
        ("prompt_chars_max", "longest problem and instruction", "characters"),
        ("prompt_tokens_mean", "mean length of the prompt in the R1 template", "tokens"),
        ("prompt_tokens_max", "longest prompt in the R1 template", "tokens"),
        ("num_prompts_over_limit", f"R1-template prompts of over {PROMPT_LIMIT_TOKENS} tokens", "problems"),
    )
}

EVERY_ESTIMAND: dict[str, Estimand] = ESTIMANDS | FILTER_ESTIMANDS | DATASET_ESTIMANDS


# What a run gives that samples and scores nothing: there is no pi, and so no mismatch. 0.0 would be a measurement.
SAMPLER_ESTIMANDS: dict[str, Estimand] = {
    name: ESTIMANDS[name]
    for name in ("response_tokens_mean", "truncated_share", "reward_mean", "entropy_nats", "num_prompts", "num_rollouts",
                 "num_response_tokens", "t_sample_s")
}  # fmt: skip
# What only training gives.
TRAINING = (
    "learning_rate", "mismatch_push_positive", "mismatch_push_negative", "bad_update_share_0p5", "bad_update_share_0p2", "eval_reward_mean",
    "drawn_reward_mean", "sampling_rounds", "sampling_limit_reached", "disagreeing_groups_share", "argmax_flip_share", "grad_norm",
    "grad_norm_embedding", "grad_norm_first_layers", "grad_norm_middle_layers", "grad_norm_last_layers", "grad_norm_head",
    "loss_scale", "step_skipped", "loss", "grad_underflow_share", "grad_scaled_max_abs", "activation_max_abs",
    "clip_fraction", "importance_weight_mean", "importance_weight_max", "truncated_fraction", "masked_fraction",
    "sync_probe_k3", "sync_probe_logprob_diff_mean", "t_train_s", "t_sync_s", "t_rest_s",
)  # fmt: skip
SCORING_ESTIMANDS = {name: row for name, row in ESTIMANDS.items() if name not in TRAINING}
