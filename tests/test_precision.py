"""What is asked for, what follows from it, and how a breach of it is named."""

import pytest

from suite.spec.precision import COARSE_FORMATS, DTYPES, FORMATS, Precision, contract_breaches, dtype_name


def test_unsaid_points_follow_their_engine():
    precision = Precision.of({"rollout": "bf16", "train": "fp16", "wire": None})
    assert (precision.wire, precision.kv_cache, precision.rollout_logits) == ("bf16", "bf16", "bf16")
    assert precision.trainer_head == "fp16"


def test_said_points_are_kept():
    assert Precision.of({"rollout": "fp16", "train": "fp16", "trainer_head": "fp32"}).trainer_head == "fp32"


def test_an_engine_in_another_dtype_is_a_breach_and_is_named():
    asked = {"rollout": "fp16", "train": "fp16"}
    executed = {"rollout_weights": "bf16", "kv_cache": "fp16", "compute": "fp16", "rollout_logits": "fp16"}
    assert contract_breaches(asked, executed) == ["rollout_weights: ran in bf16, the arm asks for fp16"]
    assert contract_breaches(asked, executed | {"rollout_weights": "fp16"}) == []


def test_a_point_that_mixes_dtypes_is_a_breach():
    assert contract_breaches({"rollout": "fp16", "train": "fp16"}, {"compute": "fp16+fp32"})


def test_dtype_names():
    assert dtype_name("torch.bfloat16") == "bf16"
    assert dtype_name("torch.float8_e4m3fn") == "float8_e4m3fn"


def test_a_coarse_format_is_held_in_fp32_and_travels_as_itself():
    precision = Precision.of({"rollout": "m3", "train": "bf16"})
    assert (precision.wire, precision.kv_cache, precision.rollout_logits) == ("m3", "fp32", "fp32")
    assert precision.coarser == "m3" and Precision.of({"rollout": "m10", "train": "bf16"}).coarser == "bf16"
    assert contract_breaches({"rollout": "m3", "train": "fp32"}, {"rollout_weights": "fp32", "wire": "m3"}) == [
        "rollout_weights: ran in fp32, the arm asks for m3"
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_the_rounding_of_a_format_is_half_the_spacing_at_one(name):
    row = FORMATS[name]
    assert row.rounding == 0.5 * 2.0**-row.mantissa_bits
    assert row.is_dtype == (name in DTYPES) == (name not in COARSE_FORMATS)
