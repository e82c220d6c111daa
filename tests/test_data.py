"""Prompt sets: the named file or none, each problem once, the templates exact to the character."""

import hashlib
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from suite.errors import DataError, NotRunnable
from suite.problems.data import INSTRUCTION, fill_template, load_prompts, token_ids

needs_published = pytest.mark.skipif(
    not os.environ.get("SUITE_DATA_DIR"), reason="SUITE_DATA_DIR is not set: the authors' files are not here"
)


def verl_row(problem: str, gold: str) -> dict:
    turn = {"role": "user", "content": problem + INSTRUCTION}
    return {"prompt": [turn], "reward_model": {"ground_truth": gold, "style": "rule"}}


def write(path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def three_rows(folder):
    """Two problems in three rows, VeRL layout: (file section, sha256)."""
    sha256 = write(folder / "set.parquet", [verl_row("1+1?", "2"), verl_row("2+2?", "4"), verl_row("1+1?", "2")])
    return {"name": "set.parquet", "sha256": sha256, "rows": 3}


def test_copies_are_kept_once_in_order(three_rows):
    prompts = load_prompts({"id": "set", "files": [three_rows], "rows": 3, "unique_rows": 2})
    assert [(one.prompt_id, one.text, one.gold, one.meta["copies"]) for one in prompts] == [
        ("set/00000", "1+1?", ("2",), 2),
        ("set/00001", "2+2?", ("4",), 1),
    ]


def test_num_prompts_takes_the_first(three_rows):
    assert [one.gold for one in load_prompts({"files": [three_rows], "num_prompts": 1})] == [("2",)]


def test_files_follow_each_other(three_rows, folder):
    write(folder / "more.parquet", [{"problem": "3+3?", "answer": "6"}])
    prompts = load_prompts({"files": [{"name": "more.parquet", "sha256": "unknown"}, three_rows]})
    assert [one.prompt_id for one in prompts] == ["more/00000", "set/00000", "set/00001"]


def test_oat_answers_become_text(folder):
    write(folder / "texts.parquet", [{"problem": "a", "answer": "\\frac{1}{2}"}])
    write(folder / "numbers.parquet", [{"problem": "b", "answer": 142.0}, {"problem": "c", "answer": 0.5}])
    write(folder / "lists.parquet", [{"problem": "d", "answer": ["0.01\n", "0.02\n"]}])
    files = [{"name": f"{name}.parquet"} for name in ("texts", "numbers", "lists")]
    golds = [one.gold for one in load_prompts({"files": files})]
    assert golds == [("\\frac{1}{2}",), ("142",), ("0.5",), ("0.01", "0.02")]


def test_another_file_is_refused_with_both_hashes(three_rows, folder):
    wrong = "0" * 64
    with pytest.raises(DataError) as error:
        load_prompts({"files": [three_rows | {"sha256": wrong}]})
    assert all(text in str(error.value) for text in (wrong, three_rows["sha256"], str(folder / "set.parquet")))


def test_the_hash_is_checked_before_the_file_is_parsed(folder):
    (folder / "set.parquet").write_bytes(b"binary \0 garbage")
    with pytest.raises(DataError, match="sha256"):
        load_prompts({"files": [{"name": "set.parquet", "sha256": "0" * 64}]})
    with pytest.raises(DataError, match="a readable parquet file"):
        load_prompts({"files": [{"name": "set.parquet", "sha256": "unknown"}]})


@pytest.mark.parametrize("count", [{"rows": 4}, {"unique_rows": 3}, {"files_rows": 2}])
def test_counts_that_differ_are_refused(three_rows, count):
    data = {"files": [three_rows | ({"rows": 2} if "files_rows" in count else {})], **count}
    with pytest.raises(DataError, match="rows: found [23], the task names [234]"):
        load_prompts(data)


def test_rows_that_cannot_be_used_are_named(folder):
    for rows, says in (
        ([{"question": "1+1?", "answer": "2"}], "row 0: found answer '2'"),
        ([{"problem": "1+1?", "answer": [""]}, {"problem": "1+1?", "answer": []}], r"row 1: found answer \[\]"),
        ([{"problem": "1+1?", "answer": "2"}, {"problem": None, "answer": "2"}], "row 1: .*problem None"),
        ([{"problem": "a", "answer": 0.5}, {"problem": "b", "answer": float("nan")}], "row 1: found answer nan"),
        ([{"problem": "a", "answer": float("inf")}], "row 0: found answer inf"),
        ([{"problem": 5, "answer": "2"}], "problem: found a column of int64"),
        ([{"problem": "a", "answer": {"text": "2"}}], "answer: found a column of struct"),
        ([{"question": "a"}], "row 0: found question 'a'"),
    ):
        write(folder / "odd.parquet", rows)
        with pytest.raises(DataError, match=says):
            load_prompts({"files": [{"name": "odd.parquet"}]})


def test_a_file_without_rows_is_no_problem_file(folder):
    pq.write_table(pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), folder / "no.parquet")
    with pytest.raises(DataError, match="found no rows"):
        load_prompts({"files": [{"name": "no.parquet"}]})


