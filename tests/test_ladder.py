"""The ladder's instrument, runner and report, on the tiny model: `recipes/ladder`."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from datetime import datetime, timezone

import numpy as np
import pytest
import torch

from mxfp4_rl.nn import MXFP4Linear, converted_layers, linear
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from recipes.ladder import grpo, report, run, through_verl
from recipes.ladder.data import Data
from recipes.ladder.options import MORE_TO_DO, Options, step_of
from recipes.ladder.rungs import GROUPS, PRESETS, RUNGS, chosen
from recipes.ladder.w8a8 import W8A8Linear, e4m3_rows

SMALL = {
    "steps": 4, "prompts": 4, "samples": 4, "response_tokens": 5, "micro_batch": 8, "rollout_batch": 64, "lr": 1e-3,
    "validate_every": 2, "validation": 6, "measure_every": 2, "checkpoint_every": 2,
}  # fmt: skip
EVERYTHING = {  # noise, stochastic rounding, two optimiser steps a rollout: all that a resume has to get right
    **RUNGS["w4a4+mbs+of+aqn"].config(),
    "recipe": RUNGS["w4a4g4sr+mbs+of"].recipe(),
}


def reward_digits(data_source, solution_str, ground_truth, extra_info=None):
    """The share of a response's characters that are digits: a random model gets a tenth of it."""
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """{"model", "task"}: the tiny model, and its own prompts with the trivial reward."""
    folder = tmp_path_factory.mktemp("ladder")
    from mxfp4_rl.tasks.data import resolve_task

    made = resolve_task("arithmetic", folder)
    files = {"train": str(made.train_path), "val": str(made.val_path), "reward": "tests.test_ladder:reward_digits"}
    return {"model": str(make_tiny_model(folder / "tiny")), "task": files}


@pytest.fixture
def own_handlers():
    """The handlers that a command sets are gone after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def prepared(folder, task, config, seed=0, **options):
    """A run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "seed": seed, "work": str(folder.parent), "options": {**SMALL, **task, **options}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logged(folder):
    """Step -> metrics, without the times."""
    out = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        out.setdefault(record["step"], {}).update({k: v for k, v in record["data"].items() if "timing" not in k})
    return out


