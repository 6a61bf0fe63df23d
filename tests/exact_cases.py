"""The cases of the design notes on which the exact forms of Algorithm 1 are tested: schedules, data, golden numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.core.mixture import Mixture

Array = NDArray[np.float64]

ALPHA = np.array([0.5, 0.7, 0.9, 0.99])
SCALAR: dict[str, Any] = {
    "alpha": ALPHA, "sigma": np.sqrt(1 - ALPHA), "beta": 0.5, "data_mean": 1.0, "data_cov": 0.25, "reward_Q": -1.0,
    "reward_q": 0.5, "reward_c": -0.125,
}  # fmt: skip
"""The golden scalar case (mathematics, section 3): r = -(y - .5)^2/2."""
COLUMNS = ("K", "k", "Q", "q", "c", "kappa")
GOLDEN = np.array([
    (-1.363308059003, 0.602134068212, -0.020152364314, -0.044039911122, -0.184545539902, 0.091122143316),
    (-2.171278269915, 1.320687984195, -0.091122143316, -0.050854381338, -0.127834425456, 0.251600531249),
    (-4.094816084877, 3.105714390424, -0.419334218748, 0.101065482186, -0.062922730871, 0.182974500008),
    (-5.768132495717, 4.763741489288, -0.914872500042, 0.436753692874, -0.109251569607, 0.020000000000),
])  # fmt: skip
"""COLUMNS of t = 0 .. 3: u* = K y + k, V_t = Q y^2/2 + q y + c."""
GOLDEN_J, GOLDEN_REWARD, GOLDEN_KL = -0.194621722059, -0.152376930328, 0.084489583461
GOLDEN_LAWS = {
    "base": (0.898236225097, 0.357127126767), "optimum": (0.741671868234, 0.246348568761),
    "path tilt": (0.741671868234, 0.208801793318), "ideal tilt": (0.732308727995, 0.208327980538),
}  # fmt: skip
"""Terminal mean and variance."""

TWO_MODES = Mixture(weights=(0.7, 0.3), means=(-2.0, 2.0), variances=(0.25, 0.25))


def signal(alpha: Array) -> Array:
    """abar_t, (T,): the product of alpha from t on."""
    return np.cumprod(alpha[::-1])[::-1]


def strided(T: int) -> tuple[Array, Array]:
    """(alpha, sigma) of DDPM's 1000-step linear schedule, strided from its end; the last step leads to abar = 1."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.arange(999, -1, -(1000 // T))]
    alpha = abar / np.append(abar[1:], 1.0)
    return alpha, np.sqrt(1 - alpha)


def score_on(data: Mixture, alpha: Array) -> Any:
    """The exact score (y, t) -> s_t(y) of the data noised by the schedule."""
    abar = signal(alpha)
    return lambda y, t: data.score(y, float(abar[t]))


def smallest_beta(message: str) -> tuple[float, float]:
    """(beta, factor on all beta_t) that an error message says is the smallest to work."""
    found = re.search(r"the smallest beta that works is (\S+) \(all beta_t times (\S+)\)", message)
    assert found, message
    return float(found[1]), float(found[2])
