"""Algorithm 1 of PI-FT on linear-quadratic problems, where every quantity is a matrix (arXiv 2412.18164).

    solution = solve(alpha, sigma, beta, data_mean, data_cov, reward_Q, reward_q, reward_c)     the optimum
    iterated = policy_iteration(..., inner_steps=3)                                             after m inner steps

Gaussian data N(m, S0), reward r(y) = y'Qy/2 + q'y + c, generation order t = 0 .. T-1, everything float64.

    paper / design notes, section 3         here
    s_t(y) = -P_t y + p_t                   LinearQuadratic.P, .p     (exact score of the noised Gaussian)
    u_t(y)                                  Affine: K[t] y + k[t]
    V_t(y) = y'Q_t y/2 + q_t'y + c_t        Solution.Q, .q, .c        (T + 1 of them, V_T = r)
    1/sqrt(alpha), (1-alpha)/sqrt(alpha)    A, B: Y_{t+1} = A Y_t + B u_t + sigma W
    rho_t = sigma_t^2 / beta_t              rho, 0 where sigma_t = 0: there u = s and nothing is divided
    c_t of eq. 18                           gain[t] = rho_t / B_t
    kappa_t                                 kappa[t] = rho_t |Q_{t+1}|_2

Three terminal laws that must not be confused: of the optimum (`Solution.terminal_*`: the mean of each kernel is
controlled), `path_tilt` (each kernel p e^{V/beta}) and `ideal_tilt` (p_pre(y_T) e^{r/beta}).

"Dropped" values: with future_kl=False the gradient of a step sees the reward-to-go without the later KL terms, which is
what DPOK's policy gradient as published does; the result is its fixed point, not the optimum (design notes, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from workers.core.iteration import Step, choose_step, ill_posed, no_tilt, range_problems, step_at, step_counts

INITIAL_LAWS = ("fixed", "tilted")


@dataclass(frozen=True)
class LinearQuadratic:
    """A controlled linear chain with a quadratic reward. Tensors are float64."""

    A: Tensor
    """(T,)"""
    B: Tensor
    """(T,)"""
    sigma: Tensor
    """(T,), >= 0"""
    beta: Tensor
    """(T,), > 0: the weight of each step's KL"""
    P: Tensor
    """(T, d, d): s_t(y) = -P_t y + p_t"""
    p: Tensor
    """(T, d)"""
    Q: Tensor
    """(d, d), symmetric: the reward's"""
    q: Tensor
    """(d,)"""
    c: Tensor
    """()"""
    mean: Tensor
    """(d,): of Y_0"""
    cov: Tensor
    """(d, d): of Y_0"""

    @property
    def T(self) -> int:
        return len(self.A)

    @property
    def d(self) -> int:
        return len(self.q)

    @property
    def rho(self) -> Tensor:
        """sigma_t^2 / beta_t, (T,)."""
        return self.sigma**2 / self.beta

    @property
    def gain(self) -> Tensor:
        """c_t of eq. 18, (T,); 0 where sigma_t = 0."""
        return self.rho / self.B

    @property
    def w(self) -> Tensor:
        """(T,): step KL per unit of |u - s|^2, summed over dimensions; 0 where sigma_t = 0 (there u = s)."""
        led = self.sigma > 0
        return torch.where(led, self.B**2 / (2 * torch.where(led, self.sigma, 1.0) ** 2), 0.0)

    @property
    def F(self) -> Tensor:
        """(T, d, d): the pre-trained chain's mean is F y + f."""
        return self.A[:, None, None] * torch.eye(self.d, dtype=torch.float64) - self.B[:, None, None] * self.P

    @property
    def f(self) -> Tensor:
        return self.B[:, None] * self.p

    @property
    def pretrained(self) -> Affine:
        return Affine(-self.P, self.p)


@dataclass(frozen=True)
class Affine:
    """A control u_t(y) = K[t] y + k[t]; (T, d, d) and (T, d)."""

    K: Tensor
    k: Tensor


@dataclass(frozen=True)
class Law:
    """A Gaussian N(mean, cov)."""

    mean: Any
    cov: Any


