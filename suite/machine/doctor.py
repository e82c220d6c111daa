"""What a machine can run, what it cannot and why, and what is known to go wrong on it.

Asks environment.collect() and task files; imports no engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from suite.machine.environment import fingerprint, sampler_engine
from suite.machine.memory import need_of, why_not
from suite.spec.kinds import Kind, kind_of
from suite.spec.plan import resolve_task
from suite.spec.precision import CACHE_FORMATS, FORMATS

GPU_MEMORY_SLACK = 0.95  # a card sold as 80 GB shows 79.6 GiB or less: firmware and ECC take their part


def can_run(task, env: dict[str, Any]) -> str | None:
    """None where the machine meets `task.resources` and has the task's engines; otherwise the reason, for NOT_RUN."""
    resolved = resolve_task(task)
    need, kind, cells = resolved.task.resources, kind_of(resolved.task), resolved.cells
    checks = (
        _gpu_reason(need, env), _disk_reason(need, env), _package_reason(kind, cells, env), unsupported_reason(kind, cells),
        _cache_reason(cells, env), _head_reason(cells, env), memory_reason(resolved),
    )  # fmt: skip
    return "; ".join(reason for reason in checks if reason) or None


def can_rehearse(task, cells, env: dict[str, Any]) -> str | None:
    """The same for the cells of a rehearsal, which need no GPU."""
    kind = kind_of(task)
    reasons = (_package_reason(kind, cells, env), unsupported_reason(kind, cells), _cache_reason(cells, env), _head_reason(cells, env))
    return "; ".join(reason for reason in reasons if reason) or None


def _gpu_reason(need, env: dict[str, Any]) -> str | None:
    if need.cpu_ok or not need.gpus:
        return None
    wanted = f"{need.gpus} GPU{'s' * (need.gpus > 1)} with {need.gpu_mem_gib:g} GiB{' each' * (need.gpus > 1)}"
    wanted = f"needs {need.nodes} nodes of {wanted}" if need.nodes > 1 else f"needs {wanted}"
    enough = [gpu for gpu in env["gpus"] if gpu["memory_gib"] >= GPU_MEMORY_SLACK * need.gpu_mem_gib]
    if len(enough) < need.gpus:
        return f"{wanted}; this machine has {describe_gpus(env['gpus'])}"
    if env["num_nodes"] < need.nodes:
        return f"{wanted}; this is {env['num_nodes']} node (a node count comes from SLURM or torchrun)"
    if env["torch_build"] == "cpu":
        return f"{wanted}; torch is a build for CPUs here, beside {describe_gpus(env['gpus'])}: run `make setup`"
    return None


def memory_reason(task) -> str | None:
    """The cells of a GPU task that its own GPUs cannot hold, by the memory model: the first of each kind, and why."""
    resolved = resolve_task(task)
    wanted, card = resolved.task.resources, resolved.task.resources.gpu_mem_gib
    if not wanted.gpus or wanted.cpu_ok:
        return None
    needs = ((cell, need_of(cell, card)) for cell in resolved.cells)
    reasons = {why: cell for cell, need in reversed(list(needs)) if need and (why := why_not(need, card))}
    return "; ".join(f"{cell.name}: {why}" for why, cell in reversed(reasons.items())) or None


def _disk_reason(need, env: dict[str, Any]) -> str | None:
    if env["disk_free_gib"] >= need.disk_gib:
        return None
    return f"needs {need.disk_gib:g} GiB of free disk; {env['disk_free_gib']:g} GiB are free where runs are written"


def _package_reason(kind: Kind, cells, env: dict[str, Any]) -> str | None:
    here = {name.removesuffix("-cpu") for name in env["packages"]}
    missing = [name for name in needed_packages(kind, cells) if name not in here]
    return f"needs {', '.join(missing)}, not installed here: run `make setup`" if missing else None


