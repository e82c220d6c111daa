"""Protocol `rl`: fine-tune on a small set of problems with one algorithm, in one precision, and record every step.

    prove the sync, once                         the sampler follows every trainer weight (sync.py)
    for each step
        sample      G rollouts of each prompt from mu, whose log-probs are kept; more rounds of it with dynamic sampling
        reward      1 or 0
        score       log pi(theta') of the same tokens by the trainer
        mismatch    mu against pi, before any update
        update      mini-batches: loss, scale, backward, unscale, clip, step
        evaluate    every few steps, where the task says so: the trainer's own policy on held-out problems
        sync        the new weights to the sampler, and the probe that they arrived
        record      evidence, one line of metrics; a checkpoint every few steps

Where train.parallel.data says so, several ranks run this loop together: each samples, rewards, scores and back-propagates
its share, every one has the whole step (suite/engines/world.py), and rank 0 records it.

All randomness is a function of launch seed and step: the order of problems, the mini-batches, the sampling noise. So a
run that was killed goes on from its last checkpoint and ends with the same series, bit for bit.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from suite.engines.batch import MiniBatch, Rollout, request_seed
from suite.engines.checkpoint import load_checkpoint, save_checkpoint
from suite.engines.losses import advantages
from suite.engines.sync import Probe, prove_sync, rounder, sync_weights
from suite.engines.trainers.health import GROUPS
from suite.errors import UserError
from suite.measure.mismatch import estimates, token_statistics
from suite.measure.routing import replay, routing_disagreement
from suite.measure.watch import argmax_flips, by_advantage
from suite.problems.data import Prompt, load_held_out, load_prompts
from suite.protocols.drawing import draw, rounds_before
from suite.protocols.engine_pool import Engines, run_one_by_one
from suite.protocols.evidence import evidence_table
from suite.protocols.session import Session
from suite.record.evidence import Tally, flat, num_response_tokens, summarise, thinned
from suite.record.writer import RunWriter
from suite.spec.algorithms import Algorithm, resolve
from suite.spec.perturbations import perturbed
from suite.spec.plan import Cell
from suite.spec.precision import FORMATS, Precision

DEFAULT_CHECKPOINT_EVERY = 10
NUM_PROBE_PROMPTS, MAX_PROBE_TOKENS = 8, 256
DIVERGED_AFTER = 10  # steps in a row in which no gradient was finite


def run(cells: list[Cell], session: Session) -> None:
    run_one_by_one(cells, session, "rl", _run_cell)


def _run_cell(cell: Cell, writer: RunWriter, engines: Engines, session: Session) -> None:
    # --- what is trained, on what, how
    schedule = cell.settings["schedule"]
    num_steps = min(schedule["steps"], session.limit or schedule["steps"])
    settings = dict(cell.settings["algorithm"])
    shuffle_rewards, perturb = settings.pop("shuffle_rewards", False), settings.pop("perturb", None)
    algorithm = resolve(settings.pop("name"), **settings)
    prompts = load_prompts(cell.settings["data"], cell.get("data.seed", None) or 0)
    prompts = engines.within(prompts, cell.get("data.max_prompt_tokens", None))
    held_out = load_held_out(cell.settings["data"])
    precision = Precision.of(cell.settings["precision"])
    wire, world = precision.wire, session.world
    sampler, trainer = engines.sampler, engines.new_trainer(cell)
    writer.note_weights(engines.weights)
    writer.update(algorithm=algorithm.settings())

    # --- where an earlier attempt stopped
    done, saved, passed_over = load_checkpoint(writer.folder / "checkpoint", writer.parts_done, world)
    writer.rewind(done)
    if passed_over:
        writer.note_recovery(*passed_over)
    if "recovered" in writer.record:
        session.progress(cell.name, done, num_steps, "; ".join(writer.record["recovered"]))

    tally = Tally()
    for part in writer.read_parts():
        tally.add(part)

    # --- both engines hold the checkpoint's weights: prove that the sampler follows the trainer
    sync_weights(trainer, sampler, wire)
    probe = _probe(prompts, engines, precision)
    floor = prove_sync(trainer, sampler, wire, probe)
    writer.update(sync_floor={"logprob_diff_mean": floor.logprob_diff_mean, "k3": floor.k3})
    if saved:
        trainer.take_over(saved)
        sync_weights(trainer, sampler, wire)

    # --- the loop
    order = partial(_prompts_of_round, prompts, schedule["prompts_per_step"], cell.seed)
    max_rounds = cell.get("schedule.dynamic_sampling.max_rounds", None)
    diverged = _diverged(writer.metrics, schedule["minibatches"])
    for step in range(done, done if diverged else num_steps):
        clock = Clock()

        def take(batch: list[Prompt], step: int = step, clock: Clock = clock):
            rollouts = world.spread(engines.requests(batch, cell.seed, step), sampler.sample)
            clock.lap("t_sample_s")
            rewards = world.spread(rollouts, lambda share: engines.reward(share, batch))
            clock.lap("t_rest_s")
            return rollouts, rewards

        drawn = draw(order, take, rounds_before(writer.metrics), max_rounds)
        batch, rollouts, rewards = drawn.prompts, drawn.rollouts, drawn.rewards
        sequences = [(rollout.token_ids, len(rollout.request.prompt_token_ids)) for rollout in rollouts]
        told = engines.scorable(rollouts)
        chosen = sampler.expert_choices(told)
        replay(cell.settings["train"], told, chosen, trainer)
        trainer_logprobs, trainer_argmaxes = trainer.score_and_argmax(sequences)
        clock.lap("t_score_s")
        if step and not _finite(rollouts, trainer_logprobs):
            session.progress(cell.name, step, num_steps, "log-probs are not finite: the run has diverged")
            writer.update(diverged={"step": step, "reason": "log-probs that are not finite"})
            diverged = True
            break
        evidence = evidence_table(rollouts, trainer_logprobs, step, rewards)
        row = _mismatch(step, rollouts, evidence) | drawn.metrics | routing_disagreement(told, chosen, trainer)
        clock.lap("t_rest_s")

        taught = _shuffled(rewards, cell.seed, step) if shuffle_rewards else rewards
        whole = _whole_batch(rollouts, sequences, trainer_logprobs, taught, algorithm, cell)
        logprobs = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
        row |= by_advantage(*logprobs, whole.advantages, num_response_tokens(evidence))
        row |= argmax_flips([rollout.argmax_token_ids for rollout in rollouts], trainer_argmaxes)
        if perturb:
            whole = _perturbed(whole, perturb, trainer, request_seed(cell.seed, "perturb", step))
        parts = _minibatches(batch, rollouts, schedule, cell.seed, step)
        updates = [trainer.update(whole.rows(part), algorithm) for part in parts]
        replay(cell.settings["train"], [], [], trainer)
        clock.lap("t_train_s")

        if held_out and (step + 1) % schedule["eval_every"] == 0:
            row["eval_reward_mean"] = _evaluate(held_out, trainer, engines, precision, cell.seed, step)
            clock.lap("t_eval_s")

        travelled = sync_weights(trainer, sampler, wire)
        gap = probe.gap(sampler, trainer)
        if math.isfinite(gap.k3) and not probe.holds(gap, floor):  # stale weights, or weights that have moved to where engines agree less
            floor = prove_sync(trainer, sampler, wire, probe)
        clock.lap("t_sync_s")

        row |= _training(updates) | {"sync_probe_k3": gap.k3, "sync_probe_logprob_diff_mean": gap.logprob_diff_mean}
        clock.lap("t_rest_s")
        if num_whole := schedule.get("whole_rows_per_step"):
            evidence = thinned(evidence, num_whole, request_seed(cell.seed, "evidence", step))
        tally.add(evidence)  # as a resume will read it
        writer.append(row | clock.laps, evidence)
        writer.note_executed(engines.executed(trainer) | {"wire": travelled})
        due = (step + 1) % (schedule.get("checkpoint_every") or DEFAULT_CHECKPOINT_EVERY) == 0 or step + 1 == num_steps
        if due:
            save_checkpoint(writer.folder / "checkpoint", step + 1, *trainer.held(), world)
        session.progress(cell.name, step + 1, num_steps, f"reward {row['reward_mean']:.3f}, k3 {row['k3_nats_per_token']:.1e}")

        diverged = _diverged(writer.metrics, schedule["minibatches"])
        if diverged:
            break
    if world.is_first:
        _finish(writer, tally, diverged)


def _diverged(metrics: list[dict], num_updates: int) -> bool:
    """Whether no gradient of the last steps was finite."""
    last = metrics[-DIVERGED_AFTER:]
    return len(last) == DIVERGED_AFTER and all(row["step_skipped"] == num_updates for row in last)


def _finite(rollouts: list[Rollout], trainer_logprobs: list[np.ndarray]) -> bool:
    given = [*(rollout.rollout_logprobs for rollout in rollouts), *trainer_logprobs]
    return all(np.isfinite(logprobs).all() for logprobs in given)


class Clock:
    """Wall time by phase, seconds; a phase may have several laps."""

    def __init__(self):
        self._last, self.laps = time.perf_counter(), {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase] = round(self.laps.get(phase, 0.0) + now - self._last, 5)
        self._last = now


def _prompts_of_round(prompts: list[Prompt], num: int, seed: int, number: int) -> list[Prompt]:
    """The `num` problems of one round of sampling, of which a step has one, or more (drawing.py): every pass over the set is a new permutation, whose end that fills no step is left out,
    so that no problem comes twice in a round."""
    if num > len(prompts):
        raise UserError(f"schedule.prompts_per_step: found {num}, allowed: at most the {len(prompts)} problems of the set")
    epoch, place = divmod(number, len(prompts) // num)
    order = np.random.default_rng(request_seed(seed, "order", epoch)).permutation(len(prompts))
    return [prompts[i] for i in order[place * num : (place + 1) * num]]


def _evaluate(held_out: list[Prompt], trainer, engines: Engines, precision: Precision, seed: int, step: int) -> float:
    """Accuracy of the trainer's own policy on problems that it does not train on: one response each, sampled as in
    training, by the same engine with the trainer's weights as its dtype holds them, not rounded any further. Leaves the
    sampler with these weights."""
    sync_weights(trainer, engines.sampler, FORMATS[precision.wire].storage)
    requests = engines.requests(held_out, seed, "eval", step)[:: engines.samples_per_prompt]
    rollouts = engines.world.spread(requests, engines.sampler.sample)
    return float(np.mean(engines.world.spread(rollouts, lambda share: engines.reward(share, held_out))))


def _mismatch(step: int, rollouts: list[Rollout], evidence) -> dict:
    """The part of a step's metrics that exists before any update."""
    logprobs = flat(evidence, "rollout_logprobs")
    counts = {"step": step, "num_rollouts": len(rollouts), "num_response_tokens": int(logprobs.size)}
    values = estimates(summarise(evidence)) | _token_statistics(evidence)
    return counts | values | {"entropy_nats": float(-logprobs.mean()) if logprobs.size else None}


