"""One RL step: ours (protocols/rl.py with vLLM) against TRL's GRPOTrainer with transformers generation.

Same weights, problems, batch, clip range, optimizer and gradient steps. Ours is the protocol itself, run into a
temporary folder: besides what TRL does it measures the mismatch, proves the weight sync and writes the record, and all
of that is in its time. A step ends when the next one could begin.

TRL trains in bf16 through autocast over fp32 weights; ours computes in bf16 from fp32 masters.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from suite.bench.pairs import column, in_turn, paired_ratios, spread, target, with_range
from suite.errors import NotRunnable, UserError
from suite.machine import environment

SIZES = ("1m", "5m")
REPETITIONS = 5
PHASES = ("sample", "score", "train", "sync")  # what is left of a step's wall time is "rest"
SLOWEST, WANTED_SPEED, REST_SHARE, FP16_COST = 1.0, 1.5, 0.10, 1.5
DATA_SEED = 0
OPTIMIZER = {"name": "adamw", "lr": 1e-6, "betas": [0.9, 0.95], "eps": 1e-15, "weight_decay": 0.0}
CLIP_LOW, CLIP_HIGH, GRAD_CLIP = 0.2, 0.28, 1.0


@dataclass(frozen=True)
class Batch:
    """One step's rollouts and gradient steps; lengths in tokens. micro_batch_size: sequences per forward. Ours are
    sorted by length, so small ones carry less padding; TRL pads all alike, and is fastest with a whole update at once."""

    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    max_tokens: int = 72
    updates: int = 4
    trl_micro_batch_size: int = 64
    micro_batch_size: int = 16
    num_terms: tuple[int, int] = (4, 10)  # digits of a desk problem: solutions of about 30 to 70 tokens
    num_prompts: int = 256
    sampler: str = "vllm"


def check(sizes: list[str] | None = None) -> None:
    needed = ("torch", "transformers", "vllm", "trl")
    here = {name.removesuffix("-cpu") for name in environment.package_versions()}
    missing = [name for name in needed if name not in here]
    if missing:
        raise NotRunnable(f"bench rl needs {', '.join(missing)}, not installed here: run `make setup`")
    from suite.desk.recipe import SIZES as RECIPES

    for size in sizes or []:
        if size not in RECIPES:
            raise UserError(f"bench --sizes: found {size!r}, allowed: {', '.join(RECIPES)}")


def measure(sizes: list[str] | None = None, *, say=print, batch: Batch = Batch(),
            repetitions: int = REPETITIONS) -> tuple[dict, list, list]:
    """(settings, rows, targets). Per size: fp32 and bf16 beside TRL, and fp16 beside our own fp32."""
    sizes = list(sizes or SIZES)
    rows, weights = [], {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder, weights[size] = checkpoint(size, Path(scratch))
            job = {"model": str(folder), "batch": asdict(batch)}
            for precision, other in (("fp32", "rl-trl"), ("bf16", "rl-trl"), ("fp16", "rl-ours")):
                theirs = job | {"side": other, "precision": "fp32" if other == "rl-ours" else precision}
                ours = job | {"side": "rl-ours", "precision": precision}
                row = {"size": size, "precision": precision, "beside": "ours, fp32" if other == "rl-ours" else "TRL",
                       "repetitions": repetitions}  # fmt: skip
                rows.append(row | compare(*in_turn(ours, theirs, repetitions)))
                speed = rows[-1]["speed_ratio"]["median"]
                say(f"rl, {size}, {precision}: {speed:.2f} times as fast as {row['beside']}")
    settings = asdict(batch) | {"sizes": sizes, "weights": weights, "optimizer": OPTIMIZER, "grad_clip": GRAD_CLIP,
                                "clip": [CLIP_LOW, CLIP_HIGH], "algorithm": "GRPO (Dr.GRPO)"}  # fmt: skip
    return settings, rows, targets(rows)


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """The figures of a row, from those of the repetitions."""
    row = {
        "seconds": {"ours": column(ours, "seconds"), "beside": column(theirs, "seconds")},
        "response_tokens": {"ours": column(ours, "response_tokens"), "beside": column(theirs, "response_tokens")},
        "speed_ratio": spread(paired_ratios(column(theirs, "seconds"), column(ours, "seconds"))),
        "split_seconds": {phase: spread(column(ours, phase)) for phase in (*PHASES, "rest")},
        "rest_share": spread(paired_ratios(column(ours, "rest"), column(ours, "seconds"))),
    }
    if "train" in theirs[0]:
        busy = [[one["score"] + one["train"] for one in side] for side in (ours, theirs)]
        row["score_and_train_ratio"] = spread(paired_ratios(*busy))
    return row


def targets(rows: list[dict]) -> list[dict]:
    judged = []
    for row in rows:
        where = f"{row['size']}, {row['precision']}"
        if row["beside"] == "TRL":
            speed = row["speed_ratio"]["median"]
            judged.append(target(f"speed, ours / TRL, {where}: not slower", speed, "at least", SLOWEST))
            aim = target(f"speed, ours / TRL, {where}", speed, "at least", WANTED_SPEED)
            judged.append(aim | {"is_aim": True})
        else:
            cost = row["score_and_train_ratio"]["median"]
            judged.append(target(f"score + train, fp16 / fp32, {row['size']}", cost, "at most", FP16_COST))
        judged.append(target(f"rest of our step, share, {where}", row["rest_share"]["median"], "below", REST_SHARE))
    return judged


def tables(rows: list[dict]) -> list[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of each table to show."""
    return [
        ("Seconds per RL step", [_head(row) | _speed(row) for row in rows]),
        ("Where our step's time goes, seconds", [_head(row) | _where(row) for row in rows]),
    ]