@dataclass(frozen=True)
class Evaluation:
    """What an affine control is worth, by moments carried forward through the chain."""

    objective: Any
    """J = E r - sum_t beta_t KL_t - beta_0 KL(q0 || p0)"""
    expected_reward: Any
    path_kl: Any
    """sum over steps, nats, unweighted; the initial law's KL is `initial_kl`"""
    step_kl: Any
    """(T,) nats, summed over dimensions"""
    initial_kl: Any
    terminal_mean: Any
    terminal_cov: Any


@dataclass(frozen=True)
class Solution(Evaluation):
    """An affine control with its values; arrays are of the kind (numpy or torch) that the problem was given in."""

    K: Any
    """(T, d, d)"""
    k: Any
    """(T, d): u_t(y) = K[t] y + k[t]"""
    Q: Any
    """(T + 1, d, d): V_t(y) = y'Q[t]y/2 + q[t]'y + c[t], V_T = r"""
    q: Any
    c: Any
    kappa: Any
    """(T,): rho_t |Q[t + 1]|_2, the factor by which an inner step of eq. 18 shrinks the control's error"""
    initial_mean: Any
    initial_cov: Any


@dataclass(frozen=True)
class Iterated(Solution):
    """The result of Algorithm 1 after m_t inner steps at each t."""

    errors: Any
    """(T, max m + 1): |(K, k)^(m) - (K, k)^(infinity)| (Frobenius) for the value V_{t+1} at hand; NaN beyond m_t"""
    eta: Any
    """(T,): the damping of each t; 1 is eq. 18 as printed"""
    factor: Any
    """(T,): what theory says the error shrinks by in an inner step, kappa where undamped"""
    rate: Any
    """(T,): measured in the eigenbasis of Q_{t+1}, row by row at the last inner step with errors above rounding, the
    largest; NaN where there is none"""


# ------------------------------------------------------------------------------------------------------ the problem


def gaussian_problem(
    alpha: Any,
    sigma: Any,
    beta: Any,
    data_mean: Any,
    data_cov: Any,
    reward_Q: Any,
    reward_q: Any,
    reward_c: Any = 0.0,
) -> LinearQuadratic:
    """The problem of a model pre-trained on N(data_mean, data_cov), exactly.

    alpha, sigma (T,) in generation order, 0 < alpha < 1, sigma >= 0; beta a number or (T,); data_mean, reward_q (d,),
    data_cov, reward_Q (d, d); numbers where d = 1. Y_0 ~ N(0, I). Raises ValueError naming what is wrong.
    """
    alpha, sigma = _row("alpha", alpha), _row("sigma", sigma)
    m, S0 = _row("data_mean", data_mean), _square("data_cov", data_cov)
    Q, q = _square("reward_Q", reward_Q), _row("reward_q", reward_q)
    beta = _row("beta", beta).expand(len(alpha)) if _row("beta", beta).numel() == 1 else _row("beta", beta)
    c = _row("reward_c", reward_c)
    _check(alpha, sigma, beta, m, S0, Q, q, c)
    abar = alpha.flip(0).cumprod(0).flip(0)
    eye = torch.eye(len(q), dtype=torch.float64)
    P = torch.linalg.inv(abar[:, None, None] * S0 + (1 - abar)[:, None, None] * eye)
    return LinearQuadratic(
        A=1 / alpha.sqrt(), B=(1 - alpha) / alpha.sqrt(), sigma=sigma, beta=beta, P=P, p=abar.sqrt()[:, None] * (P @ m),
        Q=(Q + Q.T) / 2, q=q, c=c[0], mean=torch.zeros_like(q), cov=eye,
    )  # fmt: skip


def _row(name: str, value: Any) -> Tensor:
    row = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if row.dim() > 1:
        raise ValueError(f"{name} has shape {tuple(row.shape)}; it is a number or one-dimensional")
    return row.reshape(-1)


def _square(name: str, value: Any) -> Tensor:
    square = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if square.numel() == 1:
        return square.reshape(1, 1)
    if square.dim() != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"{name} has shape {tuple(square.shape)}; it is a (d, d) matrix")
    return square


