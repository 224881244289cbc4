"""Is noise on the logits a temperature? The formula of arXiv 2605.20402 against temperatures that match entropies.

The paper equates grid noise of standard deviation sigma_eta on the logits with a temperature sqrt(1 + 2 sigma_eta^2 / Var(dl)),
dl the difference of two logits. Here, for random logits, the temperature T is found at which softmax(l / T) has the entropy of

    the mixture    E[softmax(l + eta)]: the policy averaged over the noise
    one draw       softmax(l + eta): the policy while the noise is what it is (mean entropy over draws)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mxfp4_rl.paper_numbers.data import Size
from mxfp4_rl.paper_numbers.estimate import Estimate

LOGITS, LOGIT_SIGMA = 1000, 2.0
NOISE_SIGMAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
AT = 0.5  # the noise that the page's table row quotes
REFERENCE = 1.006  # mixture, sigma_eta = 0.5, one vector of 1000 logits, in an independent simulation
SMALL_VOCABULARY = 10


@dataclass
class Temperature:
    """Entropy-matched temperatures, (number of logits, sigma_eta) -> Estimate over vectors of logits.

    Attributes:
        mixture, draw: as above. scatter: standard deviation of the mixture's temperature between vectors of logits.
    """

    mixture: dict[tuple[int, float], Estimate]
    draw: dict[tuple[int, float], Estimate]
    scatter: dict[tuple[int, float], float]


def formula(sigma_eta: float, sigma_logit: float = LOGIT_SIGMA) -> float:
    """sqrt(1 + 2 sigma_eta^2 / Var(dl)); for independent logits Var(dl) = 2 sigma_logit^2."""
    return math.sqrt(1 + 2 * sigma_eta**2 / (2 * sigma_logit**2))


def measure(size: Size) -> Temperature:
    found = Temperature({}, {}, {})
    for count in (LOGITS, SMALL_VOCABULARY):
        for sigma in NOISE_SIGMAS:
            pairs = [temperatures(count, sigma, seed, size.noise_draws) for seed in range(size.logit_vectors)]
            found.mixture[count, sigma] = Estimate.of(mixture for mixture, _ in pairs)
            found.draw[count, sigma] = Estimate.of(draw for _, draw in pairs)
            found.scatter[count, sigma] = float(np.std([mixture for mixture, _ in pairs], ddof=1))
    return found


def temperatures(count: int, sigma_eta: float, seed: int, draws: int) -> tuple[float, float]:
    """Matched temperatures (mixture, one draw) for one vector of `count` logits."""
    rng = np.random.default_rng([count, seed])  # the same logits and noise for every sigma_eta
    logits = LOGIT_SIGMA * rng.standard_normal(count)
    noisy = softmax(logits + sigma_eta * rng.standard_normal((draws, count)))
    return matched(logits, entropy(noisy.mean(0))), matched(logits, entropy(noisy).mean())


def matched(logits: np.ndarray, wanted: float) -> float:
    """The temperature at which softmax(logits / T) has the entropy `wanted` (nats), by bisection in [1/64, 64]."""
    low, high = -6.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        if entropy(softmax(logits / 2**middle)) < wanted:  # entropy rises with the temperature
            low = middle
        else:
            high = middle
    return 2 ** ((low + high) / 2)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(-1)
