"""Protocol `dataset`: is a published problem set what the paper says it is, and can every one of its answers be graded?

Read the file (hash checked), count rows, problems and copies, give every gold answer to math-verify, measure prompt
lengths: one row of metrics. Runs on a CPU, without torch. Lengths in tokens only where the model's tokenizer.json is on
this machine.
"""

import re
import statistics
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from suite.problems.data import INSTRUCTION, Row, as_mapping, check_sha256, count_copies, locate, r1_template, read_rows
from suite.problems.grader_pool import Workers, boxed
from suite.problems.rewards import Grader
from suite.spec.checkout import find_repo
from suite.spec.estimands import PROMPT_LIMIT_TOKENS

# A gold answer written in another way, or changed: (pattern of the whole gold answer, what is made of it).
VARIANTS: dict[str, tuple[str, Callable[[re.Match], str]]] = {
    "a/b": (r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", lambda m: f"{m[1]}{m[2]}/{m[3]}"),
    "rounded to six places": (r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", lambda m: f"{m[1]}{int(m[2]) / int(m[3]):.6f}"),
    "grouped by a thin space": (r"(-?\d{1,3})(\d{3})", lambda m: f"{m[1]}\\,{m[2]}"),
    "with a per cent sign": (r"-?\d{1,3}", lambda m: f"{m[0]}\\%"),
    "without \\text": (r"\\text\{([^{}]*)\}", lambda m: m[1]),
    "in another order": (r"[([]?[^()[\]{}]*,[^()[\]{}]*[)\]]?", lambda m: _reversed(m[0])),
    "in another base": (r"(-?\d+)_\{?(\d+)\}?", lambda m: f"{m[1]}_{{{int(m[2]) + 1}}}"),
    "one more": (r"-?\d+", lambda m: str(int(m[0]) + 1)),
}
VARIANTS_OF_A_RULE = 25


def run(cells: list, session) -> None:
    """Measure the data set of every cell that has no finished run.

    Raises NotRunnable where a file cannot be had (it names SUITE_DATA_DIR and the hub id), DataError where it is
    another file: both before a run folder is opened.
    """
    for data in (cell.settings["data"] for cell in cells):
        locate_checked(data)
    for cell in cells:
        session.run_cell(cell, "dataset", lambda writer, cell=cell: _fill(cell, writer, session))


def _fill(cell, writer, session) -> None:
    run_cell(cell, writer, session.progress, session.limit)
    counts = {"num_prompts": writer.metrics[0]["num_unique"], "num_rollouts": 0, "num_response_tokens": 0}
    writer.finish("success", counts=counts, series_summary=dict(writer.metrics[0]))


def run_cell(cell, writer, progress: Callable[..., None], limit: int | None = None) -> None:
    """Measure the data set of one cell and append one row of metrics; a cell that has its row is left alone."""
    if writer.parts_done:
        return
    progress(cell.name, 0, 1)
    model = cell.settings.get("model") or {}
    tokenizer_file = find_tokenizer(model.get("path"), model.get("id"))
    counts = measure_dataset(cell.settings["data"], tokenizer_file=tokenizer_file, limit=limit)
    writer.append({"step": 0, **counts})
    note = f"{counts['num_rows']} rows, {counts['num_unique']} problems, {counts['num_self_verified']} gradable"
    progress(cell.name, 1, 1, note)


def measure_dataset(
    data: Mapping[str, Any] | Any,
    tokenizer_file: Path | None = None,
    limit: int | None = None,
    num_workers: int = 2,
    timeout_seconds: float = 30.0,
) -> dict[str, float]:
    """The counts of DATASET_ESTIMANDS for the files of a `data` section; token lengths only with a `tokenizer_file`.

    limit: only the first so many distinct problems, with all their copies.
    timeout_seconds: a gold answer that takes longer counts as one that cannot be graded.
    """
    files = locate_checked(data)
    rows = [row for path, _ in files for row in read_rows(path)]
    if limit is not None:
        kept = set(list(count_copies(rows))[:limit])
        rows = [row for row in rows if row in kept]
    with Workers(num_workers, timeout_seconds) as workers:
        problems = list(count_copies(rows))
        gradable = measure_golds(problems, workers) | measure_graders(problems, workers)
    pinned = {"num_files_pinned": sum(is_pinned for _, is_pinned in files)}
    return pinned | measure_rows(rows) | gradable | measure_tokens(rows, tokenizer_file)


def locate_checked(data: Mapping[str, Any] | Any) -> list[tuple[Path, bool]]:
    """Every file of a `data` section, its hash compared, and whether the task names a hash for it at all."""
    data = as_mapping(data)
    found = []
    for file in data.get("files") or [{"name": None, "sha256": data.get("sha256")}]:
        path = locate(data, file["name"])
        check_sha256(path, file.get("sha256"))
        found.append((path, file.get("sha256") not in (None, "unknown")))
    return found


def measure_rows(rows: list[Row]) -> dict[str, float]:
    """Rows, problems, copies and lengths in characters."""
    copies = count_copies(rows)
    lengths = [len(row.problem + INSTRUCTION) for row in copies]
    return {
        "num_rows": len(rows),
        "num_unique": len(copies),
        "num_unique_problems": len({row.problem for row in copies}),
        "copies_min": min(copies.values()),
        "copies_max": max(copies.values()),
        "num_blocks": sum(1 for _ in groupby(rows)),
        "gold_chars_max": max(len(gold) for row in copies for gold in row.gold),
        "prompt_chars_mean": round(statistics.fmean(lengths), 3),
        "prompt_chars_max": max(lengths),
    }


def measure_golds(problems: list[Row], workers: Workers) -> dict[str, float]:
    """How many problems math-verify can grade. With several gold answers, one that can be graded is enough."""
    golds = sorted({gold for row in problems for gold in row.gold})

    def kept(jobs: list[tuple], good: Callable[[Any], bool]) -> int:
        results = zip(golds, workers.run(jobs), strict=True)
        passed = {gold for gold, (status, value) in results if status == "done" and good(value)}
        return sum(any(gold in passed for gold in row.gold) for row in problems)

    in_box = [("parses", f"\\boxed{{{gold}}}") for gold in golds]
    return {
        "num_parse_bare": kept([("parses", gold) for gold in golds], lambda kind: kind != "nothing"),
        "num_parse_boxed": kept(in_box, lambda kind: kind != "nothing"),
        "num_parse_expression": kept([("parses", boxed(gold)) for gold in golds], lambda kind: kind == "expression"),
        "num_self_verified": kept([("equivalent", gold, gold) for gold in golds], bool),
    }


def measure_graders(problems: list[Row], workers: Workers) -> dict[str, float]:
    """Over how many gold answers, given as answers, and over how many variants of them the graders differ. An answer
    that is late counts as not equal."""
    golds = [row.gold[0] for row in problems]
    selves, pairs = [(gold, gold) for gold in golds], variants(golds)
    judged = {name: _verdicts(name, selves + pairs, workers) for name in get_args(Grader)}
    rows = list(zip(*judged.values(), strict=True))
    verdicts = {name: values[len(golds) :] for name, values in judged.items()}

    def differing(name: str) -> int:
        return sum(a != b for a, b in zip(verdicts["suite"], verdicts[name], strict=True))

    return {
        "num_golds_graders_differ": sum(len(set(row)) > 1 for row in rows[: len(golds)]),
        "num_variants": len(pairs),
        "num_variants_graders_differ": sum(len(set(row)) > 1 for row in rows[len(golds) :]),
        "num_variants_mathd_sympy_differs": differing("mathd_sympy"),
        "num_variants_oat_differs": differing("oat"),
    }


def variants(golds: list[str]) -> list[tuple[str, str]]:
    """(gold, variant) pairs: for each rule the first VARIANTS_OF_A_RULE distinct golds that it changes."""
    pairs = []
    for pattern, change in VARIANTS.values():
        found = [(gold, change(m)) for gold in dict.fromkeys(golds) if (m := re.fullmatch(pattern, gold.strip()))]
        pairs += [(gold, variant) for gold, variant in found if variant != gold][:VARIANTS_OF_A_RULE]
    return pairs


def _reversed(listed: str) -> str:
    inner = listed.strip("()[]")
    start = listed.index(inner)
    return listed[:start] + ", ".join(term.strip() for term in inner.split(",")[::-1]) + listed[start + len(inner) :]


def _verdicts(grader: str, pairs: list[tuple[str, str]], workers: Workers) -> list[bool]:
    distinct = list(dict.fromkeys(pairs))
    results = workers.run([(grader, answer, gold) for gold, answer in distinct])
    equal = {pair: status == "done" and bool(value) for pair, (status, value) in zip(distinct, results, strict=True)}
    return [equal[pair] for pair in pairs]


def measure_tokens(rows: list[Row], tokenizer_file: Path | None) -> dict[str, float]:
    """Prompt lengths in tokens of the R1 template, markup included; nothing without a tokenizer."""
    if tokenizer_file is None:
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    prompts = [r1_template(row.problem) for row in count_copies(rows)]
    lengths = [len(one.ids) for one in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    return {
        "prompt_tokens_mean": round(statistics.fmean(lengths), 3),
        "prompt_tokens_max": max(lengths),
        "num_prompts_over_limit": sum(length > PROMPT_LIMIT_TOKENS for length in lengths),
    }


def find_tokenizer(model_path: str | None, hub_id: str | None) -> Path | None:
    """tokenizer.json beside the weights at `model_path`, or in the local hub cache, or None. Never downloads."""
    if model_path:
        file = find_repo() / Path(model_path).expanduser() / "tokenizer.json"
        return file if file.is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(hub_id, "tokenizer.json") if hub_id else None
    return Path(cached) if isinstance(cached, str) else None
