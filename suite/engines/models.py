"""From a task's `model` section to a folder of weights on this machine, each of its files that an engine reads hashed and
recorded. No torch.

Engines run no code of such a folder: they are told so, weights must be safetensors, which hold none, and a folder that
asks for code or for another model is refused. Files that no engine reads are named in the record.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

from suite.door import read_json
from suite.errors import DataError, NotRunnable
from suite.files import sha256_once
from suite.spec.checkout import find_repo

WEIGHTS = ("*.safetensors",)
# Beside the weights: shape, sampling defaults (the ids that end a response), tokenizer, chat template, quantisation.
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
READ = (
    *CONFIGS, "model.safetensors.index.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "quantize_config.json", "hf_quant_config.json",
)  # fmt: skip
PROSE = ("README*", "LICENSE*", "NOTICE*", "*.md", ".*")
REFUSED = {
    "adapter_config.json": "it makes transformers load another model; merge the adapter first",
    "params.json": "it makes vLLM read the folder in a format of its own; keep config.json alone",
}


def model_folder(model: dict) -> Path:
    """The local folder of a model: `path` (relative to the checkout) if it is said, else the hub's copy of `id`.

    Raises NotRunnable where neither can be had on this machine, DataError where weights or other files are not the named
    ones, or ask for code.
    """
    if model.get("path"):
        path = Path(model["path"]).expanduser()
        folder = path if path.is_absolute() else find_repo() / path
        if not (folder / "config.json").exists():
            raise NotRunnable(f"model.path: no config.json in {model['path']}")
    else:
        folder = _from_hub(model["id"], model["revision"])
    _refuse_code(folder, model.get("family"))
    _check_hash(folder, "the weights", weights_sha256(folder), model.get("sha256"))
    _check_hash(folder, f"the files {', '.join(other_files(folder))}", files_sha256(folder), model.get("files_sha256"))
    return folder


def _from_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    revision = None if revision in (None, "unknown") else revision
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=[*WEIGHTS, *READ]))
    except Exception as problem:  # no network, no such model, no permission: all of them mean "not on this machine"
        reason = f"model {model_id!r} is neither in the local hub cache nor can it be fetched"
        raise NotRunnable(f"{reason} ({type(problem).__name__}); set model.path to a local copy") from problem


def _refuse_code(folder: Path, family: str | None) -> None:
    for name, why in REFUSED.items():
        if (folder / name).exists():
            raise DataError(f"{folder.name}/{name}: found such a file, allowed: none ({why})")
    if not weight_files(folder):
        raise DataError(f"{folder.name}: found no *.safetensors, allowed: weights in that format, which holds no code")
    for name in CONFIGS:
        if "auto_map" in _config(folder, name):
            raise DataError(f"{folder.name}/{name}: auto_map: found names of code, allowed: none (the suite runs no code of a model)")
    found = _config(folder, "config.json").get("model_type")
    if family and found != family:
        raise DataError(f"{folder.name}/config.json: model_type: found {found!r}, allowed: {family!r}, the task's model.family")


def _config(folder: Path, name: str) -> dict:
    path = folder / name
    return read_json(path.resolve()) if path.exists() else {}  # the hub's cache is made of links


def _check_hash(folder: Path, what: str, found: str | None, expected: str | None) -> None:
    if expected not in (None, "unknown", found):
        raise DataError(f"{folder.name}: sha256 of {what}: found {found}, allowed: {expected}")


def weight_files(folder: Path) -> dict[str, str]:
    """sha256 by name of the weight files."""
    return _hashes(folder, WEIGHTS)


def other_files(folder: Path) -> dict[str, str]:
    """sha256 by name of everything else that an engine reads."""
    return _hashes(folder, READ)


def _hashes(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): sha256_once(path) for path in sorted(found)}


def ignored_files(folder: Path) -> list[str]:
    """Files beside the weights that no engine reads, prose left out: code and pickles among them."""
    known = (*WEIGHTS, *READ, *PROSE)
    return sorted(path.name for path in folder.iterdir() if not any(fnmatchcase(path.name, pattern) for pattern in known) and path.is_file())


def weights_sha256(folder: Path) -> str | None:
    """Of the weight file; of several, the hash of what `sha256sum *.safetensors` prints. None without such a file."""
    files = weight_files(folder)
    return _printed(files) if len(files) > 1 else next(iter(files.values()), None)


def files_sha256(folder: Path) -> str:
    """Of the other files that an engine reads: the hash of what `sha256sum` prints of them, sorted by name."""
    return _printed(other_files(folder))


def _printed(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in files.items()).encode()).hexdigest()


def model_record(folder: Path) -> dict:
    """What a record says of the checkpoint: hash of its weights, the hub's commit where it came from there, hash of the
    other files that engines read and of each of them, and the files that none reads."""
    return {
        "sha256": weights_sha256(folder),
        "revision": hub_commit(folder),
        "files_sha256": files_sha256(folder),
        "files": other_files(folder),
        "ignored": ignored_files(folder),
    }


def hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, whose folder it names; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def stop_token_ids(folder: Path) -> list[int]:
    """The token ids that end a response, from generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _config(folder, name).get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def model_vocabulary(folder: Path) -> int:
    """Entries of the vocabulary that config.json names."""
    config = _config(folder, "config.json")
    return int((config.get("text_config") or config)["vocab_size"])


def load_tokenizer(folder: Path):
    """The model's own tokenizer (transformers)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
