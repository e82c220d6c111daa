"""The package as it is installed and cited: locks, citation, make variables, and the tests' own network guard."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

REPO = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def pins(kind):
    lines = (REPO / "requirements" / f"{kind}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_pins_every_direct_need_exactly(kind):
    wanted = [re.match(r"[\w-]+", need)[0].lower() for need in
              PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"][kind]]
    assert set(wanted) <= pins(kind).keys()
    assert all(re.fullmatch(r"[0-9][\w.+!]*", version) for version in pins(kind).values())


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_extras_ask_for_the_versions_of_the_lock(kind):
    exact = dict(need.split("==") for need in PYPROJECT["project"]["optional-dependencies"][kind] if "==" in need)
    assert {name: pins(kind)[name].removesuffix("+cpu") for name in exact} == exact


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_holds_what_tests_and_the_speed_comparison_need(kind):
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert extras["bench"] == [f"trl=={pins(kind)['trl']}"]
    major, minor = map(int, pins(kind)["pytest"].split(".")[:2])
    assert (major, minor) < (9, 2), "pytest 9.2.0 with pytest-xdist 3.8.0 ignores xdist_group"


def test_the_cpu_lock_cannot_pull_cuda():
    assert pins("cpu")["torch"].endswith("+cpu")
    assert not pins("cpu").keys() & {"torchvision", "torchaudio", "torchcodec"}
    assert not [name for name in pins("cpu") if name.startswith("nvidia")]


def test_both_locks_train_with_the_same_code():
    for name in ("transformers", "peft", "megatron-core", "trl", "math-verify"):
        assert pins("cpu")[name] == pins("gpu")[name]


def test_every_folder_of_modules_is_a_package_and_is_found():
    found = set(find_packages(str(REPO), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    assert found == {".".join(path.parent.relative_to(REPO).parts) for path in (REPO / "suite").rglob("*.py")}


def test_whatever_else_than_python_the_package_needs_is_declared():
    declared = {path for name, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items() for pattern in patterns
                for path in (REPO / name.replace(".", "/")).glob(pattern)}  # fmt: skip
    others = {path for path in (REPO / "suite").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
    assert others == declared


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_citation_is_valid_and_puts_the_paper_under_references():
    from cffconvert import Citation

    citation = Citation((REPO / "CITATION.cff").read_text())
    citation.validate()
    assert citation.cffobj["title"] == PYPROJECT["project"]["name"]
    titles = [reference["title"] for reference in citation.cffobj["references"]]
    assert titles == ["Defeating the Training-Inference Mismatch via FP16"]
    with pytest.raises(Exception, match="authors"):
        Citation("cff-version: 1.2.0\nmessage: m\ntitle: t\n").validate()


def make(*arguments, folder=REPO, **environment):
    """Run make as a user would whose pip is not configured, also where the tests themselves were started by make."""
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX", "LOCK", "PYTHON")
    outer = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PIP_")}
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True,
                          env=outer | {"PIP_CONFIG_FILE": os.devnull} | environment)


def test_make_passes_its_variables_on():
    variables = ["SEEDS=0,1", "LIMIT=4", "NPROC=2", "FRESH=1", "RUNS_DIR=/a b/runs", "EXTRA=--arm fp16"]
    command = make("-n", "reproduce", *variables).stdout.splitlines()[-1].split(" reproduce ")[1]
    wanted = "'desk-offline-mismatch' --seeds 0,1 --limit 4 --nproc 2 --fresh --out '/a b/runs' --arm fp16"
    assert command.split() == wanted.split()
    assert "--fresh" not in make("-n", "reproduce", "FRESH=0").stdout


BACKEND = """\
import sys
sys.path.insert(0, "fakes")
from fake_wheel import fake_wheel
def build_editable(folder, *_):
    return fake_wheel(folder, "checkout", "1.0").name