def _token_statistics(evidence) -> dict:
    logprobs = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
    return token_statistics(*logprobs, num_response_tokens(evidence))


def _shuffled(rewards: list[float], seed: int, step: int) -> list[float]:
    """The control that must not learn: the step's rewards, handed to other rollouts."""
    order = np.random.default_rng(request_seed(seed, "shuffle", step)).permutation(len(rewards))
    return [rewards[i] for i in order]


def _whole_batch(rollouts, sequences, trainer_logprobs, rewards, algorithm: Algorithm, cell: Cell) -> MiniBatch:
    _, groups = np.unique([rollout.request.prompt_id for rollout in rollouts], return_inverse=True)
    return MiniBatch(
        sequences=sequences,
        rollout_logprobs=[rollout.rollout_logprobs for rollout in rollouts],
        old_trainer_logprobs=trainer_logprobs,
        advantages=advantages(torch.tensor(rewards), torch.from_numpy(groups), algorithm.advantage).float().numpy(),
        length_norm=cell.get("rollout.max_tokens"),
    )


def _perturbed(whole: MiniBatch, perturb: dict, trainer, seed: int) -> MiniBatch:
    """The batch with log-probs changed as the task says, after everything about the real ones was recorded."""
    coarse = None
    if perturb["format"]:
        with trainer.moved_weights(rounder(perturb["format"])):
            coarse = trainer.score(whole.sequences)
    old, rollout = perturbed(perturb["name"], whole.old_trainer_logprobs, whole.rollout_logprobs, coarse, seed)
    return replace(whole, old_trainer_logprobs=old, rollout_logprobs=rollout)