def test_it_learns_a_trivial_reward(tmp_path, task):
    folder = prepared(
        tmp_path / "run", task, RUNGS["w4a4+mbs+of"].config(), steps=12, prompts=8, samples=8, lr=5e-3, validate_every=0
    )
    assert grpo.Run(folder).go() == 0
    log = logged(folder)
    rewards = [log[step]["critic/score/mean"] for step in range(1, 13)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15, rewards
    first = log[1]
    assert 0.3 < first["ladder/grad_norm_ratio"] < 3 and 0.5 < first["ladder/grad_cosine"] <= 1
    assert first["mxfp4/rel_mse"] > 0 and first["mxfp4/activation/rel_mse"] > 0 and first["actor/entropy"] > 1
    done = json.loads((folder / "done.json").read_text())
    assert len(done["scores"]) == len(done["scores_unquantised"]) == SMALL["validation"]
    assert not (folder / "state.pt").exists()


class _CutOff(grpo.Run):
    """Told to stop in step 3; killed in step 5, a step after its last checkpoint."""

    def rollout(self, step):
        if step == 3 and not (self.folder / "told").exists():
            (self.folder / "told").touch()
            self.stop.set()
        if step == 6:
            raise KeyboardInterrupt
        return super().rollout(step)


def test_a_run_that_is_cut_off_goes_on_to_the_last_digit(tmp_path, task):
    options = {"steps": 7, "mini_batches": 2}
    whole = grpo.Run(prepared(tmp_path / "whole", task, EVERYTHING, **options))
    assert whole.go() == 0
    folder = prepared(tmp_path / "cut", task, EVERYTHING, **options)
    assert _CutOff(folder).go() == MORE_TO_DO
    assert max(logged(folder)) == 3  # the step it was in, finished
    with pytest.raises(KeyboardInterrupt):
        _CutOff(folder).go()
    assert max(logged(folder)) == 5  # beyond the checkpoint of step 4
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "da')  # as a killed process leaves it
    last = grpo.Run(folder)
    assert last.go() == 0
    assert logged(folder) == logged(tmp_path / "whole")
    for name in ("scores", "scores_unquantised"):
        assert (
            json.loads((folder / "done.json").read_text())[name] == json.loads((tmp_path / "whole/done.json").read_text())[name]
        )
    for a, b in zip(whole.masters, last.masters):
        assert torch.equal(a, b)
    assert len(json.loads((folder / "sessions.json").read_text())) == 3


def test_noise_is_in_the_rollout_only(tmp_path, task, monkeypatch):
    one = grpo.Run(prepared(tmp_path / "run", task, RUNGS["w4a4+aqn"].config(), seed=3, steps=10))
    assert one.noise.seed == 3
    parameters, seen = dict(one.model.named_parameters()), []

    def clean():
        masters = dict(zip(one.names, one.masters))
        return all(torch.equal(parameters[n], masters[n].to(grpo.DTYPE)) for n in one.names)

    generate, log_probs = grpo.generate, one._log_probs
    monkeypatch.setattr(grpo, "generate", lambda *a: seen.append(("sampled", clean())) or generate(*a))
    monkeypatch.setattr(one, "_log_probs", lambda *a: seen.append(("trained", clean())) or log_probs(*a))
    assert one.noise_targets
    for step in (1, 2):
        batch, metrics = one.rollout(step)
        assert metrics["mxfp4/aqn_sigma"] == one.noise.sigma(step - 1)
        one.update(batch, step)
    one.validate()
    assert seen[0] == ("sampled", True)  # stage 0 has none
    second = [how for how, _ in seen].index("sampled", 1)
    assert seen[second] == ("sampled", False) and seen[-1] == ("sampled", True)
    assert all(is_clean for how, is_clean in seen if how == "trained")


def test_rungs_reach_the_layers(tmp_path, task):
    for rung in RUNGS.values():
        rung.config()  # every one can be built
    runs = {}
    for name in ("bf16", "fp8", "w4a16", "w4a4", "w4a4+mbs"):
        runs[name] = grpo.Run(prepared(tmp_path / name, task, RUNGS[name].config()))
    assert not converted_layers(runs["bf16"].model)
    layers = {name: converted_layers(one.model)["model.layers.0.mlp.down_proj"] for name, one in runs.items() if name != "bf16"}
    assert layers["w4a16"].recipe.activation is None and layers["w4a4"].recipe.activation is not None
    assert layers["w4a4"].recipe.weight.macro_block is None and layers["w4a4+mbs"].recipe.weight.macro_block == "static"
    for name in ("w4a16", "w4a4", "w4a4+mbs"):
        layer = layers[name]
        assert torch.equal(layer.weight_operand(grpo.DTYPE), fake_quantize(layer.weight.detach(), layer.recipe.weight))
    assert type(layers["fp8"]) is W8A8Linear
    assert torch.equal(layers["fp8"].weight_operand(grpo.DTYPE), e4m3_rows(layers["fp8"].weight.detach()))
    assert all(not isinstance(one.model.lm_head, MXFP4Linear) for one in runs.values())
    with grpo.unquantised(runs["w4a4"].model):
        assert type(layers["w4a4"]) is torch.nn.Linear
    assert type(layers["w4a4"]) is MXFP4Linear
    batches = {name: one.rollout(1)[0] for name, one in runs.items()}
    logp = {name: one._log_probs(batches["bf16"], torch.arange(16))[0] for name, one in runs.items()}
    off = {name: (logp[name] - logp["bf16"]).detach().abs().mean() for name in runs}
    assert 0 < off["fp8"] < off["w4a16"] < off["w4a4"]


def test_weights_are_quantised_once_an_optimiser_step(tmp_path, task, monkeypatch):
    one = grpo.Run(prepared(tmp_path / "run", task, RUNGS["w4a16"].config()))
    made = []
    plain = linear.operand
    monkeypatch.setattr(linear, "operand", lambda t, r, axis=-1: (made.append(r) if r else None, plain(t, r, axis))[1])
    layers = len(converted_layers(one.model))
    for step in (2, 4):  # not measured
        batch, _ = one.rollout(step)
        one.update(batch, step)
    assert len(made) == 2 * layers


def test_micro_batches_add_up_to_the_batch(tmp_path, task):
    gradients = []
    for size in (3, 16):
        one = grpo.Run(prepared(tmp_path / str(size), task, RUNGS["bf16"].config(), micro_batch=size))
        batch, _ = one.rollout(1)
        one._backward(batch, torch.arange(16), defaultdict(float, weights=[]))
        gradients.append(torch.cat([m.grad.flatten() for m in one.masters]))
        assert all(p.grad is None for p in one.weights)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert abs(gradients[0].norm() / gradients[1].norm() - 1) < 0.02


def test_a_diverged_run_is_a_result(tmp_path, task, monkeypatch):
    folder = prepared(tmp_path / "run", task, RUNGS["bf16"].config())
    one = grpo.Run(folder)
    monkeypatch.setattr(one, "update", lambda *_: (_ for _ in ()).throw(FloatingPointError("not finite")))
    assert one.go() == 0
    assert json.loads((folder / "done.json").read_text())["diverged"] == 1
    stored = report.StoredRun.load(folder)
    assert stored.scores is None and "diverged at step 1" in stored.state


def test_the_runner_resumes_skips_and_reports(tmp_path, task, capsys):
    out = tmp_path / "runs"
    options = Options.from_dict({**SMALL, **task, "steps": 30, "warmup_steps": 2, "warmup_batch": 8, "checkpoint_every": 0})
    runs = [(rung, 0) for rung in chosen(["bf16", "w4a4+mbs"])]
    assert run.Runner(out, options, runs, jobs=2).go(time_limit=0.5) == MORE_TO_DO  # ended while they start

    assert grpo.Run(out / "bf16/seed0").go() == 0  # here, to save its process's start
    runner = run.Runner(out, options, runs, jobs=2)
    logs = [out / rung.name / "seed0/metrics.jsonl" for rung, _ in runs]

    def stop_in_the_middle():
        while not all(log.is_file() and len(log.read_text().splitlines()) > 3 for log in logs):
            time.sleep(0.02)
        runner.stop()

    threading.Thread(target=stop_in_the_middle, daemon=True).start()
    assert runner.go() == MORE_TO_DO
    assert (out / "w4a4+mbs/seed0/state.pt").is_file() and not (out / "w4a4+mbs/seed0/done.json").is_file()
    assert len(list((out / "warmup").glob("*.pt"))) == 1  # made by one, read by the other
    page = report.write_report(out, out / "half.md")
    text = page.read_text()
    assert "w4a4+mbs, seed 0: at step" in text and "| W4A4 + MBS | 0." in text.split("## On the way")[1]
    assert datetime.now(timezone.utc).date().isoformat()[:8] in text  # when they ran

    setting = [f"{k}={json.dumps(v)}" for k, v in vars(options).items()]
    command = ["--out", str(out), "--rungs", "bf16", "w4a4+mbs", "--seeds", "1", "--jobs", "2", "--set", *setting]
    assert run.main(command) == 0
    for log in logs:
        steps = [step_of(line) for line in log.read_text().splitlines()]
        assert steps == [*range(31), 30]  # every step once, and the final validation
        config = json.loads((log.parent / "config.json").read_text())
        first = json.loads(log.read_text().splitlines()[0])["data"]
        assert 0 <= first["ladder/val_untrained"] <= 1  # measured once, before the start that both share
        assert config["git"] and config["device"] and config["versions"]["torch"] == torch.__version__
    assert len(json.loads((out / "w4a4+mbs/seed0/sessions.json").read_text())) >= 2
    capsys.readouterr()
    assert run.main(command) == 0
    assert "2 runs were done, 0 to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lr="):
        run.Runner(out, Options.from_dict({**vars(options), "lr": 0.1}), runs)

    text = (out / "results.md").read_text()
    scores = {rung.name: report.StoredRun.load(out / rung.name / "seed0").scores for rung, _ in runs}
    difference = scores["w4a4+mbs"].mean() - scores["bf16"].mean()
    start = next(iter(json.loads(logs[0].read_text().splitlines()[0])["data"].values()))
    assert f"| BF16 | 0 | {start:.3f} | {scores['bf16'].mean():.3f} |" in text and "not finite" not in text
    assert f"| {difference:+.3f} | one seed |" in text
    assert "Missing" not in text  # the page of a command misses what the command asked for, and all of that is there
    assert "w4a4+mbs/seed0" in text and "4.312 / 4.312" in text
    for name in ("curves", "components"):
        assert (out / f"results/ladder_{name}.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()]
    for line in lines[3:5]:
        line["data"]["actor/grad_norm"] = math.nan
    logs[0].write_text("\n".join(map(json.dumps, lines)))
    text = report.write_report(out, out / "left_out.md").read_text()
    assert "gradient was not finite: bf16/seed0 2." in text
    assert "**Missing: 8 runs.**" in text and "w4a16, seed 0: not started" in text  # of the whole ladder


class Sleepers(run.Runner):
    """Runs that do nothing but last, and may break the runner."""

    broken = False

    def command(self, folder):
        return [sys.executable, "-c", "import time; time.sleep(60)" if folder.name == "seed0" else ""]

    def _ended(self, folder, process):
        if self.broken:
            raise OSError("disk full")
        super()._ended(folder, process)


def test_no_run_goes_on_when_the_runner_breaks(tmp_path):
    runner = Sleepers(tmp_path, Options.from_dict(SMALL), [(RUNGS["bf16"], seed) for seed in (0, 1)], jobs=2)
    runner.broken, children = True, []
    start = runner._start

    def remember(slot, folder):
        start(slot, folder)
        children.append(runner.running[slot][1])

    runner._start = remember
    with pytest.raises(OSError, match="disk full"):
        runner.go(grace=30)
    assert len(children) == 2 and all(child.poll() is not None for child in children)


def test_a_run_that_starts_while_the_runner_is_told_to_stop_is_told_too(tmp_path):
    runner = Sleepers(tmp_path, Options.from_dict(SMALL), [(RUNGS["bf16"], 0)])
    runner.stop()  # between the decision to start and the start
    runner._start(0, runner.waiting.pop())
    assert runner.running[0][1].wait(timeout=30) == -signal.SIGTERM


def test_what_is_asked_of_the_runner_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ValueError, match=r"--gpus 4, but CUDA_VISIBLE_DEVICES shows 2 \(4,5\)"):
        run.Runner(tmp_path, Options.from_dict(SMALL), [], gpus=4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(run, "_of_all_gpus", lambda what: ["0", "1", "2"])
    with pytest.raises(ValueError, match=r"--gpus 4, but nvidia-smi shows 3 \(0,1,2\)"):
        run.Runner(tmp_path, Options.from_dict(SMALL), [], gpus=4)
    assert run.Runner(tmp_path, Options.from_dict(SMALL), [], gpus=3).visible == ["0", "1", "2"]
    monkeypatch.setattr(through_verl, "start_of", lambda out, options: pytest.fail("nothing is to start"))
    for main in (run.main, through_verl.main):
        for option, value, told in (
            ("--jobs", "0", "give 1 or more"), ("--gpus", "-1", "give 1 or more"), ("--seeds", "0", "give 1 or more"),
            ("--time-limit", "0", "give more than 0"), ("--time-limit", "-5", "give more than 0"),
        ):  # fmt: skip
            with pytest.raises(SystemExit):
                main(["--out", str(tmp_path), option, value])
            assert f"{option} {value}: {told}" in capsys.readouterr().err


def test_the_page_misses_only_the_seeds_that_were_asked_for(tmp_path, monkeypatch, own_handlers):
    assert report.missing_runs({}, ["bf16"], range(3, 5)) == ["bf16, seed 3: not started", "bf16, seed 4: not started"]
    asked = []
    monkeypatch.setattr(report, "write_report", lambda *a: asked.append(a[3]))
    monkeypatch.setattr(run.Runner, "go", lambda *_: 0)
    run.main(["--out", str(tmp_path), "--rungs", "bf16", "--seeds", "2", "--first-seed", "3"])
    report.main([str(tmp_path), "--seeds", "2", "--first-seed", "3"])
    assert asked == [range(3, 5)] * 2


def test_a_run_waits_for_anothers_warm_up_only_until_it_is_told_to_stop(tmp_path):
    one, file, made = grpo.Run.__new__(grpo.Run), tmp_path / "start.pt", []
    one.stop = threading.Event()
    with grpo.FileLock(f"{file}.lock"):
        threading.Timer(0.2, one.stop.set).start()
        with pytest.raises(InterruptedError), grpo._alone_with(file, one.stop):
            raise AssertionError("it was another's turn")
    one.options, one.data = Options.from_dict({**SMALL, "warmup_steps": 1}), None
    one.validate = made.append
    with pytest.raises(InterruptedError):  # its turn now, but it was told before
        one._warm_up(tmp_path)
    assert made == []


def test_a_run_waits_for_anothers_mixture_only_until_it_is_told_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "write_mixture", lambda *_, **__: pytest.fail("it was another's turn"))
    options, stop = Options.from_dict({**SMALL, "upcycle": {"slices": 2}}), threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        grpo._checkpoint(options, tmp_path, stop)