"""
FAKE_WHEEL = '''\
import zipfile
from pathlib import Path
def fake_wheel(folder, name, version):
    """An installable distribution that holds one module, which says where it came from."""
    path, info = Path(folder) / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"SOURCE = {Path(folder).parent.name!r}")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
'''
PUBLIC = re.search(r"^pytorch_cpu_index=(https://.*)$", (REPO / "requirements" / "setup.sh").read_text(), re.MULTILINE)[1]


@pytest.fixture
def checkout(tmp_path):
    """What set-up reads, alone in a folder, beside three package indexes that are folders: `plain` has no CPU build of
    torch, `public` stands for PyTorch's own and `other` for one that somebody names; these two have a `helper` as well."""
    shutil.copytree(REPO / "requirements", tmp_path / "requirements")
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n")
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake_wheel.py").write_text(FAKE_WHEEL)
    space: dict = {}
    exec(FAKE_WHEEL, space)
    for index, torch in (("plain", "0.1"), ("public", "0.1+cpu"), ("other", "0.1+cpu")):
        for name, version in (("torch", torch), ("helper", "1.0")):
            folder = tmp_path / index / name
            folder.mkdir(parents=True)
            wheel = space["fake_wheel"](folder, name, version).name
            (folder / "index.html").write_text(f"<a href='{wheel.replace('+', '%2B')}'>{wheel}</a>")
            (folder / "source").write_text(index)
    script = tmp_path / "requirements" / "setup.sh"
    script.write_text(script.read_text().replace(PUBLIC, f"file://{tmp_path}/public"))
    (tmp_path / "requirements" / "cpu.lock").write_text("helper==1.0\ntorch==0.1+cpu\n")
    return tmp_path


def set_up(checkout, **environment):
    """What `make setup` says, and the index that each package came from."""
    done = make("setup", folder=checkout, LOCK="cpu", PYTHON=sys.executable, **{"PIP_INDEX_URL": f"file://{checkout}/plain"} | environment)
    log = checkout / ".venv" / "setup.log"
    found = re.findall(r"(?:Processing|Downloading|Looking in) \S*/(plain|public|other)/(torch|helper)/", log.read_text() if log.exists() else "")
    return done, {name: index for index, name in found}


def test_set_up_goes_on_with_pytorchs_own_index_where_pips_has_no_cpu_build(checkout):
    done, sources = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert sources == {"torch": "public", "helper": "plain"}
    said = [line for line in done.stderr.splitlines() if "PyTorch's own" in line]
    assert len(said) == 1 and f"file://{checkout}/public" in said[0]
    assert list(checkout.glob(".venv/.setup-*"))
    again = make("setup", folder=checkout, LOCK="cpu")
    assert (again.returncode, again.stderr) == (0, ""), "a finished set-up is not repeated"


def test_torch_index_supplies_torch_and_nothing_else(checkout):
    """Also where somebody's pip would install somewhere else: what set-up needs goes into .venv."""
    elsewhere = {"PIP_TARGET": str(checkout / "elsewhere"), "PIP_USER": "1"}
    done, sources = set_up(checkout, TORCH_INDEX=f"file://{checkout}/other", **elsewhere)
    assert done.returncode == 0, done.stderr
    assert sources == {"torch": "other", "helper": "plain"} and "PyTorch's own" not in done.stderr
    assert not (checkout / "elsewhere").exists() and list(checkout.glob(".venv/lib/*/site-packages/torch.py"))


def test_a_failed_set_up_leaves_no_stamp_and_names_torch_index(checkout):
    shutil.rmtree(checkout / "public" / "torch")
    done, sources = set_up(checkout)
    assert done.returncode != 0 and "TORCH_INDEX=<address>" in done.stderr and sources == {}
    assert not list(checkout.glob(".venv/.setup-*"))


def test_a_constraint_that_contradicts_the_lock_is_told_as_such(checkout):
    (checkout / "mine.txt").write_text("helper==2.0\n")
    done, _ = set_up(checkout, TORCH_INDEX=f"file://{checkout}/other", PIP_CONSTRAINT=str(checkout / "mine.txt"))
    assert done.returncode != 0 and not list(checkout.glob(".venv/.setup-*"))
    assert "contradicts requirements/cpu.lock" in done.stderr and "(constraint) helper==2.0" in done.stderr
    assert f"PIP_CONSTRAINT={checkout}/mine.txt" in done.stderr and "has no CPU build" not in done.stderr


def test_set_up_refuses_an_old_python_and_an_unknown_lock(checkout):
    old = checkout / "python-old"
    old.write_text("#!/bin/sh\necho 3.8.1\nexit 1\n")
    old.chmod(0o755)
    assert "Python 3.8.1; 3.11 or newer" in make("setup", folder=checkout, LOCK="cpu", PYTHON=str(old)).stderr
    assert "allowed are cpu and gpu" in make("setup", folder=checkout, LOCK="tpu", PYTHON=sys.executable).stderr


def test_readme_names_the_test_command_that_ci_runs():
    assert re.search(r"<!-- test-command -->\n```\w*\nmake test\n```", (REPO / "README.md").read_text())


def test_tests_cannot_reach_other_machines():
    with pytest.raises(RuntimeError, match="no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(RuntimeError, match="no network"):
        socket.getaddrinfo("example.org", 80)


def test_tests_can_reach_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.engine
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_engine_tests_are_dealt_to_one_worker(request):
    assert request.node.nodeid.endswith("@engine"), "xdist did not see the group: two engines would run at once"
