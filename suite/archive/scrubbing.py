"""What a published record must not tell about the people and machines behind it. No torch.

Two rules: of the environment's variables only those of a list are kept, each with a value that is no name; and from text that a
machine or a library wrote, whatever looks like a secret, an address, a name or a folder is taken out, the longest first,
so that no part of it stays behind.
"""

from __future__ import annotations

import getpass
import re
import socket
from pathlib import Path

# Of a record: written by machine or library, may name what it likes. The rest is made of the suite's own words.
FREE_TEXT = ("environment", "earlier_environments", "error", "recovered", "diverged", "reference_missing")
_PRIVATE_KEYS = {"hostname", "host", "node_name", "user", "username", "cwd", "home", "runs_dir", "path"}

# Variables that can move a log-prob or an accuracy; whatever else is set is nobody's business.
VARIABLES = frozenset(
    """
    CUBLAS_WORKSPACE_CONFIG CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES DNNL_DEFAULT_FPMATH_MODE DNNL_MAX_CPU_ISA KMP_AFFINITY
    KMP_BLOCKTIME MKL_CBWR MKL_DEBUG_CPU_TYPE MKL_DYNAMIC MKL_ENABLE_INSTRUCTIONS MKL_NUM_THREADS NVIDIA_TF32_OVERRIDE
    NVTE_ALLOW_NONDETERMINISTIC_ALGO NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN OMP_DYNAMIC OMP_NUM_THREADS OMP_PLACES
    OMP_PROC_BIND OMP_SCHEDULE ONEDNN_DEFAULT_FPMATH_MODE ONEDNN_MAX_CPU_ISA TORCHINDUCTOR_MAX_AUTOTUNE
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT TORCH_BLAS_PREFER_HIPBLASLT TORCH_COMPILE_DISABLE
    VLLM_ATTENTION_BACKEND VLLM_BATCH_INVARIANT VLLM_CPU_KVCACHE_SPACE VLLM_CPU_MOE_PREPACK VLLM_CPU_OMP_THREADS_BIND
    VLLM_CPU_SGL_KERNEL VLLM_DISABLE_COMPILE_CACHE VLLM_ENABLE_V1_MULTIPROCESSING VLLM_FLASH_ATTN_VERSION
    VLLM_MLA_DISABLE VLLM_USE_DEEP_GEMM VLLM_USE_FLASHINFER_SAMPLER VLLM_USE_TRITON_FLASH_ATTN VLLM_USE_V1
    VLLM_WORKER_MULTIPROC_METHOD WORLD_SIZE
    """.split()
)
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9_.,:=+|{}()-]{0,64}")
_PUBLIC_HOSTS = ("huggingface.co", "github.com", "arxiv.org", "pytorch.org", "download.pytorch.org", "pypi.org", "docs.vllm.ai")

_SECRETS = re.compile(
    r"\b(?:hf_|sk-|sk_|pk_|ghp_|gho_|ghs_|ghu_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|npm_|pypi-|wandb_|eyJ)[A-Za-z0-9_.=-]{8,}"
)
_NAMED_SECRETS = re.compile(
    r"(?i)\b((?:[a-z0-9_-]{0,40}(?:token|secret|password|passwd|pwd|api[_-]?key|credentials?|authorization|cookie))[\"']?\s*[=:]\s*|bearer\s+|basic\s+(?=[A-Za-z0-9+/]{8}))"
    r"(?:bearer\s+|basic\s+)?[\"']?[^\s\"',;]+"
)
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*)://(?:[^\s/@'\"]*@)?(\[[0-9a-fA-F:.]+\]|[^\s/:'\"?#,;)>\]]*)(:\d+)?([^\s'\"?#,;)>\]]*)(\?[^\s'\"#,;)>\]]*)?")
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}")
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]|\.\d)(?::\d+)?")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){3,7}[0-9a-fA-F]{1,4}(?![\w:])|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){1,6}(?::[0-9a-fA-F]{1,4}){1,6}(?![\w:])")
_FQDN = re.compile(
    r"(?<![\w./-])(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}(?:com|org|net|edu|gov|mil|io|ai|dev|cloud|local|localdomain|internal|intranet|lan|corp|cluster|example|"
    r"cn|de|fr|uk|ch|jp|kr|in|eu|us|ca|au|nl|se|it|es)(?::\d+)?(?![\w-]|\.\w)"
)
_NODE = re.compile(r"(?<![\w./:<>-])[A-Za-z][A-Za-z-]{0,62}\d[A-Za-z0-9.-]{0,62}:\d{3,5}\b")