def _check(
    alpha: Tensor, sigma: Tensor, beta: Tensor, m: Tensor, S0: Tensor, Q: Tensor, q: Tensor, c: Tensor
) -> None:
    T, d = len(alpha), len(q)
    named = (("data_mean", m), ("data_cov", S0), ("reward_Q", Q), ("reward_q", q), ("reward_c", c))
    found = [f"{name} is not finite" for name, value in named if not bool(value.isfinite().all())]
    if T == 0:
        found.append("alpha is empty; give one number per step")
    if len(c) != 1:
        found.append(f"reward_c has {len(c)} numbers; it is one")
    for name, row in (("alpha", alpha), ("sigma", sigma), ("beta", beta)):
        if len(row) != T:
            found.append(f"{name} has {len(row)} numbers but alpha has {T}; give one per step")
        found += range_problems(name, row.tolist())
    if len(m) != d or len(S0) != d or len(Q) != d:
        found.append(
            f"the dimensions differ: data_mean {len(m)}, data_cov {len(S0)}, reward_Q {len(Q)}, reward_q {d}"
        )
    elif bool(S0.isfinite().all()) and not _is_covariance(S0):
        found.append("data_cov is not a covariance: it must be symmetric with no negative eigenvalue")
    if found:
        raise ValueError("; ".join(found))


def _is_covariance(S: Tensor) -> bool:
    return torch.allclose(S, S.T) and bool((torch.linalg.eigvalsh(S) >= -1e-12 * S.abs().max()).all())


# ------------------------------------------------------------------------------------------------------ Bellman steps


def maximised(lq: LinearQuadratic, t: int, Q: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_t, q_t, c_t) of the best control against V_{t+1} = (Q, q, c) (design notes, section 3)."""
    F, f, rho, M = lq.F[t], lq.f[t], lq.rho[t], _resolvent(lq, t, Q)
    Q_t = F.T @ M @ Q @ F
    q_t = F.T @ (M @ (Q @ f + q))
    c_t = c + lq.sigma[t] ** 2 / 2 * Q.trace() + rho / 2 * q @ M @ q + f @ M @ Q @ f / 2 + q @ M @ f
    return (Q_t + Q_t.T) / 2, q_t, c_t


def _resolvent(lq: LinearQuadratic, t: int, Q: Tensor) -> Tensor:
    """M = (I - rho_t Q)^-1."""
    return torch.linalg.inv(torch.eye(lq.d, dtype=torch.float64) - lq.rho[t] * Q)


def _best(lq: LinearQuadratic, t: int, Q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The fixed point of eq. 18 against grad V = Q y + q: u = s + gain M (Q z + q), z the pre-trained mean."""
    MQ = _resolvent(lq, t, Q)
    return -lq.P[t] + lq.gain[t] * MQ @ Q @ lq.F[t], lq.p[t] + lq.gain[t] * MQ @ (Q @ lq.f[t] + q)


