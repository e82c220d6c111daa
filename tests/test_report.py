"""Publishing, tables, figures and the page: nothing private gets out, nothing is hidden, same records, same bytes."""

import csv
import dataclasses
import getpass
import gzip
import io
import json
import re
import shutil
import socket
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import published as fakes
import pyarrow.parquet as pq
import pytest

from suite.archive import points, scrubbing
from suite.archive.publishing import publish_task, published_runs
from suite.archive.scrubbing import scrub, scrub_text
from suite.measure.mismatch import estimates
from suite.record.run import find_runs
from suite.report import readme, rows, tables
from suite.report import verbs as report_verbs
from suite.report.findings import NOT_YET, QUESTIONS, Finding, findings
from suite.report.generate import generated_files
from suite.report.mixtures import mixtures_markdown
from suite.spec.reading import load_all, load_task

HOST, USER = "builder-17.lab.example", "someuser"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A checkout with one published task, made once; tests that change something take a copy."""
    repo = fakes.checkout(tmp_path_factory.mktemp("report") / "checkout")
    private = {
        "hostname": HOST,
        "engine": {"path": "/opt/engines/vllm/python"},
        "note": f"on {HOST} ({HOST.split('.')[0]}) by {USER}",
    }
    fakes.make_runs(repo, private)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr(getpass, "getuser", lambda: USER)
        assert report_verbs.publish("desk-tiny", repo / "runs", repo / "results") == 0
    return repo


@pytest.fixture
def repo(shared, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(shared, copy)
    monkeypatch.chdir(copy)
    return copy


def folder_of(repo):
    return repo / "results" / "desk-tiny" / fakes.FINGERPRINT


def row(**changes) -> rows.Row:
    plain = dict(claim="C1", claim_id="C1-a", statement="s", kind="ratio", task="t", title="T", tier="desk",
                 fingerprint="cpu",
                 estimand="k3_nats_per_token", unit="ratio", estimate=58.0, interval=[50.0, 66.0], accept=[16.0, None],
                 paper_value=None, paper_unit="", paper_source="", num_seeds=3, verdict="PASS", reason="",
                 consistent_with_paper=None,
                 chance=0.05)  # fmt: skip
    return rows.Row(**(plain | changes))


# --- publishing ------------------------------------------------------------------------------------------------------


def test_every_cell_is_published_with_all_its_files(repo):
    runs = published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)
    assert len(runs) == 6
    for run in runs:
        names = {path.name for path in run.folder.iterdir()}
        assert names == {"record.json", "metrics.jsonl.gz", "evidence_summary.parquet", "plot_points.parquet"}


def test_published_sums_give_the_raw_estimates(repo):
    raw, out = find_runs(repo / "runs", "desk-tiny"), published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)
    for a, b in zip(raw, out, strict=True):
        assert (a.arm, a.seed) == (b.arm, b.seed) and a.metrics == b.metrics
        assert estimates(a.summary) == estimates(b.summary)


def test_no_path_host_or_user_reaches_results(repo):
    names = [str(repo), str(repo.parent), "/opt/engines", HOST.split(".")[0], USER]
    for path in (path for path in (repo / "results").rglob("*") if path.is_file()):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = [name for name in names if name.encode() in data]
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("could not open /home/someone/runs/x/part.parquet: no space", "could not open <path>/part.parquet: no space"),
        ("file:///data/models/tiny", "<path>/tiny"),
        ("in '/scratch/a/b/c.py', line 3", "in '<path>/c.py', line 3"),
        ("/root", "<path>"),
        ("C:\\Users\\someone\\x.txt", "<path>x.txt".replace("<path>", "<path>/")),
        ("tokens/s and k3 = 1/2, https://arxiv.org/abs/2510.26788", "tokens/s and k3 = 1/2, https://arxiv.org/abs/2510.26788"),
        ("baselines/desk/tiny and ../x/y", "baselines/desk/tiny and ../x/y"),
    ],
)  # fmt: skip
def test_scrub_takes_absolute_paths_and_nothing_else(text, expected):
    assert scrub_text(text) == expected


def test_scrub_drops_keys_that_hold_names_at_any_depth():
    assert scrub({"a": [{"hostname": "x", "cores": 2}], "User": "y", "b": 1.5}) == {"a": [{"cores": 2}], "b": 1.5}


def test_a_user_who_is_called_like_an_arm_changes_no_cell(monkeypatch):
    monkeypatch.setattr(scrubbing, "own_names", lambda: ["bf16", "desk"])
    record = {"task": {"id": "desk-tiny"}, "cell": {"arm": "bf16", "path": "/home/desk/x"}, "error": {"message": "desk: no"},
              "environment": {"user": "desk", "note": "on desk"}}  # fmt: skip
    assert scrubbing.scrub_record(record) == {
        "task": {"id": "desk-tiny"}, "cell": {"arm": "bf16", "path": "<path>/x"}, "error": {"message": "<name>: no"},
        "environment": {"note": "on <name>"},
    }  # fmt: skip


@pytest.mark.parametrize("text, gone, kept", [
    ("https://me:hunter2@hub.acme.com/models?token=abc failed", ["me:", "hunter2", "acme", "abc"], ["failed"]),
    ("https://huggingface.co/x/y?token=hf_abcdefghijklm", ["hf_", "abcdef"], ["https://huggingface.co/x/y"]),
    ("token hf_abcdefghijklm, sk-proj-0123456789, ghp_0123456789abcdef", ["hf_", "sk-", "ghp_", "6789"], ["token"]),
    ("Authorization: Bearer abc.def; password=hunter2; api_key: 'x y'", ["abc", "hunter2"], ["Authorization", "password"]),
    ("mail jane.doe@lab.example", ["jane", "lab.example"], ["mail"]),
    ("10.3.4.5:29500 and fe80::1ff:fe23:4567:890a refused", ["10.3", "29500", "fe80", "890a"], ["refused"]),
    ("builder-17.lab.example, builder-18, x.lab.example, node-3:29500", ["builder", "lab.example", "node-3"], []),
    ("open /home/me/My Documents/secret project/x failed", ["Documents", "secret", "project"], ["open <path>/x failed"]),
    ("'/home/me/My Documents/plan b/x y.txt' is missing", ["Documents", "plan"], ["'<path>/x y.txt' is missing"]),
    ("~/plans/acme/x", ["plans", "acme"], ["<path>/x"]),
    ("grad_norm 3.5, vllm 0.32.0, torch.nn.Linear in config.json:12, 12:30:59, a/b", [],
     ["grad_norm 3.5, vllm 0.32.0, torch.nn.Linear in config.json:12, 12:30:59, a/b"]),
])  # fmt: skip
def test_secrets_addresses_names_and_folders_leave_a_free_text_and_nothing_else_does(text, gone, kept, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    found = scrub_text(text)
    assert not [word for word in gone if word in found], found
    assert all(word in found for word in kept), found


def test_only_listed_variables_are_published_and_none_whose_value_could_be_a_name():
    env = {"VLLM_AUTH": "a", "VLLM_EMAIL": "b", "TORCH_DSN": "c", "OMP_NUM_THREADS": "2", "VLLM_ATTENTION_BACKEND": "me@lab/x"}
    assert scrub({"env": env}) == {"env": {"OMP_NUM_THREADS": "2", "VLLM_ATTENTION_BACKEND": "<value>"}}


def test_names_leave_the_comments_of_a_task_and_its_settings_stay(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    text = f"# asked for by {USER}\nid: {USER}  # jane@lab.example has it in /home/jane/My Notes/x\nstatement: 'a # b'"
    said = scrubbing.scrub_record({"task": {"text": text}})["task"]["text"]
    assert said == f"# asked for by <name>\nid: {USER}  # <e-mail> has it in <path>/x\nstatement: 'a # b'"


HOSTILE = ['<img src=x onerror=alert(1)>', "[click](javascript:alert(1))", "a | b | c", "=1+1", "@x", "two\nlines\r\x1b[31m", "\\input{x} $x$ %"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_is_data_in_every_format(text):
    hostile = row(statement=text, reason=text, title=text, fingerprint=text)
    for shown in (tables.markdown([hostile]), readme.table([Finding(text, text, text, (text,))])):
        assert not [mark for mark in ("<img", "](javascript", "\x1b", "\r") if mark in shown]
        for line in shown.splitlines():
            columns = line.replace("\\|", "").count("|") if line.startswith("|") else 0
            assert columns in (0, 5, 11), line
    assert "\\input" not in tables.latex([hostile])
    for cells in list(csv.reader(io.StringIO(tables.comma_separated([hostile]))))[1:]:
        assert not any(cell[:1] in ("=", "+", "@", "\t", "\r") for cell in cells)
    assert tables.comma_separated([row(estimate=-1.5)]).count("-1.5") == 1, "numbers stay numbers"


def test_a_fresh_attempt_is_published_beside_the_first_and_publishing_again_adds_nothing(repo):
    first = {run.folder for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)}
    fakes.make_runs(repo, fresh=True)
    for _ in range(2):
        publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
        after = {run.folder for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)}
        assert len(after) == 12 and first < after
        assert all(folder.name.endswith(".2") for folder in after - first)


def test_another_run_never_overwrites_a_published_one(repo):
    before = {run.folder: run.record for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)}
    record = next((repo / "runs").rglob("record.json"))
    fakes.rewrite_record(record, started_utc="1999-01-01T00:00:00Z")
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    after = {run.folder: run.record for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)}
    assert len(after) == 7 and all(after[folder] == record for folder, record in before.items())


def test_limited_planned_and_older_runs_are_not_published_and_killed_ones_are(repo):
    shutil.rmtree(repo / "results")
    for record, change in zip(
        sorted((repo / "runs").rglob("record.json")), ({"status": "planned"}, {"limit": 4}, {"task": None}, {"status": "killed"})
    ):
        value = json.loads(record.read_text())
        change = change if "task" not in change else {"task": value["task"] | {"version": 99}}
        fakes.rewrite_record(record, **change)
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    assert len(published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)) == 3
    assert "killed" in {run.status for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)}


def test_a_failed_run_is_published_and_gives_way_to_its_own_resumption(repo):
    shutil.rmtree(repo / "results")
    record = next((repo / "runs").rglob("record.json"))
    error = {"class": "X", "phase": "score", "message": "m"}
    fakes.rewrite_record(record, status="failed", error=error)
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    assert json.loads((folder_of(repo) / "verdict.json").read_text())["verdict"] == "ERROR"
    fakes.rewrite_record(record, status="success", error=None)
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    assert {run.status for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)} == {"success"}
    assert len(published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)) == 6


def test_a_new_version_replaces_the_runs_of_the_old_one(repo):
    fakes.checkout(repo, fakes.TASK.replace("\nversion: 1", "\nversion: 2"))
    fakes.make_runs(repo)
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    assert {run.record["task"]["version"] for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)} == {2}
    assert len(published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)) == 6


def test_nothing_recorded_is_exit_14(repo):
    shutil.rmtree(repo / "runs")
    shutil.rmtree(repo / "results")
    assert report_verbs.publish("desk-tiny", repo / "runs", repo / "results") == 14


def test_metrics_are_zipped_without_time_or_name(repo):
    data = next((repo / "results").rglob("metrics.jsonl.gz")).read_bytes()
    assert data[3] == 0 and data[4:8] == bytes(4)  # flags: no file name; mtime 0


def test_a_published_task_is_small(repo):
    sizes = [path.stat().st_size for path in folder_of(repo).rglob("*") if path.is_file()]
    per_cell = max(
        sum(p.stat().st_size for p in run.folder.iterdir()) for run in published_runs(repo / "results", "desk-tiny", fakes.FINGERPRINT)
    )
    assert per_cell < 85_000 and sum(sizes) < 1_000_000  # 30 cells and their figures stay below 3 MB


# --- plot points -----------------------------------------------------------------------------------------------------


def test_points_hold_the_tail_all_sequences_and_exact_bins(repo):
    run = find_runs(repo / "runs", "desk-tiny")[0]
    table = pq.read_table(run.folder / "evidence" / "part-00000.parquet")
    mu, pi = (
        np.exp(np.concatenate(table[name].to_pylist()).astype(float))
        for name in ("rollout_logprobs", "trainer_logprobs")
    )
    found = points.plot_points(run.folder / "evidence")
    tail = found["token"]["is_tail"]
    shown = np.abs(found["token"]["pi"] - found["token"]["mu"])
    np.testing.assert_allclose(np.sort(shown[tail]), np.sort(np.abs(pi - mu))[-500:], rtol=1e-9)
    assert len(shown) == 3000 and tail.sum() == 500
    lengths = [len(values) for values in table["rollout_logprobs"].to_pylist()]
    assert found["sequence"]["num_tokens"].tolist() == lengths
    np.testing.assert_allclose(found["sequence"]["seq_log_ratio"].sum(), np.log(pi / mu).sum(), rtol=1e-9)
    for kind in ("by_position", "by_prob"):
        assert found[kind]["count"].sum() == len(mu)
        np.testing.assert_allclose(found[kind]["sum_k3"].sum(), run.summary["sum_k3"].sum(), rtol=1e-6)
        np.testing.assert_allclose(found[kind]["sum_abs_prob_diff"].sum(), np.abs(pi - mu).sum(), rtol=1e-9)


def test_points_do_not_depend_on_how_evidence_is_split_except_for_the_sample(tmp_path):
    table = fakes.evidence(2.0**-5, seed=0)
    for folder, cuts in (("one", [0, 48]), ("three", [0, 10, 11, 48])):
        (tmp_path / folder).mkdir()
        for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
            pq.write_table(table.slice(a, b - a), tmp_path / folder / f"part-{i:05d}.parquet")
    one, three = points.plot_points(tmp_path / "one"), points.plot_points(tmp_path / "three")
    tails = [np.sort(found["token"]["mu"][found["token"]["is_tail"]]) for found in (one, three)]
    np.testing.assert_array_equal(*tails)
    np.testing.assert_allclose(one["sequence"]["seq_log_ratio"], three["sequence"]["seq_log_ratio"], rtol=1e-12)
    np.testing.assert_array_equal(one["by_prob"]["count"], three["by_prob"]["count"])


def test_an_empty_response_is_a_point_of_length_zero(tmp_path):
    table = fakes.evidence(2.0**-5, seed=0).slice(0, 2).to_pylist()
    table[0] |= {"rollout_logprobs": [], "trainer_logprobs": []}
    pq.write_table(
        fakes.pa.Table.from_pylist(table, schema=fakes.record.EVIDENCE_SCHEMA), tmp_path / "part-00000.parquet"
    )
    found = points.plot_points(tmp_path)["sequence"]
    assert found["num_tokens"][0] == 0 and found["seq_log_ratio"][0] == 0.0 and found["num_tokens"][1] > 0


def test_points_survive_the_file(tmp_path, repo):
    found = points.plot_points(find_runs(repo / "runs", "desk-tiny")[0].folder / "evidence")
    points.write_points(tmp_path / "p.parquet", found)
    back = points.read_points(tmp_path / "p.parquet")
    assert back.keys() == found.keys()
    for kind, columns in found.items():
        assert back[kind].keys() == columns.keys()
        for name, values in columns.items():
            np.testing.assert_allclose(back[kind][name].astype(float), values.astype(float), rtol=1e-6, atol=1e-7)


def test_binned_mismatch_by_length_and_entropy_adds_up_to_that_of_all_tokens(tmp_path):
    rows = fakes.evidence(2.0**-5, seed=3).to_pylist()
    for place, line in enumerate(rows):
        line["trainer_entropies"] = [0.1 * (place % 5)] * len(line["rollout_logprobs"])
    table = fakes.pa.Table.from_pylist(rows, schema=fakes.record.EVIDENCE_SCHEMA)
    pq.write_table(table, tmp_path / "part-00000.parquet")
    found = points.plot_points(tmp_path)
    lengths = np.array([len(line["rollout_logprobs"]) for line in rows])
    r = np.concatenate([np.subtract(line["trainer_logprobs"], line["rollout_logprobs"]) for line in rows])
    for kind in ("by_position", "by_length", "by_entropy", "by_prob"):
        assert found[kind]["count"].sum() == lengths.sum()
        assert found[kind]["sum_k3"].sum() == pytest.approx(np.sum(np.expm1(r) - r), rel=1e-9)
    for low, high, count in zip(*(found["by_length"][name] for name in ("bin_low", "bin_high", "count"))):
        assert count == lengths[(lengths >= low) & (lengths < high)].sum()
    zero = found["by_entropy"]["bin_low"] == 0
    assert found["by_entropy"]["count"][zero].sum() == lengths[::5].sum(), "every fifth response has entropy 0"


# --- rows and tables -------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_tier_then_by_claim_number_never_by_verdict():
    mixed = [row(claim="C10", tier="desk"), row(claim="C2", tier="desk", verdict="FAIL"),
             row(claim="C19", tier="paper", verdict="NOT_RUN"),
             row(claim="C1", tier="node", verdict="INCONCLUSIVE")]  # fmt: skip
    ordered = sorted(mixed, key=lambda r: r.order)
    assert [(r.tier, r.claim) for r in ordered] == [("paper", "C19"), ("node", "C1"), ("desk", "C2"), ("desk", "C10")]


def test_the_table_of_arms_puts_few_arms_side_by_side_and_many_below_each_other():
    def verdict(num_arms):
        rows = [{"arm": f"a{i}", "at": {"data.num_terms": [4, 8]}, "num_launches": 2, "values": {"k3": i, "grad": None}}
                for i in range(num_arms)]  # fmt: skip
        return {"task": "t", "fingerprint": "cpu", "metrics": rows}

    few = tables.arm_table(verdict(2))
    assert few.header == ["metric", "a0 num_terms=4-8", "a1 num_terms=4-8"] and few.body == [["k3", "0", "1"], ["grad", "", ""]]
    many = tables.arm_table(verdict(9))
    assert many.header == ["arm", "k3", "grad"] and many.body[8] == ["a8 num_terms=4-8", "8", ""]
    assert tables.arm_table({"task": "t", "fingerprint": "cpu"}) is None


def test_headline_counts_every_graded_claim_and_the_false_passes_to_expect():
    mixed = [
        row(),
        row(verdict="FAIL"),
        row(verdict="INCONCLUSIVE"),
        row(verdict="NOT_RUN", chance=0.0),
        row(kind="report", verdict=None, chance=0),
    ]
    text = "1 PASS, 1 FAIL, 1 INCONCLUSIVE, 1 NOT_RUN of 4 claims; by chance alone at most 0.15 false passes expected"
    assert rows.headline(mixed) == text
    assert rows.headline([row(verdict="INVALID")]).startswith(
        "0 PASS, 0 FAIL, 0 INCONCLUSIVE, 0 NOT_RUN, 1 INVALID of 1 claims"
    )


def test_no_verdict_is_hidden_in_any_format():
    words = ("PASS", "FAIL", "INCONCLUSIVE", "NOT_RUN", "INVALID", "ERROR")
    mixed = [row(claim_id=f"C1-{word}", verdict=word) for word in words]
    for text in (tables.markdown(mixed), tables.latex(mixed), tables.comma_separated(mixed)):
        for word in words:
            assert word in text or word.replace("_", r"\_") in text


def test_claims_of_an_invalid_task_never_show_as_pass(repo):
    path = folder_of(repo) / "verdict.json"
    verdict = json.loads(path.read_text())
    verdict |= {"verdict": "INVALID", "reason": "control-floor failed"}
    verdict["claims"][0]["verdict"] = "PASS"
    path.write_text(json.dumps(verdict))
    found = rows.result_rows(repo / "results", load_all())
    assert [r.verdict for r in found] == ["INVALID", None] and "control-floor failed" in found[0].reason


def test_a_task_never_run_is_a_not_run_row_and_an_older_version_is_stale(repo):
    shutil.rmtree(repo / "results" / "desk-tiny")
    assert [(r.verdict, r.reason) for r in rows.result_rows(repo / "results", load_all())][0] == (
        "NOT_RUN",
        "no published run",
    )


def test_an_older_version_counts_as_not_run_and_says_so(repo):
    fakes.checkout(repo, fakes.TASK.replace("\nversion: 1", "\nversion: 2"))
    found = rows.result_rows(repo / "results", load_all())[0]
    assert found.verdict == "NOT_RUN" and "stale: published at version 1, the task is at version 2" in found.reason
    assert found.estimate is None


def test_counts_and_exact_claims_cannot_pass_by_chance(repo):
    task = load_task("desk-tiny")
    claim = {"id": "C1-k3-ratio", "kind": "ratio", "estimate": 58.0}
    assert rows._chance(task, claim) == pytest.approx(0.05)
    assert rows._chance(task, claim | {"estimate": None}) == 0.0
    assert rows._chance(task, claim | {"kind": "count"}) == 0.0


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (3, "3"), (11680, "11680"), (58.0398, "58"), (0.000123456, "0.000123"), ([1.5, 2], "1.5, 2"),
     ("never", "never"),
     ({"bf16": 7.64}, "bf16 7.64"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_read_well(value, text):
    assert tables.number(value) == text


def test_open_ends_of_a_region_are_infinite():
    assert (
        tables.region([16.0, None]) == "[16, ∞)"
        and tables.region([None, 0.0]) == "(−∞, 0]"
        and tables.region(None) == ""
    )


def test_latex_escapes_what_latex_reads():
    assert tables.escape_latex(r"a_b & 5 % |π−μ|^2") == r"a\_b \& 5 \% $|$$\pi$$-$$\mu$$|$\textasciicircum{}2"


def test_csv_holds_full_precision(repo):
    found = next(csv.DictReader(io.StringIO((repo / "results" / "results.csv").read_text())))
    verdict = json.loads((folder_of(repo) / "verdict.json").read_text())
    assert float(found["estimate"]) == verdict["claims"][0]["estimate"]
    assert json.loads(found["interval"]) == verdict["claims"][0]["interval"]


def test_the_precision_matrix_is_complete_or_absent(repo):
    arms = "".join(
        f"  {r}-{t}: {{precision: {{rollout: {r}, train: {t}}}}}\n"
        for r in tables.PRECISIONS
        for t in tables.PRECISIONS
    )
    head, rest = fakes.TASK.split("arms:\n")[0], fakes.TASK[fakes.TASK.index("vary:") :]
    text = (
        (head + "arms:\n" + arms + rest)
        .replace("desk-tiny", "desk-matrix")
        .replace("[bf16, fp16]}", "[bf16-bf16, fp16-fp16]}")
    )
    fakes.checkout(repo, text.replace("{arm: bf16}", "{arm: bf16-bf16}"), "desk-matrix")
    runs = fakes.make_runs(repo, task="desk-matrix")
    (matrix,) = tables.matrices(runs)
    assert matrix.num_seeds.tolist() == [[3.0] * 3] * 3
    k3 = [estimates(run.summary)["k3_nats_per_token"] for run in runs if run.arm == "bf16-fp16"]
    assert matrix.k3_nats_per_token[0, 1] == pytest.approx(np.exp(np.mean(np.log(k3))))
    assert "| rollout bf16 |" in tables.matrix_markdown("desk-matrix", "cpu", matrix)
    assert tables.matrices([run for run in runs if run.arm != "bf16-fp16"]) == []


def arm_rows(arms, routing=None):
    return [{"arm": arm, "at": {"data.num_terms": [25, 100]}, "num_launches": 5,
             "values": {"k3_nats_per_token": k3, "prob_diff_mean": k3 / 10} | ({} if routing is None else {"routing_disagreement": routing})}
            for arm, k3 in arms.items()]  # fmt: skip


def test_a_mixture_s_mismatch_and_other_experts_stand_beside_the_dense_task_of_the_same_arms_and_machine():
    protocols = {"dense": "offline_mismatch", "moe": "offline_mismatch", "doses": "offline_mismatch", "trained": "rl"}
    tasks = {name: SimpleNamespace(protocol=protocol) for name, protocol in protocols.items()}
    metrics = {"dense": arm_rows({"bf16": 1e-3, "fp16": 1e-5}), "moe": arm_rows({"bf16": 9e-3, "fp16": 9e-5, "bf16-replay": 2e-3}, 0.02),
               "doses": arm_rows({"fp32-m1": 1.0}), "trained": arm_rows({"bf16": 1e-3}, 0.03)}  # fmt: skip
    verdicts = [{"task": name, "fingerprint": "cpu", "metrics": rows} for name, rows in metrics.items()]
    assert mixtures_markdown([one for one in verdicts if one["task"] != "moe"], tasks) == [], "no mixture, no table"
    elsewhere = [{"task": "dense", "fingerprint": "other", "metrics": metrics["dense"]}]
    (section,) = mixtures_markdown(verdicts + elsewhere, tasks)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        ["dense", "dense", "bf16 num_terms=25-100", "0.001", "0.0001", ""],
        ["dense", "dense", "fp16 num_terms=25-100", "1e-05", "1e-06", ""],
        ["mixture of experts", "moe", "bf16 num_terms=25-100", "0.009", "0.0009", "0.02"],
        ["mixture of experts", "moe", "fp16 num_terms=25-100", "9e-05", "9e-06", "0.02"],
        ["mixture of experts", "moe", "bf16-replay num_terms=25-100", "0.002", "0.0002", "0.02"],
    ]


# --- everything generated --------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(repo):
    files = generated_files(repo / "results", load_all())
    assert {"RESULTS.md", "results.tex", "results.csv", "index.html"} <= files.keys() and len(files) == 8
    assert all((repo / "results" / name).read_bytes() == data for name, data in files.items())


def test_check_names_what_would_change_and_changes_nothing(repo, capsys):
    edited = [next((repo / "results").rglob(name)) for name in ("RESULTS.md", "index.html", "figure5.svg")]
    for path in edited:
        path.write_text(path.read_text() + "edited by hand")
    (folder_of(repo) / "figures" / "old.svg").write_text("<svg/>")
    (repo / "results" / "pages" / "gone.html").write_text("")
    (repo / "results" / "results.tex").unlink()
    assert report_verbs.report(repo / "results", check=True) == 1
    out = capsys.readouterr().out
    for text in (
        "RESULTS.md (different)",
        "index.html (different)",
        "figure5.svg (different)",
        "old.svg (no longer generated)",
        "gone.html (no longer generated)",
        "results.tex (missing)",
    ):
        assert text in out
    assert all(path.read_text().endswith("edited by hand") for path in edited)
    assert report_verbs.report(repo / "results") == 0
    assert report_verbs.report(repo / "results", check=True) == 0
    assert not (folder_of(repo) / "figures" / "old.svg").exists()


def test_the_readme_beside_the_results_is_kept_like_the_tables(repo):
    path = repo / "README.md"
    path.write_text("before\n{}\nstale\n{}\nbetween\n{}\nstale\n{}\nafter\n".format(*readme.FINDINGS, *readme.DOSE))
    assert report_verbs.report(repo / "results", check=True) == 1
    assert report_verbs.report(repo / "results") == 0
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nbetween\n" in text and "stale" not in text
    assert "not published yet" in text and "No RL task of the desk tier is published." in text
    assert report_verbs.report(repo / "results", check=True) == 0
    with pytest.raises(ValueError, match="README.md: found no generated part"):
        readme.with_results("no markers", [], [])


def test_a_finding_answers_from_the_verdicts_of_its_claims_and_says_where_none_is():
    shown = dict(fingerprint="cpu", task="desk-collapse", unit="share of seeds")
    rows_ = [
        row(**shown, claim_id="C36-coarse-sampler-collapses", verdict="PASS", estimate=1.0, interval=[0.55, 1.0]),
        row(**shown, claim_id="C36-without-mismatch-stable", verdict="FAIL", estimate=0.8, interval=[0.5, 1.0]),
        row(**shown, claim_id="C36-tis-rescues", verdict="INCONCLUSIVE", estimate=None, interval=None),
        row(task="desk-lora", claim_id="C20-bf16-collapses", verdict="PASS", fingerprint=None),
    ]
    cause, rescue, bf16 = findings(rows_)[2:5]
    assert cause.answer == "yes; no: also without it" and "1 [0.55, 1]" in cause.numbers and cause.tasks == ("desk-collapse",)
    assert (rescue.answer, rescue.numbers) == ("undecided", "")
    assert bf16.answer == NOT_YET, "a claim that nobody ran answers nothing"


def test_every_question_asks_claims_that_tasks_have():
    from suite.spec.reading import load_all

    tasks = load_all()
    for question, asked in QUESTIONS:
        for one in asked:
            assert one.claim_id in {claim.id for claim in tasks[one.task].claims}, (question, one)


def test_the_dose_is_the_mismatch_of_the_bf16_arms_per_token_and_per_response():
    def arm(task, name, k3, tokens):
        return {"task": task, "metrics": [{"arm": name, "values": {"k3_nats_per_token": k3, "response_tokens_mean": tokens}}]}

    told = readme.dose([arm("desk-sanity-grpo", "bf16", 2e-5, 31.0), arm("desk-sanity-gspo", "bf16", 1e-5, 31.0),
                        arm("desk-sanity-grpo", "fp16", 1.0, 1.0), arm("desk-lora", "bf16", 1.0, 1.0)])  # fmt: skip
    assert "1.0e-05 to 2.0e-05 nats of k3 per token and 3.1e-04 to 6.2e-04 per response" in told
    assert "50 to 100 times and 10000 to 20000 times as much" in told


def test_tasks_that_were_never_run_are_a_list_and_not_a_table_of_nothing():
    text = tables.markdown([row(fingerprint=None, task="waits", verdict="NOT_RUN"), row(task="ran", fingerprint="cpu")])
    assert "- `waits` (1 claim" in text and "| waits" not in text and "| ran" in text


def test_regenerating_never_blesses_a_changed_record(repo):
    record = next(folder_of(repo).rglob("record.json"))
    record.write_text(record.read_text().replace('"finished_utc": "2', '"finished_utc": "1'))
    report_verbs.report(repo / "results")
    assert report_verbs.verify(None, repo / "results") == 1


def test_figures_are_svg_with_the_exact_numbers_printed_in_them(repo):
    text = (folder_of(repo) / "figures" / "figure5.svg").read_text()
    ElementTree.fromstring(text)
    for words in (
        "sampler probability μ",
        "trainer probability π",
        "nats per 1K tokens",
        "KL[μ|π] = ",
        "144 responses",
    ):
        assert words in text
    assert text.count("#d55e00") and text.count("#0072b2") and "<dc:date>" not in text
    assert len(text) < 300_000


def test_the_page_is_self_contained_and_shows_every_row_and_figure(repo):
    page = (repo / "results" / "index.html").read_text()
    assert "1 PASS" in page or "1 INCONCLUSIVE" in page or "1 FAIL" in page
    assert "C1-k3-ratio" in page and "C2-seq" in page and f"desk-tiny/{fakes.FINGERPRINT}/figures/figure5.svg" in page
    assert "Sequence-level KL | as the paper prints it." in page
    assert "<link" not in page and 'src="http' not in page and "viewport" in page


def test_every_link_of_the_pages_leads_to_something(repo):
    results = repo / "results"
    pages = {path: path.read_text() for path in (results / "index.html", results / "pages" / "desk-tiny.html")}
    for path, text in pages.items():
        for address in re.findall(r'(?:href|src)="([^"]+)"', text):
            place, _, anchor = address.partition("#")
            if address.startswith("https://arxiv.org") or anchor.startswith("rows:"):
                continue
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), address
            assert not anchor or f'id="{anchor}"' in target.read_text(), address


def test_the_page_of_a_task_shows_its_text_runs_precision_and_how_to_run_it_again(repo):
    page = (repo / "results" / "pages" / "desk-tiny.html").read_text()
    for text in ("suite reproduce desk-tiny", "C1-k3-ratio", "Precision as executed", "runs</summary>", "id: desk-tiny", fakes.FINGERPRINT, "figures/figure5.svg"):
        assert text in page
    assert len(page) < 1_000_000 and "<script" not in page


def test_each_claim_of_the_paper_is_a_line_with_what_each_tier_came_to():
    from suite.report.matrix import claim_lines

    rows = [row(tier="desk", fingerprint="a", claim_id="C1-x"), row(tier="desk", fingerprint="b", claim_id="C1-x", verdict="FAIL"),
            row(tier="paper", fingerprint=None, verdict="NOT_RUN", claim_id="C1-y"), row(claim="C10", claim_id="C10-z", fingerprint="a", verdict=None)]  # fmt: skip
    first, second = claim_lines(rows, {"C1": "The first"})
    cells = {cell.tier: (cell.words, cell.num_machines, cell.num_claims) for cell in first.cells}
    assert (first.claim, first.title, second.claim) == ("C1", "The first", "C10")
    assert cells == {"paper": ((), 0, 1), "node": ((), 0, 0), "desk": ((("PASS", 1), ("FAIL", 1)), 2, 1)}


def drawn(**values):
    from suite.report.interval_plot import interval_plot

    return str(interval_plot(row(**values)))


def place_of(svg: str, kind: str) -> list[float]:
    return [float(number) for number in re.findall(rf'class="{kind}"[^>]*?(?:cx="|d="M|x=")([\d.]+)', svg)]


def test_a_plot_puts_what_it_shows_in_the_order_of_its_numbers():
    svg = drawn(estimate=60.0, interval=[50.0, 70.0], accept=[16, 128], paper_value=64, paper_unit="ratio", unit="ratio")
    (estimate,), (left,), (paper,), (field,) = (place_of(svg, kind) for kind in ("p-estimate", "p-interval", "p-paper", "p-accept"))
    assert field < left < estimate < paper
    assert "estimate 60; interval [50, 70]; accept [16, 128]; paper 64" in svg


def test_a_plot_leaves_out_what_it_cannot_compare_and_survives_odd_numbers():
    assert place_of(drawn(estimate=1.0, interval=None, paper_value=64, paper_unit="%", unit="share", accept=None), "p-paper") == []
    assert drawn(estimate=None, interval=None) == "" and drawn(estimate=[1, 2], interval=None) == ""
    for estimate, interval, accept in ((0.0, [0.0, 0.0], [0, 0]), (1.0, [0.5, 2.0], [None, 1.0]), (1e-9, [1e-12, 1e3], [0.0, None])):
        svg = drawn(estimate=estimate, interval=interval, accept=accept, paper_value=None)
        assert all(0 <= float(number) <= 168 for number in re.findall(r'(?:cx|x)="([\d.-]+)"', svg)) and "nan" not in svg


def test_text_from_tasks_cannot_break_the_page():
    from suite.report.page import render

    assert "&lt;script&gt;alert" in render([row(statement="<script>alert(1)</script>")], [], [])


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().verdict = "PASS"
