"""Files of RL frameworks: the same rollouts in every form give the numbers of the rollouts, and a file that lacks
something is refused with what to do."""

import gzip
import json

import numpy as np
import pytest
from test_dump import make_rows, make_task

from suite.cli.main import main
from suite.dumps import dump
from suite.dumps.readers import no_pairs
from suite.dumps.readers.sources import Source
from suite.errors import UserError

K3 = "k3_nats_per_token"


def rollouts():
    """Response token 1 of long responses is a tool's: mask 0, log-probs 0.0 as frameworks leave them there."""
    rows = make_rows()
    for row in rows:
        length = len(row["rollout_logprobs"])
        row["loss_mask"] = [int(i != 1 or length < 3) for i in range(length)]
        for name in ("rollout_logprobs", "trainer_logprobs"):
            row[name] = [value * kept for value, kept in zip(row[name], row["loss_mask"], strict=True)]
    return rows


def prime_rl(rows):
    for row in rows:
        yield {
            "schema_version": 1, "token_ids": row["token_ids"], "loss_mask": [False] * 3 + [bool(m) for m in row["loss_mask"]],
            "inference_logprobs": [0.0] * 3 + row["rollout_logprobs"],
            "trainer_logprobs": [None, -2.5, -2.5] + row["trainer_logprobs"],
        }  # fmt: skip


def nemo_rl(rows):
    longest = max(len(row["token_ids"]) for row in rows)
    for row in rows:
        pad = [0] * (longest - len(row["token_ids"]))
        yield {
            "token_ids": [row["token_ids"] + pad], "input_lengths": [len(row["token_ids"])],
            "token_loss_mask": [[0] * 3 + row["loss_mask"] + pad], "sample_loss_mask": [1.0],
            "generation_logprobs": [[0.0] * 3 + row["rollout_logprobs"] + pad],
            "prev_logprobs": [[0.0, -2.5, -2.5] + row["trainer_logprobs"] + pad], "rewards": [row["reward"]], "idx": 0,
        }  # fmt: skip


def slime(rows):
    import torch

    samples = [
        {
            "tokens": row["token_ids"], "response_lengths": len(row["loss_mask"]), "loss_masks": row["loss_mask"],
            "rollout_log_probs": torch.tensor(row["rollout_logprobs"]), "log_probs": torch.tensor(row["trainer_logprobs"]),
            "truncated": int(row["finish_reason"] == "length"), "rewards": -9.0, "rollout_position": i,
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return {"format_version": 2, "rollout_id": 0, "samples": samples, "raw_reward": [row["reward"] for row in rows]}


def write(form, path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "slime":
        torch = pytest.importorskip("torch")
        torch.save(slime(rows), path := path.with_suffix(".pt"))
        return path
    text = "".join(json.dumps(line) + "\n" for line in {"prime-rl": prime_rl, "nemo-rl": nemo_rl}[form](rows))
    (path := path.with_suffix(".jsonl")).write_text(text)
    return path


def k3(rows):
    """Mean of exp(d) - 1 - d over sampled tokens, d = log pi - log mu."""
    mu, pi, mask = (np.concatenate([row[name] for row in rows])
                    for name in ("rollout_logprobs", "trainer_logprobs", "loss_mask"))  # fmt: skip
    d = (pi - mu)[mask == 1]
    return float(np.mean(np.expm1(d) - d))


@pytest.mark.parametrize("form", ["prime-rl", "nemo-rl", "slime"])
def test_a_folder_of_shards_has_the_numbers_of_its_rollouts(tmp_path, form):
    rows = rollouts()
    launches = {(row["arm"], row["seed"]) for row in rows}
    of = {key: [row for row in rows if (row["arm"], row["seed"]) == key] for key in launches}
    for (arm, seed), part in of.items():
        for i in range(2):
            write(form, tmp_path / f"arm={arm}" / f"seed={seed}" / f"step_{i}" / "rank_0", part[i::2])
        (tmp_path / f"arm={arm}" / f"seed={seed}" / "step_0" / "STABLE").touch()
    runs = dump.read_dump(make_task(), tmp_path, Source(form)).runs
    assert {(run.arm, run.seed) for run in runs} == launches
    for run in runs:
        assert run.record["series_summary"][K3] == pytest.approx(k3(of[run.arm, run.seed]), rel=1e-6)
        assert run.record["counts"]["num_rollouts"] == 12 and run.record["counts"]["num_prompts"] == 4


def read(form, path, **launch):
    from suite.dumps.files import Shard

    return list(Source(form, **{"arm": "bf16", "seed": 0} | launch).read(Shard(path)))


def test_arm_and_seed_of_flags_and_gzip(tmp_path):
    path = write("prime-rl", tmp_path / "rank_0", make := rollouts()[:2])
    packed = tmp_path / "rank_0.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (_, first), (number, second) = read("prime-rl", packed)
    assert (first["arm"], first["seed"], number) == ("bf16", 0, 2)
    assert second["rollout_logprobs"] == make[1]["rollout_logprobs"]
    assert first["prompt_id"] == second["prompt_id"]  # both of one prompt


def test_rewards_and_finish_reasons_of_slime_are_the_raw_ones(tmp_path):
    rows = rollouts()[:3]
    got = [row for _, row in read("slime", write("slime", tmp_path / "0", rows))]
    assert [(row["reward"], row["finish_reason"]) for row in got] == [(r["reward"], r["finish_reason"]) for r in rows]


@pytest.mark.parametrize("form, field", [("prime-rl", "trainer_logprobs"), ("nemo-rl", "prev_logprobs")])
@pytest.mark.parametrize("change", ["missing", "short"])
def test_a_field_that_is_missing_or_short_is_named(tmp_path, form, field, change):
    path = write(form, tmp_path / "x", rollouts()[:2])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    value = lines[1].pop(field)
    if change == "short":
        lines[1][field] = value[:-1] if form == "prime-rl" else [value[0][:-1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"x.jsonl: row 2: {field}: found .*, allowed: .* \((prime-rl|NeMo-RL) writes"):
        read(form, path)


def test_the_dump_of_slimes_sampler_alone_is_refused_with_the_flag_to_give(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"rollout_id": 0, "samples": []}, path := tmp_path / "0.pt")
    with pytest.raises(UserError, match="format_version.*--save-debug-train-data"):
        read("slime", path)
    path.write_bytes(b"no torch file")
    with pytest.raises(UserError, match="0.pt: found"):
        read("slime", path)


@pytest.mark.parametrize("form", sorted(no_pairs.WHAT_TO_DO))
def test_files_without_both_logprobs_are_refused_with_what_to_write(tmp_path, form):
    with pytest.raises(UserError, match=rf"a file of {form}: .*\(.*dumps/README.md"):
        read(form, tmp_path / "any.jsonl")


def test_frameworks_and_launches_that_are_unknown_are_refused(tmp_path):
    path = write("prime-rl", tmp_path / "x", rollouts()[:1])
    with pytest.raises(UserError, match="--from: found 'skyrl', allowed: nemo-rl, openrlhf, prime-rl"):
        read("skyrl", path)
    with pytest.raises(UserError, match="arm is missing.*--arm"):
        read("prime-rl", path, arm=None)
    with pytest.raises(UserError, match="seed is missing.*--seed"):
        read("prime-rl", path, seed=None)


@pytest.mark.parametrize("flags", [["--arm", "bf16"], ["--from", "slime"]])
def test_flags_that_belong_together_are_asked_for(capsys, flags):
    assert main(["grade", "desk-offline-mismatch", *flags]) == 2
    assert "--from" in capsys.readouterr().err
