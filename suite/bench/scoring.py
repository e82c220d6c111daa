"""Scoring given tokens: DenseTrainer.score against a plain transformers forward, full logits, log_softmax and gather.

Same randomly initialised Qwen2 weights, same tokens, same attention. On a CPU our 16-bit products are those of
arithmetic.py, the plain ones torch's native kernels.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from suite.bench.pairs import Side, column, in_turn, paired_ratios, spread, target, with_range
from suite.errors import NotRunnable, UserError
from suite.machine import environment

PRECISIONS = ("fp32", "bf16", "fp16")
VOCABULARIES = (64, 8192, 151_936)  # a desk model's, a middling one, Qwen2's own
REPETITIONS = 7
LARGE_SEQUENCES = 8  # at a large vocabulary, where the plain logits of a sequence take 0.4 GiB
SLOW_SEQUENCES = 2  # of native 16-bit heads there on a CPU: a pass of fp16 can take minutes
MIN_TURN_SECONDS = 0.5  # a repetition of a side goes on for at least this long; its figure is the time per pass
LARGE_VOCABULARY = 100_000  # from here on the memory target holds
SPEED_TARGET, MEMORY_TARGET = 0.95, 0.25
MEAN_LOGPROB_TOLERANCE_NATS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}  # both sides must have scored the same thing
MEMORY_TO_USE = 0.8


@dataclass(frozen=True)
class Shape:
    """Model and batch of the comparison; lengths in tokens."""

    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_sequences: int = 32
    sequence_tokens: int = 256
    prompt_tokens: int = 16

    @property
    def num_scored(self) -> int:
        return self.num_sequences * (self.sequence_tokens - self.prompt_tokens)

    def plain_gib(self, vocabulary: int) -> float:
        """Memory of the plain side's logits: in 16 bits, in fp32, and their log_softmax."""
        return self.num_sequences * self.sequence_tokens * vocabulary * (2 + 4 + 4) / 2**30


def check(vocabularies: list[int] | None = None) -> None:
    if vocabularies and min(vocabularies) < 8:
        raise UserError(f"bench --vocab: found {min(vocabularies)}, allowed: 8 entries or more")
    missing = [name for name in ("torch", "transformers") if not environment.package_version(name)]
    if missing:
        raise NotRunnable(f"bench scoring needs {', '.join(missing)}, not installed here: run `make setup`")


def measure(vocabularies: list[int] | None = None, *, say=print, shape: Shape = Shape(), precisions=PRECISIONS,
            repetitions: int = REPETITIONS, min_turn_seconds: float = MIN_TURN_SECONDS) -> tuple[dict, list, list]:
    """(settings, rows, targets): a row per vocabulary and precision, ours beside the plain forward."""
    vocabularies = list(vocabularies or VOCABULARIES)
    settings = asdict(shape) | {"vocabularies": vocabularies, "weights": "random", "min_turn_seconds": min_turn_seconds}
    on_gpu = bool(environment.visible_gpus(environment.list_gpus(), None)) and environment.torch_build() == "cuda"
    rows = []
    for vocabulary in vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), vocabulary, shape)
            for precision in precisions:
                batch = shape
                if vocabulary >= LARGE_VOCABULARY:
                    slow = precision != "fp32" and not on_gpu
                    most = SLOW_SEQUENCES if slow else LARGE_SEQUENCES
                    batch = replace(shape, num_sequences=min(most, shape.num_sequences))
                job = {"model": folder, "vocabulary": vocabulary, "precision": precision,
                       "shape": asdict(batch), "min_turn_seconds": min_turn_seconds}  # fmt: skip
                rows.append(_row(job, batch, repetitions))
                say(f"scoring, vocabulary {vocabulary}, {precision}: " + _in_words(rows[-1]))
    return settings, rows, targets(rows)


