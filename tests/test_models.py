"""The hash of a checkpoint: of all its weights, as a user would compute it."""

import hashlib
import json
import subprocess

import pytest

from suite.engines.models import files_sha256, hub_commit, model_folder, model_record, weights_sha256
from suite.errors import DataError, UserError
from suite.spec.checkout import find_repo
from suite.spec.strict_yaml import read_yaml


def folder_of(tmp_path, **files):
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return tmp_path


def test_one_file_has_its_own_hash(tmp_path):
    assert weights_sha256(folder_of(tmp_path, model=b"w")) == hashlib.sha256(b"w").hexdigest()


def test_of_several_files_every_one_counts_and_sha256sum_gives_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = folder_of(tmp_path / "a", part1=b"x", part2=b"y")
    other = folder_of(tmp_path / "b", part1=b"x", part2=b"z")
    printed = subprocess.run("sha256sum *.safetensors | sha256sum", shell=True, cwd=one, capture_output=True, text=True)
    assert weights_sha256(one) == printed.stdout.split()[0] != weights_sha256(other)


def test_weights_with_another_hash_are_refused_with_both(tmp_path):
    folder = folder_of(tmp_path, model=b"w")
    with pytest.raises(DataError, match=f"found {hashlib.sha256(b'w').hexdigest()}, allowed: {'0' * 64}"):
        model_folder({"path": str(folder), "sha256": "0" * 64})


def test_a_snapshot_of_the_hub_names_its_commit(tmp_path):
    assert hub_commit(tmp_path / "snapshots" / "abc123") == "abc123" and hub_commit(tmp_path) is None


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", '{"rms_norm_eps": 0.5}'), ("generation_config.json", '{"eos_token_id": 7}'), ("tokenizer.json", "{}"),
    ("chat_template.jinja", "x"), ("additional_chat_templates/tools.jinja", "x"), ("merges.txt", "x"),
])  # fmt: skip
def test_another_file_that_an_engine_reads_is_refused_by_the_pin(tmp_path, name, content):
    folder = folder_of(tmp_path, model=b"w")
    model = {"path": str(folder), "sha256": weights_sha256(folder), "files_sha256": files_sha256(folder)}
    assert model_folder(model) == folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"sha256 of the files .*{name}.*: found .*, allowed: {model['files_sha256']}"):
        model_folder(model)


def test_the_pin_of_the_other_files_is_what_sha256sum_prints_of_them(tmp_path):
    folder = folder_of(tmp_path, model=b"w")
    (folder / "tokenizer.json").write_text("{}")
    printed = subprocess.run("sha256sum config.json tokenizer.json | sha256sum", shell=True, cwd=folder, capture_output=True, text=True)
    assert files_sha256(folder) == printed.stdout.split()[0]


def test_a_record_names_every_file_read_and_every_file_that_none_reads(tmp_path):
    folder = folder_of(tmp_path, model=b"w")
    for name in ("evil.py", "pytorch_model.bin", "README.md", ".gitattributes", "tokenizer.json"):
        (folder / name).write_text("x")
    found = model_record(folder)
    assert set(found["files"]) == {"config.json", "tokenizer.json"} and found["ignored"] == ["evil.py", "pytorch_model.bin"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "config.json: auto_map: found names of code"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "tokenizer_config.json: auto_map"),
    ("adapter_config.json", {"base_model_name_or_path": "elsewhere"}, "adapter_config.json: found such a file, allowed: none"),
    ("params.json", {}, "params.json: found such a file"),
    ("config.json", {"model_type": "evil"}, "model_type: found 'evil', allowed: 'qwen2'"),
    ("config.json", [], "config.json: found list"),
])  # fmt: skip
def test_a_folder_that_asks_for_code_or_for_another_model_is_refused(tmp_path, name, content, said):
    folder = folder_of(tmp_path, model=b"w")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        model_folder({"path": str(folder), "family": "qwen2"})


def test_weights_that_may_hold_code_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match="found no .*safetensors"):
        model_folder({"path": str(folder), "sha256": None})


def test_files_of_the_hubs_cache_are_links_and_are_hashed_and_read_as_files(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = folder_of(tmp_path / "blobs", model=b"w")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert model_record(snapshot) == model_record(folder) | {"revision": "abc"}
    assert model_folder({"path": str(snapshot), "files_sha256": files_sha256(folder)}) == snapshot


@pytest.mark.parametrize("block", ["desk-model", "desk-llama", "desk-moe"])
def test_the_embedded_models_are_pinned_with_all_their_files(block):
    model = read_yaml(find_repo() / "tasks" / "_base" / f"{block}.yaml")[0]["model"]
    assert len(model["files_sha256"]) == 64 and model_folder(model)
