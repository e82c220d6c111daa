"""From a task's `model` section to a folder of weights on this machine, checked against its hash. No torch."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from suite.errors import DataError, NotRunnable
from suite.record import sha256_file
from suite.task import find_repo


def model_folder(model: dict) -> Path:
    """The local folder of a model: `path` (relative to the checkout) if it is said, else the hub's copy of `id`.

    Raises NotRunnable where neither can be had on this machine, DataError where the weights are not the named ones.
    """
    if model.get("path"):
        folder = find_repo() / Path(model["path"]).expanduser()
        if not (folder / "config.json").exists():
            raise NotRunnable(f"model.path: no config.json in {model['path']}")
    else:
        folder = _from_hub(model["id"], model["revision"])
    _check_hash(folder, model.get("sha256"))
    return folder


def _from_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=None if revision in (None, "unknown") else revision))
    except Exception as problem:  # no network, no such model, no permission: all of them mean "not on this machine"
        reason = f"model {model_id!r} is neither in the local hub cache nor can it be fetched"
        raise NotRunnable(f"{reason} ({type(problem).__name__}); set model.path to a local copy") from problem


def _check_hash(folder: Path, expected: str | None) -> None:
    if expected in (None, "unknown"):
        return
    found = weights_sha256(folder) or "no *.safetensors file"
    if found != expected:
        raise DataError(f"{folder.name}: sha256 of the weights: found {found}, allowed: {expected}")


@lru_cache
def weights_sha256(folder: Path) -> str | None:
    """Of the weight file; of several, the hash of what `sha256sum *.safetensors` prints. None without such a file."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) <= 1:
        return sha256_file(files[0]) if files else None
    return hashlib.sha256("".join(f"{sha256_file(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, whose folder it names; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def stop_token_ids(folder: Path) -> list[int]:
    """The token ids that end a response, from generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def load_tokenizer(folder: Path):
    """The model's own tokenizer (transformers)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