def _row(job: dict, shape: Shape, repetitions: int) -> dict:
    head = {"vocabulary": job["vocabulary"], "precision": job["precision"], "sequences": shape.num_sequences}
    available = environment.memory_gib()
    if available and shape.plain_gib(job["vocabulary"]) > MEMORY_TO_USE * available:
        needed = shape.plain_gib(job["vocabulary"])
        return head | {"not_run": f"the plain logits need {needed:.1f} GiB, this machine has {available:g}"}
    # memory alone in a process each; speed in one process, in turns: two processes differ by a fifth for reasons of their own
    alone = in_turn(job | {"side": "scoring-ours"}, job | {"side": "scoring-plain"}, 1)
    with Side(job | {"side": "scoring-both"}) as both:
        turns = [both.turn() for _ in range(repetitions)]
    return head | {"repetitions": repetitions} | compare(*alone, turns, shape.num_scored, job["precision"])


def compare(ours: list[dict], plain: list[dict], turns: list[dict], num_scored: int, precision: str) -> dict:
    """The figures of a row: memory of either side alone, and the seconds of each repetition of both. Raises ValueError if
    the sides scored different things."""
    apart = abs(ours[0]["mean_logprob"] - plain[0]["mean_logprob"])
    if not apart <= MEAN_LOGPROB_TOLERANCE_NATS[precision]:
        raise ValueError(f"{precision}: the two sides' mean log-probs differ by {apart:.3g} nats")
    seconds = {side: column(turns, side) for side in ("ours", "plain")}
    peak = {"ours": max(column(ours, "peak_bytes")), "plain": max(column(plain, "peak_bytes"))}
    return {
        "seconds": seconds,
        "tokens_per_second": {side: spread([num_scored / s for s in values]) for side, values in seconds.items()},
        "speed_ratio": spread(paired_ratios(seconds["plain"], seconds["ours"])),
        "best_speed_ratio": min(seconds["plain"]) / min(seconds["ours"]),
        "peak_bytes": peak,
        "peak_ratio": peak["ours"] / max(peak["plain"], 1),  # of a tiny model the peak may be below what can be seen
        "mean_logprob_difference_nats": apart,
    }


def targets(rows: list[dict]) -> list[dict]:
    """fp32 is judged for speed, and for memory where the vocabulary is large; the other figures are reported.

    Speed is judged on the fastest repetition of either side: a plain forward that follows another one, whose gigabytes of
    logits were just given back, can take 2.5 times as long, and a median would fall on either side of that by chance.
    """
    judged = []
    for row in (row for row in rows if row["precision"] == "fp32" and "not_run" not in row):
        where = f"vocabulary {row['vocabulary']}, fp32"
        speed = row["best_speed_ratio"]
        judged.append(target(f"speed, ours / plain, fastest of each, {where}", speed, "at least", SPEED_TARGET))
        if row["vocabulary"] >= LARGE_VOCABULARY:
            judged.append(target(f"peak memory, ours / plain, {where}", row["peak_ratio"], "at most", MEMORY_TARGET))
    return judged


