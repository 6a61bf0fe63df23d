"""Algorithm 1 of PI-FT (Han, Razaviyayn, Xu, arXiv 2412.18164) itself, exactly, on models with a known optimum.

    paper                             here
    line 6: m_t inner iterations      after n steps of this method every t has had n of them
    eq. 18, line 8                    workers/core/lq.py and grid.py, the expectation taken exactly

One step computes Algorithm 1 anew with one more inner iteration at every t: V_{t+1} in eq. 18 is the value of the
control after as many. So the gap to J* after n steps falls as kappa^(2n), and that slope is recorded as
`algorithm_1/log10_rate`. Nothing is sampled and no gradient is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.methods import check_config
from workers.rollout import Problem
from workers.spec import TrialSpec, locate, number


@dataclass(frozen=True, kw_only=True)
class Algorithm1Config:
    """Settings of conf/method/algorithm_1.yaml."""

    damping: str | float | None
    """"auto": the damped step where kappa_t >= 1; null: never; a number in (0, 1]: always that."""

    def problems(self) -> list[str]:
        if self.damping is None or self.damping == "auto":
            return []
        found = number("method.damping", self.damping, 0, "auto, null or a damping", high=1, open_low=True, example=0.5)
        return [problem.replace("method.damping=0.5", "method.damping=auto") for problem in found]


class Algorithm1:
    """The method; see the module's docstring. One `step` is one more inner iteration at every t."""

    Config = Algorithm1Config

    def __init__(self, problem: Problem, config: Algorithm1Config) -> None:
        self.problem, self.config, self.inner = problem, config, 0

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the method's settings, and with a model or an initial law it cannot work on."""
        found = check_config(Algorithm1Config, spec)
        if not hasattr(locate(spec.model["_target_"]), "known"):
            found.append(
                f"method=algorithm_1 needs a model with a known optimum and model={spec.model['name']} has none; write "
                "model=lq or model=mixture, or method=pi_ft"
            )
        if spec.initial_law != "fixed":
            found.append(
                f"initial_law={spec.initial_law} does not go with method=algorithm_1, which controls the drift alone; "
                "write initial_law=fixed, or method=pi_ft"
            )
        return found

    def step(self) -> dict[str, float]:
        if self.problem.known is None:
            raise RuntimeError("the problem's known optimum was not attached before the first step")
        with self.problem.costs():
            self.inner += 1
            found = self.problem.known.iterate(self.inner, self.config.damping)
        rate = {} if found.log10_rate is None else {"algorithm_1/log10_rate": found.log10_rate}
        return {"algorithm_1/control_error": found.control_error, **rate}

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner = state["inner"]