def _head(row: dict) -> dict[str, str]:
    return {"size": row["size"], "precision": row["precision"], "beside": row["beside"]}


def _speed(row: dict) -> dict[str, str]:
    seconds = {side: with_range(spread(values), ".2f") for side, values in row["seconds"].items()}
    tokens = [f"{spread(row['response_tokens'][side])['median']:,.0f}" for side in ("ours", "beside")]
    return {
        "ours": seconds["ours"], "the other": seconds["beside"],
        "speed, ours / the other": with_range(row["speed_ratio"], ".2f"),
        "tokens sampled": " / ".join(tokens), "repetitions": str(row["repetitions"]),
    }  # fmt: skip


def _where(row: dict) -> dict[str, str]:
    split = {phase: f"{times['median']:.3f}" for phase, times in row["split_seconds"].items()}
    cost = row.get("score_and_train_ratio")
    return split | {"rest, share": f"{row['rest_share']['median']:.1%}"} | (
        {"score + train, to fp32": with_range(cost, ".2f")} if cost else {}
    )


CAPTION = (
    "Ours: sample (vLLM), reward, score, mismatch, gradient steps, weight sync with its probe, record. TRL: "
    "GRPOTrainer, generate (transformers), reward, score, gradient steps. fp16 rows stand beside our own fp32. Same "
    "weights and problems, each side alone in a process of its own, one after the other. Median (range) over the "
    "repetitions after a warm-up step; ratios are paired."
)


# --- in the worker ----------------------------------------------------------------------------------------------------


def checkpoint(size: str, scratch: Path) -> tuple[Path, str]:
    """(folder, where its weights are from): the shipped desk checkpoint, else random weights of the same recipe."""
    from suite.desk.build import folder_of

    shipped = folder_of(size)
    if list(shipped.glob("*.safetensors")):
        return shipped, "shipped desk checkpoint"
    import torch
    from transformers.utils import logging

    from suite.desk.recipe import SIZES as RECIPES
    from suite.desk.recipe import new_model
    from suite.desk.tokenizer import build_tokenizer

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    new_model(RECIPES[size], tokenizer).to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch, "random, of the desk recipe"


def cell_settings(job: dict) -> dict:
    """The step as settings of a cell."""
    batch, precision = Batch(**job["batch"]), job["precision"]
    return {
        "model": {"path": job["model"], "family": "qwen2"},
        "data": {"id": "desk/sum-mod-100", "template": "desk", "num_prompts": batch.num_prompts,
                 "num_terms": list(batch.num_terms), "seed": DATA_SEED},
        "rollout": {
            "engine": batch.sampler, "samples_per_prompt": batch.samples_per_prompt, "temperature": 1.0, "top_p": 1.0,
            "top_k": 0, "max_tokens": batch.max_tokens, "max_model_len": 256, "max_num_seqs": 256,
            "max_num_batched_tokens": 16384, "enforce_eager": True, "prefix_caching": False, "chunked_prefill": False,
            "cascade_attention": False, "kv_cache_gib": 1.0,
        },
        "train": {
            "engine": "dense", "attention": "sdpa", "score_batch_size": batch.micro_batch_size,
            "micro_batch_size": batch.micro_batch_size, "grad_clip": GRAD_CLIP, "optimizer": OPTIMIZER,
        },
        "precision": {"rollout": precision, "train": precision, "loss_scaling": {"enabled": precision == "fp16"}},
        "algorithm": {"name": "GRPO", "clip_low": CLIP_LOW, "clip_high": CLIP_HIGH},
        "schedule": {"steps": 10**6, "prompts_per_step": batch.prompts_per_step, "minibatches": batch.updates,
                     "checkpoint_every": 10**6},
    }  # fmt: skip