def _evaluated(
    lq: LinearQuadratic, t: int, K: Tensor, k: Tensor, Q: Tensor, q: Tensor, c: Tensor, priced: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_t, q_t, c_t) of the control K y + k against V_{t+1} = (Q, q, c): line 8, policy evaluation.

    `priced` False leaves the step's own KL out: the expected reward-to-go.
    """
    G, g = lq.A[t] * torch.eye(lq.d, dtype=torch.float64) + lq.B[t] * K, lq.B[t] * k
    D, e, price = K + lq.P[t], k - lq.p[t], lq.beta[t] * lq.w[t] * float(priced)
    Q_t = G.T @ Q @ G - 2 * price * D.T @ D
    q_t = G.T @ (Q @ g + q) - 2 * price * D.T @ e
    c_t = c + lq.sigma[t] ** 2 / 2 * Q.trace() + g @ Q @ g / 2 + q @ g - price * e @ e
    return (Q_t + Q_t.T) / 2, q_t, c_t


def _spectrum(lq: LinearQuadratic, t: int, Q: Tensor) -> tuple[float, float]:
    """The smallest and largest eigenvalue of rho_t Q."""
    values = torch.linalg.eigvalsh(lq.rho[t] * Q)
    return float(values[0]), float(values[-1])


# ------------------------------------------------------------------------------------------------------ the optimum


def optimum(lq: LinearQuadratic, initial_law: str = "fixed", future_kl: bool = True) -> Solution:
    """The control that maximises J, with its values (torch).

    future_kl=False: DPOK's fixed point instead; Q, q, c are then the expected reward-to-go, kappa its contraction.
    initial_law="tilted": Y_0 is controlled too, q0 ~ p0 e^{V_0/beta_0}. Raises IllPosed.
    """
    def first_Q(other: LinearQuadratic) -> Tensor | None:
        return _optimal_Q(other, future_kl)

    rows: list[Row] = []
    Q, q, c, kappa = lq.Q, lq.q, lq.c, []
    for t in reversed(range(lq.T)):
        low, high = _spectrum(lq, t, Q)
        if high >= 1:
            raise ill_posed(t, high, float(lq.beta[t]), lambda scale: first_Q(_scaled(lq, scale)) is not None)
        kappa.append(max(abs(low), abs(high)))
        K, k = _best(lq, t, Q, q)
        Q, q, c = maximised(lq, t, Q, q, c) if future_kl else _evaluated(lq, t, K, k, Q, q, c, priced=False)
        rows.append((K, k, Q, q, c))
    return _solution(lq, initial_law, rows, kappa, first_Q)


Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(K_t, k_t, Q_t, q_t, c_t); lists of them run backwards in t."""


def _optimal_Q(lq: LinearQuadratic, future_kl: bool = True) -> Tensor | None:
    """Q_0 of the optimum (of DPOK's fixed point); None where some step is ill-posed."""
    Q, q, c = lq.Q, lq.q, lq.c
    for t in reversed(range(lq.T)):
        if _spectrum(lq, t, Q)[1] >= 1:
            return None
        if future_kl:
            Q, q, c = maximised(lq, t, Q, q, c)
        else:
            Q, q, c = _evaluated(lq, t, *_best(lq, t, Q, q), Q, q, c, priced=False)
    return Q


def _scaled(lq: LinearQuadratic, scale: float) -> LinearQuadratic:
    return replace(lq, beta=scale * lq.beta)


def _solution(
    lq: LinearQuadratic, initial_law: str, rows: Sequence[Row], kappa: Sequence[float], first_Q: FirstQ
) -> Solution:
    K, k, Q, q, c = (torch.stack(column[::-1]) for column in zip(*rows, strict=True))
    Q, q, c = (torch.cat([v, end[None]]) for v, end in ((Q, lq.Q), (q, lq.q), (c, lq.c)))
    law = tilted_initial_law(lq, Q[0], q[0], first_Q) if initial_law == "tilted" else Law(lq.mean, lq.cov)
    if initial_law not in INITIAL_LAWS:
        raise ValueError(f"initial_law={initial_law!r} is not known; choose one of {', '.join(INITIAL_LAWS)}")
    worth = evaluate(lq, Affine(K, k), law)
    return Solution(
        **vars(worth), K=K, k=k, Q=Q, q=q, c=c, kappa=torch.tensor(kappa[::-1], dtype=torch.float64),
        initial_mean=law.mean, initial_cov=law.cov,
    )  # fmt: skip


FirstQ = Callable[[LinearQuadratic], Tensor | None]
"""Q_0 of a problem with another beta, None where it cannot be solved: how errors find the smallest beta that works."""


def tilted_initial_law(lq: LinearQuadratic, Q: Tensor, q: Tensor, first_Q: FirstQ = _optimal_Q) -> Law:
    """q0 ~ p0 e^{V_0/beta_0} for V_0 = (Q, q): the best law of Y_0 when KL(q0 || p0) costs beta_0 a nat.

    Raises IllPosed where e^{V_0/beta_0} has no expectation under p0.
    """

    def works(scale: float) -> bool:
        other = _scaled(lq, scale)
        found = first_Q(other)
        return found is not None and _largest_share(Law(lq.mean, lq.cov), found, other.beta[0]) < 1

    return _tilted(0, Law(lq.mean, lq.cov), Q, q, lq.beta[0], works)


