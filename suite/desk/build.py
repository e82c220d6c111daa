"""`suite desk build`: make a desk checkpoint from its recipe, or re-make it and compare behaviour with the one that is
shipped.

Training is bit-equal on one machine, not across machines, so `--check` compares what the model does, within tolerances
recorded here.
"""

import dataclasses
import hashlib
import json
import tempfile
import time
from pathlib import Path

from suite.errors import UserError

CHECKPOINTS = Path(__file__).resolve().parents[2] / "baselines" / "desk"

# Largest allowed difference of a re-made model, in the unit of the figure. Judgement: wide against the sampling error
# of 128 problems (0.04 for an accuracy near 0.5), narrow against a recipe that lost its noise (sampled accuracy near
# greedy) or stopped learning.
TOLERANCES = {
    "held_out_loss_nats": 0.02,
    "trained.greedy_accuracy": 0.10,
    "trained.sampled_accuracy": 0.15,
    "trained.entropy_nats": 0.02,
    "trained.response_tokens_mean": 5.0,
    "trained.stopped_share": 0.02,
    "between.sampled_accuracy": 0.10,
    "between.stopped_share": 0.10,
    "long.entropy_nats": 0.15,
    "long.stopped_share": 0.25,
}


def folder_of(size: str) -> Path:
    """Where the shipped checkpoint of a size lives; a size without a family's name is a Qwen2 model."""
    return CHECKPOINTS / (size if "-" in size else f"qwen2-{size}")


def run(size: str = "1m", out: str | Path | None = None, check: bool = False, steps: int | None = None) -> int:
    """Train, measure and write the checkpoint of `size`; with check, compare with the shipped one and write nothing.

    Returns 0, or 1 if --check finds a figure outside its tolerance. `steps` shortens the training (a trial, not a desk
    model). Raises UserError on an unknown size, on check together with out, and where a check has no shipped checkpoint
    to compare with.
    """
    from suite.desk.recipe import SIZES

    if size not in SIZES:
        raise UserError(f"desk build: size: found {size!r}, allowed: {', '.join(SIZES)}")
    if check and out is not None:
        raise UserError("desk build: --check compares with the shipped checkpoint and writes nothing; leave out --out")
    shipped = read_training(folder_of(size)) if check else None
    model, tokenizer, training = make(size, steps)
    print_behaviour(training)
    if check:
        return compare(shipped["behaviour"], training["behaviour"])
    write(Path(out) if out else folder_of(size), model, tokenizer, training)
    return 0


def read_training(folder: Path) -> dict:
    """The training.json of a checkpoint folder."""
    path = folder / "training.json"
    if not path.is_file():
        raise UserError(f"desk build: nothing to compare with: {path} is missing; build it first without --check")
    return json.loads(path.read_text())


def make(size: str, steps: int | None) -> tuple:
    """Train one model; returns (model, tokenizer, training record)."""
    from suite.desk import recipe
    from suite.desk.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    started = time.monotonic()
    model = recipe.train(recipe.SIZES[size], tokenizer, steps)
    return model, tokenizer, training_record(size, steps, model, tokenizer, time.monotonic() - started)


def training_record(size: str, steps: int | None, model, tokenizer, train_seconds: float) -> dict:
    """What training.json says of a model: recipe, regimes, measured behaviour, and how long both took."""
    from suite.desk import behaviour, recipe
    from suite.problems import desk as problems

    chosen = recipe.SIZES[size]
    started = time.monotonic()
    return {
        "schema": 1,
        "size": size,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": dataclasses.asdict(chosen) | {"steps": steps or chosen.steps},
        "noise": {"slip_rate": recipe.SLIP_RATE, "slips": recipe.SLIPS},
        "num_terms": {name: list(bounds) for name, bounds in behaviour.REGIMES.items()},
        "problem_example": problems.sample_problems(1, problems.TRAINED_TERMS, 0)[0].text,
        "behaviour": behaviour.measure(model, tokenizer),
        "train_seconds": round(train_seconds),
        "measure_seconds": round(time.monotonic() - started),
    }


def write(folder: Path, model, tokenizer, training: dict) -> None:
    """Write the checkpoint in bf16 with its tokenizer and training.json, complete or not at all."""
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        staged = Path(scratch)
        model.to(torch.bfloat16).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        sha256 = hashlib.sha256((staged / "model.safetensors").read_bytes()).hexdigest()
        (staged / "training.json").write_text(json.dumps(training | {"safetensors_sha256": sha256}, indent=2) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(staged.iterdir()):
            path.replace(folder / path.name)
    print(f"wrote {folder} (sha256 {sha256[:12]})")


def flatten(behaviour: dict) -> dict[str, float]:
    """{"held_out_loss_nats": x, "trained": {"greedy_accuracy": y}} -> {"held_out_loss_nats": x,
    "trained.greedy_accuracy": y}.
    """
    flat = {}
    for key, value in behaviour.items():
        flat |= {f"{key}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def print_behaviour(training: dict) -> None:
    """One line per figure, and the time it took."""
    for key, value in flatten(training["behaviour"]).items():
        print(f"  {key:32s} {value:10.4f}")
    print(f"  trained in {training['train_seconds']} s, measured in {training['measure_seconds']} s")


def compare(shipped: dict, remade: dict) -> int:
    """Print each compared figure; 1 if any differs by more than its tolerance or is missing, else 0."""
    shipped, remade, status = flatten(shipped), flatten(remade), 0
    for key, tolerance in TOLERANCES.items():
        difference = abs(remade.get(key, float("nan")) - shipped.get(key, float("nan")))
        within = difference <= tolerance  # False for nan
        status = status if within else 1
        found = f"shipped {shipped.get(key)} re-made {remade.get(key)} tolerance {tolerance}"
        print(f"{'ok    ' if within else 'DIFFER'} {key:32s} {found}")
    return status
