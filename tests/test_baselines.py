"""The paper's numbers agree with one another, with the digitised curves, and with what tasks expect to find."""

import csv
from pathlib import Path

import numpy as np
import pytest
from fakes import curve

from suite.spec.plan import read_path
from suite.spec.strict_yaml import read_yaml

BASELINES = Path(__file__).parents[1] / "baselines"
PAPER, PROBLEMS = read_yaml(BASELINES / "paper.yaml")
FIELDS = ("title", "statement", "unit", "source", "level", "confidence", "caveats", "suggested_pass")
ABOUT = {*FIELDS, "units", "sources", "reading_error"}
PANELS = {"grpo": "a", "grpo_token_tis": "b", "grpo_seq_mis": "c", "gspo": "d", "pg_seq_is": "e", "pg_seq_mis": "f"}
READING = 0.003  # rounding of the ledger (0.0005) on top of the reading error 0.002


def test_every_claim_is_there_once_in_order_and_says_where_it_is_from():
    assert PROBLEMS == [] and list(PAPER) == [f"C{i}" for i in range(1, 38)]
    for name, claim in PAPER.items():
        assert not [field for field in FIELDS if field not in claim], name
        assert claim["level"] in ("P0", "P1", "P2", "P3", "P4", "P5") and claim["confidence"] in ("H", "M", "L"), name
        assert all(claim[field] for field in FIELDS[:-1]), name
        assert set(claim) - ABOUT, f"{name} holds no value"


def test_units_and_sources_speak_of_values_that_exist():
    for name, claim in PAPER.items():
        for table in ("units", "sources"):
            for key in claim.get(table, {}):
                assert key.split(".")[0] not in ABOUT, (name, table, key)
                read_path(claim, key)  # KeyError where there is no such value
        assert all(set(source) == {"source", "level"} for source in claim.get("sources", {}).values()), name


def test_numbers_read_off_a_figure_carry_their_reading_error():
    assert [name for name, claim in PAPER.items() if claim["level"] == "P1" and "reading_error" not in claim] == []


def test_ratios_follow_from_the_numbers_beside_them():
    c1, c2, c11, c23 = (PAPER[name] for name in ("C1", "C2", "C11", "C23"))
    assert c1["sequence_kl_ratio"] == pytest.approx(c1["bf16_sequence_kl"] / c1["fp16_sequence_kl"], abs=0.05)
    assert c2["slope_ratio"] == pytest.approx(c2["bf16_slope"] / c2["fp16_slope"], abs=0.05)
    for ratio, ends, top, bottom in (
        ("sequence_kl_ratio", "sequence_kl_ratio_rounding", (7.635, 7.645), (0.315, 0.325)),
        ("slope_ratio", "slope_ratio_rounding", (1.005, 1.015), (0.065, 0.075)),
    ):
        claim = c1 if ratio in c1 else c2
        assert top[0] / bottom[1] <= claim[ratio] <= top[1] / bottom[0]
        assert claim[ends][0] <= claim[ratio] <= claim[ends][1]
    assert c11["steps_ratio"] == pytest.approx(
        np.mean([c11["bf16_step_090"][k] / c11["fp16_step_090"][k] for k in c11["last"]]), abs=0.05
    )
    assert c23["speed_up"] == pytest.approx(c23["bf16_step_075"] / c23["fp16_step_075"], abs=0.01)
    assert PAPER["C5"]["rows"] == PAPER["C5"]["copies"] * PAPER["C5"]["unique_problems"] == 11680


@pytest.mark.parametrize("name", PANELS)
def test_fp16_ends_and_peaks_where_the_ledger_says(name):
    values = curve(PANELS[name], "FP16")
    assert values[-1] == pytest.approx(PAPER["C6"]["last"][name], abs=READING)
    assert values.max() == pytest.approx(PAPER["C6"]["peak"][name], abs=READING)
    for key, level in (
        ("step_first_above_threshold", 0.95),
        ("step_first_above_090", 0.90),
        ("step_first_above_097", 0.97),
    ):
        read = int(np.argmax(values >= level)) + 1
        assert values.max() >= level and abs(read - PAPER["C6"][key][name]) <= 12, (key, read)


@pytest.mark.parametrize(("claim", "panel"), [("C8", "a"), ("C9", "b"), ("C10", "d")])
def test_bf16_peaks_and_ends_where_the_ledger_says(claim, panel):
    values, numbers = curve(panel, "BF16"), PAPER[claim]
    assert (
        values.max() == pytest.approx(numbers["peak"], abs=READING)
        and abs(int(values.argmax()) + 1 - numbers["step_peak"]) <= 3
    )
    assert values[-1] == pytest.approx(numbers["last"], abs=READING) and values.max() < 0.95
    assert values.max() - values[-1] >= numbers["drop"] - READING


def test_gaps_are_those_of_the_curves():
    c12, c20, c21, c22, c23 = (PAPER[name] for name in ("C12", "C20", "C21", "C22", "C23"))
    assert curve("e", "FP16")[1799] == pytest.approx(c12["fp16_at_1800"], abs=READING)
    assert curve("e", "BF16")[1799] == pytest.approx(c12["bf16_at_1800"], abs=READING)
    assert curve("h", "BF16").max() == pytest.approx(c20["bf16_peak"], abs=READING)
    assert curve("h", "BF16").min() <= c20["bf16_min"] + READING
    assert curve("g", "BF16").max() == pytest.approx(c21["bf16_peak"], abs=READING) and curve("g", "BF16")[-1] < 0.01
    for name, panel in (("grpo_seq_mis", "i"), ("grpo_token_tis", "j"), ("pg_seq_tis", "k")):
        at = c22["step"][name] - 1
        gap = curve(panel, "FP16")[at - 1] - curve(panel, "BF16")[at - 1]
        assert gap == pytest.approx(c22["reward_gap"][name], abs=0.006), name
    assert curve("l", "FP16")[-1] - curve("l", "BF16")[-1] == pytest.approx(c23["reward_gap"], abs=READING)


def test_the_24_curves_are_clean():
    files = sorted((BASELINES / "curves").glob("*.csv"))
    assert len(files) == 24
    for path in files:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        (value,) = set(rows[0]) - {"precision", "step"}
        assert value == ("reward_smoothed" if path.name.startswith("fig1") else "score")
        assert {row["precision"] for row in rows} == {"BF16", "FP16"}
        for precision in ("BF16", "FP16"):
            steps = [float(row["step"]) for row in rows if row["precision"] == precision]
            assert steps == sorted(steps), path.name
        assert all(0 <= float(row[value]) <= 1 for row in rows), path.name
