"""`mxfp4-rl eval`: its replies are the model's, its numbers the replies', and every mistake is one sentence."""

import json
import math
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import ModelRecipe, QuantRecipe, cli, convert
from mxfp4_rl.evaluation.measure import Draw, Measured, Question, answer, summary, wilson
from mxfp4_rl.evaluation.sources import find_model, find_recipe
from mxfp4_rl.generation import Sampling
from mxfp4_rl.launch import LaunchError
from mxfp4_rl.settings import RECIPE_FILE
from mxfp4_rl.tasks import arithmetic
from mxfp4_rl.tasks.tiny_model import make_tiny_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    score = float(sum(map(ord, solution_str)) % 2 == int(ground_truth))
    return {"score": -1.0, "acc": score} if data_source == "odd" else score

def broken(**kwargs):
    raise RuntimeError("no data today")

async def later(**kwargs):
    return 1.0
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "data_source": ("odd", "even")[i % 2],
            "prompt": [{"role": "user", "content": f"number {i * i}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i % 2)},
            "extra_info": {"index": i},
        }
        for i in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "val.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder / "val.parquet"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MXFP4_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MXFP4_RL_DEBUG", raising=False)


def evaluate(*arguments, out="eval.json"):
    """The exit code, and the JSON if it was written."""
    code = cli.main(["eval", *map(str, arguments), "--out", out, "--device", "cpu"])
    return code, json.loads(Path(out).read_text()) if code == 0 else None


def own_data(data_path):
    return ["--data", data_path, "--reward", f"{data_path.parent}/reward.py:compute_score"]


