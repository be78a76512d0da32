"""The order of samples as a pure function: no I/O, no framework, no state but ``{epoch, consumed}``."""

from s3loader.plan.explain import Explanation, explain_plan
from s3loader.plan.plan import Catalog, Place, Plan, mix, plan_for
from s3loader.plan.schedule import Gaps, Schedule, Tail, Topology
from s3loader.plan.spec import ALGORITHM, OrderSpec, Shuffle, choose_spec
from s3loader.plan.state import PlanState

__all__ = [
    "ALGORITHM",
    "Catalog",
    "Explanation",
    "Gaps",
    "OrderSpec",
    "Place",
    "Plan",
    "PlanState",
    "Schedule",
    "Shuffle",
    "Tail",
    "Topology",
    "choose_spec",
    "explain_plan",
    "mix",
    "plan_for",
]
