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
        ({"scale_rule": 3.9}, r"scale_rule=3.9 is not in \[4, 12\]"),
        ({"scale_rule": True}, "scale_rule=True is not one of"),
        ({"scale_rule": 7.0, "format": "nvfp4"}, "scale_rule=7.0 is a constant of E8M0 scales"),
        ({"scale_rule": "rceil", "format": "nvfp4"}, "'rceil' is a rule of mxfp4; nvfp4 has static, .* .null: static"),
        ({"scale_rule": "c7.25"}, "is a short name: give the number, 7.25"),
        ({"format": "nvfp4", "macro_block": "static", "fallback_alpha": 1}, "give macro_block=null, fallback_alpha=null"),
        ({"block_size": 16.5}, "block_size=16.5 is not one of 32, 16"),
        ({"block_size": 32, "format": "nvfp4"}, "block_size=32 is not one of 16"),
        ({"macro_size": 128.0}, "macro_size=128.0"),
        ({"macro_size": 512}, "macro_size=512 is not a multiple of 32 up to 256; try 256"),
        ({"search_window": (-1, 0)}, "needs scale_rule='search', not 'rceil'"),
        ({"search_window": (1, 2), "scale_rule": "search"}, "must hold 0"),
        ({"search_window": 3, "scale_rule": "search"}, "search_window=3 is not a pair"),
        ({"fallback_fraction": 0.1}, "fallback_fraction=0.1 masks the outlier fallback: give fallback_alpha too"),
        ({"fallback_fraction": 0.1, "fallback_threshold": 1.0, "fallback_alpha": 0.5}, "give one of them"),
        ({"fallback_fraction": 2, "fallback_alpha": 0.5}, r"fallback_fraction=2 is outside \(0, 1\]"),
        ({"fallback_threshold": float("inf"), "fallback_alpha": 0.5}, "fallback_threshold=inf"),
        ({"pre_scale": 0}, r"pre_scale=0 is outside \[0.5, 2\]"),
        ({"hadamard": 48}, "hadamard=48 is not one of null, 32"),
        ({"tile": 1}, "tile=1 is not one of False, True"),
        ({"tile": True, "macro_block": "static"}, "use one of them"),
        ({"tile": True, "hadamard": 32}, "use one of them"),
        ({"tile": True, "format": "nvfp4", "scale_rule": "soar"}, "defined for 1-D blocks"),
        ({"format": "nvfp4", "macro_block": "static"}, "macro_block is defined for format='mxfp4' only"),
        ({"format": "nvfp4", "fallback_alpha": 0.5}, "fallback_alpha is defined for format='mxfp4' only"),
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


def test_the_shipped_configuration_is_valid_and_off_by_default_elsewhere():
    from importlib.resources import files

    shipped = OmegaConf.load(files("mxfp4_rl.configs") / "mxfp4.yaml").mxfp4
    shipped.run_dir = "runs/x"
    settings = Settings.from_config(shipped)
    assert settings.enable and settings.recipe.weight.fallback_alpha == 1.0 and not settings.aqn.enable
    assert not Settings.from_config(None).enable


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mxfp4", QuantRecipe()),
        ("MXFP4+OAS+mbs32-dynamic+of1", QuantRecipe(scale_rule="oas", macro_block="dynamic", macro_size=32, fallback_alpha=1)),
        ("mxfp4+mbs+of", QuantRecipe(macro_block="static", fallback_alpha=0.5)),
        ("mxfp4+of0.25+top5%", QuantRecipe(fallback_alpha=0.25, fallback_fraction=0.05)),
        ("mxfp4+c7.25+b16", QuantRecipe(scale_rule=7.25, block_size=16)),
        ("mxfp4+search+tile+prescale", QuantRecipe(scale_rule="search", tile=True, pre_scale=0.75)),
        ("mxfp4+sr+hadamard64", QuantRecipe(rounding="stochastic", hadamard=64)),
        ("nvfp4+four-over-six", QuantRecipe(format="nvfp4", scale_rule="four_over_six")),
        (" mxfp4 + of.5 ", QuantRecipe(fallback_alpha=0.5)),
    ],
)
def test_short_names(text, expected):
    assert QuantRecipe.parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("int4", "format='int4' is not one of 'mxfp4', 'nvfp4'"),
        ("mxfp4+nbs", "'nbs' in 'mxfp4.nbs' is none of: rceil"),
        ("mxfp4+soar", r"'soar' in .* \(it belongs to nvfp4\)"),
        ("mxfp4+oas+floor", "'floor' in 'mxfp4.oas.floor' sets scale_rule a second time"),
        ("mxfp4+mbs100", "macro_size=100"),
        ("nvfp4+mbs", "macro_block is defined for format='mxfp4' only"),
        ("mxfp4+of.", "'of.' in"),
        ("mxfp4+top5%", r"in a short name, \+of"),
        ("", "format=''"),
        ("mxfp4+", "'' in"),
    ],
)
def test_wrong_short_names_are_explained(text, message):
    with pytest.raises(RecipeError, match=message):
        QuantRecipe.parse(text)


