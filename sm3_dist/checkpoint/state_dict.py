"""State dicts of model and optimizer by canonical name, with the signatures of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from sm3_dist.checkpoint.boxed import BoxedTensor
from sm3_dist.checkpoint.canonical import Canonical, sm3_within
from sm3_dist.checkpoint.flat_dict import flatten, unflatten
from sm3_dist.checkpoint.model import is_flattened, load_model, model_slots
from sm3_dist.checkpoint.names import canonical_names
from sm3_dist.checkpoint.slots import values
from sm3_dist.step.state import as_tensor

StateDict = dict[str, Any]


@torch.no_grad()
def get_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> StateDict:
    """The state of the optimizers by parameter name, the same for every wrapper and number of ranks.

    Call it on every rank. The counterpart of :func:`torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`;
    optimizers other than SM3 are handed on to it.

    Args:
        model: the wrapped root module.
        optimizers: one or more that train its parameters.
        submodules: not used, as in PyTorch.
        options: see :class:`torch.distributed.checkpoint.state_dict.StateDictOptions`. By default values are live (but
            for accumulators with ``shard_covers``): tensors, DTensors, and :class:`BoxedTensor` where a rank holds
            flat ranges; saving writes them chunk by chunk, and loading writes into them. ``full_state_dict=True`` makes
            whole tensors, one after another.

    Returns:
        ``{"state": {name: {"step", "accumulator_0", …, "momentum_buffer"}}, "param_groups": [{"params": names, …}]}``.
        For a tensor of shape ``(n_1, …, n_k)``, ``accumulator_i`` has shape ``(n_i,)`` and ``momentum_buffer`` (only
        with momentum) that of the tensor; ``step`` is a float32 scalar.

    Raises:
        ValueError: if a parameter of the optimizer is not one of the model.

    Example:
        >>> import torch
        >>> from sm3_dist import SM3
        >>> from sm3_dist.checkpoint import get_optimizer_state_dict
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> saved = get_optimizer_state_dict(model, SM3(model.parameters()))
        >>> {key: tuple(value.shape) for key, value in saved["state"]["0.weight"].items()}
        {'step': (), 'accumulator_0': (3,), 'accumulator_1': (4,)}
    """
    options = _checked(options)
    state: StateDict = {}
    groups: list[StateDict] = []
    for optimizer in _several(optimizers):
        if sm3_within(optimizer) is not None:
            canonical = Canonical(model, optimizer)
            part: StateDict = {"state": canonical.state(), "param_groups": canonical.groups()}
        else:
            part = dict(torch_state_dict.get_optimizer_state_dict(model, optimizer))
        state |= part["state"]
        groups += part["param_groups"]
    if options.ignore_frozen_params:
        frozen = _frozen(model)
        state = {name: values for name, values in state.items() if name not in frozen}
        groups = [{**group, "params": [name for name in group["params"] if name not in frozen]} for group in groups]
    lonely = _lonely(options)
    state = {
        name: {key: _placed(value, options, lonely) for key, value in values.items()} for name, values in state.items()
    }
    if lonely:
        return {}
    return flatten(state, groups) if options.flatten_optimizer_state_dict else {"state": state, "param_groups": groups}


@torch.no_grad()
def set_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    optim_state_dict: StateDict,
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Load what :func:`get_optimizer_state_dict` returned, under this or any other wrapper and number of ranks.

    Call it on every rank. Values are whole tensors, DTensors of any layout, or what
    :func:`torch.distributed.checkpoint.load` filled in. Hyperparameters are taken over with the state.

    Args:
        model: the wrapped root module.
        optimizers: one or more that train its parameters.
        optim_state_dict: the state; it is copied. With ``broadcast_from_rank0=True`` only that of rank 0 is used.
        options: see :class:`torch.distributed.checkpoint.state_dict.StateDictOptions`. ``strict=False`` lets tensors
            for which there is nothing keep what they have.

    Raises:
        ValueError: if names are missing, or shapes or hyperparameters do not fit; nothing is then changed.
    """
    _Setting(model, _several(optimizers), optim_state_dict, _checked(options)).finish()


