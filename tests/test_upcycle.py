"""A dense model made into a mixture of experts computes the same, before and after quantisation."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxfp4_rl import ModelRecipe, QuantRecipe, convert
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from recipes.upcycle.upcycle import main, moe_config, upcycle


def dense_model(tmp_path, architecture="llama", dtype=torch.float32, **sizes):
    folder = make_tiny_model(tmp_path / architecture, architecture=architecture, **{"intermediate": 256, **sizes})
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("architecture", "family"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_the_dense_model_does(architecture, family, tied, tmp_path):
    _, dense = dense_model(tmp_path, architecture, tie_word_embeddings=tied)
    ids = torch.randint(6, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of(dense, ids)
    moe = upcycle(dense, slices=4, copies=3)
    assert moe.config.model_type == family
    torch.testing.assert_close(logits_of(moe, ids), expected, rtol=1e-5, atol=1e-5)

    taken = []
    for layer in moe.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: taken.append(out[2]))
    logits_of(moe, ids)
    groups = torch.cat(taken) // 4
    assert (groups == groups[:, :1]).all() and set(groups.unique().tolist()) == {0, 1, 2}  # whole copies, all in use

    if not tied:  # quantised, too: slices are of whole blocks and macro blocks
        recipe = QuantRecipe.parse("mxfp4+mbs32+of")
        quantised = ModelRecipe(weight=recipe, activation=recipe)
        convert(dense, quantised)
        assert convert(moe, quantised).experts
        torch.testing.assert_close(logits_of(moe, ids), logits_of(dense, ids), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits_of(moe, ids), expected, rtol=1e-2, atol=1e-3)


def test_a_checkpoint_is_written_and_trains(tmp_path, capsys):
    folder, dense = dense_model(tmp_path, dtype=torch.bfloat16)
    main([str(folder), str(tmp_path / "moe"), "--slices", "2", "--copies", "2"])
    assert "4 experts a layer, 2 for a token" in capsys.readouterr().out
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids = torch.tensor([tokenizer("What is 3 + 4?")["input_ids"]])
    torch.testing.assert_close(logits_of(moe, ids), logits_of(dense, ids), rtol=0.05, atol=0.05)
    recipe = QuantRecipe.parse("mxfp4+mbs+of")
    convert(moe, ModelRecipe(weight=recipe, activation=recipe))
    moe(input_ids=ids, labels=ids).loss.backward()
    for layer in moe.model.layers:
        router = layer.mlp.gate.weight.grad
        assert router.isfinite().all() and router.abs().sum() > 0
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "moe")])
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": 3}, "slices=3 is not a power of two"),
        ({"copies": 1}, "copies=1: with fewer than two"),
        ({"slices": 512}, "slices=512 does not divide intermediate_size=256"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message, tmp_path):
    _, dense = dense_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        moe_config(dense.config, **{"slices": 4, "copies": 2, **options})


def test_other_families_are_refused(tmp_path):
    folder, _ = dense_model(tmp_path)
    folder = make_tiny_model(tmp_path / "m", architecture="qwen3_moe")
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