def greedy_replies(path, prompts, recipe=None, tokens=10):
    """Of transformers' own generate, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    if recipe is not None:
        convert(model, recipe)
    out = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        out.append(tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return out


# ---------------------------------------------------------------------------------------------------- the numbers


def test_replies_are_the_models_and_accuracy_is_theirs(model_path, data_path):
    code, record = evaluate(model_path, *own_data(data_path), "--recipe", "mxfp4+mbs+of", "--batch", 1, "--max-new-tokens", 10)
    assert code == 0 and list(record["results"]) == ["bf16", "quantised"]
    rows = pyarrow.parquet.read_table(data_path).to_pylist()
    quant = QuantRecipe.parse("mxfp4+mbs+of")
    recipe = ModelRecipe(weight=quant, activation=quant)
    assert ModelRecipe.from_dict(record["recipe"]) == recipe
    replies = {
        "bf16": greedy_replies(model_path, [row["prompt"] for row in rows]),
        "quantised": greedy_replies(model_path, [row["prompt"] for row in rows], recipe),
    }
    assert replies["bf16"] != replies["quantised"]
    for name, texts in replies.items():
        result = record["results"][name]
        right = [sum(map(ord, text)) % 2 == int(row["reward_model"]["ground_truth"]) for text, row in zip(texts, rows)]
        assert result["accuracy"] == pytest.approx(sum(right) / len(right))
        assert result["interval"] == pytest.approx(wilson(sum(right) / len(right), len(right)))
        odd = [r for r, row in zip(right, rows) if row["data_source"] == "odd"]
        assert result["by_source"]["odd"]["accuracy"] == pytest.approx(sum(odd) / len(odd))
        assert result["questions"] == result["replies"] == 12 and result["tokens_per_second"] > 0
        for example in record["examples"]:
            row = next(row for row in rows if example["prompt"] == f"<user>{row['prompt'][0]['content']}<eos><assistant>")
            assert example[name]["reply"] == texts[row["extra_info"]["index"]]


def test_the_record_says_what_was_done(model_path, data_path, capsys):
    code, record = evaluate(model_path, *own_data(data_path), "--limit", 5, "--samples", 3, "--max-new-tokens", 4)
    assert code == 0
    said = capsys.readouterr().out
    assert "5 questions" in said and "3 samples at temperature 1" in said and "no recipe given or stored" in said
    assert "odd" in said and "even" in said and "tokens/s" in said and "solved in at least one" in said
    assert record["draw"] == {
        **{"samples": 3, "max_new_tokens": 4, "batch": 64, "seed": 0},
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": -1},
    }
    assert record["recipe"] is None and list(record["results"]) == ["bf16"]
    assert record["results"]["bf16"]["questions"] == 5 and record["results"]["bf16"]["replies"] == 15
    assert record["versions"]["packages"]["torch"] and record["versions"]["command"][:2] == ["mxfp4-rl", "eval"]


def test_samples_follow_the_seed(model_path, data_path):
    def replies(seed, batch):
        arguments = ["--samples", 2, "--max-new-tokens", 6, "--seed", seed, "--batch", batch, "--temperature", 2]
        record = evaluate(model_path, *own_data(data_path), *arguments)[1]
        return [example["bf16"]["reply"] for example in record["examples"]]

    assert replies(0, 64) == replies(0, 64) != replies(1, 64)


@pytest.mark.parametrize("task", ["arithmetic", "word_problems"])
def test_tasks_are_asked_their_held_out_problems(model_path, task):
    arguments = ["--task", task, "--task-option", "val_size=10", "--max-new-tokens", 2, "--recipe", "mxfp4", "--no-bf16"]
    code, record = evaluate(model_path, *arguments)
    assert code == 0 and list(record["results"]) == ["quantised"]
    assert record["results"]["quantised"]["questions"] == 10
    if task == "arithmetic":
        asked = {example["prompt"] for example in record["examples"]}
        assert asked <= {f"<user>{p.text}<eos><assistant>" for p in arithmetic.make_problems(val_size=10)[1]}
    else:
        assert set(record["results"]["quantised"]["by_source"]) == {f"word_problems_level{n}" for n in (1, 2, 3, 4)}


def test_task_options_reach_the_task(model_path):
    arguments = ["--task", "word_problems", "--task-option", 'levels={"2": 1}', "--task-option", "language=de"]
    code, record = evaluate(model_path, *arguments, "--limit", 3, "--max-new-tokens", 1)
    assert code == 0 and set(record["results"]["bf16"]["by_source"]) == {"word_problems_level2"}
    assert all("Antworte kurz." in example["prompt"] for example in record["examples"])


def test_a_right_model_is_right():
    """Sampling and scoring around a model that counts: replies of every question and sample meet their own question."""

    class Tokenizer:
        pad_token_id = 0

        def decode(self, ids, skip_special_tokens):
            return " ".join(str(i) for i in ids if i != 1)

    class Model(torch.nn.Module):
        """Says the last token of its prompt + 1, then 1, the end."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, **kwargs):
            following = input_ids[:, -1] + 1 if past_key_values is None else torch.ones_like(input_ids[:, -1])
            logits = torch.nn.functional.one_hot(following, 50)[:, None] * 50.0

            class Cache:
                def batch_select_indices(self, rows):
                    pass

            return type("Out", (), {"logits": logits, "past_key_values": Cache()})

    questions = [Question([5] * (i % 3) + [10 + i], f"s{i % 2}", 11 + i) for i in range(7)]
    draw = Draw(2, Sampling(1.0), 4, batch=3)
    measured = answer(Model(), Tokenizer(), questions, lambda q, text: float(text == str(q.ground_truth)), draw, {1})
    assert measured.scores == [[1.0, 1.0]] * 7 and measured.tokens == 28 and measured.ended == 14
    result = summary(questions, measured)
    assert result["accuracy"] == 1.0 and result["ended"] == 1.0 and result["mean_tokens"] == 2
    assert result["by_source"]["s0"]["questions"] == 4


def test_summary_counts_questions_not_samples():
    questions = [Question([1], "a", 0), Question([1], "a", 0), Question([1], "b", 0)]
    measured = Measured([[1, 0], [0, 0], [1, 1]], [["", ""]] * 3, 12, 3, 2.0)
    result = summary(questions, measured)
    assert result["accuracy"] == 0.5 and result["solved_once"] == pytest.approx(2 / 3) and result["ended"] == 0.5
    assert result["interval"] == wilson(0.5, 3) and result["tokens_per_second"] == 6
    assert result["by_source"]["a"]["accuracy"] == 0.25 and result["by_source"]["b"]["accuracy"] == 1
    assert summary(questions, Measured([[2, 0], [0, 0], [0, 0]], [["", ""]] * 3, 1, 1, 1.0))["interval"] is None


