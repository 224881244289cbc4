"""Decode attention over a packed KV cache against its float64 reference."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_kernels.attention import reference
from mxfp4_kernels.attention.decode import attend, parts

from mxfp4_rl import QuantRecipe
from mxfp4_rl.kv_cache.blocks import Blocks, Stored, pack


def held_by(rows, heads, width, block, lengths, sink, name="nvfp4+search", dtype=torch.float32, seed=0):
    """A cache of sequences of these lengths, packed as `mxfp4_rl.kv_cache` does, stale room filled with NaN."""
    g = torch.Generator().manual_seed(seed)
    recipe = QuantRecipe.parse(name)
    packed = [max(0, (n - sink - 1) // block) for n in lengths]  # an open block may be full

    def some(count):
        spread = torch.exp2(torch.randint(-3, 3, (rows, heads, 1, width), generator=g))
        return torch.randn(rows, heads, count, width, generator=g) * spread

    stored = []
    for axis in (0, 1):
        blocks = some(max(packed) * block).unflatten(2, (-1, block))
        stored.append(pack(blocks if axis == 0 else blocks.mT.contiguous(), recipe))
    dense = [some(sink).to(dtype), some(sink).to(dtype), some(block).to(dtype), some(block).to(dtype)]
    for row, (n, count) in enumerate(zip(lengths, packed, strict=True)):
        for t in dense[:2]:
            t[row, :, n:] = float("nan")
        for t in dense[2:]:
            t[row, :, max(0, n - sink - count * block) :] = float("nan")
        for blocks in stored:  # NaN: of E4M3, of E8M0, of the exponents
            blocks.scales[row, :, count:] = 127 if recipe.format == "nvfp4" else 255
            if blocks.exponents is not None:
                blocks.exponents[row, :, count:] = 255
    counts = [torch.tensor(t, dtype=torch.int32) for t in (lengths, packed)]
    return Stored(*stored, *dense, *counts, recipe)


def on(held, device):
    moved = {
        n: t.map(lambda x: x.to(device)) if isinstance(t, Blocks) else t.to(device)
        for n, t in vars(held).items()
        if n != "recipe"
    }
    return Stored(**moved, recipe=held.recipe)


def check(held, queries, dtype=torch.float32, seed=1, **options):
    rows, heads, width = held.open_keys.shape[0], held.open_keys.shape[1], held.open_keys.shape[3]
    q = torch.randn(rows, heads * queries, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = reference.attend(q, held, width**-0.5)
    out = attend(q.to(DEVICE), on(held, DEVICE), width**-0.5, **options).cpu()
    assert out.dtype == dtype and out.shape == q.shape and expected.isfinite().all()
    # BF16 rounds weights to 2^-9 of themselves (and, on a GPU, the result); float32 products only sum.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    largest = 8 * 5  # of the values' spread and a Gaussian
    assert (out.double() - expected).abs().max() <= tolerance * largest


@pytest.mark.parametrize("name", ["nvfp4+search", "mxfp4"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("split", [1, 3])
def test_is_the_reference(name, block, split):
    if name == "mxfp4" and block == 16:
        pytest.skip("mxfp4's own block has 32 elements")
    lengths = [4 + 3 * block + 5, 4 + block + block, 2, 4 + 1]
    check(held_by(4, 2, 64, block, lengths, 4, name), 3, split=split)


@pytest.mark.parametrize("width, queries, heads, sink", [(32, 1, 1, 0), (128, 8, 2, 20), (64, 17, 1, 4), (256, 2, 1, 1)])
def test_heads_of_all_kinds(width, queries, heads, sink):
    check(held_by(2, heads, width, 16, [sink + 150, sink + 33], sink), queries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16])
def test_low_precision(dtype):
    check(held_by(2, 2, 64, 64, [300, 77], 4, dtype=dtype), 4, dtype)


def test_every_code_and_scale():
    """A key that picks one token, whose value then comes out exactly: all codes, and E4M3's scales of all kinds."""
    scales = torch.tensor([1, 2, 3, 7, 8, 9, 15, 16, 64, 79, 93, 111, 119, 120, 125, 126], dtype=torch.uint8)
    blocks = len(scales)
    held = held_by(1, 1, 32, 16, [blocks * 16 + 1], 0)
    held.keys.codes.zero_()
    held.keys.scales.fill_(0x7E)
    held.keys.exponents.fill_(127)
    held.values.exponents.fill_(127)
    held.values.scales.copy_(scales.view(1, 1, blocks, 1, 1).expand_as(held.values.scales))
    token = torch.arange(16)
    held.values.codes.copy_((token[::2] | (token[1::2] << 4)).view(1, 1, 1, 1, 8).expand_as(held.values.codes))
    held.open_keys.zero_()
    held.open_values.nan_to_num_()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    for block, code in enumerate((1, 15, 2, 9, 5, 7, 14, 3, 4, 6, 8, 10, 11, 12, 13, 0)):
        held.keys.codes.zero_()
        held.keys.codes[0, 0, block, code] = 0x77  # 6 in all channels
        q = torch.full((1, 1, 32), 1.0)
        out = attend(q.to(DEVICE), on(held, DEVICE), 1.0).cpu()
        expected = values[code] * scales[block].view(torch.float8_e4m3fn).float()
        assert torch.equal(out, expected.expand_as(out)), (block, code)


