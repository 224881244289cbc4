"""The command line and the launcher: every mistake is told before Ray starts, and no run leaves a process behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import mxfp4_rl
from mxfp4_rl import checkpoints, cli
from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.compose import compose_config, list_configs, resolved
from mxfp4_rl.launch.failure import find_failure
from mxfp4_rl.launch.preflight import prepare
from mxfp4_rl.launch.processes import RUN_ID_VARIABLE, RunProcesses
from mxfp4_rl.launch.progress import Tail, phase_of, step_text, validation_text
from mxfp4_rl.launch.records import LOCAL_RAY_KEYS, versions, write_records
from mxfp4_rl.launch.run_dir import claim_run_dir
from mxfp4_rl.monitor.live import LiveRun


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    from mxfp4_rl.tasks.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def surroundings(tmp_path, tmp_path_factory, monkeypatch):
    """A working directory and a cache of our own, no cluster, and no way to start a child by mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MXFP4_RL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "MXFP4_RL_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_child(monkeypatch):
    monkeypatch.setattr("mxfp4_rl.launch.run.launch", lambda *a, **k: pytest.fail("the run was started"))


def quickstart(model_dir, *overrides):
    """Arguments of a run of the tiny model."""
    return ["train", f"actor_rollout_ref.model.path={model_dir}", *overrides]


def prepared(model_dir, *overrides):
    run = prepare(compose_config("quickstart", quickstart(model_dir, *overrides)[1:]))
    run.run_dir.release()
    return run


# ---- mistakes


def write_parquet(path, rows=16, columns=("prompt", "data_source", "reward_model")):
    import pyarrow
    import pyarrow.parquet

    values = {
        "prompt": [[{"role": "user", "content": "1+1?"}]] * rows,
        "data_source": ["x"] * rows,
        "reward_model": [{"style": "rule", "ground_truth": "2"}] * rows,
    }
    pyarrow.parquet.write_table(pyarrow.table({name: values[name] for name in columns}), path)
    return path