def _minibatches(prompts: list[Prompt], rollouts: list[Rollout], schedule: dict, seed: int, step: int) -> list[list[int]]:
    """Rollout indices of each gradient step: whole groups in a random order of their prompts, or responses in a random
    order of their own."""
    num, shuffled = schedule["minibatches"], np.random.default_rng(request_seed(seed, "minibatches", step)).permutation
    if schedule.get("minibatch_of") == "responses":
        return [part.tolist() for part in np.array_split(shuffled(len(rollouts)), num)]
    order = shuffled(len(prompts))
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.request.prompt_id, []).append(index)
    parts = np.array_split(order, num)
    return [[i for place in part for i in groups[prompts[place].prompt_id]] for part in parts]


# Not the effective sample size: that of a step is of the weights before its update, as offline.
MEANS = ("loss", "grad_norm", "grad_underflow_share", "clip_fraction", "importance_weight_mean", "truncated_fraction",
         "masked_fraction", *GROUPS)  # fmt: skip
MAXIMA = ("importance_weight_max", "activation_max_abs", "grad_scaled_max_abs")


def _training(updates: list[dict[str, float]]) -> dict[str, float]:
    """The gradient steps of one iteration as one set of metrics; a skipped step has no gradient norm."""
    row = {name: updates[-1][name] for name in ("learning_rate", "loss_scale")}
    row |= {"step_skipped": sum(update["step_skipped"] for update in updates)}
    for names, reduce in ((MEANS, np.mean), (MAXIMA, np.max)):
        for name in names:
            values = [update[name] for update in updates if name in update]
            values = [v for v in values if not (name == "grad_norm" and math.isnan(v))]
            if values:
                row[name] = float(reduce(values))
    return row


