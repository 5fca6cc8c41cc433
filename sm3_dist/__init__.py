"""SM3, the memory-efficient adaptive optimizer, for whole and for sharded PyTorch training."""

from sm3_dist.in_backward import step_in_backward
from sm3_dist.optimizer import SM3
from sm3_dist.planner.planning import plan
from sm3_dist.ranks.same_gradients import GradientMismatchError
from sm3_dist.ranks.watch import CollectiveError, PlanMismatchError
from sm3_dist.recipes import AdamWLikeSM3, MuonLikeSM3

__all__ = [
    "SM3",
    "AdamWLikeSM3",
    "CollectiveError",
    "GradientMismatchError",
    "MuonLikeSM3",
    "PlanMismatchError",
    "plan",
    "step_in_backward",
]
__version__ = "0.1.0"