MISTAKES = {
    "flash attention on a CPU": (
        ["actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2"],
        ["attn_implementation=flash_attention_2", "sdpa"],
    ),
    "tensor parallel": (["actor_rollout_ref.rollout.tensor_model_parallel_size=2"], ["tensor_model_parallel_size=2", "use 1"]),
    "epochs": (
        ["trainer.total_training_steps=500", "trainer.total_epochs=1"],
        ["total_training_steps=500", "trainer.total_epochs="],
    ),
    "noise as text": (["mxfp4.aqn.enable=off"], ["mxfp4.aqn.enable='off'", "true or false"]),
    "sigma as text": (["mxfp4.aqn.sigma_start=abc"], ["mxfp4.aqn.sigma_start='abc'", "number"]),
    "FP32 compute": (
        ["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32"],
        ["param_dtype=fp32", "make them the same"],
    ),
    "unsupported rollout": (
        ["actor_rollout_ref.rollout.name=sglang"],
        ["rollout.name=sglang", "mxfp4_hf or vllm", "enable=false"],
    ),
    "an alarm without its metric": (
        ["mxfp4.mismatch.stop=true", "algorithm.rollout_correction.bypass_mode=true"],
        ["mismatch.stop", "bypass_mode=false"],
    ),
    "vLLM on a CPU": (["actor_rollout_ref.rollout.name=vllm"], ["needs a GPU", "rollout.name=mxfp4_hf"]),
    "another recipe in the rollout": (
        ["++actor_rollout_ref.rollout.custom.mxfp4={enable: true}"],
        ["rollout.custom.mxfp4", "two different models"],
    ),
    "router replay": (["actor_rollout_ref.rollout.enable_rollout_routing_replay=true"], ["Megatron", "enable=false"]),
    "LoRA": (["actor_rollout_ref.model.lora_rank=8"], ["lora_rank=8", "enable=false"]),
    "FSDP1 on a CPU": (["actor_rollout_ref.actor.strategy=fsdp"], ["strategy=fsdp", "use fsdp2"]),
    "other bits": (["actor_rollout_ref.rollout.dtype=float32"], ["rollout.dtype=float32", "make them the same"]),
    "other trainer": (["trainer.v1.trainer_mode=sync"], ["trainer_mode=sync", "mxfp4_sync"]),
    # overrides -> what the message must contain: the value, and the fix
    "unknown key": (["trainer.total_step=3"], ["trainer.total_step", "trainer.total_epochs"]),
    "unknown deep key": (["actor_rollout_ref.actor.optim.lrr=1"], ["did you mean actor_rollout_ref.actor.optim.lr?"]),
    "right key, wrong place": (["trainer.lr=1"], ["did you mean actor_rollout_ref.actor.optim.lr"]),
    "unknown key deleted": (["~trainer.nnode"], ["trainer.nnode ", "trainer.nnodes"]),
    "key added twice": (["+trainer.nnodes=1"], ["trainer.nnodes=1", "remove + prefix"]),
    "no value": (["trainer.nnodes"], ["trainer.nnodes", "write key=value"]),
    "unbalanced": (["trainer.logger=[console"], ["trainer.logger=[console", "write key=value"]),
    "unknown choice": (["data=gsm8k"], ["data/gsm8k", "legacy_data"]),
    "unknown config": (["--config-name", "quickstrat"], ["quickstrat", "did you mean quickstart?"]),
    "no config dir": (["--config-dir", "nowhere"], ["nowhere", "give the folder"]),
    "unknown option": (["--config-nam", "x"], ["--config-nam", "--help"]),
    "broken interpolation": (["trainer.project_name=${trainer.nope}"], ["trainer.nope"]),
    "unknown block key": (["mxfp4.recpe.alpha=1"], ["'recpe'", "did you mean 'recipe'?"]),
    "unknown recipe key": (["mxfp4.recipe.fallback_alpa=1"], ["'fallback_alpa'", "did you mean 'fallback_alpha'?"]),
    "unknown operand key": (["mxfp4.recipe.weight.macrosize=64"], ["'macrosize'", "did you mean 'macro_size'?"]),
    "unknown aqn key": (["mxfp4.aqn.sigma=1"], ["'sigma'", "sigma_"]),
    "alpha 0": (["mxfp4.recipe.fallback_alpha=0"], ["fallback_alpha=0", "(0, 1]", "0.5"]),
    "macro size": (["mxfp4.recipe.macro_size=100"], ["macro_size=100", "try 96"]),
    "mx without grad": (["mxfp4.recipe.dgrad=mx"], ["grad", "'ste'"]),
    "enable": (["mxfp4.enable=maybe"], ["mxfp4.enable='maybe'", "true or false"]),
    "aqn order": (["mxfp4.aqn.sigma_end=0.5"], ["sigma_end=0.5", "sigma_end <= sigma_start"]),
    "task as text": (["mxfp4.task=arithmetic"], ["mxfp4.task='arithmetic'", "mxfp4.task.name=arithmetic"]),
    "unknown task": (["mxfp4.task.name=arithmetics"], ["'arithmetics'", "did you mean 'arithmetic'"]),
    "unknown task option": (["mxfp4.task.nope=1"], ["nope", "mxfp4_rl.tasks.arithmetic"]),
    "no model": (["actor_rollout_ref.model.path=/no/such/model"], ["/no/such/model", "give a folder"]),
    "model name": (["actor_rollout_ref.model.path=smollm2-135m"], ["did you mean smollm2-135m-instruct?"]),
    "hub model": (
        ["actor_rollout_ref.model.path=no-such-org/no-such-model"],
        ["no-such-org/no-such-model", "download it"],
    ),
    "no such layer": (["mxfp4.recipe.exclude=[nope_proj]"], ["nope_proj", "layers are named like"]),
    "nothing left": (["mxfp4.recipe.exclude=['re:proj']"], ["nothing to quantise", "change the recipe"]),
    "steps": (["trainer.total_training_steps=0"], ["trainer.total_training_steps=0", "positive integer, or null"]),
    "steps unknown": (
        ["trainer.total_training_steps=null", "data.filter_overlong_prompts=true", "mxfp4.aqn.enable=true"],
        ["trainer.total_training_steps is null", "set trainer.total_training_steps"],
    ),
    "batch": (["data.train_batch_size=4"], ["ppo_mini_batch_size=8 exceeds data.train_batch_size=4", "use 4"]),
    "sizes that contradict each other": (
        [
            *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5"),
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
        ],
        [
            *("ppo_mini_batch_size=8 exceeds data.train_batch_size=4: use 4", "ppo_micro_batch_size_per_gpu=5 does not divide"),
            *("log_prob_micro_batch_size_per_gpu=64 does not divide", "the 16 samples", "; "),
        ],
    ),
    "learning rate as text": (
        ["actor_rollout_ref.actor.optim.lr=fast"],
        ["lr='fast' must be a number, such as actor_rollout_ref.actor.optim.lr=1e-06"],
    ),
    "count as text": (["trainer.nnodes=two"], ["trainer.nnodes='two' must be an integer, such as trainer.nnodes=1"]),
    "both files missing": (
        ["mxfp4.task=null", "data.train_files=/no/a.parquet", "data.val_files=/no/b.parquet"],
        ["data.train_files: no data file /no/a.parquet", "; data.val_files: no data file /no/b.parquet"],
    ),
    "no task of that name": (["mxfp4.task.name=gsm8k"], ["'gsm8k'", "arithmetic, word_problems", "data.train_files"]),
    "alpha, whose key it was": (["mxfp4.recipe.fallback_alpha=3"], ["mxfp4-rl: mxfp4.recipe.fallback_alpha=3 is outside"]),
    "alpha of one operand": (
        ["mxfp4.recipe.weight.fallback_alpha=3"],
        ["mxfp4-rl: mxfp4.recipe.weight.fallback_alpha=3 is outside"],
    ),
    "rows": (
        ["data.train_batch_size=80000", "actor_rollout_ref.actor.ppo_mini_batch_size=80000"],
        ["data.train_batch_size=80000", "rows of the training data"],
    ),
    "micro batch": (
        ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5"],
        ["ppo_micro_batch_size_per_gpu=5", "32 samples", "use 4"],
    ),
    "log-prob micro batch": (
        ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64"],
        ["log_prob_micro_batch_size_per_gpu=64", "use 32"],
    ),
    "no micro batch": (
        ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=null"],
        ["ppo_micro_batch_size_per_gpu is null", "e.g. 32"],
    ),
    "old micro batch": (
        ["actor_rollout_ref.actor.ppo_micro_batch_size=8"],
        ["ppo_micro_batch_size=8 is deprecated", "_per_gpu"],
    ),
    "workers": (
        ["trainer.n_gpus_per_node=3", "ray_kwargs.ray_init.num_gpus=3"],
        ["ppo_mini_batch_size=8", "3 data-parallel workers", "multiple of 3"],
    ),
    "dynamic batch": (
        ["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"],
        ["log_prob_use_dynamic_bsz=True must equal"],
    ),
    "logical GPUs": (["ray_kwargs.ray_init.num_gpus=0"], ["num_gpus=0", "num_gpus=1"]),
    "nodes": (["trainer.nnodes=2"], ["trainer.nnodes=2", "RAY_ADDRESS"]),
    "resume mode": (["trainer.resume_mode=always"], ["trainer.resume_mode=always", "auto, disable, resume_path"]),
    "checkpoints kept": (["trainer.max_actor_ckpt_to_keep=0"], ["trainer.max_actor_ckpt_to_keep=0", "null to keep all"]),
    "checkpoints written later": (
        ["actor_rollout_ref.actor.checkpoint.async_save=true"],
        ["async_save=true", "set it to false"],
    ),
    "resume path": (["trainer.resume_mode=resume_path"], ["trainer.resume_from_path=None", "global_step_N"]),
    "run dir": (["mxfp4.run_dir=/proc/nope/run"], ["mxfp4.run_dir=/proc/nope/run", "that you can write to"]),
}


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_anything_starts(overrides, expected, model_dir, tmp_path, no_child, capsys):
    own_model = [f"actor_rollout_ref.model.path={model_dir}"] if "model.path" not in str(overrides) else []
    assert cli.main(["train", *own_model, *overrides]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mxfp4-rl: ")
    for part in expected:
        assert part in message
    assert "Traceback" not in message and len(message) < 700 and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no run directory is left behind


def test_gpu_that_is_not_there(model_dir, no_child, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(quickstart(model_dir, "trainer.device=cuda", "trainer.n_gpus_per_node=2")) == 2
    assert "torch sees 1 GPU(s): lower n_gpus_per_node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare_folder", "expected"),
    [
        (lambda folder: None, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no weights"),
        (
            lambda folder: [(folder / "config.json").write_text("{}"), (folder / "model.safetensors").write_bytes(b"")],
            "is not a causal language model that can be built",
        ),
    ],
)
def test_incomplete_model_folders(prepare_folder, expected, tmp_path, no_child, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    prepare_folder(folder)
    assert cli.main(quickstart(folder)) == 2
    assert expected in capsys.readouterr().err


def test_a_model_without_linear_layers(tmp_path, no_child, capsys):
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))  # GPT-2's layers are Conv1D
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert cli.main(quickstart(tmp_path)) == 2
    assert "nothing to quantise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no data file"),
        (lambda path: path.write_text("hello"), "is not a Parquet file"),
        (lambda path: write_parquet(path, columns=("prompt",)), "lacks data_source, reward_model"),
        (lambda path: write_parquet(path, rows=0), "has no rows"),
        (lambda path: write_parquet(path, rows=3), "exceeds the 3 rows"),
    ],
)
def test_unusable_data(make, expected, model_dir, tmp_path, no_child, capsys):
    make(tmp_path / "train.parquet")
    val = write_parquet(tmp_path / "val.parquet")
    files = [f"data.train_files={tmp_path / 'train.parquet'}", f"data.val_files={val}"]
    assert cli.main(quickstart(model_dir, "mxfp4.task=null", *files)) == 2
    assert expected in capsys.readouterr().err


