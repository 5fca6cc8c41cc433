"""SM3, the memory-efficient adaptive optimizer, for whole and for sharded PyTorch training."""

from sm3_dist.agreement import PlanMismatchError
from sm3_dist.optimizer import SM3
from sm3_dist.same_gradients import GradientMismatchError

__all__ = ["SM3", "GradientMismatchError", "PlanMismatchError"]
__version__ = "0.1.0.dev0"
