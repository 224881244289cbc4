"""Two hundred configurations, each broken in one way drawn at random: the checks before Ray tell every one of them.

The mistakes are made on a configuration that is fine (the quickstart's, with the tiny model), on the command line or in it, as
a user's YAML file would. What is drawn comes from the configuration itself and from verl's defaults, so a new key takes part.
"""

import copy
import random
from typing import Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.compose import compose_config, verl_defaults
from mxfp4_rl.launch.preflight import prepare
from mxfp4_rl.launch.schema import describe, fits, interpolated
from mxfp4_rl.launch.values import BOUNDS, CHOICES, asserted, compared
from mxfp4_rl.tasks.tiny_model import make_tiny_model

BLOCKS = (
    *("mxfp4", "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"),
    *("data", "trainer", "algorithm"),
)
# verl takes any key in these, and another one's keys in the copies of the mxfp4 block.
FREE = (
    *("override_config", "engine_kwargs", "custom", "kwargs", "turbo_config", "wrap_policy", "mixed_precision", "pf_ppo"),
    *("mxfp4.", "fsdp_config.mxfp4", "sampler_kwargs", "profiler", "overrides", "task", "recipe.weight", "recipe.activation"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fine(model):
    return compose_config("quickstart", [f"actor_rollout_ref.model.path={model}"])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MXFP4_RL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def leaves(node, prefix=""):
    """Dotted key -> resolved value of every leaf."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def misspell(name, rng):
    """One slip of the fingers: a letter lost, doubled, swapped with its neighbour, or another one."""
    at = rng.randrange(1, len(name) - 1)
    slips = (
        name[:at] + name[at + 1 :],
        name[:at] + name[at] + name[at:],
        name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :],
        name[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + name[at + 1 :],
    )
    return rng.choice([slip for slip in slips if slip != name] or [f"{name}x"])


class Breaker:
    """Draws mistakes. Each method returns (overrides, changes to the configuration, what the message must contain)."""

    def __init__(self, config, rng):
        self.rng = rng
        self.values = leaves(OmegaConf.to_container(config, resolve=True))
        self.defaults = leaves(verl_defaults())
        inside = [k for k in self.values if k.startswith(BLOCKS) and not any(word in f"{k}." for word in self._free(k))]
        copies = tuple(f"{key}." for key in interpolated(config))  # what is written there is written to the original
        self.keys = [k for k in inside if not k.endswith("_target_") and not k.startswith(copies)]
        self.verls = [k for k in self.keys if k in self.defaults]

    def _free(self, key):
        return tuple(word for word in FREE if not (word == "mxfp4." and key.startswith("mxfp4.")))

    def _of(self, kinds, keys=None):
        same = [k for k in keys or self.verls if type(self.values[k]) in kinds and type(self.defaults.get(k)) in kinds]
        return self.rng.choice(same)

    def _key(self, block):
        keys = [k for k in self.keys if k.startswith(block) and len(k.rsplit(".", 1)[-1]) > 4]
        return self.rng.choice(keys)

    def misspelt_on_the_command_line(self):
        key = self._key(self.rng.choice(BLOCKS))
        path, _, name = key.rpartition(".")
        wrong = self._slip(key)
        return [f"{path}.{wrong}=1"], {}, [wrong, "did you mean", name]

    def misspelt_in_a_file(self):
        key = self._key(self.rng.choice(BLOCKS))
        path, _, name = key.rpartition(".")
        wrong = self._slip(key)
        return [], {f"{path}.{wrong}": self.values[key]}, [wrong, "did you mean", name]

    def misspelt_block(self):
        key = self.rng.choice([k for k in self.keys if k.count(".") >= 2 and not k.startswith("mxfp4")])
        parts = key.split(".")
        at = self.rng.randrange(1, len(parts) - 1)
        parts[at], name = misspell(parts[at], self.rng) + "x", parts[at]
        if self.rng.random() < 0.5:
            return [f"{'.'.join(parts)}=1"], {}, [parts[at], name]
        return [], {".".join(parts): 1}, [parts[at], name]

    def _slip(self, key):
        path, _, name = key.rpartition(".")
        siblings = {
            k.removeprefix(f"{path}.").split(".")[0] for k in {*self.values, *self.defaults} if k.startswith(f"{path}.")
        }
        while (wrong := misspell(name, self.rng)) in siblings:
            pass
        return wrong

    def text_for_a_number(self):
        key = self._of((int, float))
        return [], {key: self.rng.choice(["many", "1e-3x", "", "eight"])}, [key.rsplit(".", 1)[-1]]

    def no_bool(self):
        key = self._of((bool,))
        return [], {key: self.rng.choice(["maybe", 3, "on", [True]])}, [key, "true or false"]

    def list_for_a_scalar(self):
        key = self._of((int, float, bool))
        return [], {key: [1, 2]}, [key.rsplit(".", 1)[-1]]

    def scalar_for_a_block(self):
        key = self._of((int, float, bool, str))
        block = key.rpartition(".")[0]
        return [], {block: self.rng.choice([3, "text", [1]])}, [block.rsplit(".", 1)[-1]]

    def block_for_a_scalar(self):
        key = self._of((int, float, bool))
        return [], {key: {"a": 1}}, [key]

    def fraction_for_a_count(self):
        key = self._of((int,))
        if isinstance(self.values[key], bool) or "coef" in key or key.endswith(("top_p", "temperature")):
            key = "trainer.test_freq"
        return [], {key: 2.5}, [key]

    def null(self):
        required = [k for k in self.verls if type(self.defaults[k]) in (int, float, bool) and self.defaults[k] is not None]
        key = self.rng.choice([k for k in required if not k.endswith(("lr_warmup_steps", "min_lr_ratio"))])
        return [], {key: None}, [key]

    def out_of_bounds(self):
        known = [k for k in self.verls if any(k == b or k.endswith(f".{b}") for b in BOUNDS)]
        key = self.rng.choice([k for k in known if not isinstance(self.values[k], list) and self.values[k] is not None])
        name = next(b for b in BOUNDS if key == b or key.endswith(f".{b}"))
        low, high, _ = BOUNDS[name]
        whole = isinstance(self.values[key], int) and low == 1
        below = self.rng.choice([0, -1, -8]) if whole else -self.rng.choice([0.5, 1.0])
        value = high + self.rng.choice([0.5, 3.0]) if high == 1 and self.rng.random() < 0.5 else below
        return [], {key: value}, [key, f"={value}"]

    def negative(self):
        keys = [k for k in self.verls if type(self.defaults[k]) in (int, float) and self.defaults[k] >= 0]
        key = self.rng.choice([k for k in keys if not k.endswith(("seed", "entropy_coeff"))])
        return [], {key: -3 if isinstance(self.values[key], int) else -0.25}, [key, "-"]

    def not_finite(self):
        keys = [k for k in self.verls if type(self.defaults[k]) is float]
        key = self.rng.choice(keys)
        return [], {key: float(self.rng.choice(["nan", "inf", "-inf"]))}, [key, "finite"]

    def unknown_choice(self):
        key = self.rng.choice([k for k in CHOICES if isinstance(self.values.get(k), str)])
        return [], {key: f"{self.values[key]}zz"}, [f"{self.values[key]}zz", self.values[key]]

    def unknown_asserted_choice(self):
        optim = "actor_rollout_ref.actor.optim.lr_scheduler_type"
        key, value = self.rng.choice(
            [("actor_rollout_ref.actor.loss_agg_mode", "token-maen"), (optim, "consine"), ("trainer.resume_mode", "autoo")]
        )
        return [], {key: value}, [f"{key}={value}"]

    def unknown_logger(self):
        wrong = misspell(self.rng.choice(["tensorboard", "console", "wandb"]), self.rng) + "z"
        return [], {"trainer.logger": ["console", wrong]}, ["trainer.logger", wrong, "did you mean"]

    def required_but_absent(self):
        key = self.rng.choice(
            ["actor_rollout_ref.rollout.name", "data.train_batch_size", "trainer.nnodes", "algorithm.adv_estimator"]
        )
        if self.rng.random() < 0.5:
            return [], {key: "???"}, [key, "required"]
        return [f"~{key}"], {}, [key, "missing"]

    def contradiction(self):
        actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
        pairs = [
            ({"data.train_batch_size": 4, f"{actor}.ppo_mini_batch_size": 8}, ["ppo_mini_batch_size=8", "use 4"]),
            ({f"{actor}.ppo_micro_batch_size_per_gpu": self.rng.choice([3, 5, 7, 9])}, ["ppo_micro_batch_size_per_gpu", "use"]),
            ({f"{rollout}.log_prob_micro_batch_size_per_gpu": 13}, ["log_prob_micro_batch_size_per_gpu=13"]),
            ({f"{actor}.use_dynamic_bsz": True, f"{rollout}.log_prob_use_dynamic_bsz": False}, ["use_dynamic_bsz"]),
            ({"mxfp4.aqn.sigma_start": 1e-4, "mxfp4.aqn.sigma_end": 1e-2}, ["sigma_end=0.01"]),
            ({"mxfp4.recipe.dgrad": "mx"}, ["grad"]),
            ({"mxfp4.recipe.format": "nvfp4", "mxfp4.recipe.scale_rule": "floor"}, ["floor", "nvfp4"]),
            ({"trainer.save_freq": -3}, ["trainer.save_freq=-3", "or -1 for never"]),
            ({"trainer.total_training_steps": 900, "trainer.total_epochs": 1}, ["total_training_steps=900", "total_epochs"]),
            ({f"{rollout}.name": "vllm"}, ["vllm", "GPU"]),
            ({f"{rollout}.dtype": "float16"}, ["rollout.dtype=float16"]),
            ({f"{rollout}.expert_parallel_size": 3}, ["expert_parallel_size"]),
            ({"trainer.resume_mode": "resume_path"}, ["trainer.resume_from_path"]),
            ({"trainer.n_gpus_per_node": 3}, ["n_gpus_per_node=3"]),
        ]
        changes, expected = self.rng.choice(pairs)
        return [], changes, expected

    def wrong_in_the_mxfp4_block(self):
        wrong = [
            ("mxfp4.recipe.format", "mxfp5", "mxfp5"),
            ("mxfp4.recipe.scale_rule", self.rng.choice(["rciel", 20.0, -1]), "scale_rule"),
            ("mxfp4.recipe.macro_size", self.rng.choice([0, 48, "big", None, 64.5]), "macro_size"),
            ("mxfp4.recipe.fallback_alpha", self.rng.choice([0, 2, "half", [1]]), "fallback_alpha"),
            ("mxfp4.recipe.rounding", "up", "rounding"),
            ("mxfp4.recipe.exclude", self.rng.choice([3, "lm_head", [None], ["re:("]]), "exclude"),
            ("mxfp4.recipe.overrides", self.rng.choice([3, ["a"], {"x": 3}, {"x": {"macrosize": 1}}]), "overrides"),
            ("mxfp4.recipe.weight", self.rng.choice([3, "mxfp4", {"hadamrd": 32}]), "weight"),
            ("mxfp4.recipe", self.rng.choice([3, ["mxfp4"]]), "recipe"),
            ("mxfp4.aqn", self.rng.choice(["on", 3]), "aqn"),
            ("mxfp4.aqn.stages", self.rng.choice([0, -2, "ten", 2.5, None]), "stages"),
            ("mxfp4.aqn.sigma_start", self.rng.choice([-1.0, "big", None, float("nan")]), "sigma_start"),
            ("mxfp4.aqn.seed", self.rng.choice(["one", None, 0.5]), "seed"),
            ("mxfp4.monitor.every", self.rng.choice([-1, 0.5, "two", None]), "every"),
            ("mxfp4.monitor.max_rows", self.rng.choice([0, "all", 1.5, True]), "max_rows"),
            ("mxfp4.mismatch.k3_kl", self.rng.choice([0, -1, "large", float("nan"), [1]]), "k3_kl"),
            ("mxfp4.enable", self.rng.choice(["yes", 1, None]), "enable"),
            ("mxfp4.task", self.rng.choice(["arithmetic", 3, {"name": "aritmetic"}, {"size": 3}]), "task"),
            ("mxfp4.run_dir", self.rng.choice([3, ["runs"], "/proc/nope/run", {"a": 1}]), "run_dir"),
            ("mxfp4", self.rng.choice([3, "on", ["enable"]]), "mxfp4"),
        ]
        key, value, named = self.rng.choice(wrong)
        return [], {key: value}, [named]

    def no_such_path(self):
        missing = f"/no/such/{self.rng.randrange(1000)}"
        choices = [
            {"actor_rollout_ref.model.path": missing},
            {"mxfp4.task": None, "data.train_files": f"{missing}.parquet"},
            {"mxfp4.task": None, "data.train_files": [f"{missing}.parquet"]},
            {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": f"{missing}/global_step_1"},
        ]
        return [], self.rng.choice(choices), [missing]

    def unreadable_override(self):
        unreadable = ["trainer.nnodes", "=3", "trainer.logger=[console", "data.seed={a:", "trainer..nnodes=1", "+a b=1"]
        override = self.rng.choice(unreadable)
        return [override], {}, [override]

    def unknown_group_choice(self):
        group = self.rng.choice(["data", "actor@actor_rollout_ref.actor", "model_engine"])
        return [f"{group}=nope"], {}, ["nope"]

    def ray_argument(self):
        wrong = self.rng.choice(["num_cpu", "objectstore_memory", "adress", "include_dashbord"])
        return [], {f"ray_kwargs.ray_init.{wrong}": 1}, [wrong, "did you mean"]


KINDS = [name for name, method in vars(Breaker).items() if callable(method) and not name.startswith("_")]


def broken(config, changes):
    config = copy.deepcopy(config)
    with open_dict(config):
        for key, value in changes.items():
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            if node is None:  # a misspelt block brings its own
                OmegaConf.update(config, key, value, force_add=True)
            else:
                node[name] = value
    assert isinstance(config, DictConfig)
    return config


def test_the_configuration_is_fine_before_it_is_broken(fine):
    prepare(copy.deepcopy(fine)).run_dir.release(unused=True)


def mistakes_untold(fine, model, count, seed):
    """Break `count` configurations, the kinds in turn, and say for which ones the checks did not do."""
    breaker, failures = Breaker(fine, random.Random(seed)), []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        overrides, changes, expected = getattr(breaker, kind)()
        what = f"{number} {kind}: {overrides or changes}"
        try:
            if overrides:
                config = compose_config("quickstart", [f"actor_rollout_ref.model.path={model}", *overrides])
            else:
                config = broken(fine, changes)
            prepare(config).run_dir.release(unused=True)
            failures.append(f"{what}: accepted")
        except LaunchError as error:
            missing = [part for part in expected if str(part) not in str(error)]
            if missing or "\n" in str(error) or len(str(error)) > 700:
                failures.append(f"{what}: {missing} not in {error}")
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {error}")
    return failures


def test_one_mistake_of_every_kind(fine, model, tmp_path):
    assert not mistakes_untold(fine, model, len(KINDS), seed=1)
    assert list(tmp_path.iterdir()) == []  # no run directory is left behind


@pytest.mark.slow  # half a minute
def test_two_hundred_broken_configurations(fine, model, tmp_path):
    failures = mistakes_untold(fine, model, 200, seed=20260)
    assert not failures, "\n".join(failures)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "words"),
    [
        (int, [3], [2.5, True, "3", None, [3]], "an integer"),
        (float, [3, 2.5], ["x", True, None], "a number"),
        (bool, [True], [1, "true"], "true or false"),
        (str | None, ["a", None], [3, ["a"]], "text or null"),
        (Literal["a", "b"], ["a"], ["c"], "one of a, b"),
        (tuple[float, float], [[0.9, 1]], [[0.9], [0.9, "b"], 0.9], "a list of 2: a number, a number"),
        (list[int], [[1, 2], []], [["a"], 1], "a list (an integer each)"),
        (dict[str, Any], [{"a": 1}], [1, [1]], "a block of keys"),
    ],
)
def test_what_fits_an_annotation(kind, right, wrong, words):
    assert all(fits(value, kind) for value in right) and not any(fits(value, kind) for value in wrong)
    assert describe(kind) == words


def test_names_come_from_verls_sources():
    from verl.trainer.ppo.core_algos import kl_penalty_forward
    from verl.workers.config import FSDPActorConfig

    assert {"token-mean", "seq-mean-token-sum-norm"} <= set(asserted(FSDPActorConfig, "loss_agg_mode"))
    assert {"kl", "k1", "low_var_kl", "k3"} <= set(compared(kl_penalty_forward, "kl_penalty"))


def test_every_bound_and_every_choice_is_a_key_of_verl(fine):
    """A key that verl renames or drops would leave its bound without effect."""
    config = OmegaConf.to_container(fine, resolve=True)
    keys = {*leaves(config), *leaves(verl_defaults()), "actor_rollout_ref.rollout.repetition_penalty"}
    assert not [bound for bound in BOUNDS if not any(f".{key}".endswith(f".{bound}") for key in keys)]
    assert not [choice for choice in CHOICES if choice not in keys]
    assert all(names(config) for names in CHOICES.values())