# An absolute path: a slash that does not follow a word, a dot, another slash, a colon or a placeholder, then at least
# two components, or one below a well-known root. Fractions (a/b), URLs and relative paths do not match. A component that
# another one follows may have blanks in it.
_PART = r"[^\s/'\",;:()\[\]{}<>|]+"
_ABSOLUTE = re.compile(
    rf"(?:(?<![\w./:<>\])-])(?:file://)?|~[\w-]*)/(?:(?:{_PART}(?: {_PART}){{0,4}}/)+(?P<name>{_PART})?|(?:home|root|tmp|work|mnt|data|Users)\b)"
)
_QUOTED = re.compile(r"(?P<q>['\"`])(?:file://)?(?:/|~[\w-]*/|[A-Za-z]:\\|\\\\)(?:(?!(?P=q))[^\n])*?[/\\](?P<name>[^/\\\n'\"`]*)(?P=q)")
_WINDOWS = re.compile(r"(?:\b[A-Za-z]:|\\)\\(?:[^\\'\"\n]+\\)*(?P<name>[^\s\\'\"]*)")


def scrub_record(record: dict) -> dict:
    """A record without secrets, absolute paths and unlisted variables, and without names where text of the machine's own can
    stand; never elsewhere, since a user may well be called like an arm or a task."""
    clean = {key: scrub(value, names=key in FREE_TEXT) for key, value in record.items()}
    if "text" in (record.get("task") or {}):
        clean["task"]["text"] = scrub_comments(record["task"]["text"])
    return clean


def scrub(value, names: bool = True):
    """The same JSON value without secrets and absolute paths and, with `names`, without addresses, host and user names.

    An absolute path keeps its last component ("<path>/name"); keys that only hold such names are dropped, and so are
    variables (`env`) that are not on the list.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (names and str(k).lower() in _PRIVATE_KEYS)}
        return {scrub(k, names): variables(v) if names and k == "env" and isinstance(v, dict) else scrub(v, names) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, names) for item in value]
    return scrub_text(value, names) if isinstance(value, str) else value


def variables(env: dict) -> dict[str, str]:
    """The listed variables; a value that could name something stands as <value>."""
    return {name: str(env[name]) if _PLAIN_VALUE.fullmatch(str(env[name])) else "<value>" for name in sorted(env) if name in VARIABLES}


def scrub_comments(text: str) -> str:
    """A task's text with the names taken out of its comments, and paths and secrets everywhere."""
    return "\n".join(_scrub_comment(line) for line in text.split("\n"))


def _scrub_comment(line: str) -> str:
    mark = re.search(r"(?:^|\s)#", line)
    if mark is None:
        return scrub_text(line, names=False)
    return scrub_text(line[: mark.start()], names=False) + scrub_text(line[mark.start() :])


def scrub_text(text: str, names: bool = True) -> str:
    """One text. Secrets and credentials go always; addresses and names only with `names`."""
    text = _URL.sub(_public_url, text)
    text = _SECRETS.sub("<token>", text)
    text = _NAMED_SECRETS.sub(r"\1<secret>", text)
    text = _QUOTED.sub(lambda match: f"{match['q']}{_last_component(match)}{match['q']}", text)
    text = _ABSOLUTE.sub(_last_component, text)
    text = _WINDOWS.sub(_last_component, text)
    if not names:
        return text
    for pattern, word in ((_EMAIL, "<e-mail>"), (_IPV4, "<address>"), (_IPV6, "<address>")):
        text = pattern.sub(word, text)
    for name in own_names():
        text = re.sub(rf"(?i)(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    for stem in _own_stems():
        text = re.sub(rf"(?i)(?<!\w){re.escape(stem)}\d+[\w.-]*", "<name>", text)
    text = _NODE.sub("<address>", text)
    return _FQDN.sub(lambda match: match[0] if match[0].lower() in _PUBLIC_HOSTS else "<address>", text)


def _public_url(match: re.Match) -> str:
    """A URL of a public host without credentials and query; of another host its scheme alone."""
    scheme, host, port, path, query = match.groups()
    if scheme == "file":
        return match[0]
    if host.lower() in _PUBLIC_HOSTS:
        return f"{scheme}://{host}{port or ''}{path}{'?<query>' if query else ''}"
    return f"{scheme}://<address>"


def _last_component(match: re.Match) -> str:
    return "<path>/" + match["name"] if match["name"] else "<path>"


def own_names() -> list[str]:
    """Names of this machine, its domain and its user, if they are names and not common words; the longest first."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    host = socket.gethostname()
    names = {user, Path.home().name, host, host.split(".")[0], host.partition(".")[2]}
    common = ("root", "user", "localhost", "local", "localdomain", "home", "nobody")
    return sorted((name for name in names if len(name) > 3 and name not in common), key=lambda name: (-len(name), name))


def _own_stems() -> list[str]:
    """What this machine's name shares with its neighbours: gpu-node- of gpu-node-17."""
    host = socket.gethostname().split(".")[0]
    stem = re.sub(r"\d+$", "", host)
    return [stem] if stem != host and len(stem) > 2 else []
