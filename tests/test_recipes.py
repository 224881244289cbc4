"""The recipes' data scripts on small local files of the same schemas, and their configurations."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from verl.utils.reward_score import default_compute_score

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.compose import compose_config, resolved, verl_defaults
from mxfp4_rl.launch.preflight import check_batches
from mxfp4_rl.launch.schema import check_schema
from mxfp4_rl.launch.support import check_supported
from mxfp4_rl.launch.values import check_numbers
from mxfp4_rl.settings import Settings

RECIPES = Path(__file__).parents[1] / "recipes"


def script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", RECIPES / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_rows_get_a_prompt_and_the_number_behind_the_mark(tmp_path, capsys):
    rows = [
        {"question": "Ann has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"question": "How much are 2 cars at $600?", "answer": "It is 2 * 600.\n#### 1,200"},
    ]
    train = json_lines(tmp_path / "train.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "test.parquet")
    script("gsm8k_grpo").main(["--train", str(train), "--val", str(tmp_path / "test.parquet"), "--out", str(tmp_path / "out")])
    assert "train.parquet: 2 problems" in capsys.readouterr().out
    written = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in written] == ["7", "1200"]
    assert written[0]["prompt"][0]["role"] == "user" and written[0]["prompt"][0]["content"].startswith("Ann has 3 apples")
    for row in written:  # verl's own reward reads what was written
        truth = row["reward_model"]["ground_truth"]
        assert default_compute_score(row["data_source"], f"So it is\n#### {truth}", truth) == 1.0
        assert default_compute_score(row["data_source"], "So it is\n#### 8", truth) == 0.0
    assert pyarrow.parquet.read_table(tmp_path / "out" / "val.parquet").num_rows == 1
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Q", "answer": "no mark"}\n', "no number behind '####'"),
        ('{"question": "Q"}\n', "train row 0 has no answer"),
        ('{"q": "Q"}\n', 'has no question and no answer: every row needs a text in "question" and one in "answer"'),
        ("", "holds no rows"),
        ("not json", "neither parquet"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_gsm8k_is_told(tmp_path, capsys, content, message):
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as exit:
        script("gsm8k_grpo").main(["--train", str(file), "--val", str(file), "--out", str(tmp_path / "out")])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gsm8k_grpo", "dapo_math"])
def test_both_files_or_none(tmp_path, capsys, name, monkeypatch):
    """Missing files are named together, and a set that cannot be had leaves nothing of the other."""
    module, out = script(name), tmp_path / "out"
    arguments = ["--train", str(tmp_path / "a.jsonl"), "--val", str(tmp_path / "b.jsonl"), "--out", str(out)]
    with pytest.raises(SystemExit):
        module.main(arguments)
    assert f"{tmp_path / 'a.jsonl'} and {tmp_path / 'b.jsonl'} do not exist" in capsys.readouterr().err
    good = dapo_row("1 + 1?", "2") | {"question": "1 + 1?", "answer": "#### 2"}
    json_lines(tmp_path / "a.jsonl", [good])

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(SystemExit):
        module.main([*arguments[:2], *arguments[4:]])
    assert "give local files instead" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("row", "lacks"),
    [
        ({"question": "1 + 1?"}, "lacks prompt messages and reward_model.ground_truth: every row needs"),
        ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"answer": "2"}}, "lacks reward_model.ground_truth:"),
        ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "2"}}, "lacks prompt messages:"),
        ([1], "lacks prompt messages and"),
    ],
)
def test_what_is_no_dapo_row_is_told_without_a_key_error(tmp_path, capsys, row, lacks):
    file = json_lines(tmp_path / "train.jsonl", [row])
    with pytest.raises(SystemExit):
        script("dapo_math").main(["--train", str(file), "--val", str(file), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"row 0 (math_dapo) {lacks}" in said and "KeyError" not in said
    with pytest.raises(SystemExit):
        script("dapo_math").main(["--help"])
    assert "ground_truth" in capsys.readouterr().out  # the schema


def dapo_row(problem, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": problem}],
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "a"},
    }


def test_dapo_problems_are_kept_once_and_contradictory_ones_left_out(tmp_path, capsys):
    rows = [dapo_row("1 + 1?", "2"), dapo_row("2 + 2?", "4"), dapo_row("1 + 1?", "2"), dapo_row("x?", "1"), dapo_row("x?", "2")]
    train = json_lines(tmp_path / "train.jsonl", rows)
    val = json_lines(tmp_path / "val.jsonl", [dapo_row("AIME?", "204")] * 32)
    script("dapo_math").main(["--train", str(train), "--val", str(val), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "2 problems of 5 rows, without 1 that have two answers" in said and "1 problems of 32 rows\n" in said
    written = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [row["prompt"][0]["content"] for row in written] == ["1 + 1?", "2 + 2?"]
    (aime,) = pyarrow.parquet.read_table(tmp_path / "out" / "val.parquet").to_pylist()
    assert default_compute_score(aime["data_source"], "... Answer: 204", "204")["acc"]  # what dynamic sampling filters by
    assert default_compute_score(aime["data_source"], "... Answer: 203", "204")["score"] == -1.0
    json_lines(tmp_path / "train.jsonl", [{"prompt": "a text"}])
    with pytest.raises(SystemExit):
        script("dapo_math").main(["--train", str(train), "--val", str(val), "--out", str(tmp_path / "out")])
    assert "row 0 (math_dapo) lacks prompt messages" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gsm8k_grpo", "dapo_math"])
def test_every_key_of_the_configurations_is_one_that_verl_has(name):
    assert check_schema(resolved(compose_config(name, [])), verl_defaults()) == []


@pytest.mark.parametrize("name", ["gsm8k_grpo", "dapo_math"])
def test_the_configurations_fit_together(monkeypatch, name):
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.22.0" if package == "vllm" else own(package))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mxfp4_rl.launch.support.has_flash_attention", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    config = compose_config(name, [])
    resolved(config)
    check_supported(config, Settings.from_config(config.mxfp4))
    assert check_batches(config) == []
    first = (RECIPES.parent / "configs" / f"{name}.yaml").read_text().splitlines()[0]
    assert "GPUs" in first and first.startswith("#")
    rollout = config.actor_rollout_ref.rollout
    assert rollout.max_model_len == config.data.max_prompt_length + config.data.max_response_length


def test_a_slip_in_what_the_dapo_reward_reads_is_told():
    config = resolved(compose_config("dapo_math", ["+reward.reward_kwargs.max_response_len=3"]))
    with pytest.raises(LaunchError, match=r"reward_kwargs.max_response_len .* did you mean max_resp_len"):
        check_schema(config, verl_defaults())


def test_what_verl_reads_without_declaring_it_and_numbers_of_the_users_own_are_taken():
    own = ["reward.custom_reward_function.reward_kwargs.wrong=-1", "reward.max_rpm=10"]
    own.append("actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=-1")
    config = resolved(compose_config("quickstart", [f"+{one}" for one in own]))
    assert check_schema(config, verl_defaults()) == []
    check_numbers(config, verl_defaults())