def _tilted(t: int, law: Law, Q: Tensor, q: Tensor, beta: Tensor, works: Callable[[float], bool]) -> Law:
    """The law of Y_t times e^{V/beta}, normalised, V = (Q, q)."""
    share = _largest_share(law, Q, beta)
    if share >= 1:
        raise no_tilt(t, share, float(beta), works)
    precision = torch.linalg.inv(law.cov)
    cov = torch.linalg.inv(precision - Q / beta)
    return Law(cov @ (precision @ law.mean + q / beta), cov)


def _largest_share(law: Law, Q: Tensor, beta: Tensor) -> float:
    """The largest eigenvalue of cov Q/beta: law * e^{V/beta} can be normalised iff it is below 1."""
    return float(torch.linalg.eigvals(law.cov @ Q / beta).real.max())


def evaluate(lq: LinearQuadratic, control: Affine, initial: Law | None = None) -> Evaluation:
    """J and its parts for any affine control, by carrying mean and covariance forward: knows nothing of V or eq. 18.

    Where sigma_t = 0 the control is s, whatever `control` says. Differentiable in the control and the initial law.
    """
    start = Law(lq.mean, lq.cov) if initial is None else initial
    m, S, kls = start.mean, start.cov, []
    eye = torch.eye(lq.d, dtype=torch.float64)
    for t in range(lq.T):
        led = bool(lq.sigma[t] > 0)
        K, k = (control.K[t], control.k[t]) if led else (-lq.P[t], lq.p[t])
        D, e = K + lq.P[t], k - lq.p[t]
        kls.append(lq.w[t] * ((D @ m + e).square().sum() + (D @ S @ D.T).trace()))
        G = lq.A[t] * eye + lq.B[t] * K
        m, S = G @ m + lq.B[t] * k, G @ S @ G.T + lq.sigma[t] ** 2 * eye
    step_kl = torch.stack(kls)
    reward = ((lq.Q @ S).trace() + m @ lq.Q @ m) / 2 + lq.q @ m + lq.c
    initial_kl = gaussian_kl(start, Law(lq.mean, lq.cov)) if initial is not None else torch.zeros((), dtype=m.dtype)
    J = reward - (lq.beta * step_kl).sum() - lq.beta[0] * initial_kl
    return Evaluation(J, reward, step_kl.sum(), step_kl, initial_kl, m, S)


def gaussian_kl(one: Law, other: Law) -> Tensor:
    """KL(one || other) in nats, summed over dimensions."""
    precision, shift = torch.linalg.inv(other.cov), one.mean - other.mean
    ratio = precision @ one.cov
    return (ratio.trace() - len(shift) + shift @ precision @ shift - torch.logdet(ratio)) / 2


# ------------------------------------------------------------------------------------------------------ Algorithm 1


def iterate(
    lq: LinearQuadratic,
    inner_steps: int | Sequence[int],
    damping: str | float | None = "auto",
    initial_law: str = "fixed",
) -> Iterated:
    """Algorithm 1 with m_t inner steps at each t (torch); see `policy_iteration`. The margin has the paper's steps, and
    the line numbers of its pseudocode where the design notes give them."""
    m_t = step_counts(inner_steps, lq.T)

    def first_Q(other: LinearQuadratic) -> Tensor | None:
        return _iterated_Q(other, m_t, damping)

    def works(scale: float) -> bool:
        return first_Q(_scaled(lq, scale)) is not None

    Q, q, c = lq.Q, lq.q, lq.c                                                         # V_T = r
    rows: list[Row] = []
    steps: list[Step] = []
    errors = torch.full((lq.T, max(m_t, default=0) + 1), torch.nan, dtype=torch.float64)
    rates = torch.full((lq.T,), torch.nan, dtype=torch.float64)
    for t in reversed(range(lq.T)):                                                    # for t = T-1, ..., 0
        step = step_at(t, *_spectrum(lq, t, Q), float(lq.beta[t]), damping, works)
        us = _iterates(lq, t, Q, q, step.eta, m_t[t])                                  #   u^(0) = s, ..., u^(m_t)
        limit, (K, k) = _best(lq, t, Q, q), us[-1]
        gaps = [_gap(u, limit) for u in us]
        errors[t, : len(gaps)], rates[t] = torch.stack(gaps).flatten(1).norm(dim=1), _measured_rate(gaps, Q, limit)
        Q, q, c = _evaluated(lq, t, K, k, Q, q, c)                                     #   line 8: V_t = E V - beta KL
        rows.append((K, k, Q, q, c))
        steps.append(step)
    found = _solution(lq, initial_law, rows, [step.kappa for step in steps], first_Q)
    eta, factor = (_float64(getattr(step, name) for step in steps[::-1]) for name in ("eta", "factor"))
    return Iterated(**vars(found), errors=errors, eta=eta, factor=factor, rate=rates)


