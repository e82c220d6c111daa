"""A training step of a mixture of experts: our MoeTrainer (megatron-core) against transformers' own mixture.

Both are trainers of the suite behind one contract (the same head, masters, optimizer and loss scaling), on the embedded
mixture, with the same tokens; what differs is whose layers compute. Each repetition scores a batch of rollouts and takes
the gradient steps of one iteration, ours first, then transformers'. transformers chooses its experts' implementation.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass

from suite.bench.pairs import Side, column, paired_ratios, spread, target, with_range
from suite.errors import NotRunnable
from suite.machine import environment

PRECISIONS = ("fp32", "bf16", "fp16")
SIZE = "qwen3-moe-2m"
REPETITIONS = 5
ENGINES = {"ours": "moe", "transformers": "dense"}  # train.engine
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.05}  # relative, of the first gradient norm: both took the same step
SPEED = 1.0
OPTIMIZER = {"name": "adamw", "lr": 1e-6, "betas": [0.9, 0.95], "eps": 1e-15, "weight_decay": 0.0}


@dataclass(frozen=True)
class Batch:
    """The rollouts and gradient steps of one iteration of a desk task; num_terms: digits of a problem."""

    num_sequences: int = 128
    updates: int = 8
    num_rows: int = 16  # sequences per forward
    num_terms: tuple[int, int] = (6, 12)
    seed: int = 0


def check(**_) -> None:
    from suite.desk.build import folder_of

    needed = ("torch", "transformers", "megatron-core")
    missing = [name for name in needed if name not in environment.package_versions()]
    if missing:
        raise NotRunnable(f"bench moe needs {', '.join(missing)}, not installed here: run `make setup`")
    if not list(folder_of(SIZE).glob("*.safetensors")):
        raise NotRunnable(f"bench moe needs the weights of {folder_of(SIZE)}: run `suite desk build --size {SIZE}`")


def measure(*, say=print, batch: Batch = Batch(), precisions=PRECISIONS, repetitions: int = REPETITIONS) -> tuple[dict, list, list]:
    """(settings, rows, targets): a row per precision."""
    rows = []
    for precision in precisions:
        with Side({"side": "moe-both", "precision": precision, "batch": asdict(batch)}) as both:
            turns = [both.turn() for _ in range(repetitions)]
        rows.append({"precision": precision, "repetitions": repetitions} | compare(turns, precision))
        say(f"moe, {precision}: {rows[-1]['speed_ratio']['median']:.2f} times as fast as transformers")
    return asdict(batch) | {"size": SIZE, "optimizer": OPTIMIZER}, rows, targets(rows)


def compare(turns: list[dict], precision: str) -> dict:
    """The figures of a row. Raises ValueError if the two sides took different steps."""
    norms = [turns[0][f"{side}_grad_norm"] for side in ENGINES]
    if not abs(norms[0] - norms[1]) <= LOSS_TOLERANCE[precision] * norms[1]:
        raise ValueError(f"{precision}: the two sides' gradient norms are {norms[0]:.6g} and {norms[1]:.6g}")
    seconds = {f"{side}_{phase}": column(turns, f"{side}_{phase}") for side in ENGINES for phase in ("score", "train")}
    step = {side: [turn[f"{side}_score"] + turn[f"{side}_train"] for turn in turns] for side in ENGINES}
    return {
        "seconds": seconds | step,
        "speed_ratio": spread(paired_ratios(step["transformers"], step["ours"])),
        "score_ratio": spread(paired_ratios(seconds["transformers_score"], seconds["ours_score"])),
        "train_ratio": spread(paired_ratios(seconds["transformers_train"], seconds["ours_train"])),
        "grad_norms": norms,
    }


def targets(rows: list[dict]) -> list[dict]:
    return [
        target(f"speed of a step, ours / transformers, {row['precision']}", row["speed_ratio"]["median"], "at least", SPEED) for row in rows
    ]


def tables(rows: list[dict]) -> list[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of each table to show."""
    return [("Seconds per step of a mixture of experts", [_shown(row) for row in rows])]


def _shown(row: dict) -> dict[str, str]:
    seconds = {f"{side}, s": with_range(spread(row["seconds"][side]), ".2f") for side in ENGINES}
    ratios = {"speed, ours / transformers": "speed_ratio", "of scoring": "score_ratio", "of gradient steps": "train_ratio"}
    shown = {name: with_range(row[key], ".2f") for name, key in ratios.items()}
    return {"precision": row["precision"]} | seconds | shown | {"repetitions": str(row["repetitions"])}


CAPTION = (
    "Scoring of the rollouts of one iteration and its gradient steps, by megatron-core's layers (ours) and by those of "
    "transformers, both behind the suite's head, fp32 masters, AdamW and loss scaling. Same weights and tokens, one process, "
    "in turn. Median (range) over the repetitions after a warm-up; ratios are paired."
)


# --- in the worker ----------------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> list[tuple[list[int], int]]:
    """Desk problems with solutions as the model was taught them: (token_ids, num_prompt_tokens) each."""
    from suite.desk import recipe
    from suite.desk.tokenizer import build_tokenizer
    from suite.problems import desk as problems

    tokenizer, rng = build_tokenizer(), random.Random(batch.seed)
    rows = []
    for problem in problems.sample_problems(batch.num_sequences, batch.num_terms, batch.seed):
        prompt = tokenizer.encode(problems.prompt_text(problem))
        solution = tokenizer.encode(recipe.noisy_solution(problem.terms, rng)) + [tokenizer.eos_token_id]
        rows.append((prompt + solution, len(prompt)))
    return rows


def _both(turns) -> None:
    from suite.desk.build import folder_of
    from suite.engines.trainers.load import load_trainer

    job, batch = turns.job, Batch(**turns.job["batch"])
    precision = {"rollout": job["precision"], "train": job["precision"], "loss_scaling": {"enabled": job["precision"] == "fp16"}}
    train = {"score_batch_size": batch.num_rows, "micro_batch_size": batch.num_rows, "grad_clip": 1.0, "optimizer": OPTIMIZER}
    sides = {side: load_trainer(folder_of(SIZE), train | {"engine": engine}, precision, 1.0) for side, engine in ENGINES.items()}
    rows = rows_of(batch)
    while True:
        turns.answer(**{f"{side}_{name}": value for side, trainer in sides.items() for name, value in _step(trainer, rows, batch).items()})


def _step(trainer, rows: list, batch: Batch) -> dict:
    import numpy as np

    from suite.engines.batch import MiniBatch
    from suite.spec.algorithms import resolve

    started = time.perf_counter()
    old = trainer.score(rows)
    scored = time.perf_counter()
    advantages = np.random.default_rng(batch.seed).normal(size=len(rows)).astype(np.float32)
    whole = MiniBatch(rows, old, old, advantages, length_norm=64)
    parts = np.array_split(np.arange(len(rows)), batch.updates)
    reports = [trainer.update(whole.rows(part.tolist()), resolve("GRPO")) for part in parts]
    return {"score": scored - started, "train": time.perf_counter() - scored, "grad_norm": reports[0]["grad_norm"]}


SIDES = {"moe-both": _both}