def test_git_revisions_are_recorded(tmp_path, monkeypatch):
    """Of the checkout that the package runs from, and of the repository that the run is started in."""
    assert versions([])["git"]["working_directory"] is None  # as in a folder of no repository
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    file = tmp_path / "mine.yaml"
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        file.write_text("a: 1\n")
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert versions([])["git"]["working_directory"] == commit
    file.write_text("a: 2\n")
    assert versions([])["git"]["working_directory"] == f"{commit}+"

    # Installed into the user's repository, as in a virtual environment there, the package has no revision of its own.
    monkeypatch.setattr(mxfp4_rl, "__file__", str(tmp_path / "__init__.py"))
    assert versions([])["git"]["mxfp4_rl"] is None
    (tmp_path / "__init__.py").touch()
    subprocess.run([*git, "add", "."], check=True)
    assert versions([])["git"]["mxfp4_rl"] == f"{commit}+"


def test_config_without_the_block(tmp_path, no_child, capsys):
    (tmp_path / "plain.yaml").write_text("defaults: [ppo_trainer, _self_]\n")
    assert cli.main(["train", "--config-dir", str(tmp_path), "--config-name", "plain"]) == 2
    assert "add `- mxfp4` after `- ppo_trainer`" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("MXFP4_RL_DEBUG", "1")
    with pytest.raises(LaunchError):
        cli.main(["train", "trainer.nope=1"])


