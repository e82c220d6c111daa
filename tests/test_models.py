"""The hash of a checkpoint: of all its weights, as a user would compute it."""

import hashlib
import subprocess

import pytest

from suite.errors import DataError
from suite.models import hub_commit, model_folder, weights_sha256


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