def test_text_that_is_not_utf8_is_refused(folder):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"problem": bad, "answer": ["2"]}), folder / "bad.parquet")
    with pytest.raises(DataError, match="UTF"):
        load_prompts({"files": [{"name": "bad.parquet"}]})


def test_a_flipped_byte_is_read_or_refused_and_never_a_traceback(folder):
    write(folder / "whole.parquet", [verl_row(f"{i}+{i}?", str(2 * i)) for i in range(50)])
    whole, refused = (folder / "whole.parquet").read_bytes(), 0
    for at in range(0, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[at] ^= 0x55
        (folder / "flipped.parquet").write_bytes(flipped)
        try:
            load_prompts({"files": [{"name": "flipped.parquet"}]})
        except DataError:
            refused += 1
    assert refused > 5


def test_a_file_that_is_small_on_disk_only_is_refused_by_its_metadata(folder):
    pq.write_table(pa.table({"problem": ["a"] * 1000, "answer": [["x"] * 20_000] * 1000}), folder / "bomb.parquet")
    assert (folder / "bomb.parquet").stat().st_size < 2**20
    with pytest.raises(DataError, match="MiB once read"):
        load_prompts({"files": [{"name": "bomb.parquet"}]})


def test_a_path_wins_over_the_data_folder(three_rows, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other / "set.parquet", [verl_row("9+9?", "18")])
    for path in (other, other / "set.parquet"):
        prompts = load_prompts({"path": str(path), "files": [{"name": "set.parquet"}]})
        assert [one.gold for one in prompts] == [("18",)]
    with pytest.raises(DataError, match="found a folder"):
        load_prompts({"path": str(other)})
    with pytest.raises(DataError, match="no such file"):
        load_prompts({"path": str(other / "gone"), "files": [{"name": "set.parquet"}]})


@pytest.mark.parametrize("variable", ["", "a folder without it"])
def test_without_the_file_nothing_can_run_and_the_reason_says_what_to_do(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_DATA_DIR", str(tmp_path) if variable else "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotRunnable) as error:
        load_prompts({"id": "somebody/something", "files": [{"name": "set.parquet"}]})
    assert all(text in str(error.value) for text in ("SUITE_DATA_DIR", "somebody/something", "set.parquet"))


def test_desk_problems_come_from_the_seed():
    data = {"id": "desk", "template": "desk", "num_prompts": 5, "num_terms": [4, 6]}
    first, again, other = load_prompts(data, 1), load_prompts(data, 1), load_prompts(data, 2)
    assert first == again and {one.text for one in first}.isdisjoint({one.text for one in other})
    for one in first:
        digits = [int(digit) for digit in re.findall(r"\d", one.meta["problem"].removeprefix("Sum mod 100:"))]
        assert 4 <= len(digits) <= 6 and one.gold == (str(sum(digits) % 100),)
    with pytest.raises(DataError, match="num_prompts"):
        load_prompts({"template": "desk"})


def test_templates_to_the_character():
    instructed = "1+1? Please reason step by step, and put your final answer within \\boxed{}.\n"
    assert fill_template("none", "1+1?") == fill_template(None, "1+1?") == {"text": "1+1?"}
    assert fill_template("verl_r1", "1+1?") == {"messages": ({"role": "user", "content": instructed},)}
    assert fill_template("r1", "1+1?") == {"text": f"<｜begin▁of▁sentence｜><｜User｜>{instructed}<｜Assistant｜><think>\n"}
    assert fill_template("qwen_math", "1+1?") == {
        "text": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    }
    tagged = fill_template("octothinker", "1+1?")["text"]
    assert tagged.startswith("A conversation between User and Assistant. The User asks a question,")
    assert tagged.endswith("<answer> answer here </answer>.\nUser: 1+1?\nAssistant: <think>")


def test_chat_prompts_go_through_the_tokenizers_own_template(three_rows):
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize and add_generation_prompt
            return f"<user>{messages[0]['content']}<assistant>"

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return list(text.encode())

    chat, plain = (load_prompts({"files": [three_rows], "template": name})[0] for name in ("verl_r1", "none"))
    assert bytes(token_ids(chat, Tokenizer())).decode() == f"<user>1+1?{INSTRUCTION}<assistant>"
    assert bytes(token_ids(plain, Tokenizer())).decode() == "1+1?"


@needs_published
@pytest.mark.parametrize(
    "name, problems",
    [("aime_2024", 30), ("aime_2025", 30), ("oat_aime_2024", 30), ("amc", 83), ("math_500", 500), ("minerva", 272),
     ("olympiad_bench", 675), ("math_1460", 1460)],
)  # fmt: skip
def test_every_published_file_can_be_read(name, problems):
    prompts = load_prompts({"files": [{"name": f"{name}.parquet"}], "unique_rows": problems, "template": "r1"})
    assert len({one.prompt_id for one in prompts}) == problems
    assert all(one.text.count(INSTRUCTION.strip()) == 1 and all(one.gold) for one in prompts)


@needs_published
def test_both_copies_of_aime_2024_are_the_same_problems():
    verl, oat = (load_prompts({"files": [{"name": name}]}) for name in ("aime_2024.parquet", "oat_aime_2024.parquet"))
    assert {one.text.strip(): one.gold for one in verl} == {one.text.strip(): one.gold for one in oat}
