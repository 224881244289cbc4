"""SOAR (arXiv 2605.12245): the tensor's scale and the block scales of NVFP4, optimised together and without data.

With alpha the tensor's scale, D_i the E4M3 scales and Q = E2M1(W / (alpha D)), minimise ||W - alpha D Q||^2 by turns:

    CJSO    alpha = sum_i D_i a_i / sum_i D_i^2 b_i        a_i = sum_j W_ij Q_ij,  b_i = sum_j Q_ij^2  over block i
            D_i   = E4M3(a_i / (alpha b_i))                (kept where b_i = 0)
    DSS     D_i, or a neighbouring E4M3 code, with the elements rounded at another scale: Q = E2M1(W / (alpha beta D_i)),
            beta in [0.5, 1.5] by 0.01; the pair of least squared error

for at most 15 rounds, until a round improves the squared error by less than a thousandth. Under the squared error DSS needs
no beta but 1: for a stored scale D_i, rounding at D_i is the best for each element on its own. `betas` is there to check that
(tests/test_nvfp4.py), and for metrics that do not split into elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mxfp4_rl.quant.blocks import fold_sum
from mxfp4_rl.quant.elements import E2M1_MAX, round_e2m1
from mxfp4_rl.quant.nvfp4 import MAX_CODE, MIN_CODE, e4m3_code, e4m3_value, tensor_scale
from mxfp4_rl.quant.passes import Rows
from mxfp4_rl.quant.scales import divided

DSS_BETAS = tuple(k / 100 for k in range(50, 151))
MAX_ROUNDS, TOLERANCE = 15, 1e-3


@dataclass
class SoarState:
    """The scales after some rounds, and the squared error after each.

    Attributes:
        tensor_scale: alpha, float32 (). codes: E4M3 bits, int32 (rows, blocks). betas: float32 (rows, blocks), 1 without DSS.
        errors: squared error at the start and after each round. other_beta_won: how often, over blocks and rounds, a beta
            other than 1 had the least error.
    """

    tensor_scale: torch.Tensor
    codes: torch.Tensor
    betas: torch.Tensor
    errors: list[float] = field(default_factory=list)
    other_beta_won: int = 0


def soar_scales(rows: Rows, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha, float32 (), and E4M3 codes, int32 (rows, blocks), of the default iteration."""
    state = optimise(rows, amax)
    return state.tensor_scale, state.codes


def optimise(
    rows: Rows,
    amax: torch.Tensor,
    dss: bool = True,
    betas: tuple[float, ...] = (1.0,),
    max_rounds: int = MAX_ROUNDS,
    tolerance: float = TOLERANCE,
) -> SoarState:
    """Run the iteration on the blocks of `rows`, with largest magnitudes amax, float32 (rows, blocks)."""
    alpha = tensor_scale(amax, "soar")
    state = SoarState(alpha, e4m3_code(divided(amax, E2M1_MAX) / alpha), torch.ones_like(amax))
    products, squares, error = _measure(rows, state)
    state.errors.append(error)
    for _ in range(max_rounds):
        scales = e4m3_value(state.codes).double()
        den = (squares * scales.square()).sum()
        if not den > 0:
            break
        new_alpha = ((products * scales).sum() / den).float()
        wanted = (products / (squares * new_alpha.double())).float()
        codes = torch.where(squares > 0, e4m3_code(torch.where(squares > 0, wanted, 1.0)), state.codes)
        trial = SoarState(new_alpha, codes, torch.ones_like(amax), state.errors, state.other_beta_won)
        if dss:
            _search_neighbours(rows, trial, betas)
        products, squares, error = _measure(rows, trial)
        if not error < state.errors[-1]:
            break
        improvement = 1 - error / state.errors[-1]
        state = trial
        state.errors.append(error)
        if improvement < tolerance:
            break
    return state


def _measure(rows: Rows, state: SoarState) -> tuple[torch.Tensor, torch.Tensor, float]:
    """a_i and b_i, float64 (rows, blocks), and the squared error. Blocks with NaN or Inf count as zero."""
    products = torch.zeros(state.codes.shape, dtype=torch.float64, device=state.codes.device)
    squares = torch.zeros_like(products)
    error = 0.0
    for r, b in rows.chunks():
        _silence_broken(b.x)
        worth = (e4m3_value(state.codes[r]) * state.tensor_scale).unsqueeze(-1)
        q = round_e2m1(b.x / (worth * state.betas[r].unsqueeze(-1)))
        products[r] = (b.x.double() * q).sum(-1)
        squares[r] = q.square().sum(-1).double()
        error += (q * worth - b.x).double().square().sum().item()
    return products, squares, error


def _search_neighbours(rows: Rows, state: SoarState, betas: tuple[float, ...]) -> None:
    """DSS in place: the best of the codes -1, 0, +1 and the betas for every block; the first of equals, code 0 first."""
    for r, b in rows.chunks():
        _silence_broken(b.x)
        best = best_error = best_beta = None
        plain_error = torch.full(state.codes[r].shape, torch.inf, device=b.x.device)
        for offset in (0, -1, 1):
            code = (state.codes[r] + offset).clamp_(MIN_CODE, MAX_CODE)
            worth = (e4m3_value(code) * state.tensor_scale).unsqueeze(-1)
            for beta in sorted(betas, key=lambda beta: abs(beta - 1)):
                q = round_e2m1(b.x / (worth * beta))
                error = fold_sum(q.mul_(worth).sub_(b.x).div_(state.tensor_scale).square_())
                if beta == 1:
                    plain_error = torch.minimum(plain_error, error)
                if best is None:
                    best, best_error, best_beta = code, error, torch.full_like(error, beta)
                    continue
                better = error < best_error
                best = torch.where(better, code, best)
                best_error = torch.where(better, error, best_error)
                best_beta = torch.where(better, beta, best_beta)
        state.codes[r], state.betas[r] = best, best_beta
        # float32 sums of the same squares may differ in the last bits: an improvement is more than that.
        state.other_beta_won += int((best_error < plain_error * (1 - 1e-5)).sum())


def _silence_broken(x: torch.Tensor) -> None:
    broken = ~x.isfinite().all(-1, keepdim=True)
    if broken.any():
        x.masked_fill_(broken, 0)
