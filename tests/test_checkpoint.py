"""Checkpoints: whole or passed over, the newest two kept, and what is read is what was written."""

import pytest

torch = pytest.importorskip("torch")

from suite.engines.checkpoint import HASHES, NUMBERS, load_checkpoint, save_checkpoint  # noqa: E402

NUMBERS_OF = {"scaler": {"scale_value": 2.0**-20, "max_abs_scaled_grad": float("inf")}, "adamw_steps": {"w": 3.0}}


def save(folder, *steps):
    for step in steps:
        save_checkpoint(folder, step, {"w": torch.full((3, 2), float(step))}, NUMBERS_OF)


def value(saved):
    found = {"w": torch.zeros(3, 2)}
    saved.read(found)
    assert found["w"].unique().numel() == 1
    return found["w"][0, 0].item()


def test_what_is_read_is_what_was_written_and_two_are_kept(tmp_path):
    save(tmp_path, 2, 4, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00004", "step-00006"]
    done, saved, passed_over = load_checkpoint(tmp_path, 99)
    assert (done, value(saved), saved.numbers, passed_over) == (6, 6.0, NUMBERS_OF, [])


def test_no_checkpoint_is_step_0(tmp_path):
    assert load_checkpoint(tmp_path / "none", 99) == (0, None, [])


def test_one_that_is_ahead_of_the_record_is_passed_over(tmp_path):
    save(tmp_path, 2, 4)
    done, saved, passed_over = load_checkpoint(tmp_path, 3)
    assert (done, value(saved), passed_over) == (2, 2.0, ["step-00004: the record has only 3 whole steps"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "a tensor file is shorter": (lambda path: cut(path / "__0_0.distcp"), "its content does not have the recorded hash"),
    "a tensor file is missing": (lambda path: (path / "__0_0.distcp").unlink(), "its content does not have the recorded hash"),
    "numbers are others": (lambda path: (path / NUMBERS).write_text("{}"), "its content does not have the recorded hash"),
    "numbers are missing": (lambda path: (path / NUMBERS).unlink(), "its content does not have the recorded hash"),
    "the metadata is empty": (lambda path: (path / ".metadata").write_bytes(b""), "its content does not have the recorded hash"),
    "the hashes are no text": (lambda path: (path / HASHES).write_bytes(b"\xff" * 64), "its content does not have the recorded hash"),
    "the hashes are empty": (lambda path: (path / HASHES).write_bytes(b""), "its hashes are missing, it was cut short"),
    "the hashes are missing": (lambda path: (path / HASHES).unlink(), "its hashes are missing, it was cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, damage):
    save(tmp_path, 2, 4)
    harm, said = DAMAGES[damage]
    harm(tmp_path / "step-00004")
    done, saved, passed_over = load_checkpoint(tmp_path, 99)
    assert (done, value(saved), passed_over) == (2, 2.0, [f"step-00004: {said}"])


def test_what_a_kill_left_unfinished_is_no_checkpoint_and_goes_away_with_the_next_one(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step-00002").rename(tmp_path / "step-00004.unfinished")
    (tmp_path / "step-last").mkdir()
    assert load_checkpoint(tmp_path, 99) == (0, None, [])
    save(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00006", "step-last"]


def test_a_step_that_is_done_again_replaces_the_checkpoint_of_the_first_time(tmp_path):
    save(tmp_path, 2)
    save_checkpoint(tmp_path, 2, {"w": torch.ones(3, 2)}, NUMBERS_OF)
    assert value(load_checkpoint(tmp_path, 99)[1]) == 1.0


def test_a_single_file_of_an_earlier_version_is_named_and_left_alone(tmp_path):
    (tmp_path / "step-00004.pt").write_bytes(b"x")
    done, saved, passed_over = load_checkpoint(tmp_path, 99)
    assert (done, saved) == (0, None) and passed_over == ["step-00004.pt: a single file, as versions before this one wrote it"]
