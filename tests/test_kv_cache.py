"""The 4-bit KV cache: what blocks hold, where tokens are, and that attention through it is what its definition says."""

import itertools

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.generation import Sampling, generate
from mxfp4_rl.kv_cache import ATTENTION, KVCacheRecipe, QuantizedCache
from mxfp4_rl.kv_cache.attention import rotated
from mxfp4_rl.kv_cache.blocks import pack, unpack
from mxfp4_rl.recipe import RecipeError

NVFP4, MXFP4 = QuantRecipe.parse("nvfp4+search"), QuantRecipe.parse("mxfp4")


def llama(attention=ATTENTION, **changes):
    config = dict(
        vocab_size=61, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # attention that is not flat
    model.set_attn_implementation(attention)
    return model


def tokens(rows, count, seed=0):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(model, ids, cuts, cache, mask=None):
    """Logits of `ids`, fed in parts that end at `cuts`."""
    out = []
    for a, b in itertools.pairwise((0, *cuts)):
        kwargs = {}
        if mask is not None:
            kwargs = {"attention_mask": mask[:, :b], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, a:b]}
        out.append(model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True, **kwargs).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("recipe", [NVFP4, QuantRecipe.parse("nvfp4"), MXFP4], ids=QuantRecipe.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_quantisers(recipe, dtype):
    """Of a block whose g is 1, codes and scales are those of `quantize`; other powers of two only move the exponent."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 32, 64, generator=g).to(dtype)
    x[..., 0, 0] = 1000.0  # between 768 and 1536: g = 1
    blocks = pack(x, recipe)
    alone = quantize(x, recipe, tensor_scale=1.0 if recipe.format == "nvfp4" else None)
    assert torch.equal(blocks.codes, alone.codes) and torch.equal(blocks.scales, alone.scales)
    assert torch.equal(unpack(blocks, recipe), alone.dequantize())
    small = pack((x.float() * 2.0**-20), recipe)
    assert torch.equal(unpack(small, recipe), unpack(blocks, recipe) * 2.0**-20)
    if recipe.format == "nvfp4":
        assert (blocks.exponents == 127).all() and (small.exponents == 107).all() and torch.equal(small.scales, blocks.scales)
    exact = unpack(blocks, recipe)
    assert torch.equal(exact, exact.bfloat16().float())  # BF16 holds it


def test_error_is_nvfp4s():
    """A block's power of two loses nothing against a float32 scale: of a Gaussian's energy static 0.00906, searched 0.00660."""
    x = torch.randn(64, 8, 64, 64, generator=torch.Generator().manual_seed(2))
    for name, expected in (("nvfp4", 0.009059), ("nvfp4+search", 0.006600), ("mxfp4", 0.013306)):
        recipe = QuantRecipe.parse(name)
        error = (unpack(pack(x, recipe), recipe) - x).square().mean() / x.square().mean()
        assert error == pytest.approx(expected, rel=0.01)


def test_zeros_and_broken_blocks():
    x = torch.zeros(4, 1, 16, 16)
    x[1, 0, 3, 3] = float("nan")
    x[2, 0, 3, 3] = float("inf")
    x[3] = 1e-30
    out = unpack(pack(x, NVFP4), NVFP4)
    assert (out[0] == 0).all() and out[1].isnan().all() and out[2].isnan().all()
    torch.testing.assert_close(out[3], x[3], rtol=0.03, atol=0)


def emulated(model, ids, recipe, length):
    """Logits of the last of `length` tokens by the definition: no cache class, a quantised copy of each complete block.

    Tokens go one by one; DynamicCache's tensors are overwritten as blocks complete.
    """
    model.set_attn_implementation("sdpa")
    cache, out, done = DynamicCache(config=model.config), [], 0
    for t in range(length):
        if t - recipe.sink >= (done + 1) * recipe.block:
            part = slice(recipe.sink + done * recipe.block, recipe.sink + (done + 1) * recipe.block)
            for layer in cache.layers:
                k, v = layer.keys[:, :, part], layer.values[:, :, part]
                if recipe.transform:  # orthogonal: the way back is the transpose
                    matrix = rotated(torch.eye(k.shape[-1]))
                    k = unpack(pack(k @ matrix, recipe.quant), recipe.quant) @ matrix.T
                else:
                    k = unpack(pack(k, recipe.quant), recipe.quant)
                layer.keys[:, :, part] = k
                layer.values[:, :, part] = unpack(pack(v.mT.contiguous(), recipe.quant), recipe.quant).mT
            done += 1
        out.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    model.set_attn_implementation(ATTENTION)
    return torch.cat(out, 1)


RECIPES = [
    KVCacheRecipe(block=16, sink=4, transform=None),
    KVCacheRecipe(block=16, sink=0, transform="hadamard"),
    KVCacheRecipe(format="mxfp4", scale_rule="rceil", block=32, sink=3, transform=None),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=KVCacheRecipe.describe)
def test_attention_is_that_of_quantised_blocks(recipe):
    """One token at a time, and in parts that end where blocks do, which is the same by definition."""
    model, count = llama(), recipe.sink + 2 * recipe.block + 5
    ids = tokens(2, count)
    with torch.no_grad():
        expected = emulated(model, ids, recipe, count)
    singly = fed(model, ids, range(1, count + 1), QuantizedCache(model.config, recipe))
    torch.testing.assert_close(singly, expected, rtol=1e-3, atol=1e-3)
    first = recipe.sink or recipe.block
    cuts = [*range(first, count, recipe.block), count]
    in_parts = fed(model, ids, cuts, QuantizedCache(model.config, recipe))
    torch.testing.assert_close(in_parts, expected, rtol=1e-3, atol=1e-3)
    plain = fed(model, ids, [count], None)
    assert (plain - expected).abs().max() > 0.01  # quantising did change something


def test_transform_changes_nothing_but_the_quantisation():
    model, ids = llama(), tokens(2, 30)
    recipe = KVCacheRecipe(block=64, transform="hadamard")  # nothing is ever complete
    for cuts in ([30], [10, 11, 30], range(1, 31)):
        torch.testing.assert_close(
            fed(model, ids, cuts, QuantizedCache(model.config, recipe)), fed(model, ids, [30], None), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Each sequence of a padded batch gets the logits that it gets alone: its own sinks, its own blocks."""
    model, recipe = llama(), KVCacheRecipe(block=16, sink=2)
    lengths, width, more = (23, 40, 7), 40, 30
    ids, mask = tokens(3, width + more), torch.ones(3, width + more, dtype=torch.int64)
    for row, n in enumerate(lengths):
        pads = slice(0, width - n) if side == "left" else slice(n, width)
        mask[row, pads] = 0
    cache = QuantizedCache(model.config, recipe, mask[:, :width])
    cuts = [width, *range(width + 1, width + 20), width + more]
    batch = fed(model, ids, cuts, cache, mask)
    for row, n in enumerate(lengths):
        own = ids[row : row + 1, mask[row].bool()]
        ends = [n, *range(n + 1, n + 20), n + more]
        alone = fed(model, own, ends, QuantizedCache(model.config, recipe))
        torch.testing.assert_close(batch[row, mask[row].bool()], alone[0], rtol=1e-4, atol=1e-4)


def test_any_attention_without_a_transform():
    recipe, ids = KVCacheRecipe(block=16, transform=None), tokens(2, 50)
    results = []
    for attention in ("sdpa", "eager", ATTENTION):
        model = llama(attention)
        results.append(fed(model, ids, [5, 21, 40, *range(41, 51)], QuantizedCache(model.config, recipe)))
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-4)