def test_hybrid_macro_blocks_are_dynamic_for_weights():
    """MBS-Hybrid, arXiv 2603.08713."""
    with pytest.raises(RecipeError, match="give 'dynamic' or 'static' here"):
        QuantRecipe(macro_block="hybrid")
    recipe = ModelRecipe.from_dict({"macro_block": "hybrid", "grad": {}})
    assert [recipe.weight.macro_block, recipe.activation.macro_block, recipe.grad.macro_block] == [
        "dynamic",
        "static",
        "static",
    ]
    recipe = ModelRecipe(overrides={"down_proj": {"macro_block": "hybrid", "macro_size": 32}}).for_layer(["down_proj"])
    assert recipe.weight == QuantRecipe(macro_block="dynamic", macro_size=32)
    assert recipe.activation == QuantRecipe(macro_block="static", macro_size=32)


def test_hybrid_is_for_all_operands():
    with pytest.raises(RecipeError, match=r"recipe.weight.macro_block='hybrid' is for a whole model: give it at recipe.macro"):
        ModelRecipe.from_dict({"weight": {"macro_block": "hybrid"}})
    assert QuantRecipe(format="nvfp4", scale_rule="four-over-six").scale_rule == "four_over_six"


def test_an_override_may_change_the_format():
    recipe = ModelRecipe(overrides={"down_proj": {"format": "nvfp4"}}).for_layer(["down_proj"])
    assert recipe.weight == recipe.activation == QuantRecipe(format="nvfp4")


def test_an_operand_of_another_format_starts_from_its_own_scale_rule():
    recipe = ModelRecipe.from_dict({"scale_rule": "oas", "grad": {"format": "nvfp4"}, "activation": {"format": "mxfp4"}})
    assert recipe.grad == QuantRecipe(format="nvfp4") and recipe.activation.scale_rule == "oas"
    with pytest.raises(RecipeError, match=r"recipe.grad: macro_block is defined for"):
        ModelRecipe.from_dict({"macro_block": "static", "grad": {"format": "nvfp4"}})


def test_stochastic_rounding_is_for_gradients():
    with pytest.raises(RecipeError, match=r"weight.rounding='stochastic'.*grad.rounding=stochastic"):
        ModelRecipe.from_dict({"rounding": "stochastic"})
    recipe = ModelRecipe.from_dict({"dgrad": "mx", "grad": {"rounding": "stochastic", "hadamard": 64}, "scale_rule": "oas"})
    assert recipe.weight == QuantRecipe(scale_rule="oas")
    assert recipe.in_backward("weight") == QuantRecipe(scale_rule="oas", rounding="stochastic", hadamard=64)


def test_methods_survive_json():
    recipe = ModelRecipe.from_dict({"scale_rule": "search", "search_window": [-2, 1], "grad": {"tile": True}})
    assert ModelRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_bits_per_element():
    bits = {
        "mxfp4": 4.25,
        "mxfp4+mbs": 4.3125,
        "mxfp4+mbs32": 4.5,
        "mxfp4+of": 8.5,
        "mxfp4+of+top10%": 4.25 * 1.1 + 1 / 32,
        "mxfp4+tile": 4 + 8 / 1024,
        "nvfp4": 4.5,
    }
    for text, expected in bits.items():
        assert QuantRecipe.parse(text).bits_per_element == pytest.approx(expected), text
