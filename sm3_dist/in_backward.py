"""Steps taken during backward: each gradient is used as soon as it is there, and freed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sm3_dist import kernels
from sm3_dist.layout.flat_metadata import is_flattened
from sm3_dist.maths.update import Settings
from sm3_dist.optimizer import SM3
from sm3_dist.step.gradient import settled_gradient
from sm3_dist.step.guard import STEP
from sm3_dist.step.param_groups import settings_of
from sm3_dist.step.plan import StepPlan, mark_changed
from sm3_dist.step.scheduled import check_scheduled


def step_in_backward(model: nn.Module, optimizer: SM3, *, clip_value: float | None = None) -> StepInBackward:
    """Take each parameter's step as soon as its gradient is there, and free the gradient.

    The training loop stays as it is. ``backward()`` steps the parameters one after another, with the hyperparameters of
    the beginning of the step; ``optimizer.step()``, once after every ``backward()``, steps what still has a gradient
    and sends the new maxima, in the one all-reduce of every step. The bits are those of a step after backward.

    For one process, FSDP2, HSDP and tensor parallel: wherever the gradient that backward leaves is the final one. To
    accumulate gradients with FSDP2, turn ``set_requires_gradient_sync`` off in all backward passes but the last. A
    global norm of the gradients does not exist at any time, so they cannot be clipped by it (``clip_grad_norm_`` finds
    no gradients). ``clip_value`` cuts off their elements instead, as ``clip_grad_value_`` does, and with
    ``update_rms=`` the optimizer cuts off elements of updates.

    Call it on every rank, after the model is wrapped.

    Args:
        model: the root module, as wrapped.
        optimizer: has (some of) its parameters. Those added later are stepped by ``optimizer.step()``.
        clip_value: elements of gradients are cut off at this value either way; ``None``: they are used as they are.

    Returns:
        A handle whose ``remove()`` undoes it; so does leaving its ``with`` block.

    Raises:
        TypeError: for an optimizer that is not SM3, or has another around it.
        ValueError: for DistributedDataParallel, FSDP1, fairscale, ``shard_over=``, ``shard_covers=True``,
            ``orthogonalize`` and ``skip_nonfinite`` where other ranks have a word in it, with the reason; for a
            ``clip_value`` that is not greater than 0.
        RuntimeError: in backward, if a parameter gets a second gradient before ``optimizer.step()``; in
            ``optimizer.step()``, if a GradScaler takes it.

    Example:
        >>> import torch
        >>> from sm3_dist import SM3, step_in_backward
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SM3(model.parameters(), lr=0.1)
        >>> with step_in_backward(model, optimizer):
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> model.weight.grad is None
        True
    """
    _refuse(model, optimizer)
    if clip_value is not None and not clip_value > 0:
        raise ValueError(f"clip_value must be greater than 0 (or None, for no clipping), but is {clip_value}")
    return StepInBackward(optimizer, clip_value)


class StepInBackward:
    """What :func:`step_in_backward` returns.

    Args:
        optimizer: whose parameters are to be stepped.
        clip_value: where elements of gradients are cut off; ``None``: nowhere.
    """

    def __init__(self, optimizer: SM3, clip_value: float | None = None) -> None:
        self.optimizer = optimizer
        self.clip_value = clip_value
        self._plan: StepPlan | None = None
        self._kernels: dict[Tensor, list[kernels.Kernel]] = {}
        self._settings: dict[int, Settings] = {}
        self._of_graphs: list[Any] = []  # CUDA graphs refer to their tables by address
        self._stepped: dict[Tensor, None] = {}
        self._nonfinite: dict[Tensor, str] = {}
        self._turn = threading.Lock()  # autograd has a thread for each device
        # a GradScaler then leaves the gradients, which are gone, to step(), where it is refused
        self._unscaled_in_step, optimizer._step_supports_amp_scaling = optimizer._step_supports_amp_scaling, True
        optimizer._current_plan()  # compared across ranks here, and not in the midst of backward
        params = [param for param in _params(optimizer) if param.requires_grad]
        self._handles: list[Any] = [param.register_post_accumulate_grad_hook(_weakly(self._step)) for param in params]
        self._handles.append(optimizer.register_step_pre_hook(self._refuse_scaler))
        self._handles.append(optimizer.register_step_pre_hook(self._clip_what_is_left))
        self._handles.append(optimizer.register_step_post_hook(self._end))

    def remove(self) -> None:
        """Leave gradients where they are again, for ``optimizer.step()`` to use. May be called more than once."""
        if self._handles:
            self.optimizer._step_supports_amp_scaling = self._unscaled_in_step
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> StepInBackward:
        """The handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo it."""
        self.remove()

    def _step(self, param: Tensor) -> None:
        """A gradient is there."""
        with self._turn, torch.no_grad():
            if param.grad is not None:
                self._use_gradient(param)

    def _use_gradient(self, param: Tensor) -> None:
        """Take the parameter's step, and free the gradient."""
        if param in self._stepped:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} got a second gradient before optimizer.step(), but its "
                "first has been used and freed. Call optimizer.step() after every backward(). To accumulate gradients, "
                "step after backward instead: call remove() on the handle of step_in_backward(). If a backward pass "
                f"was aborted (out of memory, say), {len(self._stepped)} parameters have taken their step and the "
                "others have not: drop the gradients that are left and call optimizer.step(), on every rank, to go on "
                "from there; or "
                "load the last checkpoint."
            )
        if not self._stepped:
            self._begin()
        if param not in self._kernels:  # nor in the optimizer any more
            return
        self._clip(param)
        if self._finite(param):
            for kernel in self._kernels[param]:
                kernel.update(self._settings)
            mark_changed([param])
        self._stepped[param] = None
        param.grad = None

    @torch.no_grad()
    def _clip_what_is_left(self, *_: Any) -> None:
        """Gradients of parameters without a hook, which were added since."""
        if self._stepped and self._plan is not None:
            self._plan.note()
        for param in _params(self.optimizer):
            if param.grad is not None:
                self._clip(param)

    def _clip(self, param: Tensor) -> None:
        """Element by element: no rank needs to know of another's."""
        if self.clip_value is None:
            return
        values = settled_gradient(param)  # only a sum can be cut off
        assert values is not None
        values.clamp_(-self.clip_value, self.clip_value)

    def _finite(self, param: Tensor) -> bool:
        """Whether to take the step, as far as ``skip_nonfinite`` asks."""
        if self.optimizer._skipping.mode is not None:
            assert self._plan is not None
            self._nonfinite |= self._plan.guard.here([param])
        return param not in self._nonfinite

    def _begin(self) -> None:
        optimizer = self.optimizer
        check_scheduled(optimizer.param_groups)
        plan = optimizer._current_plan()
        plan.receive()
        if plan is not self._plan:
            self._plan = plan
            entries: dict[Tensor, list[Any]] = {}
            for entry in plan.entries:
                entries.setdefault(entry.param, []).append(entry)
            self._kernels = {param: kernels.launch_list(these, optimizer.backend) for param, these in entries.items()}
        if plan.captured:
            self._of_graphs.append((self._kernels, plan))
        self._settings = {id(group): settings_of(group, None) for group in optimizer.param_groups}

    def _end(self, *_: Any) -> None:
        if self._nonfinite:
            self.optimizer._skipping.note(self._nonfinite)
        self._stepped.clear()
        self._nonfinite = {}

    def _refuse_scaler(self, *_: Any) -> None:
        if getattr(self.optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "GradScaler skips a step if any gradient is not finite, but step_in_backward() has used each as it "
                "came. Train in bfloat16, which needs no loss scaling, or step after backward: call remove() on the "
                "handle."
            )


