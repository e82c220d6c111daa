"""Cells and run keys: what enters a key, what does not, and that arms differ in one factor only."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_task import GOOD, checkout  # noqa: F401  (a fixture)

from suite.spec.plan import Cell, canonical_json, differing_paths, one_factor_errors, plan, read_path, resolve_task
from suite.spec.reading import load_task

REPO = Path(__file__).resolve().parents[1]


def keys(path) -> list[str]:
    return [cell.run_key() for cell in plan(load_task(path))]


def test_cells_are_arms_by_grid_by_seeds_and_then_controls(checkout):  # noqa: F811
    cells = plan(load_task(checkout()))
    names = [cell.name for cell in cells]
    assert names[:4] == [
        "bf16.num_terms=4-24.s0",
        "bf16.num_terms=4-24.s1",
        "bf16.num_terms=4-24.s2",
        "bf16.num_terms=60-120.s0",
    ]
    assert names[12:] == ["control-aa.num_terms=4-24.s10", "control-aa.num_terms=4-24.s11"]
    assert len(set(names)) == len({cell.run_key() for cell in cells}) == 14
    assert [cell.is_control for cell in cells] == [False] * 12 + [True] * 2


def test_a_cell_knows_its_settings(checkout):  # noqa: F811
    cell = plan(load_task(checkout()))[-3]
    assert (cell.get("precision.rollout"), cell.get("data.num_terms"), cell.get("rollout.top_k")) == (
        "fp16",
        [60, 120],
        0,
    )
    assert cell.get("train.lora") is None and cell.get("train.lora.rank") is None and cell.get("algorithm.name") is None
    assert cell.get("train.lora.rank", 1) == 1 and cell.get("rollout.seed", 7) == 7
    with pytest.raises(KeyError, match="no setting 'rollout.topk'"):
        cell.get("rollout.topk")


# Edits that change no number: the key must stay.
SAME = {
    "title": ("title: A task for tests", "title: Another title"),
    "tags": ("protocol:", "tags: [x]\nprotocol:"),
    "budget": ("resources:", "budget: {minutes: 5}\nresources:"),
    "resources": ("disk_gib: 1", "disk_gib: 2"),
    "path": ("path: here", "path: elsewhere/model"),
    "pin of the small files": ("path: here", f"path: here, files_sha256: {'c' * 64}"),
    "grade version": ("grade_version: 1", "grade_version: 2"),
    "accept region": ("accept: [16, 128]", "accept: [8, 128]"),
    "metrics": ("metrics: [k3_nats_per_token]", "metrics: [prob_diff_mean]"),
    "statement": ("k3 is smaller in fp16", "k3 is larger in bf16"),
    "arm name": ("  fp16: {precision", "  fp16-fp16: {precision"),
    "a default written out": ("max_tokens: 64", "max_tokens: 64, top_k: 0, enforce_eager: true"),
    "another axis value": ("[[4, 24], [60, 120]]", "[[4, 24], [60, 120], [200, 300]]"),
    "order of keys": ("{engine: hf, samples_per_prompt: 4", "{samples_per_prompt: 4, engine: hf"),
}
# Edits that change what is computed: every arm's key must change.
DIFFERENT = {
    "version": ("\nversion: 1", "\nversion: 2"),
    "a rollout setting": ("max_tokens: 64", "max_tokens: 65"),
    "temperature": ("temperature: 1.0", "temperature: 0.9"),
    "batch shape of the trainer": ("score_batch_size: 8", "score_batch_size: 4"),
    "checkpoint hash": ("a" * 64, "b" * 64),
    "data id": ("id: desk,", "id: other,"),
    "a setting that was left out": ("template: desk}", "template: desk, num_prompts: 9}"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_number_does_not_enter_the_key(checkout, name):  # noqa: F811
    edit = SAME[name]
    more = [("ratio: [bf16, fp16]", "ratio: [bf16, fp16-fp16]")] if name == "arm name" else []
    before = keys(checkout())
    after = keys(checkout(edit, *more))
    assert set(before) <= set(after)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_the_numbers_changes_every_key(checkout, name):  # noqa: F811
    assert not set(keys(checkout())) & set(keys(checkout(DIFFERENT[name])))


def test_seed_limit_and_being_a_control_each_make_a_key_of_their_own(checkout):  # noqa: F811
    cell = plan(load_task(checkout()))[0]
    parts = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
    others = [Cell(**parts | {"seed": 1}), Cell(**parts | {"is_control": True}), Cell(**parts | {"task_id": "other"})]
    assert (
        len({cell.run_key(), cell.run_key(limit=8), cell.run_key(limit=9), *(other.run_key() for other in others)}) == 6
    )


def test_a_key_is_the_same_in_another_process_and_folder(checkout, tmp_path):  # noqa: F811
    path = checkout()
    imports = "from suite.spec.reading import load_task; from suite.spec.plan import plan"
    code = f"{imports}; print(plan(load_task({str(path)!r}))[0].run_key())"
    environ = {"PYTHONPATH": str(REPO), "PYTHONHASHSEED": "77"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path.parent, env=environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == plan(load_task(path))[0].run_key()


def test_canonical_json_is_one_text_per_value():
    assert canonical_json({"b": [1, 2.5, None], "a": "ä"}) == '{"a":"\\u00e4","b":[1,2.5,null]}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_arms_that_differ_outside_vary_are_named_with_both_values(checkout):  # noqa: F811
    task = load_task(checkout(("vary: [precision]", "vary: [precision.train]")))
    (error,) = one_factor_errors(task)
    assert error.key == "arms.fp16.precision.rollout" and error.found == "bf16: 'bf16', fp16: 'fp16'"
    assert one_factor_errors(load_task(checkout())) == []


def test_vary_is_matched_by_whole_path_components(checkout):  # noqa: F811
    edits = [
        ("vary: [precision]", "vary: [precision, rollout.max]"),
        ("fp16: {precision: ", "fp16: {rollout: {max_tokens: 65}, precision: "),
    ]
    assert [error.key for error in one_factor_errors(load_task(checkout(*edits)))] == ["arms.fp16.rollout.max_tokens"]


def test_differing_paths_of_nested_settings():
    left, right = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3, "e": None}, "d": [2]}
    assert differing_paths(left, right) == ["a.c", "d"]
    assert differing_paths(left, left) == []


def test_an_arm_may_complete_a_section_and_a_grid_point_overrides_it(checkout):  # noqa: F811
    task = load_task(checkout(("bf16: {precision:", "bf16: {data: {num_terms: [1, 2]}, precision:")))
    settings = resolve_task(task).settings_by("bf16", (("data.num_terms", [60, 120]),))
    assert read_path(settings, "data.num_terms") == [60, 120]


def test_a_control_without_a_point_runs_at_every_grid_point(checkout):  # noqa: F811
    path = checkout(("seeds: [10, 11]\n    at: {data.num_terms: 4-24}", "seeds: [10]"))
    names = [cell.name for cell in plan(load_task(path)) if cell.is_control]
    assert names == ["control-aa.num_terms=4-24.s10", "control-aa.num_terms=60-120.s10"]


def test_a_dataset_task_needs_no_arms_and_a_compare_task_has_no_cells(checkout):  # noqa: F811
    start, end = GOOD.index("arms:"), GOOD.index("seeds:")
    text = GOOD[:start] + GOOD[end : GOOD.index("metrics:")] + GOOD[GOOD.index("resources:") :]
    dataset = load_task(checkout(("offline_mismatch", "dataset"), text=text))
    assert [cell.name for cell in plan(dataset)] == ["dataset.s0", "dataset.s1", "dataset.s2"]
    assert plan(load_task(checkout(("offline_mismatch", "compare"), text=text))) == []
