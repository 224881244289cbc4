"""Log-probs of labels in chunks, against float64 and against verl's own."""

import pytest
import torch
from verl.utils import torch_functional
from verl.workers.engine.fsdp import transformer_impl

import mxfp4_rl.verl_plugin.register  # noqa: F401  (what verl's engine calls)
from mxfp4_rl.verl_plugin import log_probs


def numbers(shape=(37, 51), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).mul(4).to(dtype), torch.randint(0, shape[-1], shape[:-1], generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 51 * 10, 1 << 26])  # a row, chunks with a rest, all at once
def test_values_and_gradients_are_those_of_float64(monkeypatch, dtype, chunk):
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    logits, labels = numbers(dtype=dtype)
    grad = torch.randn(37, generator=torch.Generator().manual_seed(1))
    own, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = log_probs.label_log_probs(own, labels)
    expected = exact.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=2e-6, rtol=1e-6)
    out.backward(grad)
    expected.backward(grad.double())
    assert own.grad.dtype == dtype
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(own.grad.double(), exact.grad, atol=1e-7, rtol=tolerance)


def test_verls_engine_calls_it_with_any_leading_shape():
    logits, labels = numbers((3, 5, 17))
    out = transformer_impl.logprobs_from_logits(logits=logits, labels=labels)
    assert out.shape == (3, 5)
    assert torch.allclose(out, torch_functional.logprobs_from_logits_naive(logits, labels), atol=1e-6)


def test_no_rows_and_certain_labels():
    assert log_probs.label_log_probs(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)
    logits = torch.tensor([[0.0, -torch.inf], [1e30, 0.0], [torch.nan, 0.0]])
    out = log_probs.label_log_probs(logits, torch.tensor([0, 0, 1]))
    assert out[:2].tolist() == [0.0, 0.0] and out[2].isnan()


def test_flash_attention_is_left_to_verl(monkeypatch):
    called = []
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    monkeypatch.setattr(torch_functional, "logprobs_from_logits_flash_attn", lambda *a, **k: called.append(k) or torch.zeros(6))
    transformer_impl.logprobs_from_logits(*numbers((2, 3, 8)), inplace_backward=False)
    assert called == [{"inplace_backward": False}]
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    transformer_impl.logprobs_from_logits(*numbers((2, 3, 8)))
    assert len(called) == 1
