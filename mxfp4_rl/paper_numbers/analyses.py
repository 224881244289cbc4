"""The three claims that do not come out as printed: expected, came out, why, and what it means for users.

Each function returns the markdown blocks of one analysis.
"""

from __future__ import annotations

import math

from mxfp4_rl.paper_numbers import macro_blocks as macro_section
from mxfp4_rl.paper_numbers.data import Size, label
from mxfp4_rl.paper_numbers.gradient import FROZEN, LAYERS, PRINTED_RANGE, REFERENCE, Gradient
from mxfp4_rl.paper_numbers.macro_blocks import GAUSSIAN_REFERENCE, KINDS, LAWS, SIZES, STATIC_REFERENCE, MacroBlocks
from mxfp4_rl.paper_numbers.markdown import percent, table, text
from mxfp4_rl.paper_numbers.temperature import AT, LOGITS, NOISE_SIGMAS, SMALL_VOCABULARY, Temperature, formula
from mxfp4_rl.paper_numbers.temperature import REFERENCE as TEMPERATURE_REFERENCE


def macro_blocks(macro: MacroBlocks) -> list[str]:
    base, error, bias = macro.base["gaussian"], macro.error["gaussian"], macro.bias["gaussian"]
    kinds = tuple(KINDS.values())

    def each(kind: str, size: int) -> str:
        return " / ".join(f"{100 * macro.closed[law][kind, size].value:.1f}" for law in LAWS) + " %"

    def between(kind: str, size: int, decimals: int = 0) -> str:
        values = [macro.closed[law][kind, size].value for law in LAWS]
        return f"{percent(min(values), decimals)} to {percent(max(values), decimals)}"

    worst = max(e.error for values in macro.closed.values() for e in values.values())
    simulated = {z: percent(a) if a == b else f"{percent(a)} to {percent(b)}" for z, (a, b) in STATIC_REFERENCE.items()}
    optimal = ", ".join(f"{macro.base[law]['optimal'].short(2)} ({label(law)})" for law in LAWS)
    return [
        "### 1. Macro blocks of 128",
        text(
            """**Expected** (2605.20402): with one 8-bit mantissa per 128 elements the variance of the scale error
            shrinks by 256^-2, the scale component vanishes, and the error converges to that of the real-valued scale
            amax / 6, the "floor"."""
        ),
        text(
            f"""**Came out**: static factors at 128 close {between("static", 128)} of the gap between rceil and the
            floor, and leave {percent(bias["static", 128].value / base["bias"].value)} of the scale component's energy
            (Gaussian: {base["bias"]} of the tensor's without MBS, {bias["static", 128]} with it)."""
        ),
        "![scale component and share of the error's gap closed, by macro size](paper_numbers/macro_blocks.png)",
        text(
            f"""Share of the gap closed, Gaussian / t(12) / Laplace, rows over an octave; standard errors are at most
            {100 * worst:.1f} points. Above 100 % the error is below the "floor"."""
        ),
        table(
            ("macro size (bits per element)", *kinds, "static, independent simulation"),
            [
                (f"{size} ({macro_section.bits(size):g})", *(each(kind, size) for kind in kinds), simulated[size])
                for size in SIZES
            ],
        ),
        text("The same as relMSE on the Gaussian, and the energy of the scale component over the tensor's:"),
        table(
            ("", "without MBS", *(f"{kind} 128" for kind in kinds), "static 32", "floor"),
            [
                ("relMSE", base["rceil"], *(error[kind, 128] for kind in kinds), error["static", 32], base["floor"]),
                ("independent simulation", "0.01361", *(f"{GAUSSIAN_REFERENCE[k]:.5f}" for k in kinds), "", "0.01020"),
                ("scale component", base["bias"], *(bias[kind, 128] for kind in kinds), bias["static", 32], "0"),
            ],
        ),
        text(
            """**Why**: the factor fits the scale of the one block of 32 that holds the macro block's maximum. The other
            three blocks' maxima lie anywhere below it, so after the multiplication their scales are off by as random a
            part of an octave as before. The claim is true of a mantissa per block of 32."""
        ),
        text(
            f"""**What closes the gap**: static factors with macro blocks of 32 do, to {between("static", 32, 1)} (a
            factor is truncated to 8 bits): each block then has its own mantissa, at 4.5 bits per element. Dynamic
            factors do not fit maxima, they take the least error of 16 candidates: {between("dynamic", 128)} at 128, and
            beyond the floor at 32. OAS with dynamic factors reaches {between("OAS + dynamic", 128)} at 128, at the same
            {macro_section.bits(128):g} bits. Going below the floor is no contradiction: it is a floor for scales that
            put the maximum on the grid's end. The best real-valued scale of each block has only {optimal} times the
            floor's error."""
        ),
        text(
            f"""**For users**: from static factors at 128 expect half of what MBS promises. For weights, which are
            quantised once a step, take `oas` with dynamic factors, or `macro_size: 32`. At 4.5 bits NVFP4 is the one to
            beat: relMSE {base["nvfp4"]} with static scales and {base["nvfp4 search"]} with ScaleSearch, against
            {error["static", 32]} (static 32) and {error["OAS + dynamic", 32]} (OAS + dynamic 32). And once scales are
            searched, do not read the scale component as harm: dynamic factors at 128 leave more of it than static ones
            ({bias["dynamic", 128]} against {bias["static", 128]}) at a smaller error, since it measures the distance to
            the quantiser with scale amax / 6."""
        ),
    ]