def _head_reason(cells, env: dict[str, Any]) -> str | None:
    """An fp32 output head of a 16-bit sampler is vLLM's `head_dtype`. In 0.25.1 that is for pooling models: generation falls
    back to the model's dtype with a warning (vllm/config/model.py, _get_head_dtype); in 0.32.0 generation follows it."""
    asks = [cell for cell in cells if _has_wider_head(cell)]
    vllm = {name: version for name, version in env["packages"].items() if name.removesuffix("-cpu") == "vllm"}
    if not asks:
        return None
    if {cell.get("rollout.engine") for cell in asks} == {"hf"} or not vllm:
        return "needs vLLM for precision.rollout_logits (fp32): the plain sampler has no output head in another dtype than its model"
    if any(older(env, name, HEAD_DTYPE_SINCE) for name in vllm):
        found = ", ".join(f"{name} {version}" for name, version in vllm.items())
        allowed = ".".join(map(str, HEAD_DTYPE_SINCE))
        return f"needs vLLM {allowed} or newer for precision.rollout_logits (fp32); found {found}, which would ignore it"
    return None


def _has_wider_head(cell) -> bool:
    rollout, head = (cell.get(f"precision.{point}", None) for point in ("rollout", "rollout_logits"))
    return rollout is not None and head == "fp32" != FORMATS[rollout].storage


HEAD_DTYPE_SINCE = (0, 32)  # known to follow it; between it and 0.25.1 nobody has looked


def _cache_reason(cells, env: dict[str, Any]) -> str | None:
    """vLLM's CPU kernels read a cache of 8 bits with AVX-512 alone."""
    asked = {cell.get("precision.kv_cache", None) for cell in cells} & set(CACHE_FORMATS)
    if not asked or env["gpus"] or env["cpu"]["class"].startswith("avx512"):
        return None
    return f"needs a GPU or a CPU with AVX-512 for precision.kv_cache ({', '.join(sorted(asked))}); this one is {env['cpu']['class']}"


def unsupported_reason(kind: Kind, cells) -> str | None:
    """What any of the cells asks for that no engine of this version does; a setting that would be ignored is refused
    instead."""
    found = dict.fromkeys(line for cell in cells for line in _unsupported(kind, cell))
    return f"asks for {', '.join(found)}, which this version does not do yet" if found else None


def _unsupported(kind: Kind, cell) -> list[str]:
    train = cell.settings.get("train") or {}
    parallel = {name: size for name, size in (train.get("parallel") or {}).items() if size and size > 1}
    if kind.trains:  # on several ranks; other protocols deal whole cells out
        parallel.pop("data", None)
    asked = {
        "train.parallel": ", ".join(f"{name} {size}" for name, size in parallel.items()),
    }
    for point in ("kv_cache", "rollout_logits"):  # each follows the sampler's precision
        value, rollout = cell.get(f"precision.{point}", None), cell.get("precision.rollout", None)
        own = FORMATS[rollout].storage if rollout else value
        also = CACHE_FORMATS if point == "kv_cache" else ("fp32",)  # of logits: vLLM's head_dtype
        asked[f"precision.{point}"] = value if value not in (own, *also) else None
    return [f"{name} ({value})" for name, value in asked.items() if value]


NEEDED_BY = {"vllm": "vllm", "moe": "megatron-core", "lora": "peft"}  # engine or setting -> distribution


def needed_packages(kind: Kind, cells) -> list[str]:
    """The distributions without which none of these cells starts; none for protocols that only read data or records."""
    if not kind.has_engines:
        return []
    used = {cell.get(f"{section}.engine", None) for cell in cells for section in ("rollout", "train")}
    used |= {"lora" for cell in cells if cell.get("train.lora", None)}
    return ["torch", "transformers", *(name for feature, name in NEEDED_BY.items() if feature in used)]


def describe_gpus(gpus: list[dict[str, Any]]) -> str:
    """`no GPU`, or each kind with its count and memory."""
    kinds = [f"{gpu['name']} ({gpu['memory_gib']:g} GiB)" for gpu in gpus]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "no GPU"


@dataclass(frozen=True)
class KnownBad:
    """A combination that is known to break a run or to move its numbers for a reason other than precision."""

    name: str
    applies: Callable[[dict[str, Any]], bool]
    detail: str
    needed: str