def test_runs_of_another_verl_configuration_are_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(through_verl, "start_of", lambda out, options: out / "start")
    options, runs = Options.from_dict(SMALL), [(RUNGS["bf16"], 0)]
    through_verl.VerlRunner(tmp_path, options, runs, 1, 1, "one_gpu", [])
    through_verl.VerlRunner(tmp_path, options, runs, 1, 1, "one_gpu", [])
    with pytest.raises(ValueError, match="config_name: stored one_gpu, asked for two_gpus"):
        through_verl.VerlRunner(tmp_path, options, runs, 1, 1, "two_gpus", [])
    with pytest.raises(ValueError, match="more: stored"):
        through_verl.VerlRunner(tmp_path, options, runs, 1, 1, "one_gpu", ["actor_rollout_ref.actor.optim.lr=1"])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_through_verl_begins_anew_or_from_its_last_checkpoint(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(through_verl, "start_of", lambda out, options: out / "start")
    options = Options.from_dict({**PRESETS["gpu"], "steps": 4})
    runner = through_verl.VerlRunner(tmp_path, options, [(RUNGS["bf16"], 0)], 1, 1, "one_gpu", [])
    (folder,) = runner.waiting
    left = [folder / name for name in ("metrics.jsonl", "experts.jsonl", "validation/4.jsonl")]
    left[-1].parent.mkdir()
    for file in left:
        file.touch()
    whole = tmp_path / "checkpoints" / "global_step_2"
    monkeypatch.setattr(through_verl, "latest_whole", lambda root: (whole if checkpoint else None, []))
    given = runner.command(folder)
    assert {"trainer.resume_mode=auto", f"trainer.save_freq={PRESETS['gpu']['checkpoint_every']}"} <= set(given)
    assert all(file.exists() == checkpoint for file in left)


def test_the_start_is_made_in_a_process_of_its_own_whose_failure_is_told(tmp_path, task, capfd, own_handlers):
    options = {**SMALL, **task, "warmup_steps": 1, "warmup_batch": 4}
    start = through_verl.start_of(tmp_path, Options.from_dict(options))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in start.iterdir()}
    options |= {"model": str(tmp_path / "no-such-model")}
    given = ["--set", *(f"{k}={json.dumps(v)}" for k, v in options.items()), "--out", str(tmp_path / "other")]
    assert through_verl.main(given) == 1
    told = capfd.readouterr().err
    assert "no-such-model" in told and "the supervised start could not be made" in told and "exit code 1" in told