def _float64(values: Iterable[float]) -> Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def _iterates(
    lq: LinearQuadratic, t: int, Q: Tensor, q: Tensor, eta: float, m_t: int
) -> list[tuple[Tensor, Tensor]]:
    """(K, k) of u^(0) = s to u^(m_t) against grad V_{t+1} = Q y + q."""
    K, k = -lq.P[t], lq.p[t]                                                           #   u^(0) = s
    found = [(K, k)]
    for _ in range(m_t):                                                               #   line 6: for m < m_t
        new = _eq_18(lq, t, K, k, Q, q)                                                #     line 7: eq. 18
        K, k = K + eta * (new[0] - K), k + eta * (new[1] - k)                          #     (damped: part of the way)
        found.append((K, k))
    return found


def _eq_18(lq: LinearQuadratic, t: int, K: Tensor, k: Tensor, Q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """s + c_t E grad V_{t+1}(A y + B u(y) + sigma W): the noise has mean zero and grad V is affine."""
    G, g = lq.A[t] * torch.eye(lq.d, dtype=torch.float64) + lq.B[t] * K, lq.B[t] * k
    return -lq.P[t] + lq.gain[t] * Q @ G, lq.p[t] + lq.gain[t] * (Q @ g + q)


def _iterated_Q(lq: LinearQuadratic, m_t: Sequence[int], damping: str | float | None) -> Tensor | None:
    """Q_0 after m_t inner steps at each t; None where some step is ill-posed or would diverge."""
    Q, q, c = lq.Q, lq.q, lq.c
    for t in reversed(range(lq.T)):
        low, high = _spectrum(lq, t, Q)
        step = choose_step(low, high, damping) if high < 1 else None
        if step is None:
            return None
        Q, q, c = _evaluated(lq, t, *_iterates(lq, t, Q, q, step.eta, m_t[t])[-1], Q, q, c)
    return Q


def _gap(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """(d, d + 1): the difference of (K, k)."""
    return torch.cat([one[0] - other[0], (one[1] - other[1])[:, None]], 1)


def _measured_rate(gaps: Sequence[Tensor], Q: Tensor, limit: tuple[Tensor, Tensor]) -> float:
    """The largest factor by which a row of the error, in the eigenbasis of Q, last shrank above rounding."""
    basis = torch.linalg.eigh(Q)[1]
    rows = torch.stack([(basis.T @ gap).norm(dim=1) for gap in gaps])
    floor = 1e-10 * (1 + _gap(limit, (torch.zeros_like(Q), torch.zeros_like(limit[1]))).norm())
    found = [float(r[n + 1] / r[n]) for r in rows.T if (n := int((r[1:] > floor).sum()) - 1) >= 0]
    return max(found, default=float("nan"))


# ------------------------------------------------------------------------------------------------------ public face


def solve(
    alpha: Any,
    sigma: Any,
    beta: Any,
    data_mean: Any,
    data_cov: Any,
    reward_Q: Any,
    reward_q: Any,
    reward_c: Any = 0.0,
    *,
    initial_law: str = "fixed",
    future_kl: bool = True,
) -> Solution:
    """The optimal control of J for Gaussian data and a quadratic reward (design notes, section 3). Arguments as in
    `gaussian_problem` and `optimum`.

    Results are numpy arrays, torch tensors when any argument is one. Raises IllPosed (a ValueError that names t, kappa,
    beta and the smallest beta that works) and ValueError for arguments that make no problem.
    """
    given = (alpha, sigma, beta, data_mean, data_cov, reward_Q, reward_q, reward_c)
    return _as_given(optimum(gaussian_problem(*given), initial_law, future_kl), given)


def policy_iteration(
    alpha: Any,
    sigma: Any,
    beta: Any,
    data_mean: Any,
    data_cov: Any,
    reward_Q: Any,
    reward_q: Any,
    reward_c: Any = 0.0,
    inner_steps: int | Sequence[int] = 1,
    *,
    damping: str | float | None = "auto",
    initial_law: str = "fixed",
) -> Iterated:
    """Algorithm 1 from u^(0) = s, with `inner_steps` inner steps at each t (one number, or one per t).

    `damping`: "auto" is eq. 18 as printed where kappa_t < 1 and the damped step elsewhere; None never damps; a number
    is the damping. Raises IllPosed and, without damping where kappa_t >= 1, Diverges (both ValueErrors that name t,
    kappa, beta and the smallest beta that works).
    """
    given = (alpha, sigma, beta, data_mean, data_cov, reward_Q, reward_q, reward_c)
    return _as_given(iterate(gaussian_problem(*given), inner_steps, damping, initial_law), given)


def _as_given(found: Any, arguments: Sequence[Any]) -> Any:
    """numpy arrays and floats, unless an argument was a torch tensor."""
    if any(isinstance(value, Tensor) for value in arguments):
        return found
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    plain = {name: value.item() if value.dim() == 0 else value.numpy() for name, value in values.items()}
    return replace(found, **plain)


# ------------------------------------------------------------------------------------------------------ terminal laws


def path_tilt(lq: LinearQuadratic, initial_law: str = "fixed") -> Law:
    """The terminal law when every kernel is p e^{V/beta}: mean and covariance controlled. Constant beta only."""
    beta = _one_beta(lq)
    best = optimum(lq, initial_law)
    m, S = best.initial_mean, best.initial_cov
    for t in range(lq.T):
        M = _resolvent(lq, t, best.Q[t + 1])
        G = M @ lq.F[t]
        m, S = G @ m + M @ (lq.f[t] + lq.rho[t] * best.q[t + 1]), G @ S @ G.T + beta * lq.rho[t] * M
    return Law(m, S)


def ideal_tilt(lq: LinearQuadratic) -> Law:
    """p_pre(y_T) e^{r(y_T)/beta}, normalised. Constant beta only. Raises IllPosed where it cannot be."""
    beta, base = torch.tensor(_one_beta(lq), dtype=torch.float64), evaluate(lq, lq.pretrained)
    law = Law(base.terminal_mean, base.terminal_cov)
    return _tilted(lq.T, law, lq.Q, lq.q, beta, lambda scale: _largest_share(law, lq.Q, scale * beta) < 1)


def initial_law_bias(lq: LinearQuadratic) -> Tensor:
    """For a linear reward: how far the optimum's terminal mean stays behind the ideal tilt's when Y_0 is fixed, (d,).

    The optimum moves the mean by C q / beta with C = Cov(Y_T | Y_0), the ideal tilt by Cov(Y_T) q / beta: the bias is
    Cov(E[Y_T | Y_0]) q / beta, and vanishes iff Y_T forgets Y_0.
    """
    flow = torch.eye(lq.d, dtype=torch.float64)
    for F in lq.F:
        flow = F @ flow
    return flow @ lq.cov @ flow.T @ lq.q / _one_beta(lq)


def _one_beta(lq: LinearQuadratic) -> float:
    if not bool((lq.beta == lq.beta[0]).all()):
        raise ValueError("beta varies with t: the tilts p e^(V/beta) are defined for one beta; give a number")
    return float(lq.beta[0])