@dataclass(frozen=True)
class BenchTask:
    """What a record asks of its task."""

    id: str = "bench-rl"
    version: int = 1
    grade_version: int = 1
    text: str = "suite bench rl"


def _ours(turns) -> None:
    """The protocol itself; its progress report at the end of a step is where the next turn is waited for."""
    from suite.protocols import rl
    from suite.protocols.session import Session
    from suite.record.writer import open_run
    from suite.spec.plan import Cell
    from suite.spec.precision import contract_breaches

    with tempfile.TemporaryDirectory() as runs:
        cell = Cell(BenchTask.id, 1, turns.job["precision"], (), 0, cell_settings(turns.job))
        writer = open_run(Path(runs), BenchTask(), cell, {}, "bench")
        started = time.perf_counter()

        def step_done(*_) -> None:
            nonlocal started
            seconds = time.perf_counter() - started
            breaches = contract_breaches(cell.settings["precision"], writer.record["precision_executed"])
            if breaches:
                raise RuntimeError("; ".join(breaches))
            turns.answer(**_split(writer.metrics[-1], seconds))
            started = time.perf_counter()

        rl.run([cell], Session(BenchTask(), None, step_done, lambda cell: writer))


def _split(metrics: dict, seconds: float) -> dict:
    """Wall time of a step by phase; the rest is all that no phase accounts for, the record's writing included."""
    phases = {phase: metrics[f"t_{phase}_s"] for phase in PHASES}
    rest = seconds - sum(phases.values())
    return {"seconds": seconds, "response_tokens": metrics["num_response_tokens"], **phases, "rest": rest}


def _trl(turns) -> None:
    """GRPOTrainer; the end of the last gradient step of a batch is where the next turn is waited for."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from suite.engines.models import load_tokenizer
    from suite.problems.data import load_prompts
    from suite.problems.rewards import desk_reward

    job, batch = turns.job, Batch(**turns.job["batch"])
    started, sampled = time.perf_counter(), 0

    def reward(completions, completion_ids, gold, **_) -> list[float]:
        nonlocal sampled
        sampled += sum(map(len, completion_ids))
        return [desk_reward(text, answer).value for text, answer in zip(completions, gold, strict=True)]

    class StepClock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            nonlocal started, sampled
            if state.global_step % batch.updates == 0:
                turns.answer(seconds=time.perf_counter() - started, response_tokens=sampled)
                started, sampled = time.perf_counter(), 0

    prompts = load_prompts(cell_settings(job)["data"], DATA_SEED)
    rows = [{"prompt": prompt.text, "gold": prompt.gold[0]} for prompt in prompts]
    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(output_dir=out, use_cpu=not torch.cuda.is_available(), **trl_settings(job))
        trainer = GRPOTrainer(
            model=job["model"], reward_funcs=reward, args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(Path(job["model"])),
            callbacks=[StepClock()],
        )  # fmt: skip
        trainer.train()


def trl_settings(job: dict) -> dict:
    """The same step as `cell_settings` in TRL's words; what TRL has on by default and ours has not is off."""
    batch = Batch(**job["batch"])
    per_update = batch.prompts_per_step * batch.samples_per_prompt // batch.updates
    return dict(
        bf16=job["precision"] == "bf16", model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=min(batch.trl_micro_batch_size, per_update),
        gradient_accumulation_steps=max(1, per_update // batch.trl_micro_batch_size),
        generation_batch_size=batch.prompts_per_step * batch.samples_per_prompt,
        num_generations=batch.samples_per_prompt, max_completion_length=batch.max_tokens,
        temperature=1.0, top_p=1.0, top_k=0, use_vllm=False,
        loss_type="dr_grpo", scale_rewards="none", beta=0.0, num_iterations=1, epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH,
        learning_rate=OPTIMIZER["lr"], lr_scheduler_type="constant", optim="adamw_torch_fused",
        adam_beta1=OPTIMIZER["betas"][0], adam_beta2=OPTIMIZER["betas"][1], adam_epsilon=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"], max_grad_norm=GRAD_CLIP, gradient_checkpointing=False,
        max_steps=10**6, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip


SIDES = {"rl-ours": _ours, "rl-trl": _trl}
