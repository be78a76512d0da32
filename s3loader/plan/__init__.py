"""The order of samples as a pure function: no I/O, no framework, no state but ``{epoch, consumed}``."""

from s3loader.plan.explain import DryRun, Explanation, explain_runs
from s3loader.plan.order import ALGORITHM, OrderSpec, Shuffle, choose_spec
from s3loader.plan.plan import Catalog, Occurrence, Plan, mix, plan_for
from s3loader.plan.schedule import Gaps, PlanState, Schedule, Tail, Topology

__all__ = [
    "ALGORITHM",
    "Catalog",
    "DryRun",
    "Explanation",
    "Gaps",
    "Occurrence",
    "OrderSpec",
    "Plan",
    "PlanState",
    "Schedule",
    "Shuffle",
    "Tail",
    "Topology",
    "choose_spec",
    "explain_runs",
    "mix",
    "plan_for",
]