def _refuse(model: nn.Module, optimizer: SM3) -> None:
    """Raise where a gradient is not final when backward leaves it, or a step is more than its parameters' steps."""
    if not isinstance(model, nn.Module) or not isinstance(optimizer, SM3):
        raise TypeError(
            "step_in_backward(model, optimizer) takes a module and SM3 itself, without what a framework wrapped around "
            f"it, but got {type(model).__name__} and {type(optimizer).__name__}"
        )
    instead = "Step after backward instead, or shard the model with FSDP2 (torch.distributed.fsdp.fully_shard)."
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "ShardedDataParallel":
            raise ValueError(
                f"{name or 'the model'} is wrapped in {type(module).__name__}, which averages gradients over the ranks "
                f"after backward has left them: a step before that would use this rank's alone. {instead}"
            )
    if any(is_flattened(param) for param in (*model.parameters(), *_params(optimizer))):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1 or fairscale's), which flattens parameters and "
            f"hands out their gradients after backward alone. {instead}"
        )
    if optimizer._keeper.replicas is not None:
        raise ValueError(
            "with shard_over= a step ends with an exchange of new weights, and gradients are averaged over the ranks "
            f"after backward has left them. {instead}"
        )
    if optimizer.shard_covers:
        raise ValueError(
            "with shard_covers=True a step begins with an all-gather, which would fall into the midst of backward, "
            "among the collectives of the model. Leave shard_covers out."
        )
    mode = optimizer._skipping.mode
    if mode == STEP:
        raise ValueError(
            "with skip_nonfinite='step' no parameter is stepped before the gradients of all are known to be finite, "
            "which they are after backward alone. Pass skip_nonfinite='parameter', or step after backward instead."
        )
    if mode is not None and optimizer._current_plan().guard.is_shared:
        raise ValueError(
            "with skip_nonfinite='parameter' the ranks that hold parts of a parameter ask one another whether its "
            "gradient is finite, which they would do in the midst of backward, among the collectives of the model. "
            "Step after backward instead, or leave skip_nonfinite out and pass clip_value=, against infinity."
        )
    if any(group["orthogonalize"] for group in optimizer.param_groups):
        raise ValueError(
            "with orthogonalize a step needs the whole update of a matrix, which the ranks that hold parts of it would "
            "send one another in the midst of backward, among the collectives of the model, and in the order in which "
            "each has its gradients. Step after backward instead, or leave orthogonalize out."
        )


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that calls a method as long as its object lives.

    Python's collector does not see what hooks of a tensor hold. One that held the optimizer would keep all of its
    tensors, and so itself, for ever.
    """
    known = WeakMethod(method)

    def hook(param: Tensor) -> None:
        if (call := known()) is not None:
            call(param)

    return hook


def _params(optimizer: SM3) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
