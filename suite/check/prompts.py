"""The prompts of a check, as token ids: a file of the user's own, or `builtin`. No torch.

    builtin        for the embedded models, problems of their family; for any other model the lines of prompts.txt, through its
                   chat template where it has one; for a checkpoint without a tokenizer, ids drawn at random
    FILE           .txt with one prompt per line; .jsonl (also .gz) or .parquet with `prompt` (text, given to the model as it
                   stands), `messages` (through the chat template) or `token_ids`
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

from suite import door
from suite.check.checkpoint import Checkpoint
from suite.door import FileError

BUILTIN = "builtin"
FIELDS = ("prompt", "messages", "token_ids")
MAX_PROMPTS = 100_000
MAX_BYTES = 2**28
EMBEDDED_TERMS = (((4, 24), 6), ((25, 100), 6))  # terms of a problem, and how many: trained lengths, and beyond
RANDOM_PROMPTS, RANDOM_TOKENS = 16, 32


def load(source: str, model: Checkpoint, tokenizer, most_tokens: int | None) -> list[list[int]]:
    """The prompts as ids, in order. FileError names file, row and key of one that cannot be used.

    tokenizer: of the model; None where the checkpoint has none. most_tokens: a longer prompt leaves no room for a response.
    """
    where = source if source != BUILTIN else BUILTIN
    rows = list(_builtin(model, tokenizer) if source == BUILTIN else _file(Path(source), tokenizer))
    if not rows:
        raise FileError(where, "", "no prompts", "at least one")
    for number, ids in rows:
        bad = [one for one in ids if not 0 <= one < model.vocabulary]
        if bad:
            raise FileError(where, f"row {number}", f"token id {bad[0]}", f"0 to {model.vocabulary - 1}, the model's vocabulary")
        if not ids:
            raise FileError(where, f"row {number}", "a prompt without tokens", "at least one token")
        if most_tokens is not None and len(ids) > most_tokens:
            raise FileError(where, f"row {number}", f"a prompt of {len(ids)} tokens", f"at most {most_tokens}, so that a response fits")
    return [ids for _, ids in rows]


def _builtin(model: Checkpoint, tokenizer) -> Iterator[tuple[int, list[int]]]:
    if tokenizer is None:
        draw = random.Random(0)
        lines = [[draw.randrange(model.vocabulary) for _ in range(RANDOM_TOKENS)] for _ in range(RANDOM_PROMPTS)]
    elif is_embedded(model):
        lines = [tokenizer.encode(text, add_special_tokens=False) for text in _embedded_problems()]
    else:
        texts = (files("suite.check") / "prompts.txt").read_text(encoding="utf-8").splitlines()
        lines = [_ids_of_turn(text, tokenizer) for text in texts if text.strip()]
    yield from enumerate(lines, 1)


def is_embedded(model: Checkpoint) -> bool:
    """Whether it is one of the suite's own small models, which know one kind of problem."""
    about = model.folder / "training.json"
    return about.exists() and "recipe" in door.read_json(about.resolve())


def _embedded_problems() -> list[str]:
    from suite.problems.desk import prompt_text, sample_problems

    return [prompt_text(one) for terms, count in EMBEDDED_TERMS for one in sample_problems(count, terms, 0)]


def _ids_of_turn(text: str, tokenizer) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        return _ids_of_messages([{"role": "user", "content": text}], tokenizer)
    return tokenizer.encode(text)  # with the special tokens that the tokenizer adds itself, such as bos


def _ids_of_messages(messages: list[dict], tokenizer) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)  # the template writes them out


def _file(path: Path, tokenizer) -> Iterator[tuple[int, list[int]]]:
    name = path.name.lower().removesuffix(".gz")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {".txt": _text, ".jsonl": _json, ".ndjson": _json, ".parquet": _parquet}
    reader = readers.get(Path(name).suffix)
    if reader is None:
        raise FileError(path, "", f"a file called {path.name}", ", ".join(readers))
    with door.whatever_fails(path, "a file of prompts"):
        path = path.resolve(strict=True)
    for number, row in reader(path):
        if number > MAX_PROMPTS:
            raise FileError(path, f"row {number}", "another prompt", f"at most {MAX_PROMPTS}")
        yield number, _ids(row, tokenizer, path, number)


def _text(path: Path) -> Iterator[tuple[int, dict]]:
    with door.whatever_fails(path, "a text in UTF-8"):
        lines = door.read_bytes(path, MAX_BYTES).decode("utf-8").splitlines()
    yield from ((number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip())


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    return door.json_lines(path, MAX_BYTES)


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    with door.open_parquet(path, max_bytes=MAX_BYTES) as file:
        there = [name for name in FIELDS if name in file.schema_arrow.names]
    table = door.read_parquet(path, {name: lambda kind: True for name in there} or None, max_bytes=MAX_BYTES)
    yield from enumerate(table.to_pylist(), 1)


def _ids(row: Any, tokenizer, path: Path, number: int) -> list[int]:
    given = [name for name in FIELDS if isinstance(row, dict) and row.get(name) is not None]
    if len(given) != 1:
        found = ", ".join(given) or (", ".join(map(str, list(row)[:6])) if isinstance(row, dict) and row else "nothing")
        raise FileError(path, f"row {number}", found, f"exactly one of {', '.join(FIELDS)}")
    name, value = given[0], row[given[0]]
    if name == "token_ids":
        if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            raise FileError(path, f"row {number}: token_ids", door.printable(repr(value), 60), "a list of whole numbers")
        return value
    if tokenizer is None:
        raise FileError(path, f"row {number}: {name}", "text", "token_ids: the checkpoint has no tokenizer", "or put tokenizer.json beside it")
    if name == "prompt":
        if not isinstance(value, str):
            raise FileError(path, f"row {number}: prompt", type(value).__name__, "a text")
        return tokenizer.encode(value)
    if not getattr(tokenizer, "chat_template", None):
        raise FileError(path, f"row {number}: messages", "messages", "prompt: the model has no chat template")
    shaped = isinstance(value, list) and value and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str) for one in value
    )
    if not shaped:
        raise FileError(path, f"row {number}: messages", door.printable(repr(value), 60), "a list of {role, content}, both texts")
    return _ids_of_messages(value, tokenizer)


def as_table(prompts: list[list[int]]) -> pa.Table:
    """The file that a task of template `tokens` reads."""
    return pa.table({"token_ids": pa.array(prompts, pa.list_(pa.int32()))})