def test_a_command_that_is_ended_early_ends_the_process_that_makes_the_start(tmp_path, monkeypatch, own_handlers):
    children, here = [], threading.main_thread().ident

    class Slow(subprocess.Popen):
        def __init__(self, command, **_):
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"])
            children.append(self)
            threading.Timer(0.2, signal.pthread_kill, [here, signal.SIGTERM]).start()

    monkeypatch.setattr(through_verl, "VerlRunner", lambda out, options, *_: through_verl.start_of(out, options))
    monkeypatch.setattr(subprocess, "Popen", Slow)
    with pytest.raises(SystemExit) as ended:
        through_verl.main(["--out", str(tmp_path)])
    assert ended.value.code == MORE_TO_DO and children[0].returncode == -signal.SIGKILL


def test_a_run_whose_validation_cannot_be_read_has_failed_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(through_verl, "start_of", lambda out, options: out / "start")
    monkeypatch.setattr(through_verl.VerlRunner, "command", Sleepers.command)
    runner = through_verl.VerlRunner(tmp_path, Options.from_dict(SMALL), [(RUNGS["bf16"], 1)], 1, 1, "one_gpu", [])
    runner.began = defaultdict(float)
    assert runner.go() == 1 and "was validated at steps []" in capsys.readouterr().out


