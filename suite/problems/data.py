"""Prompt sets: read the problems a task names, check that they are those problems, and put them into a template.

    desk family        generated from a seed (suite.problems.desk); nothing to read
    kept set           data.kept: what the filter left of either (suite.problems.kept)
    token ids          data.template `tokens`: Parquet at data.path with a column token_ids; no answers, so no rewards
    published files    Parquet at data.path, else in the folder SUITE_DATA_DIR, else on the hub under data.id

A file's sha256 is checked before it is opened, its counts after; a difference is a DataError that shows both sides.
Both layouts of the authors' files are understood: VeRL (`prompt`, `reward_model.ground_truth`) and OAT (`problem`,
`answer`). Copies of a problem are kept once, in the order of first appearance. The same settings and seed give the same
prompts. No torch.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from suite import door
from suite.errors import DataError, NotRunnable

DATA_DIR_VARIABLE = "SUITE_DATA_DIR"
MAX_ROWS, MAX_BYTES = 2_000_000, 256 * 2**20  # of a problem file
HUB_SECONDS = 10.0  # how long the hub may take to answer before the data count as out of reach
# The authors' VeRL files carry it at the end of every problem; their OAT code adds it (oat/main.py).
INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}.\n"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_answer(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) and _is_text(kind.value_type)
    return _is_text(kind) or is_list or pa.types.is_integer(kind) or pa.types.is_floating(kind)


# The columns that are read, of both layouts; what else a file holds is not looked at.
COLUMNS = {
    "prompt": lambda kind: pa.types.is_list(kind) and pa.types.is_struct(kind.value_type),
    "reward_model": pa.types.is_struct,
    "problem": _is_text,
    "answer": _is_answer,
}


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    Set is one of `text` (what the model is given, special tokens written out), `messages` (for the model's own chat
    template) and `token_ids`. `gold` holds every accepted answer; without one a response gets no reward. `meta`: source
    file, copies in it, and the bare problem.
    """

    prompt_id: str
    gold: tuple[str, ...]
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of a published file: the bare problem (instruction taken off) and its accepted answers."""

    problem: str
    gold: tuple[str, ...]


# --- templates: the bare problem -> what the model is given -----------------------------------------------------------
# The wording is the authors' (sail-sg/Precision-RL, oat/main.py): part of the experiment, so exact to the character.


def qwen_math_template(problem: str) -> str:
    """Chat markup of Qwen2.5-Math with the instruction as system turn (LoRA runs)."""
    system = INSTRUCTION.strip()
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"


def r1_template(problem: str) -> str:
    """R1-Distill markup written by hand, thinking already opened (OAT's sanity runs)."""
    return f"<｜begin▁of▁sentence｜><｜User｜>{problem}{INSTRUCTION}<｜Assistant｜><think>\n"


def octothinker_template(problem: str) -> str:
    """Base-model conversation with <think> and <answer> tags; sampling stops at `</answer>` (OctoThinker runs)."""
    return (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
        "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
        f"\nUser: {problem}\nAssistant: <think>"
    )


def verl_r1_messages(problem: str) -> tuple[dict[str, str], ...]:
    """One user turn for the tokenizer's own chat template (VeRL's sanity runs)."""
    return ({"role": "user", "content": problem + INSTRUCTION},)


def desk_template(problem: str) -> str:
    """A desk question with its chain opened."""
    from suite.problems.desk import TEMPLATE_END

    return problem + TEMPLATE_END


TEMPLATES: dict[str, Callable[[str], str]] = {
    "desk": desk_template,
    "qwen_math": qwen_math_template,
    "r1": r1_template,
    "octothinker": octothinker_template,
    "none": str,
}


def fill_template(template: str | None, problem: str) -> dict[str, Any]:
    """The `text` or `messages` of a Prompt."""
    if template == "verl_r1":
        return {"messages": verl_r1_messages(problem)}
    return {"text": TEMPLATES[template or "none"](problem)}


def token_ids(prompt: Prompt, tokenizer) -> list[int]:
    """What the model is given, as ids of a transformers tokenizer. Special tokens are written out: none are added. A prompt
    that is ids already needs no tokenizer."""
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if prompt.messages is None:
        return tokenizer.encode(prompt.text, add_special_tokens=False)
    text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


# --- prompt sets ------------------------------------------------------------------------------------------------------


def load_prompts(data: Mapping[str, Any] | Any, seed: int = 0) -> list[Prompt]:
    """The distinct prompts of a task's `data` section (plain, as in Cell.settings["data"], or typed) in a fixed order.

    `seed` (or data.seed, which wins) draws desk problems; published sets, and the set in data.kept, are read whole, or
    their first `num_prompts` problems.
    Raises DataError where a file is not the one that was named, NotRunnable where none can be had here.
    """
    data = as_mapping(data)
    seed = seed if data.get("seed") is None else data["seed"]
    if data.get("kept"):
        return _kept_prompts(data)
    if data.get("template") == "desk":
        return _desk_prompts(data, seed)
    if data.get("template") == "tokens":
        return _token_prompts(data)
    prompts = [
        Prompt(f"{path.stem}/{index:05d}", row.gold, **fill_template(data.get("template"), row.problem),
               meta={"file": path.name, "copies": copies, "problem": row.problem})
        for path, rows in read_files(data)
        for index, (row, copies) in enumerate(count_copies(rows).items())
    ]  # fmt: skip
    return prompts[: data.get("num_prompts")]


def load_held_out(data: Mapping[str, Any]) -> list[Prompt]:
    """The problems of data.held_out, none of which is trained on; [] where the task names none."""
    data = as_mapping(data)
    if not data.get("held_out"):
        return []
    trained = {prompt.meta["problem"] for prompt in load_prompts(data)}
    drawn = load_prompts({**data, **data["held_out"], "kept": None, "held_out": None})
    return [prompt for prompt in drawn if prompt.meta["problem"] not in trained]


def _desk_prompts(data: Mapping[str, Any], seed: int) -> list[Prompt]:
    from suite.problems.desk import TRAINED_TERMS, prompt_text, sample_problems

    if data.get("num_prompts") is None:
        raise DataError("data.num_prompts: found nothing, allowed: a number (desk problems are generated without end)")
    low, high = data.get("num_terms") or TRAINED_TERMS
    problems = sample_problems(data["num_prompts"], (low, high), seed)
    return [
        Prompt(f"desk-{low}-{high}-{seed}/{index:05d}", (one.answer,), prompt_text(one), meta={"problem": one.text})
        for index, one in enumerate(problems)
    ]


def _token_prompts(data: Mapping[str, Any]) -> list[Prompt]:
    """The rows of a Parquet file with a column token_ids: prompts as they are given to the model, without answers."""
    path = locate(data, data["id"])
    check_sha256(path, data.get("sha256"))
    try:
        table = door.read_parquet(path.resolve(), {"token_ids": _is_ids}, max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
    except door.FileError as problem:
        raise DataError(str(problem)) from None
    rows = table["token_ids"].to_pylist()
    _check_count("rows", data.get("rows"), len(rows), [(path, [])])
    for number, ids in enumerate(rows):
        if not ids or any(one is None or one < 0 for one in ids):
            raise DataError(f"{path}: row {number}: token_ids: found {door.printable(repr(ids), 60)}, allowed: at least one id, each 0 or more")
    return [Prompt(f"{path.stem}/{number:05d}", (), token_ids=tuple(ids)) for number, ids in enumerate(rows)][: data.get("num_prompts")]


def _is_ids(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)


def _kept_prompts(data: Mapping[str, Any]) -> list[Prompt]:
    """The problems that an earlier filter kept, in the order of its file."""
    from suite.problems.kept import problem_file, read_kept

    path, num = problem_file(data["kept"]), data.get("num_prompts")
    problems = read_kept(path)
    if num is not None and num > len(problems):
        raise DataError(f"{path}: data.num_prompts: found {num}, allowed: at most {len(problems)}, the kept problems")
    return [
        Prompt(one.prompt_id, one.gold, **fill_template(data.get("template"), one.problem),
               meta={"problem": one.problem})
        for one in problems[:num]
    ]  # fmt: skip


def count_copies(rows: list[Row]) -> dict[Row, int]:
    """Distinct rows in order of first appearance, with the number of times each stands in the file."""
    copies: dict[Row, int] = {}
    for row in rows:
        copies[row] = copies.get(row, 0) + 1
    return copies


def read_files(data: Mapping[str, Any]) -> list[tuple[Path, list[Row]]]:
    """Every row of every file of a `data` section, hashes and counts checked."""
    files = data.get("files") or [{"name": None, "sha256": data.get("sha256"), "rows": data.get("rows")}]
    found = [_read_checked(data, file) for file in files]
    rows = [row for _, part in found for row in part]
    _check_count("rows", data.get("rows"), len(rows), found)
    _check_count("unique_rows", data.get("unique_rows"), len(set(rows)), found)
    return found


def _read_checked(data: Mapping[str, Any], file: Mapping[str, Any]) -> tuple[Path, list[Row]]:
    path = locate(data, file["name"])
    check_sha256(path, file.get("sha256"))
    rows = read_rows(path)
    _check_count("rows", file.get("rows"), len(rows), [(path, rows)])
    return path, rows


def _check_count(key: str, expected: int | None, found: int, files: list[tuple[Path, list[Row]]]) -> None:
    if expected is not None and expected != found:
        names = ", ".join(str(path) for path, _ in files)
        raise DataError(f"{names}: {key}: found {found}, the task names {expected}")


# --- files ------------------------------------------------------------------------------------------------------------


def locate(data: Mapping[str, Any], name: str | None) -> Path:
    """The local copy of one file: data.path (a file, or a folder that holds `name`), SUITE_DATA_DIR/name, then the hub.

    Raises DataError for a data.path that does not exist, NotRunnable with everything that was tried otherwise.
    """
    if data.get("path"):
        path = Path(data["path"])
        path = path / name if path.is_dir() and name else path
        if not path.is_file():
            what = f"found {door.kind_of(path.stat().st_mode)}, allowed: a file" if path.exists() else "no such file"
            raise DataError(f"{path}: data.path: {what}")
        return path
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if folder and name and (Path(folder) / name).is_file():
        return Path(folder) / name
    tried = f"{DATA_DIR_VARIABLE} is not set" if not folder else f"{DATA_DIR_VARIABLE}={folder} does not hold it"
    return _from_hub(data, name, tried)


def _from_hub(data: Mapping[str, Any], name: str | None, tried: str) -> Path:
    """The file from the data set `data.id` on the hub, by way of its cache. HF_HUB_OFFLINE=1 asks the cache only."""
    hub_id, what = data.get("id"), f"{name or 'the data file'} ({data.get('id')})"
    need = f"{what} is not here: {tried}, and the hub"
    revision = None if data.get("revision") in (None, "unknown") else data["revision"]
    try:
        from huggingface_hub import HfApi, hf_hub_download

        if not hub_id or "/" not in hub_id:
            raise LookupError(f"has no data set of the id {hub_id!r}")
        names = [name] if name else []
        if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
            listed = HfApi().dataset_info(hub_id, revision=revision, timeout=HUB_SECONDS).siblings
            paths = [one.rfilename for one in listed if one.rfilename.endswith(".parquet")]
            names = [one for one in paths if name in (None, Path(one).name)]
        if len(names) != 1:
            raise LookupError(f"has {len(names)} such Parquet files under {hub_id}")
        return Path(hf_hub_download(hub_id, names[0], repo_type="dataset", revision=revision))
    except Exception as reason:  # no package, no network, no such repository: all mean that the file cannot be had here
        message = str(reason).splitlines()[0] if str(reason) else ""
        raise NotRunnable(
            f"{need} id {hub_id} could not give it ({type(reason).__name__}: {message}). "
            f"Put the file into a folder and name that in {DATA_DIR_VARIABLE}, or give data.path."
        ) from reason


def check_sha256(path: Path, expected: str | None) -> str:
    """The file's sha256, 64 hex digits. Raises DataError if `expected` is another; `unknown` and None match any."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected not in (None, "unknown", found):
        raise DataError(f"{path}: sha256: found {found}, the task names {expected}; this is another file")
    return found


def read_rows(path: Path) -> list[Row]:
    """All rows of a Parquet file in its order, in either layout. Raises DataError for anything else: other columns or types,
    no rows, damaged bytes, more than MAX_ROWS rows or MAX_BYTES of values."""
    path, budget = path.resolve(), {"max_rows": MAX_ROWS, "max_bytes": MAX_BYTES, "max_file_bytes": MAX_BYTES}
    try:
        with door.open_parquet(path, **budget) as file:
            there = {name: fits for name, fits in COLUMNS.items() if name in file.schema_arrow.names}
        rows = door.read_parquet(path, there or None, **budget).to_pylist()
    except door.FileError as problem:
        raise DataError(str(problem)) from None
    if not rows:
        raise DataError(f"{path}: found no rows, allowed: a Parquet file with at least one problem")
    return [_parse_row(path, index, row) for index, row in enumerate(rows)]


def _parse_row(path: Path, index: int, row: dict[str, Any]) -> Row:
    match row:
        case {"prompt": [{"role": "user", "content": str(content)}], "reward_model": {"ground_truth": str(gold)}}:
            return Row(content.removesuffix(INSTRUCTION), (gold,))
        case {"problem": str(problem), "answer": list(golds)} if golds and all(isinstance(one, str) for one in golds):
            return Row(problem, tuple(one.strip() for one in golds))
        case {"problem": str(problem), "answer": str(gold)}:
            return Row(problem, (gold,))
        case {"problem": str(problem), "answer": int(number)} if not isinstance(number, bool):
            return Row(problem, (str(number),))
        case {"problem": str(problem), "answer": float(number)} if math.isfinite(number):
            return Row(problem, (str(int(number)) if number.is_integer() else repr(number),))
    wanted = "prompt (one user turn) and reward_model.ground_truth, or problem (text) and answer (text, texts or a finite number)"
    found = ", ".join(f"{name} {door.printable(repr(value), 60)}" for name, value in sorted(row.items()))
    raise DataError(f"{path}: row {index}: found {found}, allowed: {wanted}")


def as_mapping(data: Mapping[str, Any] | Any) -> Mapping[str, Any]:
    """A data section as plain data, whichever form it comes in."""
    return data if isinstance(data, Mapping) else data.model_dump(mode="json")