def tables(rows: list[dict]) -> list[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of each table to show."""
    return [
        ("Response tokens scored per second", [_head(row) | _speed(row) for row in rows]),
        ("Peak memory over the state after loading, MiB", [_head(row) | _memory(row) for row in rows]),
    ]


def _head(row: dict) -> dict[str, str]:
    return {"vocabulary": f"{row['vocabulary']:,}", "precision": row["precision"], "sequences": str(row["sequences"])}


def _speed(row: dict) -> dict[str, str]:
    if "not_run" in row:
        return {"ours": f"not run: {row['not_run']}"}
    rates = {side: with_range(rate, ",.0f") for side, rate in row["tokens_per_second"].items()}
    ratios = {"ours / plain": with_range(row["speed_ratio"], ".2f"), "fastest / fastest": f"{row['best_speed_ratio']:.2f}"}
    return rates | ratios | {"repetitions": str(row["repetitions"])}


def _memory(row: dict) -> dict[str, str]:
    if "not_run" in row:
        return {}
    peaks = {side: f"{peak / 2**20:,.0f}" for side, peak in row["peak_bytes"].items()}
    return peaks | {"ours / plain": f"{row['peak_ratio']:.3f}"}


def _in_words(row: dict) -> str:
    if "not_run" in row:
        return row["not_run"]
    return f"{row['best_speed_ratio']:.2f} of the plain speed, {row['peak_ratio']:.3f} of its peak memory"


CAPTION = (
    "Ours is DenseTrainer.score; plain is a transformers forward with full logits, log_softmax and gather. Same random "
    "weights, same tokens. Speed: both in one process, taking turns; median (range) over the repetitions after a warm-up; "
    "ratios are paired, and the target is judged on the fastest repetition of either side. Memory: each alone in a process of its own. Plain 16-bit rows are torch's native kernels, which can be very "
    "slow on a CPU: at a large vocabulary those rows have few sequences."
)


# --- in the worker ----------------------------------------------------------------------------------------------------


def write_model(folder: Path, vocabulary: int, shape: Shape) -> None:
    """A randomly initialised Qwen2 checkpoint in bf16, untied head."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.sequence_tokens, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)


def _tokens(job: dict):
    """(B, T) token ids, the same in both processes."""
    import torch

    shape = Shape(**job["shape"])
    size = (shape.num_sequences, shape.sequence_tokens)
    return torch.randint(job["vocabulary"], size, generator=torch.Generator().manual_seed(1))


def _scorer_of_ours(job: dict):
    """A function that scores all tokens and returns the sum of their log-probs."""
    from suite.engines.trainers.dense import DenseTrainer

    num_prompt = job["shape"]["prompt_tokens"]
    train = {"score_batch_size": job["shape"]["num_sequences"], "attention": "sdpa"}
    trainer = DenseTrainer(Path(job["model"]), train, {"rollout": job["precision"], "train": job["precision"]}, 1.0)
    sequences = [(row, num_prompt) for row in _tokens(job).tolist()]
    return lambda: float(sum(s.sum(dtype="f8") for s in trainer.score(sequences)))


def _plain_scorer(job: dict):
    """The same with a plain forward."""
    import torch
    from transformers import AutoModelForCausalLM

    from suite.engines.arithmetic import torch_dtype

    num_prompt = job["shape"]["prompt_tokens"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch_dtype(job["precision"]), attn_implementation="sdpa", trust_remote_code=False
    )
    model, token_ids = model.eval().to(device), _tokens(job).to(device)

    @torch.inference_mode()
    def score() -> float:
        logits = model(input_ids=token_ids, use_cache=False).logits  # (B, T, V)
        logprobs = logits[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, token_ids[:, 1:, None])[..., 0]  # (B, T-1)
        return chosen[:, num_prompt - 1 :].sum(dtype=torch.float64).item()

    return score


SCORERS = {"ours": _scorer_of_ours, "plain": _plain_scorer}


def _alone(turns, side: str) -> None:
    """Peak memory of one side, and what it scored."""
    from suite.bench.worker import PeakMemory

    score, memory = SCORERS[side](turns.job), PeakMemory()
    memory.reset()
    while True:
        mean = score() / Shape(**turns.job["shape"]).num_scored
        turns.answer(mean_logprob=mean, peak_bytes=memory.growth())


def _both(turns) -> None:
    """Seconds per pass of both sides in one process; the one that goes first changes every time."""
    scorers = {side: make(turns.job) for side, make in SCORERS.items()}
    order = list(scorers)
    while True:
        turns.answer(**{side: _seconds_per_pass(scorers[side], turns.job["min_turn_seconds"]) for side in order})
        order.reverse()


def _seconds_per_pass(score, at_least: float) -> float:
    """`score` returns a sum of log-probs, which cannot be known before they are."""
    passes, started = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - started < at_least:
        score()
        passes += 1
    return (time.perf_counter() - started) / passes


SIDES = {
    "scoring-ours": lambda turns: _alone(turns, "ours"),
    "scoring-plain": lambda turns: _alone(turns, "plain"),
    "scoring-both": _both,
}