def _probe(prompts: list[Prompt], engines: Engines, precision: Precision) -> Probe:
    """Fixed sequences: the sampler's own rollouts of the first problems, one each, before any training. Rank 0 samples them:
    they are scored at every sync, so they are few and short."""
    requests = engines.requests(prompts[:NUM_PROBE_PROMPTS], "probe")[:: engines.samples_per_prompt]
    short = [replace(request, max_tokens=MAX_PROBE_TOKENS) for request in requests]
    sequences = engines.world.first(engines.scorable(engines.sampler.sample(short)) if engines.world.is_first else None)
    if not sequences:
        raise UserError("rollout.max_model_len: none of the first problems leaves room for a response of two tokens")
    return Probe(sequences, precision.coarser, engines.world, precision.wire, precision.kv_cache)


def _finish(writer: RunWriter, tally: Tally, diverged: bool) -> None:
    sums = tally.sums()
    counts = {
        "num_prompts": len(sums["prompt_id"]),
        "num_rollouts": int(np.sum(sums["num_rollouts"])),
        "num_response_tokens": int(np.sum(sums["num_response_tokens"])),
        "num_steps": len(writer.metrics),
        "num_skipped_steps": sum(row["step_skipped"] for row in writer.metrics),
    }
    status = "diverged" if diverged else "success"
    writer.finish(status, summary=sums, counts=counts, series_summary=estimates(sums) | tally.token_statistics())
    shutil.rmtree(writer.folder / "checkpoint", ignore_errors=True)  # it was there to resume