def test_broken_tokens_are_nan_where_they_are():
    held = held_by(2, 1, 32, 16, [40, 40], 4)
    held.values.exponents[1, 0, 1] = 255
    out = attend(torch.randn(2, 2, 32).to(DEVICE), on(held, DEVICE), 1.0).cpu()
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_parts_fill_the_gpu():
    assert parts(8, 64) == 1 and parts(8, 1 << 16) == 64 and parts(10_000, 4096) == 1 and parts(1, 0) == 1


def test_what_does_not_fit_is_refused():
    held = on(held_by(2, 2, 32, 16, [40, 40], 4), DEVICE)
    q = torch.zeros(2, 4, 32, device=DEVICE)
    for wrong, message in ((q[:1], "does not fit"), (q[:, :3], "does not fit"), (q.double(), "float64"), (q[0], "must be")):
        with pytest.raises(ValueError, match=message):
            attend(wrong, held, 1.0)
    with pytest.raises(ValueError, match="powers of two"):
        wide = held_by(1, 1, 32, 48, [60], 4)
        attend(q[:1, :1], on(wide, DEVICE), 1.0)
    held.lengths = held.lengths.long()
    with pytest.raises(ValueError, match="lengths must be int32"):
        attend(q, held, 1.0)


def test_a_model_decodes_with_it(monkeypatch):
    """The attention function that transformers calls gives the kernel what it needs, padding and selection included."""
    from mxfp4_rl.kv_cache import KVCacheRecipe, QuantizedCache, attention
    from tests.test_kv_cache import fed, llama, tokens

    model, recipe = llama(), KVCacheRecipe(block=16, sink=2)
    ids, mask = tokens(2, 36), torch.ones(2, 36, dtype=torch.int64)
    mask[0, :13] = 0  # its first block is full after 31 columns, the other sequence's second one after 34
    cuts = [29, *range(30, 37)]
    expected = fed(model, ids, cuts, QuantizedCache(model.config, recipe, mask[:, :29]), mask)
    calls = []

    def read_packed(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if isinstance(key, attention.View) and key.keys is None:
            calls.append(1)
            q = attention.rotated(query).squeeze(2)
            return attend(q.to(DEVICE), on(key.stored(), DEVICE), scaling).to(query.device).unsqueeze(1), None
        return attention.attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION, read_packed)
    out = fed(model, ids, cuts, QuantizedCache(model.config, recipe, mask[:, :29]), mask)
    assert len(calls) == 7 * 2
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)