def get_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[StateDict, StateDict]:
    """The state of the model and of its optimizers, both by canonical name.

    Args:
        model: the wrapped root module.
        optimizers: as in :func:`get_optimizer_state_dict`.
        submodules: as in :func:`torch.distributed.checkpoint.state_dict.get_state_dict`.
        options: as in :func:`get_optimizer_state_dict`.

    Returns:
        The state dict of the model, as PyTorch makes it, and that of the optimizers.
    """
    model_state = _get_model_state(model, submodules, _checked(options))
    return model_state, get_optimizer_state_dict(model, optimizers, submodules=submodules, options=options)


def set_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    model_state_dict: StateDict,
    optim_state_dict: StateDict,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Load what :func:`get_state_dict` returned. What does not fit the optimizers changes nothing.

    Args:
        model: the wrapped root module.
        optimizers: as in :func:`set_optimizer_state_dict`.
        model_state_dict: the state of the model.
        optim_state_dict: the state of the optimizers.
        options: as in :func:`set_optimizer_state_dict`.

    Returns:
        The keys that the model missed and those that it did not know.

    Raises:
        ValueError: as in :func:`set_optimizer_state_dict`.
        RuntimeError: if the weights are those of another model; the optimizers are then as they were, and the model has
            what fits, as after any ``load_state_dict`` of PyTorch.
    """
    options = _checked(options)
    setting = _Setting(model, _several(optimizers), optim_state_dict, options)
    try:
        keys = _set_model_state(model, model_state_dict, options)
    except Exception:
        setting.give_up()
        raise
    setting.finish()
    return keys


@torch.no_grad()
def _get_model_state(model: nn.Module, submodules: set[nn.Module] | None, options: StateDictOptions) -> StateDict:
    if submodules or not is_flattened(model):
        return torch_state_dict.get_model_state_dict(model, submodules=submodules, options=options)
    state: StateDict = dict(values(model_slots(model)))
    if options.ignore_frozen_params:
        for name in _frozen(model):
            state.pop(name, None)
    lonely = _lonely(options)
    placed = {name: _placed(value, options, lonely) for name, value in state.items()}
    return {} if lonely else placed


@torch.no_grad()
def _set_model_state(model: nn.Module, state_dict: StateDict, options: StateDictOptions) -> _IncompatibleKeys:
    if not is_flattened(model):
        if options.broadcast_from_rank0:  # PyTorch sends memory as it lies, and receives it as contiguous
            state_dict = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in state_dict.items()}
        return torch_state_dict.set_model_state_dict(model, state_dict, options=options)
    if options.broadcast_from_rank0 and dist.is_initialized():
        shared = _FromRank0.of(lambda: _Loaded({"": state_dict}, []), _device(model.parameters()))
        loaded = ((name, value) for _, name, value in shared.values())
        return load_model(model, shared.shapes[""], loaded, options.strict)
    return load_model(model, state_dict, state_dict.items(), options.strict)


class _Setting:
    """State on its way to optimizers: all of it is checked when this is made, before anything is changed.

    Args:
        model: the wrapped root module.
        optimizers: which train its parameters.
        state_dict: the state.
        options: as in :func:`set_optimizer_state_dict`.

    Raises:
        ValueError: if it does not fit one of them.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], state_dict: StateDict, options: StateDictOptions
    ) -> None:
        self._ours = [each for each in optimizers if sm3_within(each) is not None]
        others = [each for each in optimizers if each not in self._ours]
        self._set_others = [
            partial(torch_state_dict.set_optimizer_state_dict, model, each, state_dict, options=options)
            for each in others
        ]
        self._prepared: list[Canonical] = []
        self._values: Callable[[], Iterable[tuple[str, str, Tensor]]] = tuple
        if not self._ours:
            return
        shapes: Mapping[str, Mapping[str, Any]]
        if options.broadcast_from_rank0 and dist.is_initialized():
            device = _device(p for each in self._ours for group in each.param_groups for p in group["params"])
            shared = _FromRank0.of(lambda: _Loaded.of(state_dict), device)
            shapes, groups, self._values = shared.shapes, shared.groups, shared.values
        else:
            loaded = _Loaded.of(state_dict)
            shapes, groups, self._values = loaded.state, loaded.groups, loaded.values
        spared = _frozen(model) if options.ignore_frozen_params else ()
        try:
            for each in self._ours:
                self._prepared.append(Canonical(model, each))
                self._prepared[-1].prepare(shapes, groups, options.strict, spared)
        except Exception:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Leave the optimizers as they were."""
        for canonical in self._prepared:
            canonical.give_up()

    def finish(self) -> None:
        """Bring the state to the optimizers."""
        for set_other in self._set_others:
            set_other()
        for canonical in self._prepared:
            canonical.load(self._values())


class _Loaded(NamedTuple):
    """A state dict of optimizers, flat or not."""

    state: StateDict
    groups: list[StateDict]

    @classmethod
    def of(cls, state_dict: StateDict) -> _Loaded:
        if "state" in state_dict or not state_dict:
            state, groups = state_dict.get("state", {}), state_dict.get("param_groups", [])
        else:
            state, groups = unflatten(state_dict)
        if not all(isinstance(name, str) for name in state):
            raise ValueError(
                "the loaded state is by position, as optimizer.state_dict() has it, and goes by name here. Load it "
                "with optimizer.load_state_dict(), under the layout that saved it; or give it names: "
                "sm3_dist.checkpoint.from_adamw does, of Adam's, and from_torch_sm3"
            )
        return cls({name: {k: as_tensor(v) for k, v in each.items()} for name, each in state.items()}, groups)

    def values(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, each in self.state.items():
            for key, value in each.items():
                yield name, key, value


class _Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class _FromRank0(NamedTuple):
    """A state dict that rank 0 has, and sends tensor by tensor."""

    shapes: dict[str, dict[str, _Form]]
    groups: list[StateDict]
    state: Mapping[str, Mapping[str, Tensor]]
    device: torch.device

    @classmethod
    def of(cls, read: Callable[[], _Loaded], device: torch.device) -> _FromRank0:
        """What rank 0 reads. A collective.

        Raises:
            ValueError: on every rank, if rank 0 cannot.
        """
        loaded, reason = _Loaded({}, []), None
        sent: list[Any] = [None, None, ""]
        if dist.get_rank() == 0:
            try:
                loaded = read()
                forms = {
                    name: {key: _Form(tuple(value.shape), value.dtype) for key, value in values.items()}
                    for name, values in loaded.state.items()
                }
                sent = [forms, loaded.groups, ""]
            except Exception as error:
                reason, sent = error, [None, None, f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(sent, src=0)
        shapes, groups, words = sent
        if words:
            raise ValueError(f"rank 0 cannot send what is to be loaded: {words}") from reason
        return cls(shapes, groups, loaded.state, device)

    def values(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, forms in self.shapes.items():
            for key, form in forms.items():
                if dist.get_rank() == 0:
                    whole = self.state[name][key].detach().to(self.device, copy=True).contiguous()
                else:
                    whole = torch.empty(form.shape, dtype=form.dtype, device=self.device)
                dist.broadcast(whole, src=0)
                yield name, key, whole


def _several(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def _checked(options: StateDictOptions | None) -> StateDictOptions:
    options = options or StateDictOptions()
    if options.broadcast_from_rank0 and not options.full_state_dict:
        raise ValueError("broadcast_from_rank0=True needs full_state_dict=True: rank 0 must have whole tensors to send")
    return options


def _lonely(options: StateDictOptions) -> bool:
    """Whether this rank takes part but gets nothing: whole tensors on the CPU are for rank 0 alone."""
    return options.full_state_dict and options.cpu_offload and dist.is_initialized() and dist.get_rank() != 0


def _frozen(model: nn.Module) -> set[str]:
    return {name for parameter, name in canonical_names(model).items() if not parameter.requires_grad}


def _device(tensors: Iterable[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _placed(value: Any, options: StateDictOptions, drop: bool) -> Any:
    """A value as whole tensor and on the CPU, as the options say. A collective for sharded values to be made whole."""
    if not isinstance(value, Tensor):
        return value
    if options.full_state_dict:
        if isinstance(value, BoxedTensor):
            value = value.full()
        elif isinstance(value, DTensor):
            value = value.full_tensor()
    if drop:
        return None
    return value.cpu() if options.cpu_offload else value