def gradient(g: Gradient) -> list[str]:
    low, high = g.range
    rceil, frozen, real = g.chains["rceil"], g.chains[FROZEN], g.chains["real scale"]
    simulated = {rule: f"{mean:+.2f} +- {spread:.2f}" for rule, (mean, spread) in REFERENCE.items()}
    return [
        "### 2. The range of the gradient",
        text(
            f"""**Expected** (2605.20402): log(|g_q| / |g|) is the sum of delta over the layers, delta uniform in [0, 1).
            Over {LAYERS} layers its standard deviation is 2.0 (empirical 1.97), which is printed as the range
            [{PRINTED_RANGE[0]}x, {PRINTED_RANGE[1]}x]."""
        ),
        text(
            f"""**Came out**: the sum of delta along random paths, one block of each of {LAYERS} layers, has standard
            deviation {g.sum_std} octaves around a mean of {g.sum_mean}: the 2.0 is right. One standard deviation is then
            a factor between {low:.2f} and {high:.2f}. The printed range is {math.log2(PRINTED_RANGE[0]):+.2f} to
            {math.log2(PRINTED_RANGE[1]):+.2f} octaves, or +-{math.log(PRINTED_RANGE[1]):.2f} in natural logarithms, and
            neither is 2.0: it follows from no reading of the formula."""
        ),
        text(
            f"""And a gradient does not do this at all. {len(real.ratios)} draws of {LAYERS} random layers of 256 x 256,
            where g is multiplied by each layer's transposed MXFP4 weight (as the straight-through estimator does),
            against the same chain unquantised:"""
        ),
        "![sums of delta along random paths; the gradient's norm after 48 layers](paper_numbers/gradient.png)",
        table(
            (
                "scales",
                "log2(norm of g_q / norm of g), mean",
                "its spread over the draws",
                "independent simulation, mean +- spread",
                "predicted from the energy",
                "cosine of g_q and g",
                "slope Q.W / W.W",
                "energy of Q over that of W",
            ),
            [
                (
                    rule,
                    chain.mean.signed(),
                    f"{chain.spread:.2f}",
                    simulated.get(rule, ""),
                    f"{chain.predicted:+.2f}",
                    chain.cosine,
                    chain.slope,
                    chain.energy,
                )
                for rule, chain in g.chains.items()
            ],
        ),
        text(
            f"""**Why**: a scale that is too large by 2^delta does not make Q(W) too large by 2^delta, because the codes
            are chosen for that scale: the slope is {rceil.slope} with rceil. What a layer does to the norm is the square
            root of the last column, and {LAYERS} layers in a row give the predicted column. Only if the codes stay those
            of the ideal scale while the scale is rounded up ("{FROZEN}") does the bias multiply, to
            2^{frozen.mean.value:.0f}; and even then the draws scatter by {frozen.spread:.2f} octaves, not by 2, because
            a gradient is a sum over very many paths and averages their scale errors. The spread of the other rows is no
            smaller with real-valued scales ({real.spread:.2f}), which have no scale bias: it is what any error does to a
            product of {LAYERS} random matrices."""
        ),
        text(
            f"""**For users**: along {LAYERS} layers rceil costs the gradient's norm {-rceil.predicted:.2f} octaves (from the
            energy, which averages better than the draws), and floor, whose clipping shrinks weights,
            {-g.chains["floor"].predicted:.2f}; both are small beside what gradient clipping and Adam normalise away.
            What suffers is the direction: the cosine with the true gradient is {rceil.cosine} with rceil and
            {real.cosine} with ideal scales, so better scales recover little of it. (A plain chain is the worst case: a
            transformer's residual connections carry most of the gradient past the quantised weights.)"""
        ),
    ]


def temperature(t: Temperature, size: Size) -> list[str]:
    columns = [(found, count) for count in (LOGITS, SMALL_VOCABULARY) for found in (t.mixture, t.draw)]
    return [
        "### 3. The temperature",
        text(
            """**Expected** (2605.20402): noise of standard deviation sigma_eta on the logits acts as a temperature T =
            sqrt(1 + 2 sigma_eta^2 / Var(dl)), dl being the difference of two logits."""
        ),
        text(
            f"""**Came out**: {size.logit_vectors} vectors of {LOGITS} independent logits with sigma_l = 2 (so Var(dl) =
            8), {size.noise_draws} draws of noise each. At sigma_eta = {AT} the formula says {formula(AT):.3f}. The
            temperature with the same entropy as the policy averaged over the noise is {t.mixture[LOGITS, AT]} (an
            independent simulation gave {TEMPERATURE_REFERENCE}; single vectors scatter by {t.scatter[LOGITS, AT]:.4f}).
            For the policy under one draw of the noise it is {t.draw[LOGITS, AT]}: colder, not hotter."""
        ),
        "![entropy-matched temperature against the noise, and the formula](paper_numbers/temperature.png)",
        table(
            (
                "sigma_eta",
                "formula",
                f"averaged policy, {LOGITS} logits",
                f"one draw, {LOGITS} logits",
                f"averaged policy, {SMALL_VOCABULARY} logits",
                f"one draw, {SMALL_VOCABULARY} logits",
            ),
            [(f"{s:g}", f"{formula(s):.3f}", *(found[count, s] for found, count in columns)) for s in NOISE_SIGMAS],
        ),
        text(
            """**Why**: the formula's T is the factor by which noise widens the differences of logits. But wider
            differences are a lower temperature: one draw of noise makes the policy sharper, by about 1 / T. Averaging
            over draws makes it flatter again, the more so the fewer tokens share the probability; among many tokens the
            noise on each averages out in the normalisation. So the temperature depends on the size of the vocabulary,
            which the formula does not know: it is far too high for 1000 logits and too low for 10."""
        ),
        text(
            """**For users**: do not choose a sampling temperature or a noise level by this formula. Noise that stays the
            same while a batch is sampled (AQN's, or the grid's own) is one draw: it moves the policy rather than
            flattening it. Independent Gaussian logits are a model, too; watch `actor/entropy`."""
        ),
    ]
