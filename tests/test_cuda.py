"""On a GPU the reference gives the CPU's bits, and a converted model trains and samples there."""

import copy

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mxfp4_rl import ModelRecipe, QuantRecipe, convert, quantize
from mxfp4_rl.cli import main
from mxfp4_rl.generation import Sampling, generate
from mxfp4_rl.nn import MXFP4Experts, convert_for_rollout, converted_layers
from mxfp4_rl.nn.experts import PROJECTIONS
from mxfp4_rl.quant import error_stats, fake_quantize
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from tests.test_nn import FULL, llama
from tests.test_quant import RECIPES, RULES, awkward, ids, same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SR = QuantRecipe.parse("mxfp4+sr+mbs+of")
ALL = [*RECIPES, *(QuantRecipe(scale_rule=rule) for rule in RULES), SR]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ALL, ids=[r.describe() for r in ALL])
def test_codes_scales_and_operands_are_the_cpus_bit_for_bit(recipe, dtype):
    x = awkward(rows=64, length=416).clamp(-1e38, 1e38).to(dtype)
    here = quantize(x, recipe, seed=7)
    for backend in (None, "reference"):
        there = quantize(x.cuda(), recipe, seed=7, backend=backend)
        for name, tensor in here.tensors().items():
            assert torch.equal(tensor, there.tensors()[name].cpu()), (name, backend)
        assert same_bits(here.dequantize(), there.dequantize().cpu())
        operand = fake_quantize(x.cuda(), recipe, seed=7, backend=backend)
        assert same_bits(fake_quantize(x, recipe, seed=7), operand.cpu())


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_error_statistics_agree(recipe):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    here, there = error_stats(x, recipe).metrics(), error_stats(x.cuda(), recipe).metrics()
    assert there == pytest.approx(here, rel=1e-5, abs=2e-7)  # float32 sums of terms of size 1, in another order


@pytest.mark.parametrize(
    "format, recipe",
    [("mxfp4-pack-quantized", "mxfp4"), ("nvfp4-pack-quantized", "nvfp4+four-over-six"), ("bf16", "mxfp4+mbs+of1")],
)
def test_an_export_is_the_cpus_bit_for_bit(format, recipe, tmp_path):
    model = make_tiny_model(tmp_path / "model", intermediate=192)
    for device in ("cpu", "cuda"):
        options = ["--format", format, "--recipe", recipe, "--device", device, "--verify"]
        assert main(["export", str(model), str(tmp_path / device), *options]) == 0
    here, there = ((tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda"))
    assert here == there


def train(model):
    """Twelve steps on one batch; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (4, 16), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("product", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs"])
def test_training_with_either_product(name, product):
    model = llama(intermediate_size=192).cuda()
    own = QuantRecipe.parse(name)
    report = convert(
        model, ModelRecipe(weight=own, activation=own, grad=QuantRecipe(), dgrad="mx", wgrad="mx", product=product)
    )
    assert f"products {product}" in report.backends(torch.device("cuda"))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.5


def test_a_converted_model_trains_and_its_rollout_agrees():
    recipe = ModelRecipe(weight=FULL, activation=FULL)
    actor = llama().cuda()
    rollout = copy.deepcopy(actor).bfloat16()
    convert(actor, recipe)
    convert_for_rollout(rollout, recipe)
    losses = train(actor)
    assert losses[-1] < losses[0] - 0.5
    layers = converted_layers(rollout)
    for name, layer in converted_layers(actor).items():
        packed = quantize(layer.weight.bfloat16(), layer.recipe.weight).to("cpu").to("cuda")
        layers[name].hold(packed, torch.bfloat16)
        assert same_bits(layers[name].weight_operand(torch.bfloat16), layer.weight_operand(torch.bfloat16))
    out = generate(rollout.eval(), [[1, 2, 3]] * 4, [8] * 4, [0, 1, 2, 3], Sampling(), {63}, 0)
    assert all(1 <= len(tokens) <= 8 for tokens, _ in out)


FAMILIES = {"Qwen3Moe": Qwen3MoeExperts, "GptOss": GptOssExperts}
MX = ModelRecipe(grad=QuantRecipe(), dgrad="mx", wgrad="mx")


@pytest.mark.parametrize("recipe", [ModelRecipe(), ModelRecipe(weight=FULL, activation=FULL), MX], ids=["plain", "full", "mx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_compute_what_they_do_on_the_cpu(family, recipe):
    """Grouped kernels against the loop over experts in float32; of five experts the last gets no token."""
    sizes = dict(hidden_size=96, intermediate_size=64, moe_intermediate_size=64, num_experts=5, num_local_experts=5)
    config = getattr(transformers, f"{family}Config")(**sizes, num_hidden_layers=1)
    here = FAMILIES[family](config).bfloat16()
    torch.manual_seed(0)
    for p in here.parameters():
        torch.nn.init.normal_(p, std=0.2)
    there = copy.deepcopy(here).cuda()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 96, generator=generator).bfloat16()
    index = torch.rand(200, 4, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(200, 2, generator=generator)
    results = []
    for experts, device in ((here, "cpu"), (there, "cuda")):
        MXFP4Experts.swap(experts, "layer.experts", dict.fromkeys(PROJECTIONS, recipe))
        own_x, own_w = (t.clone().to(device).requires_grad_() for t in (x, weights))
        y = experts(own_x, index.to(device), own_w)
        y.backward(torch.ones_like(y))
        grads = [own_x.grad, own_w.grad, *(p.grad for p in experts.parameters())]
        operands = [projection.weight_operand(torch.bfloat16) for projection in experts.projections.values()]
        results.append(([t.float().cpu() for t in (y.detach(), *grads)], [t.cpu() for t in operands]))
    (expected, operands), (got, on_gpu) = results
    assert all(same_bits(a, b) for a, b in zip(operands, on_gpu))
    for a, b in zip(expected, got):
        # Sums in another order flip BF16 roundings of `inner`, and with them a few 4-bit codes.
        assert torch.isfinite(b).all() and (a - b).norm() <= 0.03 * a.norm()
    gate_up = there.gate_up_proj.grad
    assert not gate_up[4].any() and gate_up[:4].any()