def test_intervals():
    rng = np.random.default_rng(0)
    d = rng.normal(0.1, 0.3, size=(4, 400)) + rng.normal(0, 0.02, size=(4, 1))
    for low, high in (report.student_interval(d), report.bootstrap_interval(d, 500)):
        assert low < d.mean() < high and high - low < 0.15
    assert report.student_interval(d[:1]) is None
    low, high = report.bootstrap_interval(d[:1], 2000)  # one seed: problems only, 1.645 standard errors
    assert (high - low) / 2 == pytest.approx(1.645 * d[0].std() / 20, rel=0.1)


def test_what_is_asked_for_is_checked():
    assert [rung.name for rung in chosen(["ladder"])][:4] == ["bf16", "fp8", "w4a16", "w4a4"]
    assert len(chosen(["all"])) == len(RUNGS) == sum(map(len, GROUPS.values()))
    with pytest.raises(ValueError, match="no rung 'w4a5'"):
        chosen(["w4a5"])
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        Options.from_dict({"stepz": 3})


def test_a_mixture_of_experts_climbs_too(tmp_path, task):
    from transformers import AutoModelForCausalLM

    from recipes.upcycle.upcycle import upcycle

    dense = make_tiny_model(tmp_path / "dense", architecture="llama", intermediate=256)
    moe = upcycle(AutoModelForCausalLM.from_pretrained(dense), slices=2)
    moe.save_pretrained(tmp_path / "moe")
    for file in dense.glob("*token*"):
        (tmp_path / "moe" / file.name).write_bytes(file.read_bytes())
    for template in dense.glob("chat_template*"):
        (tmp_path / "moe" / template.name).write_bytes(template.read_bytes())
    options = {"model": str(tmp_path / "moe"), "steps": 2, "measure_every": 1}
    loop = grpo.Run(prepared(tmp_path / "run", task, RUNGS["w4a4+mbs+of"].config(), **options))
    ids = torch.arange(10, 40).unsqueeze(0)
    with torch.no_grad(), grpo.unquantised(loop.model):
        plain = loop.model(input_ids=ids).logits
    bf16 = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16)
    assert torch.equal(plain, bf16(input_ids=ids).logits)
    assert not torch.equal(plain, loop.model(input_ids=ids).logits)  # quantised again
    assert loop.go() == 0
    steps = logged(tmp_path / "run")
    assert all(0 < steps[step]["mxfp4/rel_mse"] < 0.1 and "ladder/grad_cosine" in steps[step] for step in (1, 2))
    with pytest.raises(ValueError, match="fp8 has no experts"):
        grpo.Run(prepared(tmp_path / "fp8", task, RUNGS["fp8"].config(), **options))


