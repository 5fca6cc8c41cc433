"""SM3, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sm3_dist import kernels
from sm3_dist.compat import whole_step
from sm3_dist.layout.describe import Flattened, Replicas
from sm3_dist.ranks.same_gradients import GradientCheck
from sm3_dist.step.blank_step import is_blank
from sm3_dist.step.guard import Skipping
from sm3_dist.step.keeper import PlanKeeper, States
from sm3_dist.step.param_groups import (
    adamw_like_options,
    complete,
    in_order,
    inverse_of,
    label_of,
    loaded_options,
    movable_params,
    refuse_options_of_adam,
    settings_of,
    validate,
)
from sm3_dist.step.plan import StepPlan
from sm3_dist.step.scheduled import check_scheduled, warn_of_cycled_momentum
from sm3_dist.step.silence import warn_of_silence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Never

_COPIED = ("shard_covers", "momentum_dtype", "backend", "_skipping", "_step_supports_amp_scaling")


class SM3(Optimizer):
    r"""SM3-II: adaptive learning rates from one small vector per tensor dimension, for whole and sharded parameters.

    For a tensor of shape :math:`(n_1, …, n_k)`, :math:`k \ge 2`, accumulator :math:`\mu_i` has shape :math:`(n_i,)`;
    for :math:`k \le 1` the only accumulator has the tensor's shape. With gradient :math:`g`, for each element
    :math:`j`:

    .. math::
        \nu(j) &= \min_i \mu_i(j_i) + g(j)^2 \quad (\beta = 0), \qquad
        \nu(j) = \beta \min_i \mu_i(j_i) + (1 - \beta)\, g(j)^2 \quad (\beta > 0) \\
        u(j) &= g(j) / \sqrt{\nu(j) + \epsilon} \\
        m &= \mathrm{momentum} \cdot m + (1 - \mathrm{momentum})\, u, \quad u = m \quad (\mathrm{momentum} > 0) \\
        w &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{weight\_decay})\, w - \mathrm{lr} \cdot u \\
        \mu_i(r) &= \max \{ \nu(j) : j_i = r \}

    Accumulators and momentum are float32 (float64 for float64 parameters), and so is the arithmetic, whatever the type
    of the parameters. Weights and state after a step are the same to the bit however the parameters are sharded.

    Args:
        params: tensors, param-group dicts, or ``(name, tensor)`` pairs. Plain tensors and DTensors (FSDP2, HSDP, tensor
            parallel) of any number of dimensions; float32, float64, bfloat16 or float16.
        lr: learning rate, a float or a tensor of one element.
        momentum: coefficient of the moving average of the updates, in ``[0, 1)``; costs one value per element.
        beta: coefficient of the moving average of squared gradients, in ``[0, 1)``; 0 sums them, as in the paper.
        eps: added under the square root.
        weight_decay: decoupled weight decay; a step first multiplies weights by ``1 - lr * weight_decay``.
        maximize: follow the gradient up, not down.
        bias_correction: average squared gradients over the steps so far, without the zeros that a moving average
            starts from, for which the first steps are too long. In step ``t`` of the parameter :math:`\beta` is
            :math:`\beta (1 - \beta^{t-1}) / (1 - \beta^t)` (arXiv 1804.04235, section 7.1). Needs ``beta > 0``.
        nesterov: take :math:`\mathrm{momentum} \cdot m + (1 - \mathrm{momentum})\, u` with the new :math:`m` for the
            update. Needs ``momentum > 0``.
        update_rms: multiply the update of each tensor, before momentum, with what would have brought those of the steps
            before it (a moving average over about 10) to this root mean square, and cut it off at 5 times that either
            way. Adam's is about 1, whatever its covers SM3's is with ``update_rms=1``, and then AdamW's learning rates
            do. It costs a second all-reduce (of one integer per tensor), as hidden as the first. The mean square is
            taken of exact integers, so that it is the same under every layout.
        cover_block: let an accumulator entry cover a block of so many elements of its row (or column) and not all of
            it. Accumulator 0 of an ``(n, m)`` matrix then has shape ``(n, ceil(m / cover_block))``, accumulator 1
            ``(ceil(n / cover_block), m)``; a tensor of more dimensions counts as a matrix. One more accumulator,
            of shape ``(ceil(n / cover_block), ceil(m / cover_block))``, covers the tiles. Ranks share only the blocks
            that an edge of a shard cuts.
        cover_product: estimate :math:`\nu` from the product of the accumulators over that of the tile,
            :math:`\mu_0 \mu_1 / \mu_2` for a matrix, and not from their minimum. It is a closer estimate where rows and
            columns differ in scale independently of one another. Needs ``cover_block``.
        orthogonalize: take in place of a matrix's update, momentum included, the nearest orthogonal matrix, as Muon
            does, at a root mean square of 0.2; ``(n_1, n_2 … n_k)`` is a matrix too, a vector is none. Of tensors
            that were flattened into one parameter, the names of those that are meant. See ``docs/orthogonal.md``.
        model: the wrapped root module, where parameters were flattened (FullyShardedDataParallel of torch or
            fairscale): their original shapes are read there. Other models may be passed too.
        shard_over: process group or 1-D mesh over which parameters are replicated (ZeRO-1). Each rank keeps the state
            of an equal range of all parameters and updates that alone; a step ends when every rank has all new weights.
        shard_covers: store each shared accumulator entry on one rank alone. A step then begins with an all-gather and
            ends with a reduce-scatter that nothing hides, and to read ``state`` is a collective: do it on every rank.
        momentum_dtype: type of the momentum buffer, if not that of the accumulators: ``torch.float32``;
            ``torch.bfloat16``, for two bytes per element; or ``torch.int8`` for one, which is a code
            (:mod:`~sm3_dist.maths.momentum_code`), always rounded stochastically, and has the key ``momentum_e3m4``.
        stochastic_rounding: round what is kept in bfloat16, weights and momentum, up or down with probabilities that
            make it right on average, so that updates too small for bfloat16 are not lost. The random numbers belong to
            the elements of the original tensors: the bits are the same under every layout and after a resume.
        rounding_seed: another seed gives other random numbers; 64 bits.
        check_gradients: with ``shard_over``, in how many first steps to check that gradients are the same to the bit on
            every rank, as DistributedDataParallel leaves them; 0 for never.
        unscale_in_step: under ``torch.amp.GradScaler``, unscale gradients on their way into the update and not in a
            pass of their own. ``param.grad`` stays scaled, so it cannot be clipped by its norm. Nobody takes a step if
            a gradient of any rank is not finite, whether or not the scaler asks the other ranks.
        skip_nonfinite: ``"parameter"``: one with NaN or infinity anywhere in its gradient takes no step, as if it had
            none; ``"step"``: then nobody takes one. On every rank alike; ``nonfinite_steps`` counts. See the FAQ.
        backend: ``"auto"``, ``"eager"``, ``"c"`` or ``"triton"``.

    Raises:
        ValueError: for a hyperparameter out of its range, or a layout that cannot be trained.
        TypeError: for parameters of other types, such as complex, integer and float8.
        sm3_dist.PlanMismatchError: in a step, on every rank, if ranks differ: see ``docs/one-rank.md``.
        sm3_dist.CollectiveError: in a step, if another rank has stopped or a collective has failed.
        sm3_dist.GradientMismatchError: in one of the first steps, on every rank, if gradients of replicated parameters
            differ (``shard_over``).

    Source: Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive Optimization", 2019, arXiv 1901.11150. The first five
    arguments are those of the package torch-SM3.

    Example:
        >>> import torch
        >>> from sm3_dist import SM3
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = SM3(layer.named_parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(value.shape) for key, value in optimizer.state[layer.weight].items()}
        {'step': (), 'accumulator_0': (3,), 'accumulator_1': (4,), 'momentum_buffer': (3, 4)}
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        beta: float = 0.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        bias_correction: bool = False,
        nesterov: bool = False,
        update_rms: float | None = None,
        cover_block: int | None = None,
        cover_product: bool = False,
        orthogonalize: bool | Iterable[str] = False,
        model: nn.Module | None = None,
        shard_over: ProcessGroup | DeviceMesh | None = None,
        shard_covers: bool = False,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        check_gradients: int = 3,
        unscale_in_step: bool = False,
        skip_nonfinite: str | None = None,
        backend: str = "auto",
        **others: Never,
    ) -> None:
        refuse_options_of_adam(others)
        if backend not in kernels.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, kernels.BACKENDS))}, but is {backend!r}")
        if not isinstance(check_gradients, int) or check_gradients < 0:
            raise ValueError(f"check_gradients must be a number of steps, at least 0, but is {check_gradients!r}")
        self.shard_covers, self.momentum_dtype, self.backend = shard_covers, momentum_dtype, backend
        self._step_supports_amp_scaling, self._skipping = unscale_in_step, Skipping(skip_nonfinite)
        replicas = None if shard_over is None else Replicas(shard_over)
        self._keeper = self._new_keeper(Flattened(model), replicas)
        self._gradient_check = (
            None if replicas is None else GradientCheck(replicas.group, check_gradients, self._keeper.watch)
        )
        self._without_momentum: set[int] = set()  # positions of param groups
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta": beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bias_correction": bias_correction,
            "nesterov": nesterov,
            "update_rms": update_rms,
            "cover_block": cover_block,
            "cover_product": cover_product,
            "orthogonalize": in_order(orthogonalize),
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)
        warn_of_silence(self)

    @classmethod
    def adamw_like(
        cls,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        **options: Any,
    ) -> SM3:
        """SM3 with the options that measurements favour, to be used at AdamW's learning rates. Start here.

        Nesterov momentum of 0.9, a bias-corrected moving average of squared gradients with ``beta=0.95``, updates at
        AdamW's root mean square, and products of covers of 64 elements, which make 0.13 bytes of accumulators per
        parameter of a matrix. What each of these brings is in ``docs/quality.md``.

        Args:
            params: as for :class:`SM3`.
            lr: learning rate, as for :class:`torch.optim.AdamW`.
            options: further arguments of :class:`SM3`, and others in place of these. ``momentum=0`` takes ``nesterov``
                with it, ``beta=0`` the bias correction, ``cover_block=None`` the product.

        Example:
            >>> import torch
            >>> from sm3_dist import SM3
            >>> layer = torch.nn.Linear(64, 48)
            >>> optimizer = SM3.adamw_like(layer.parameters(), lr=2e-3, weight_decay=0.1)
            >>> layer(torch.ones(2, 64)).square().mean().backward()
            >>> optimizer.step()
            >>> {key: tuple(value.shape) for key, value in optimizer.state[layer.weight].items() if "acc" in key}
            {'accumulator_0': (48, 1), 'accumulator_1': (1, 64), 'accumulator_2': (1, 1)}
        """
        return cls(params, lr, **adamw_like_options(options))

    def attach(self, model: nn.Module) -> None:
        """Say which model the parameters are of, now that it is wrapped; as ``model=`` does before.

        For frameworks that wrap it in FullyShardedDataParallel after the optimizer was made. Others flatten nothing.

        Args:
            model: the wrapped root module.

        Raises:
            ValueError: in the next step, if the state was made under another layout.

        Example:
            >>> import torch
            >>> from sm3_dist import SM3
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = SM3.adamw_like(model.parameters())
            >>> optimizer.attach(model)  # after model, optimizer = accelerator.prepare(model, optimizer)
        """
        self._keeper.attach(model)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @whole_step
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Every rank must call it, whatever its gradients: the ranks exchange maxima in each step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: for a learning rate, or another number in a param group, out of its range; nothing is updated.
        """
        with self._keeper.watch.step():
            return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._keeper.flattened.check_sharded()
        check_scheduled(self.param_groups)
        warn_of_cycled_momentum(self.param_groups, self._without_momentum)
        blank = is_blank(self._keeper.states)
        plan = self._current_plan()
        # 1. Receive: the maxima that were on their way since the end of the last step.
        plan.receive()
        found = getattr(self, "found_inf", None)  # by a GradScaler
        if found is not None and plan.guard.on_any_rank(bool(found)):
            return loss
        with self._skipping.nonfinite(plan.guard) as takes_step:
            if takes_step:
                self._take(plan, blank)
        return loss

    def _take(self, plan: StepPlan, blank: bool) -> None:
        if self._gradient_check is not None:
            self._gradient_check(movable_params(self.param_groups))
        # 2. Update: every box from its slices of the accumulators.
        unscale = inverse_of(getattr(self, "grad_scale", None))
        plan.update({id(group): settings_of(group, unscale) for group in self.param_groups})
        if blank:
            plan.count_from_0()
        # 3. Send: the new maxima travel while the next gradients are computed.
        plan.send()

    @property
    def nonfinite_steps(self) -> int:
        """In how many steps a gradient was not finite, and ``skip_nonfinite`` had something left out."""
        return self._skipping.steps

    @property
    def state(self) -> States:
        """The state of each parameter. Reading it waits for the maxima that are still on their way."""
        return self._keeper.received()

    @state.setter
    def state(self, value: States) -> None:
        self._keeper.replace(value)

    def state_dict(self) -> dict[str, Any]:
        """The state by position, as this rank holds it; see :meth:`torch.optim.Optimizer.state_dict`.

        Accumulators of flattened parameters (torch's FSDP1, fairscale) come as ``cover_minimum``, a tensor of the shape
        of the local parameter from which they follow exactly: what ``FSDP.optim_state_dict`` can gather and cut. What
        ``update_rms`` keeps of them is in the param groups, by the names of the original tensors.
        """
        return self._keeper.to_hand_out(super().state_dict(), self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; see :meth:`torch.optim.Optimizer.zero_grad`."""
        if set_to_none:
            self._keeper.watch.drop_gradients(param for group in self.param_groups for param in group["params"])
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see :meth:`torch.optim.Optimizer.add_param_group`. On every rank, if on any."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate(group, len(self.param_groups) - 1, self.momentum_dtype)
            for index, param in enumerate(group["params"]):
                self._keeper.describe(param, label_of(group, len(self.param_groups) - 1, index), group["cover_block"])
        except Exception:
            self.param_groups.pop()
            raise
        self._keeper.positions.expect(group)
        if not group["momentum"]:
            self._without_momentum.add(len(self.param_groups) - 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, under the same layout; also what torch-SM3's returned.

        Types are those of this optimizer: unlike in :meth:`torch.optim.Optimizer.load_state_dict`, accumulators are not
        cast to the type of the parameters.

        Args:
            state_dict: the state; it is copied.

        Raises:
            ValueError: if param groups, options or shapes do not fit; the optimizer is then as it was.
        """
        adopted: list[Any] = []  # states, and what they fit: what does not raises before anything is changed

        def keep_aside(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            adopted[:] = self._keeper.adopt(loaded, self.param_groups, self.defaults["cover_block"])
            return {**loaded, "state": {}, "param_groups": loaded_options(loaded, self, self.momentum_dtype)}

        def put_back(_: Optimizer) -> None:
            self._keeper.install(adopted[0], adopted[1], self.param_groups)

        hooks = (
            self.register_load_state_dict_pre_hook(keep_aside),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._keeper.check_copyable(self.param_groups)
        kept = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        return kept | {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        states = state.pop("state", None)
        if "_keeper" not in self.__dict__:  # unpickled or copied
            self._gradient_check = None
            self._without_momentum = set()
            self.__dict__.update({name: state[name] for name in _COPIED})
            self._keeper = self._new_keeper(Flattened(None), None)
        super().__setstate__(state)
        complete(self.param_groups, self.defaults)
        if states is not None:
            self._keeper.install(states, {}, self.param_groups)

    def _new_keeper(self, flattened: Flattened, replicas: Replicas | None) -> PlanKeeper:
        common = (flattened, replicas, self.momentum_dtype, self.shard_covers, kernels.Launcher(self.backend))
        return PlanKeeper(*common, self._skipping, self._step_supports_amp_scaling)

    def _current_plan(self) -> StepPlan:
        return self._keeper.current(self.param_groups)
