"""What lies at MODEL, from its headers alone: a checkpoint that both engines can take and that fits this machine, or a
refusal that says what was found. Nothing is loaded, and of a hub model nothing is downloaded before its size is known. No
torch.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from suite.door import FileError, kind_of, read_json
from suite.errors import NotRunnable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_SECONDS = 10.0
WANTED = "a folder with config.json and *.safetensors, as save_pretrained writes it, or the id of such a model on the hub"
GGUF = "GGUF holds weights in llama.cpp's own, mostly quantised form; check the checkpoint that it was made from"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.npz")
SAFETENSORS_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000  # what the format allows
# Settings under which logits are not the product of head and last hidden state alone; the trainer scores with that product.
AFTER_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, not loaded yet. `shown`: as the user named it. context: positions it was made for. sizes: elements by
    the dtype on disk."""

    shown: str
    folder: Path
    hub_id: str | None
    config: dict[str, Any]
    sizes: dict[str, int]

    @property
    def family(self) -> str:
        return self.config["model_type"]

    @property
    def text_config(self) -> dict[str, Any]:
        return self.config.get("text_config") or self.config

    @property
    def vocabulary(self) -> int:
        return int(self.text_config["vocab_size"])

    @property
    def context(self) -> int | None:
        return self.text_config.get("max_position_embeddings")

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes.values())

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"))


def find(model: str) -> Path | str:
    """The folder of a local model, or the id of one on the hub. FileError for anything else that lies there."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise FileError(model, "", _what_file(path), WANTED, GGUF if _is_gguf(path) else None)
    if HUB_ID.fullmatch(model) and not model.lower().endswith(".gguf"):
        return model
    raise FileError(model, "", "no such folder", WANTED, GGUF if model.lower().endswith(".gguf") else None)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"


def _what_file(path: Path) -> str:
    return "a GGUF file" if _is_gguf(path) else f"{kind_of(path.stat().st_mode)} {path.name}"


def from_hub(hub_id: str, most_bytes: int) -> Path:
    """The local copy of a hub model. Its size is asked first. FileError for no such model, or none that fits; NotRunnable where
    the hub cannot be reached and its cache has none."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    from suite.engines.models import READ, WEIGHTS

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*WEIGHTS, *READ], local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        about = HfApi().model_info(hub_id, files_metadata=True, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise FileError(hub_id, "", "no such folder here, and no such model on the hub", WANTED) from None
    except Exception as problem:  # no network, no permission, an answer that is none: all mean that it cannot be had here
        raise NotRunnable(f"model {hub_id!r}: no such folder here, and the hub does not answer ({type(problem).__name__}); "
                          "give the folder of a local copy") from problem  # fmt: skip
    files = {one.rfilename: one.size or 0 for one in about.siblings or ()}
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name)
    if not weights:
        found = "GGUF files" if any(name.lower().endswith(".gguf") for name in files) else ", ".join(sorted(files)[:6]) or "no files"
        raise FileError(hub_id, "", found, WANTED, GGUF if found == "GGUF files" else None)
    if weights > most_bytes:
        raise FileError(hub_id, "", f"weights of {weights / 2**30:.1f} GiB", f"at most {most_bytes / 2**30:.1f} GiB on this machine")
    return Path(snapshot_download(hub_id, allow_patterns=[*WEIGHTS, *READ]))


def read(shown: str, folder: Path, hub_id: str | None = None) -> Checkpoint:
    """The checkpoint in a folder. FileError for a folder that holds none, or one that an engine does not take."""
    there = sorted(path.name for path in folder.iterdir())
    if "config.json" not in there:
        raise _no_checkpoint(shown, folder, there)
    config = read_json((folder / "config.json").resolve())
    if not isinstance(config.get("model_type"), str):
        raise FileError(folder / "config.json", "model_type", config.get("model_type"), "the name of a model's family", "is this a checkpoint?")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "some method")
        raise FileError(folder / "config.json", "quantization_config", f"weights quantised with {method}", "weights in fp32, bf16 or fp16",
                        "the trainer has no quantised weights; check the checkpoint it was made from")  # fmt: skip
    if not isinstance((config.get("text_config") or config).get("vocab_size"), int):
        raise FileError(folder / "config.json", "vocab_size", "nothing", "a whole number", "is this a language model?")
    _refuse_head(folder, config.get("text_config") or config)
    _refuse_missing_shards(folder)
    sizes: dict[str, int] = {}
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _no_checkpoint(shown, folder, there)
    for path in weights:
        for dtype, count in _elements(path.resolve(), path).items():
            sizes[dtype] = sizes.get(dtype, 0) + count
    return Checkpoint(shown, folder, hub_id, config, sizes)


def _no_checkpoint(shown: str, folder: Path, there: list[str]) -> FileError:
    if any(name.lower().endswith(".gguf") for name in there):
        return FileError(shown, "", "a folder of GGUF files", WANTED, GGUF)
    if "adapter_config.json" in there:
        return FileError(shown, "", "an adapter (adapter_config.json)", WANTED, "merge it into its model first")
    others = sorted({path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)})
    if "config.json" in there and others:
        return FileError(shown, "", f"weights in {others[0]} and no *.safetensors", WANTED, "load it with transformers and save_pretrained it")
    lacks = "no *.safetensors" if "config.json" in there else "no config.json"
    inside = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "") if there else "nothing"
    return FileError(shown, "", f"a folder with {lacks}, but {inside}", WANTED)


def _refuse_head(folder: Path, config: dict) -> None:
    for name, neutral in AFTER_HEAD.items():
        if config.get(name) not in (None, neutral):
            allowed = f"{json.dumps(neutral)}: the trainer takes logits from the head's product alone, and has no such step"
            raise FileError(folder / "config.json", name, config[name], allowed, "set by models such as Gemma 2, Granite and Cohere")


def _refuse_missing_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    files = set((read_json(index.resolve()).get("weight_map") or {}).values())
    if missing := sorted(name for name in files if not (folder / name).exists()):
        raise FileError(index, "weight_map", f"{len(missing)} of {len(files)} files absent, such as {missing[0]}", "all of them", "download it again")


def _elements(path: Path, shown: Path) -> dict[str, int]:
    """Elements by dtype, from the header of a safetensors file, whose end is checked too."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise FileError(shown, "", "no header of a safetensors file", "a whole safetensors file", "download it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: one for name, one in header.items() if name != "__metadata__"}
            end = max((one["data_offsets"][1] for one in tensors.values()), default=0)
            found = [(one["dtype"], prod(one["shape"])) for one in tensors.values()]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise FileError(shown, "", "a broken header", "a whole safetensors file", "download it again") from None
    if (size := os.stat(path).st_size) < 8 + length + end:
        raise FileError(shown, "", f"{size} bytes", f"{8 + length + end}, as its header says", "download it again")
    sizes: dict[str, int] = {}
    for dtype, count in found:
        if dtype not in SAFETENSORS_DTYPES:
            raise FileError(shown, "", f"tensors of dtype {dtype}", ", ".join(SAFETENSORS_DTYPES))
        sizes[dtype] = sizes.get(dtype, 0) + count
    return sizes