def test_a_rung_through_verl_has_the_ladders_options(tmp_path):
    from mxfp4_rl.launch.compose import compose_config
    from mxfp4_rl.settings import Settings

    options = Options.from_dict({**PRESETS["gpu"], "lr": 3e-5, "norm_std": False, "is_cap": 4.0})
    for rung in (
        RUNGS["bf16"],
        RUNGS["w4a4"],
        RUNGS["w4a4+mbs+of1"],
        RUNGS["w4a4g4+mbs+of"],
        RUNGS["w4a16"],
        RUNGS["w4a4+aqn"],
    ):
        given = through_verl.overrides_of(rung, 2, options, tmp_path / "start", tmp_path / "run")
        config = compose_config("one_gpu", given)
        settings = Settings.from_config(config.mxfp4)
        assert settings.enable == (rung.words is not None)
        if settings.enable:
            ours, theirs = settings.recipe.to_dict(), rung.recipe()
            assert {k: ours[k] for k in theirs} == theirs, rung.name
            assert settings.aqn.enable == (rung.aqn is not None)
        assert config.mxfp4.task == options.task
        assert config.trainer.default_local_dir == str(tmp_path / "run" / through_verl.CHECKPOINTS)
        assert config.actor_rollout_ref.actor.optim.lr == 3e-5 and config.actor_rollout_ref.rollout.n == options.samples
        assert config.algorithm.norm_adv_by_std_in_grpo is False and config.data.seed == 3
        assert config.algorithm.rollout_correction.rollout_is_threshold == 4.0
        assert config.trainer.total_training_steps == options.steps and config.trainer.test_freq == options.validate_every
    with pytest.raises(ValueError, match="fp8 is of the ladder's own loop"):
        through_verl.overrides_of(RUNGS["fp8"], 0, options, tmp_path, tmp_path)


def test_what_verl_validated_becomes_the_ladders_result(tmp_path, task):
    from transformers import AutoTokenizer

    folder, options = tmp_path / "bf16" / "seed0", Options.from_dict({**SMALL, **task})
    (folder / "validation").mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    rows = Data(options, tokenizer, tmp_path).val
    lines = [{"input": tokenizer.decode(r["ids"], skip_special_tokens=True), "score": float(i % 2)} for i, r in enumerate(rows)]
    newest = folder / "validation" / f"{options.steps}.jsonl"
    newest.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))  # verl sorts by random names
    through_verl.collect(folder, task["model"], options)
    done = json.loads((folder / "done.json").read_text())
    assert done["scores"] == [float(i % 2) for i in range(len(rows))]
    assert done["problems"] == [row["prompt"][-1]["content"] for row in rows]
    newest.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(ValueError, match="held-out problems"):
        through_verl.collect(folder, task["model"], options)
    newest.rename(newest.with_name("1.jsonl"))
    with pytest.raises(ValueError, match="not at its last"):
        through_verl.collect(folder, task["model"], options)