def test_sequences_can_be_selected():
    model, recipe = llama(), KVCacheRecipe(block=16)
    ids = tokens(3, 45)
    whole = fed(model, ids, [40, *range(41, 46)], QuantizedCache(model.config, recipe))
    cache = QuantizedCache(model.config, recipe)
    fed(model, ids[:, :40], [40], cache)
    rows = torch.tensor([2, 0, 2])
    cache.batch_select_indices(rows)
    with torch.no_grad():
        out = [model(input_ids=ids[rows][:, t : t + 1], past_key_values=cache).logits for t in range(40, 45)]
    torch.testing.assert_close(torch.cat(out, 1), whole[rows, 40:], rtol=1e-4, atol=1e-4)


def test_memory_is_counted():
    model, recipe = llama(), KVCacheRecipe(block=16, sink=4)
    cache = QuantizedCache(model.config, recipe)
    fed(model, tokens(2, 70), [70], cache)
    m = cache.memory()
    values = 2 * 2 * 2 * 2 * 64 * 32  # K and V, layers, rows, heads, tokens in 4 blocks, channels
    assert m.values == values and m.tokens == 2 * 70
    assert m.bits_per_value == 4.5 + 8 / (16 * 32)
    assert m.bf16 == 2 * 2 * 2 * 70 * 2 * 32 * 2 and m.sinks == 2 * 2 * 2 * 2 * 4 * 32 * 4 and m.total > m.packed
    mx = QuantizedCache(model.config, KVCacheRecipe("mxfp4", block=32))
    assert mx.memory().bits_per_value is None
    fed(model, tokens(2, 70), [70], mx)
    assert mx.memory().bits_per_value == 4.25


