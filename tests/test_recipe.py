"""Recipes and settings refuse what they cannot do, naming the value and the fix, and survive a round trip."""

import json

import pytest
from omegaconf import OmegaConf

from mxfp4_rl import ModelRecipe, QuantRecipe, RecipeError
from mxfp4_rl.settings import Settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fallback_alpha": 0}, r"fallback_alpha=0 is outside \(0, 1\]"),
        ({"fallback_alpha": 1.5}, r"fallback_alpha=1.5"),
        ({"fallback_alpha": float("nan")}, "fallback_alpha=nan"),
        ({"fallback_alpha": "half"}, "fallback_alpha='half'"),
        ({"macro_size": 100}, "macro_size=100 is not a multiple of 32 up to 256; try 96"),
        ({"macro_size": 0}, "macro_size=0"),
        ({"macro_block": "both"}, "macro_block='both' is not one of null, 'static', 'dynamic'"),
        ({"scale_rule": "round"}, "scale_rule='round' is not one of 'rceil', 'floor'"),
        ({"format": "int4"}, "format='int4'"),
        ({"rounding": "up"}, "rounding='up'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        QuantRecipe(**values)
    with pytest.raises(RecipeError, match=message):
        ModelRecipe.from_dict(values)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"recipe": {"scale_rul": "floor"}}, "unknown key 'scale_rul' in mxfp4.recipe; did you mean 'scale_rule'"),
        ({"recipe": {"weight": {"alpha": 1}}}, "unknown key 'alpha' in mxfp4.recipe.weight"),
        ({"recipe": {"weight": 4}}, "mxfp4.recipe.weight=4 must be a block"),
        ({"recipe": {"overrides": {"q": {"macro": 32}}}}, r"overrides\['q'\]"),
        ({"recipe": {"exclude": "lm_head"}}, "must be a list"),
        ({"recipe": {"dgrad": "fp8"}}, "dgrad='fp8'"),
        ({"recipe": {"wgrad": "mx"}}, "give a `grad` recipe"),
        ({"recipe": {"weight": None, "activation": None}}, "nothing is quantised"),
        ({"enabled": True}, "unknown key 'enabled' in mxfp4; did you mean 'enable'"),
        ({"enable": "yes"}, "mxfp4.enable='yes' must be true or false"),
        ({"aqn": {"sigma": 1}}, "unknown key 'sigma' in mxfp4.aqn"),
        ({"monitor": {"every": -1}}, "every=-1"),
        ({"monitor": {"max_rows": 0}}, "max_rows=0"),
    ],
)
def test_settings_name_the_key_and_the_nearest_one(block, message):
    with pytest.raises(RecipeError, match=message):
        Settings.from_config(OmegaConf.create(block))


@pytest.mark.parametrize(
    "aqn, message",
    [
        ({"sigma_start": 0.1, "sigma_end": 0.2}, "sigma_end"),
        ({"stages": 1}, "stages=1"),
        ({"sigma_end": 0}, "sigma_end=0"),
    ],
)
def test_noise_schedule_is_checked(aqn, message):
    settings = Settings.from_config({"aqn": {"enable": True, **aqn}})
    with pytest.raises(RecipeError, match=message):
        settings.aqn.schedule(10)


def test_shared_keys_apply_to_every_operand_and_are_overridden_for_one():
    recipe = ModelRecipe.from_dict(
        {
            "macro_block": "static",
            "fallback_alpha": 0.5,
            "activation": {"fallback_alpha": None},
            "grad": {"scale_rule": "oas"},
        }
    )
    assert recipe.weight == QuantRecipe(macro_block="static", fallback_alpha=0.5)
    assert recipe.activation == QuantRecipe(macro_block="static")
    assert recipe.grad == QuantRecipe(macro_block="static", fallback_alpha=0.5, scale_rule="oas")
    assert ModelRecipe.from_dict({}).grad is None
    assert ModelRecipe.from_dict({"activation": None}).activation is None


def test_recipes_survive_json():
    recipe = ModelRecipe.from_dict(
        {"macro_block": "dynamic", "overrides": {"q_proj": {"macro_size": 64}}, "exclude": ["o_proj"]}
    )
    assert ModelRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_bits_per_element():
    assert QuantRecipe().bits_per_element == 4.25
    assert QuantRecipe(macro_block="static").bits_per_element == 4.3125
    assert QuantRecipe(macro_block="static", fallback_alpha=0.5).bits_per_element == 8.5625


def test_the_shipped_configuration_is_valid_and_off_by_default_elsewhere():
    from importlib.resources import files

    shipped = OmegaConf.load(files("mxfp4_rl.configs") / "mxfp4.yaml").mxfp4
    shipped.run_dir = "runs/x"
    settings = Settings.from_config(shipped)
    assert settings.enable and settings.recipe.weight.fallback_alpha == 0.5 and settings.aqn.enable
    assert not Settings.from_config(None).enable