@settings(max_examples=200)
@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_ends_where_the_rate_is_z_deviations_off(n, data):
    rate = data.draw(st.integers(0, n)) / n
    low, high = wilson(rate, n)
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1
    for end in (low, high):
        assert abs(rate - end) == pytest.approx(1.6448536 * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-6)


def test_wilson_of_nothing():
    assert wilson(0.5, 0) is None and wilson(1.5, 3) is None


# ------------------------------------------------------------------------------------------- checkpoints, recipes


def options(**given):
    return type("Options", (), {"recipe": None, "weight": None, "activation": None, "bf16": False, **given})


def test_a_verl_checkpoint_is_found_with_its_recipe(model_path, data_path, tmp_path):
    step = tmp_path / "checkpoints" / "global_step_4"
    folder = step / "actor" / "huggingface"
    shutil.copytree(model_path, folder)
    recipe = ModelRecipe.from_dict({"macro_block": "static", "overrides": {"down_proj": {"fallback_alpha": 1.0}}})
    (step / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    for named in (step, step / "actor", folder):
        assert find_model(str(named)) == str(folder)
        assert find_recipe(options(checkpoint=str(named)), str(folder)) == (recipe, str(step / RECIPE_FILE))
    arguments = [*own_data(data_path), "--limit", 2, "--max-new-tokens", 2]
    record = evaluate(step, *arguments)[1]
    assert list(record["results"]) == ["bf16", "quantised"] and ModelRecipe.from_dict(record["recipe"]) == recipe
    assert list(evaluate(step, *arguments, "--bf16")[1]["results"]) == ["bf16"]
    other = evaluate(step, *arguments, "--weight", "nvfp4", "--no-bf16")[1]
    assert list(other["results"]) == ["quantised"]
    assert other["recipe"]["weight"]["format"] == "nvfp4" and other["recipe"]["activation"] is None
    as_file = evaluate(model_path, *arguments, "--recipe", step / RECIPE_FILE)[1]
    assert ModelRecipe.from_dict(as_file["recipe"]) == recipe
    (step / RECIPE_FILE).write_text("null\n")  # a run in BF16
    assert list(evaluate(step, *arguments)[1]["results"]) == ["bf16"]


def test_the_trainer_stores_its_recipe_under_that_name():
    trainer = pytest.importorskip("mxfp4_rl.verl_plugin.trainer")
    assert trainer.RECIPE_FILE == RECIPE_FILE


def test_a_folder_or_the_default_gets_the_json(model_path, data_path, tmp_path):
    arguments = ["eval", str(model_path), *map(str, own_data(data_path)), "--limit", "1", "--max-new-tokens", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "new" / "folder")]) == 0
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["eval.json"]
    assert cli.main(arguments) == 0
    assert [p.name for p in (tmp_path / "runs" / "eval").rglob("*.json")] == ["eval.json"]


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], ["nowhere", "does not exist"]),
        (["."], ["no config.json", "global_step_N"]),
        (["no-such-organisation/no-such-model"], ["no-such-organisation", "cannot be loaded"]),
        (["{model}", "--task", "word_problem"], ["did you mean 'word_problems'"]),
        (["{model}", "--task-option", "nope=1"], ["nope"]),
        (["{model}", "--task-option", "nope"], ["KEY=VALUE"]),
        (["{model}", "--task-option", "val_size=0"], ["val_size=0"]),
        (["{model}", "--recipe", "mxfp4+mbz"], ["--recipe", "'mbz'"]),
        (["{model}", "--recipe", "absent.json"], ["absent.json", "cannot be read"]),
        (["{model}", "--recipe", "mxfp4", "--weight", "mxfp4"], ["--recipe is for both", "--weight"]),
        (["{model}", "--weight", "none"], ["nothing is quantised"]),
        (["{model}", "--recipe", "mxfp4+sr"], ["stochastic"]),
        (["{model}", "--bf16", "--recipe", "mxfp4"], ["--bf16", "--recipe"]),
        (["{model}", "--no-bf16"], ["--no-bf16 needs a recipe"]),
        (["{model}", "--samples", "0"], ["--samples 0"]),
        (["{model}", "--samples", "2", "--temperature", "0"], ["all the same"]),
        (["{model}", "--temperature", "-1"], ["--temperature -1"]),
        (["{model}", "--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["{model}", "--data", "absent.parquet"], ["absent.parquet"]),
        (["{model}", "--data", "{data}", "--task", "arithmetic"], ["--task", "one of them"]),
        (["{model}", "--reward", "x.py:f"], ["--reward is for --data"]),
        (["{model}", "--data", "{data}", "--reward", "reward.py"], ["FUNCTION"]),
        (["{model}", "--data", "{data}", "--reward", "absent.py:f"], ["absent.py"]),
        (["{model}", "--data", "{data}", "--reward", "{folder}/reward.py:nope"], ["nope"]),
        (["{model}", "--data", "{data}", "--reward", "{folder}/reward.py:later"], ["asynchronous"]),
        (["{model}", "--data", "{data}", "--reward", "{folder}/reward.py:broken"], ["'odd'", "no data today"]),
        (["{model}", "--data", "{data}"], ["default_compute_score", "data source"]),
        (["{model}", "--device", "tpu"], ["--device 'tpu'"]),
        (["{model}", "--device", "cuda:99"], ["cuda:99", "GPUs"]),
        (["{model}", "--out", "{data}/x"], ["--out", "no folder"]),
        (["{model}", "more"], ["unexpected argument more"]),
    ],
)
def test_mistakes_are_one_sentence(model_path, data_path, tmp_path, capsys, arguments, said):
    names = {"model": model_path, "data": data_path, "folder": data_path.parent}
    assert cli.main(["eval", *(argument.format(**names) for argument in arguments)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mxfp4-rl: ") and all(part in message for part in said), message
    assert not list(tmp_path.rglob("*.json"))


def test_a_recipe_that_does_not_fit_the_model_is_told_before_it_is_measured(model_path, data_path, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps({"exclude": ["no_such_layer"]}))
    code = cli.main(["eval", str(model_path), *map(str, own_data(data_path)), "--recipe", "recipe.json"])
    assert code == 2 and "no_such_layer" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_parts_of_verls_checkpoint_without_the_model_are_explained(model_path, tmp_path, capsys):
    folder = tmp_path / "global_step_1" / "actor" / "huggingface"
    shutil.copytree(model_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert cli.main(["eval", str(tmp_path / "global_step_1")]) == 2
    message = capsys.readouterr().err
    assert "verl.model_merger merge --backend fsdp" in message and str(tmp_path / "global_step_1" / "merged") in message
    assert "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]" in message


def test_a_merged_verl_checkpoint_is_found_with_its_recipe(model_path, tmp_path):
    step = tmp_path / "checkpoints" / "global_step_4"
    parts, merged = step / "actor" / "huggingface", step / "merged"
    shutil.copytree(model_path, parts, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(model_path, merged)
    recipe = ModelRecipe.from_dict({"macro_block": "static"})
    (step / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    for named in (step, step / "actor", parts, merged):
        assert find_model(str(named)) == str(merged)
        assert find_recipe(options(checkpoint=str(named)), str(merged)) == (recipe, str(step / RECIPE_FILE))
    for weights in merged.glob("*.safetensors"):  # a merge that was cut off
        weights.unlink()
    with pytest.raises(LaunchError, match="verl saved them in parts"):
        find_model(str(step))


def test_an_interrupt_leaves_no_file(model_path, data_path, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mxfp4_rl.evaluation.measure.answer", interrupt)
    assert cli.main(["eval", str(model_path), *map(str, own_data(data_path)), "--out", str(tmp_path / "o")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "o").exists()