def test_a_mistake_loads_neither_ray_nor_torch():
    script = "import sys; from mxfp4_rl.cli import main; code = main(['train', 'mxfp4.recipe.fallback_alpha=2']); "
    script += "print(code, [m for m in ('ray', 'torch', 'verl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


# ---- what a good command line becomes


def test_attention_may_be_left_to_transformers_on_a_cpu(model_dir):
    run = prepared(model_dir, "actor_rollout_ref.model.override_config.attn_implementation=null")
    assert run.config["actor_rollout_ref"]["model"]["override_config"]["attn_implementation"] is None


def test_help_version_and_printed_config(capsys):
    for arguments, expected in ((["--version"], mxfp4_rl.__version__), (["train", "--help"], "quickstart  ")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    assert "mxfp4" not in list_configs()  # a building block, not a run
    assert cli.main(["train", "trainer.nnodes=1", "--print-config", "mxfp4.recipe.weight.macro_size=64"]) == 0
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    assert config["mxfp4"]["recipe"]["weight"] == {"macro_size": 64}
    assert config["actor_rollout_ref"]["actor"]["fsdp_config"]["mxfp4"] == config["mxfp4"]


def test_dry_run_checks_and_leaves_nothing(model_dir, tmp_path, no_child, capsys):
    assert cli.main(quickstart(model_dir, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "14 Linear layers quantised" in out and "mxfp4 rceil + MBS static 128 + OF 1" in out
    assert list(tmp_path.iterdir()) == []


def test_resolved_config(model_dir, tmp_path):
    run = prepared(model_dir, "trainer.total_training_steps=null", "trainer.total_epochs=2", "mxfp4.task.train_size=40")
    config = run.config
    assert run.total_steps == config["trainer"]["total_training_steps"] == 2 * (40 // 8)
    assert config["actor_rollout_ref"]["rollout"]["custom"]["total_training_steps"] == 10
    assert config["mxfp4"]["run_dir"] == str(tmp_path / "runs/quickstart")
    assert config["trainer"]["default_local_dir"] == str(tmp_path / "runs/quickstart/checkpoints")
    assert config["reward"]["custom_reward_function"]["path"] == "pkg://mxfp4_rl.tasks.arithmetic"
    assert Path(config["data"]["train_files"]).is_file() and Path(config["data"]["val_files"]).is_file()
    assert "${" not in json.dumps(config)


def test_own_config_dir_and_data(model_dir, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [quickstart, _self_]\ntrainer: {total_stepz: 3}\nmxfp4: {task: null, aqn: {enable: false}}\n"
    )
    files = [f"data.{name}_files={write_parquet(tmp_path / f'{name}.parquet')}" for name in ("train", "val")]
    config = compose_config("mine", [f"actor_rollout_ref.model.path={model_dir}", *files], tmp_path)
    with pytest.raises(LaunchError, match=r"trainer\.total_stepz .* did you mean trainer\.total_epochs\?"):
        prepare(config)
    run = prepare(config, added=["trainer.total_stepz"])  # as `+trainer.total_stepz=3` on the command line
    run.run_dir.release()
    assert any("trainer.total_stepz" in warning and "did you mean" in warning for warning in run.warnings)
    assert run.config["reward"]["custom_reward_function"]["path"] is None


def test_plain_verl_skips_the_model_check(tmp_path, monkeypatch):
    monkeypatch.setattr("mxfp4_rl.launch.preflight.check_quantisable", lambda *a: pytest.fail("checked"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert prepared(tmp_path, "mxfp4.enable=false").quantised is None


def test_embedded_model_becomes_a_path(tmp_path, monkeypatch, model_dir):
    monkeypatch.setattr("mxfp4_rl.tasks.embedded_model.ensure_embedded_model", lambda: model_dir)
    assert prepared("smollm2-135m-instruct").config["actor_rollout_ref"]["model"]["path"] == str(model_dir)


def test_joining_a_cluster_drops_what_only_starts_ray(model_dir, monkeypatch):
    local = prepared(model_dir)
    assert not local.joins_cluster
    write_records(local, "/tmp/mxr-x", [])
    written = Path(local.run_dir.path, "config.yaml").read_text()
    assert "_temp_dir: /tmp/mxr-x" in written and "num_cpus: 32" in written
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    sizes = ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16"]
    joined = prepared(model_dir, "trainer.nnodes=2", *sizes)
    assert joined.joins_cluster
    write_records(joined, None, ["train", "x=1"])
    assert not set(LOCAL_RAY_KEYS) & set(joined.config["ray_kwargs"]["ray_init"])
    versions = json.loads(Path(joined.run_dir.path, "versions.json").read_text())
    assert versions["command"] == ["mxfp4-rl", "train", "x=1"] and versions["packages"]["verl"].startswith("0.9")


def test_no_two_runs_share_a_directory(tmp_path):
    never, always = (lambda path: False), (lambda path: True)
    first = claim_run_dir(tmp_path / "run", never)
    second = claim_run_dir(tmp_path / "run", never)  # the first is still going on
    assert [first.path.name, second.path.name] == ["run", "run-2"]
    (first.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(LaunchError, match="still going on"):
        claim_run_dir(tmp_path / "run", always)
    first.release()
    second.release(unused=True)
    assert not second.path.exists()
    assert claim_run_dir(tmp_path / "run", never).path.name == "run-2"
    resumed = claim_run_dir(tmp_path / "run", always)
    assert resumed.path == first.path and resumed.resumes


def test_resuming_needs_a_checkpoint(model_dir, tmp_path):
    run = tmp_path / "runs/quickstart"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert prepared(model_dir, "trainer.resume_mode=auto").run_dir.path.name == "quickstart-2"
    torn = checkpoints.folder_of(run / "checkpoints", 2)
    torn.mkdir()
    assert prepared(model_dir, "trainer.resume_mode=auto").run_dir.path.name == "quickstart-2"
    whole = checkpoints.folder_of(run / "checkpoints", 1)
    whole.mkdir()
    checkpoints.seal(whole)
    (run / "config.yaml").write_text("the first part's\n")
    assert prepared(model_dir).run_dir.path.name == "quickstart-2"
    resumed = prepared(model_dir, "trainer.resume_mode=auto")
    assert resumed.run_dir.path == run
    assert any(f"checkpoint {torn} is torn and skipped: complete.json" in text for text in resumed.warnings)
    write_records(resumed, "/tmp/mxr-x", [])
    assert (run / "config-1.yaml").read_text() == "the first part's\n"


def test_checkpoints_that_a_run_must_not_meet(model_dir, tmp_path):
    root = tmp_path / "elsewhere"
    for step in (3, 5):
        checkpoints.begin(checkpoints.folder_of(root, step))
        checkpoints.seal(checkpoints.folder_of(root, step))
    there = f"trainer.default_local_dir={root}"
    first = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoints.folder_of(root, 3)}"]
    for overrides in ([there], [there, *first]):  # they are past step 0, and past step 3
        with pytest.raises(LaunchError, match=r"holds a checkpoint of step 5, past the one that this run starts from"):
            prepared(model_dir, *overrides)
    prepared(model_dir, there, "trainer.resume_mode=auto").run_dir.release()
    prepared(model_dir, *first).run_dir.release()  # its own go elsewhere
    checkpoints.folder_of(root, 3).joinpath("complete.json").write_text("{}")
    with pytest.raises(LaunchError, match=r"resume_from_path=.*global_step_3 is torn \(complete.json is not readable"):
        prepared(model_dir, *first)


def test_too_little_room_for_a_checkpoint_is_said_at_the_start(model_dir, monkeypatch):
    weights = sum(path.stat().st_size for path in Path(model_dir).glob("*.safetensors"))
    for free, said in ((6 * weights - 1, 1), (6 * weights, 0)):
        monkeypatch.setattr(checkpoints, "free", lambda root, free=free: free)
        run = prepared(model_dir, "trainer.save_freq=5")
        run.run_dir.release(unused=True)
        assert len([text for text in run.warnings if text.startswith("a checkpoint takes about")]) == said


def test_bad_interpolation_is_named():
    config = compose_config("quickstart", ["trainer.project_name=${trainer.nope}"])
    with pytest.raises(LaunchError, match=r"project_name: .*trainer\.nope"):
        resolved(config)


# ---- reading logs


def test_innermost_exception_of_a_ray_log():
    log = """\
    (TaskRunnerV1 pid=12) starting
    \x1b[36m(WorkerDict pid=77)\x1b[0m RuntimeWarning: no matter
    Traceback (most recent call last):
      File "main_ppo.py", line 1, in main
    ray.exceptions.RayTaskError(ValueError): \x1b[36mray::TaskRunnerV1.run()\x1b[39m (pid=12, ip=10.0.0.2)
      File "trainer.py", line 2, in run
    ray.exceptions.RayTaskError(ValueError): \x1b[36mray::WorkerDict.init_model()\x1b[39m (pid=77)
      File "engine.py", line 3, in init_model
    ValueError: the weights do not fit:
    expected 576, got 575
    (raylet) some noise after the end
    (WorkerDict pid=77) KeyError: 'a complaint of a dying worker'
    """
    assert find_failure(textwrap.dedent(log).splitlines()) == "ValueError: the weights do not fit:\nexpected 576, got 575"
    died = ["(A pid=1) torch.OutOfMemoryError: CUDA", "ray.exceptions.ActorDiedError: The actor died unexpectedly"]
    assert find_failure(died) == "torch.OutOfMemoryError: CUDA"
    assert find_failure(died[1:]) == died[1]
    assert find_failure(["a", "", "Killed"]) == "a\nKilled"


def test_progress_texts():
    data = {"critic/score/mean": 0.25, "actor/entropy": 1.5, "timing_s/step": 12.34, "mxfp4/scale_bias": 0.0011}
    assert step_text(data) == "reward 0.250  entropy 1.500  12.3 s"
    data |= {"mxfp4/deadzone": 0.002, "mxfp4/grid_noise": 0.0305}
    assert "scale/deadzone/grid 1.10/2.00/30.50 e-3" in step_text(data)
    assert validation_text({"val-core/sums/reward/mean@1": 0.1, "val-core/sums/acc/mean@1": 0.5}) == "sums acc 0.500"
    assert validation_text(data) is None
    assert phase_of("\x1b[36m(TaskRunnerV1 pid=9)\x1b[0m [mxfp4] trainer: first weight sync") == "trainer: first weight sync"
    assert phase_of("(TaskRunnerV1 pid=9) something else") is None


def test_tail_waits_for_whole_lines(tmp_path):
    tail = Tail(tmp_path / "log")
    assert tail.new_lines() == []
    with open(tmp_path / "log", "w") as file:
        file.write("one\ntw")
        file.flush()
        assert tail.new_lines() == ["one"]
        file.write("o\n")
        file.flush()
        assert tail.new_lines() == ["two"]


# ---- whole runs, with a stand-in for verl

FAKE_VERL = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import yaml

config_path, parent, temp_dir = sys.argv[1:]
if "watched" in {mode!r}:
    from mxfp4_rl.launch.child import become_subreaper, end_with_parent
    become_subreaper()
    end_with_parent(int(parent), temp_dir)
config = yaml.safe_load(Path(config_path).read_text())
run = Path(config["mxfp4"]["run_dir"])
print("[mxfp4] importing verl")
assert config["ray_kwargs"]["ray_init"]["_temp_dir"] == temp_dir and len(temp_dir) < 40
# Like Ray's workers: another session, deaf to SIGTERM, without our environment and name, and orphaned.
stubborn = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); s.signal(s.SIGINT, s.SIG_IGN); "
stubborn += "print('deaf', flush=True); time.sleep(120)"
clean = {{k: v for k, v in os.environ.items() if k != "MXFP4_RL_RUN_ID"}}
daemon = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True, "
daemon += "stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid)"
worker = subprocess.run([sys.executable, "-c", daemon, stubborn], env=clean, stdout=subprocess.PIPE, text=True).stdout
(run / "worker.pid").write_text(worker)

def log(step, **data):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({{"step": step, "data": data}}) + "\\n")

mode = {mode!r}
if mode == "die":
    os.kill(os.getpid(), signal.SIGKILL)
log(0, **{{"val-core/sums/acc/mean@1": 0.25}})
for step in (1, 2, 3):
    log(step, **{{"critic/score/mean": step / 10, "actor/entropy": 1.0, "timing_s/step": 2.0, "mxfp4/rel_mse": 0.01,
                 "mxfp4/scale_bias": 0.001, "mxfp4/deadzone": 0.002, "mxfp4/grid_noise": 0.003}})
if mode == "crash":
    raise ValueError("the optimizer is on fire")
if mode != "finish":
    print("[mxfp4] waiting")
    time.sleep(120)
print("[mxfp4] alarm: step 3: entropy: actor/entropy is low", flush=True)
log(4, **{{"val-core/sums/acc/mean@1": 0.75}})
"""


def fake_verl(tmp_path, mode):
    path = tmp_path / f"fake_{mode}.py"
    path.write_text(FAKE_VERL.format(mode=mode))
    return [sys.executable, str(path)]


def start_cli(tmp_path, model_dir, mode, **popen):
    """The real command line in a process of its own, with a stand-in for verl below it."""
    arguments = quickstart(model_dir, "mxfp4.run_dir=run", "mxfp4.enable=false")  # false: spares importing torch
    script = f"import sys; from mxfp4_rl.cli import main; sys.exit(main({arguments!r}, {fake_verl(tmp_path, mode)!r}))"
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True, **popen)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def worker_pid(tmp_path):
    return int((tmp_path / "run/worker.pid").read_text())


def temp_dir_of(tmp_path):
    import yaml

    return Path(yaml.safe_load((tmp_path / "run/config.yaml").read_text())["ray_kwargs"]["ray_init"]["_temp_dir"])


def assert_nothing_left(tmp_path):
    assert not is_running(worker_pid(tmp_path))
    temp_dir = temp_dir_of(tmp_path)
    assert not temp_dir.exists()
    assert not any(str(temp_dir) in _command(process) for process in psutil.process_iter())


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_in_time_leaves_nothing_and_reports(number, code, tmp_path, model_dir):
    process = start_cli(tmp_path, model_dir, "wait")
    wait_for(lambda: "waiting" in (tmp_path / "run/verl.log").read_text() if (tmp_path / "run/verl.log").exists() else False)
    assert is_running(worker_pid(tmp_path))
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == code
    assert_nothing_left(tmp_path)
    assert (tmp_path / "run/report/report.html").is_file() and "run/report/report.html" in out
    assert "Traceback" not in out + err


def test_second_interrupt_kills_at_once(tmp_path, model_dir):
    process = start_cli(tmp_path, model_dir, "wait")
    wait_for(lambda: (tmp_path / "run/worker.pid").exists() and (tmp_path / "run/worker.pid").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - began < 4.5  # politely it would be 5 s from the first one on: the worker is deaf
    assert process.returncode == 130
    assert_nothing_left(tmp_path)


def test_killed_launcher_takes_the_run_with_it(tmp_path, model_dir):
    process = start_cli(tmp_path, model_dir, "watched")
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
    process.kill()
    process.communicate()
    child = [p for p in psutil.process_iter() if "fake_watched.py" in _command(p)]
    wait_for(lambda: not any(is_running(p.pid) for p in child), seconds=8)
    assert_nothing_left(tmp_path)
    status = LiveRun(tmp_path / "run").status()
    assert status["state"] == "died" and status["failure"].startswith("the launcher was killed")


def test_crash_shows_the_cause(tmp_path, model_dir, capfd):
    command = fake_verl(tmp_path, "crash")
    assert cli.main(quickstart(model_dir, "mxfp4.run_dir=run", "mxfp4.enable=false"), command) == 1
    out, err = capfd.readouterr()
    assert "ValueError: the optimizer is on fire" in err and "verl.log" in err
    assert "Traceback" not in out + err
    assert_nothing_left(tmp_path)
    assert (tmp_path / "run/report/report.html").is_file()
    status = LiveRun(tmp_path / "run").status()
    assert status["state"] == "failed" and "the optimizer is on fire" in status["failure"]


def test_killed_run_is_told(tmp_path, model_dir, capfd):
    command = fake_verl(tmp_path, "die")
    assert cli.main(quickstart(model_dir, "mxfp4.run_dir=run", "mxfp4.enable=false"), command) == 1
    assert "ended by SIGKILL (out of memory?)" in capfd.readouterr().err
    assert_nothing_left(tmp_path)
    assert not (tmp_path / "run/report").exists()  # nothing was logged


def test_finished_run_in_plain_text(tmp_path, model_dir, capfd):
    command = fake_verl(tmp_path, "finish")
    arguments = quickstart(model_dir, "mxfp4.run_dir=run", "trainer.total_training_steps=3")
    assert cli.main(arguments, command) == 0
    out, _ = capfd.readouterr()
    for line in (
        "  recipe  W: mxfp4 rceil + MBS static 128 + OF 1; A: ",
        "validation after step 0: sums acc 0.250",
        "step 3/3  reward 0.300  entropy 1.000  scale/deadzone/grid 1.00/2.00/3.00 e-3  2.0 s  ETA 0:00",
        "[mxfp4] alarm: step 3: entropy: actor/entropy is low",  # also after the first step, when phases no longer are shown
        "validation after step 4: sums acc 0.750",
        "reward  0.100 -> 0.300",
        "validated  0.250 (step 0) -> 0.750 (step 4)",
        f"report  {tmp_path}/run/report/report.html",
    ):
        assert line in out
    assert "\x1b" not in out
    assert_nothing_left(tmp_path)
    assert cli.main(arguments, fake_verl(tmp_path, "die")) == 1  # the same again gets a directory of its own
    assert (tmp_path / "run-2/worker.pid").is_file()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5
    assert cli.main(["report", "run", "--overlay", "run"]) == 0
    assert "run/report/report.html" in capfd.readouterr().out.splitlines()[-1]


def test_live_display_on_a_terminal(tmp_path, model_dir):
    """Through a pseudo-terminal: the same numbers, as a bar."""
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    process = start_cli(tmp_path, model_dir, "finish", stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while data := os.read(leader, 4096):
            shown += data
    os.close(leader)
    assert process.wait(10) == 0
    text = shown.decode(errors="replace")
    assert "[mxfp4] alarm: step 3: entropy" in text
    assert "3/20" in text and "reward 0.300" in text and "validation after step 0: sums acc 0.250" in text


def test_report_of_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_processes_are_found_by_their_mark(tmp_path):
    """A process that is no descendant of the run, as when Ray's daemons were started from elsewhere."""
    environment = {**os.environ, RUN_ID_VARIABLE: "mark-1"}
    marked = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
    titled = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "/tmp/mxr-mark-2/session"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        processes = RunProcesses("mark-1", "/tmp/mxr-mark-2", root=2**22)
        wait_for(lambda: {p.pid for p in processes.alive()} == {marked.pid, titled.pid}, seconds=5)
        assert processes.end(interrupt=False)
        assert other.poll() is None
    finally:
        for process in (marked, titled, other):
            process.kill()
            with contextlib.suppress(ChildProcessError):
                process.wait()