def test_sampling_does_not_depend_on_the_batch():
    model, recipe = llama(), KVCacheRecipe(block=16, sink=2)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 21, 21, 12)]
    prompts[2] = prompts[1]

    def sample(which):
        return generate(
            model, [prompts[i] for i in which], [40 - 5 * i for i in which], [7 + i for i in which], Sampling(),
            stop_ids={3}, pad_id=0, cache=lambda mask: QuantizedCache(model.config, recipe, mask),
        )  # fmt: skip

    together = sample(range(4))
    for i in range(4):
        ids, log_probs = sample([i])[0]
        assert ids == together[i][0] and log_probs == pytest.approx(together[i][1], abs=1e-4)
    assert any(len(ids) > 20 for ids, _ in together)


def test_transformers_own_generation_takes_it():
    model, ids = llama(), tokens(2, 20).clamp(min=1)
    outs = []
    for recipe in (KVCacheRecipe(block=16), KVCacheRecipe(block=256)):  # the second one never packs
        cache = QuantizedCache(model.config, recipe)
        outs.append(
            model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
        )
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(outs[1], plain) and outs[0].shape == plain.shape
    assert cache.get_seq_length() == 49


@pytest.mark.parametrize(
    "values, message",
    [
        ({"format": "fp8"}, "format='fp8' is not one of"),
        ({"scale_rule": "rceil"}, "rule of mxfp4"),
        ({"scale_rule": "soar"}, "use 'search'"),
        ({"block": 24}, "multiple of 16"),
        ({"format": "mxfp4", "block": 16}, "multiple of 32"),
        ({"block": True}, "multiple of 16"),
        ({"sink": -1}, "try 4"),
        ({"transform": "dct"}, "null, 'hadamard'"),
        ({"sinks": 4}, "did you mean 'sink'"),
        (3, "block of keys"),
    ],
)
def test_wrong_recipes_are_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        KVCacheRecipe.from_dict(values)


def test_what_cannot_be_cached_is_refused():
    model = llama("sdpa")
    with pytest.raises(RecipeError, match="set_attn_implementation"):
        QuantizedCache(model.config, KVCacheRecipe())
    with pytest.raises(RecipeError, match="power of two"):
        QuantizedCache(LlamaConfig(head_dim=48, attn_implementation=ATTENTION), KVCacheRecipe())
    with pytest.raises(RecipeError, match=r"multiple of 32.*nvfp4"):
        QuantizedCache(LlamaConfig(head_dim=80), KVCacheRecipe("mxfp4", transform=None))
    from transformers import Gemma2Config

    with pytest.raises(RecipeError, match="sliding_attention"):
        QuantizedCache(Gemma2Config(), KVCacheRecipe(transform=None))


def test_a_forgotten_mask_is_refused():
    model, mask = llama(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="give QuantizedCache the attention_mask"), torch.no_grad():
        model(tokens(2, 4), attention_mask=mask, past_key_values=QuantizedCache(model.config, KVCacheRecipe()))
    with pytest.raises(ValueError, match="first call"), torch.no_grad():
        model(tokens(2, 4), past_key_values=QuantizedCache(model.config, KVCacheRecipe(), mask[:, :3]))
    cache = QuantizedCache(model.config, KVCacheRecipe())
    with pytest.raises(NotImplementedError, match="cut"):
        cache.crop(3)
    view, _ = cache.update(torch.zeros(1, 2, 4, 32), torch.zeros(1, 2, 4, 32), 0)
    with pytest.raises(AttributeError, match="view, not a tensor with 'transpose'"):
        view.transpose(1, 2)


def test_plain_calls_are_sdpa():
    ids = tokens(2, 20)
    assert torch.equal(fed(llama(), ids, [20], None), fed(llama("sdpa"), ids, [20], None))