# Not here: the dtype of vLLM's logits. They are in the model's dtype, and both samplers upcast them before the softmax, in
# 0.25.1 as in 0.32.0 (there: model_executor/layers/logits_processor.py:180-199, v1/sample/sampler.py:96-97,
# v1/worker/gpu/sample/sampler.py:242). What ran is recorded as rollout_logits.
KNOWN_BAD = (
    KnownBad(
        "vllm-cascade-attention",
        lambda env: older(env, "vllm", (0, 11)) and any("A100" in gpu["name"] for gpu in env["gpus"]),
        "vLLM before 0.11.0 on A100: cascade attention is reported to add mismatch (vLLM issue 22103)",
        "vllm 0.11.0 or newer, or rollout.cascade_attention: false",
    ),
    KnownBad(
        "torch-cuda-without-gpu",
        lambda env: env["torch_build"] == "cuda" and not env["gpus"],
        "torch is a build for CUDA and no GPU is visible",
        "`make setup LOCK=cpu`, or a working driver",
    ),
    KnownBad(
        "torch-cpu-beside-gpu",
        lambda env: env["torch_build"] == "cpu" and bool(env["gpus"]),
        "torch is a build for CPUs; the GPU of this machine stays unused",
        "`make setup LOCK=gpu`",
    ),
    KnownBad(
        "torchvision-cuda",
        lambda env: env["torch_build"] == "cpu" and "+cpu" not in env["packages"].get("torchvision", "+cpu"),
        "torchvision built for CUDA breaks `import transformers` beside a CPU build of torch",
        "uninstall torchvision, torchaudio and torchcodec; no task uses them",
    ),
    KnownBad(
        "tf32-override",
        lambda env: "1" in (env["env"].get("NVIDIA_TF32_OVERRIDE"), env["env"].get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")),
        "a TF32 override is set: fp32 matmuls keep 10 bits of mantissa and the fp32 floor is none",
        "unset NVIDIA_TF32_OVERRIDE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    ),
)


def older(env: dict[str, Any], package: str, than: tuple[int, ...]) -> bool:
    """Is the package installed, in a release before `than`?"""
    version = env["packages"].get(package)
    return version is not None and tuple(int(n) for n in re.findall(r"\d+", version)[: len(than)]) < than


def finding(name: str, ok: bool, detail: str, needed: str = "") -> dict[str, Any]:
    """One line of doctor's answer; `needed` says what to do, and is empty where ok is True."""
    return {"name": name, "ok": ok, "detail": detail, "needed": "" if ok else needed}


def findings(task, env: dict[str, Any]) -> list[dict[str, Any]]:
    """Findings {name, ok, detail, needed}: the machine, known-bad versions, then `task` or, for None, every task."""
    from suite.spec.reading import load_all

    tasks = [task] if task is not None else list(load_all().values())
    return [*machine_findings(env), *known_bad_findings(env), *(task_finding(each, env) for each in tasks)]


def machine_findings(env: dict[str, Any]) -> list[dict[str, Any]]:
    """What is here, part by part."""
    packages = env["packages"]
    cpu, commit = env["cpu"], env["git"]["revision"]
    cores = f"{cpu['num_cores']} cores, {env['memory_gib']} GiB memory"
    sampler, version = sampler_engine(packages)
    driver = f", driver {env['gpus'][0]['driver']}" if env["gpus"] else ""
    trainer = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages)
    dirty = " with uncommitted changes" if env["git"]["dirty"] else ""
    return [
        finding("cpu", True, f"{cpu['model']}, {cpu['class']}, {cores}"),
        finding("gpu", True, describe_gpus(env["gpus"]) + driver),
        finding("disk", True, f"{env['disk_free_gib']} GiB free where runs are written"),
        finding("sampler", version != "none", f"{sampler} {version}", "make setup"),
        finding("trainer", "torch" in packages and "transformers" in packages, trainer or "none", "make setup"),
        finding("checkout", commit is not None, (commit or "no git")[:12] + dirty, "a git checkout: records name it"),
        finding("fingerprint", True, fingerprint(env)),
    ]


def known_bad_findings(env: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of KNOWN_BAD that apply here."""
    return [finding(bad.name, False, bad.detail, bad.needed) for bad in KNOWN_BAD if bad.applies(env)]


def task_finding(task, env: dict[str, Any]) -> dict[str, Any]:
    """Can this machine run the task, and if not, why."""
    resolved = resolve_task(task)
    reason, task = can_run(resolved, env), resolved.task
    return finding(f"task {task.id}", reason is None, f"{task.tier}: {'runs here' if reason is None else 'not here'}",
                   reason or "")
