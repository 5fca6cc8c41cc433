"""Which tensors of a model are made orthogonal: the matrices between its first layer and its last one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from sm3_dist.layout.describe import Flattened
from sm3_dist.layout.flat_metadata import clean
from sm3_dist.layout.kinds import reshard

EMBEDDING = re.compile(r"embed|^w[tp]e$|^pos(ition)?s?$", re.IGNORECASE)
"""Found in any word of the name of what is looked up, or adds a place to what was looked up."""
HEAD = re.compile(r"^((lm_?|mlm_?|cls_?)?head|output|classifier|score|to_logits|logits)$", re.IGNORECASE)
"""The module that puts out the logits."""
PARAMETRIZED = "parametrizations"
"""Where PyTorch keeps what it makes the weights of a module from."""
WITHIN = ("modules_to_save", "original_module", PARAMETRIZED)
"""What is kept there is of the module before: a head stays one as peft's ``lm_head.modules_to_save.default``."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def with_matrices(
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]], model: nn.Module | None
) -> list[dict[str, Any]]:
    """Param groups that say of which tensors the update is to be made orthogonal; see :class:`~sm3_dist.MuonLikeSM3`.

    Args:
        params: as for an optimizer; names may be ``param_names`` of a group too, as torchtitan has it. Groups that have
            ``orthogonalize`` stay as they are.
        model: the model, wrapped or not; ``None``: names decide, with which parameters must come.

    Returns:
        for each group one of the matrices and one of the rest, as far as there are any.

    Raises:
        ValueError: if a parameter has neither a name nor a place in the model, or was flattened of some of both.
    """
    given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    groups = given if not given or isinstance(given[0], dict) else [{"params": given}]
    picker = Picker(model)
    return [each for group in groups for each in split(group, picker)]


def split(group: dict[str, Any], picker: Picker) -> Iterator[dict[str, Any]]:
    """A param group's matrices and its rest, as far as there are any; as it is, if it says ``orthogonalize`` itself.

    What holds no tensors is left to the optimizer, which says so.

    Raises:
        ValueError: if somebody else keeps the groups, and would not hear that there are more; and as above.
    """
    if not isinstance(group, dict) or "orthogonalize" in group or isinstance(group["params"], set):
        yield group
        return
    if "model" in group:
        raise ValueError(
            "a param group has a 'model' in it, as a wrapper of optimizers (fairscale's OSS, torch's "
            "ZeroRedundancyOptimizer) puts it there. It hands learning rates on group by group, and of each of its "
            "groups two are made here, of matrices and of the rest. Pass it MuonLikeSM3.groups(params, model) in the "
            "place of params."
        )
    given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if not given or not all(map(_is_tensor, given)):
        yield {**group, "params": given, "orthogonalize": False}
        return
    names = group.get("param_names") or ()
    if len(names) == len(given) and all(isinstance(each, Tensor) for each in given):
        given = list(zip(names, given, strict=True))
        group = {key: value for key, value in group.items() if key != "param_names"}  # each part gets its own
    by_choice: dict[bool, list[Any]] = {True: [], False: []}
    for each in given:
        name, param = each if isinstance(each, tuple) else (None, each)
        by_choice[picker.pick(param, name)].append(each)
    for choice, params in by_choice.items():
        if params:
            yield {**group, "params": params, "orthogonalize": choice}


def is_matrix(name: str, shape: Sequence[int], module: nn.Module | None) -> bool:
    """Whether a tensor is one of the matrices between the first layer and the last.

    Args:
        name: the tensor's, with those of the modules that it lies in.
        shape: its shape.
        module: what it is the weight of; ``None`` where nobody knows.

    Example:
        >>> is_matrix("blocks.3.mlp.up.weight", (512, 128), nn.Linear(128, 512))
        True
        >>> is_matrix("lm_head.weight", (256, 128), None), is_matrix("embed_tokens.weight", (256, 128), None)
        (False, False)
    """
    dims = (2, 3, 4, 5) if isinstance(module, CONVOLUTIONS) else (2,) if module is not None else (2, 4)
    if len(shape) not in dims or shape[0] == 1 or max(shape[1:]) == 1:
        return False
    if module is not None and "Embedding" in type(module).__name__:
        return False
    *path, _ = clean(name).split(".") if "." in name else ("", name)
    path = list(takewhile(lambda word: word not in WITHIN, path)) or [""]
    return not (any(map(EMBEDDING.search, path)) or HEAD.match(path[-1]))


class Picker:
    """Knows the tensors of a model by name.

    Args:
        model: the model, wrapped or not; ``None``: tensors must come with names.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.flattened = Flattened(model)
        if model is not None:
            reshard(model)
        self._modules = {clean(path): module for path, module in model.named_modules()} if model is not None else {}
        self._names: dict[Tensor, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False) if model is not None else ():
            self._names.setdefault(param, []).append(clean(name))

    def pick(self, param: Tensor, name: str | None) -> bool:
        """Whether a parameter is such a matrix."""
        if param in self.flattened:
            originals = self.flattened.originals(param)
            found = [o.name for o in originals if self._all_matrices([o.name, *o.aliases], o.shape)]
            if found and len(found) < len(originals):
                other = next(o.name for o in originals if o.name not in found)
                raise ValueError(
                    f"{found[0]}, a matrix, and {other}, which is none, were flattened into one parameter and cannot "
                    "have options of their own. Wrap with use_orig_params=True (fairscale: flatten_parameters=False), "
                    "or give the param group one set of options and name the matrices: orthogonalize="
                    f"[{found[0]!r}, ...]."
                )
            return bool(found)
        names = self._names.get(param) or ([name] if name is not None else [])
        if not names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} has no name and is no parameter of "
                f"{'any model' if self.model is None else type(self.model).__name__}, so nobody knows whether its "
                "update is to be made orthogonal. Pass model=, pass model.named_parameters(), or say orthogonalize="
                "True or False in its param group."
            )
        return self._all_matrices(names, param.shape)

    def _all_matrices(self, names: Iterable[str], shape: Sequence[int]) -> bool:
        """A tensor that has several names (tied weights) is one only if it is under each of them."""
        return all(is_matrix(name, shape, self._modules.get(_module_of(name))) for name in names)


def _module_of(name: str) -> str:
    """The module that a tensor is a weight of, or has a weight that is made of the tensor."""
    path = name.split(".")[:-1]
    return ".".join(path[: path.index(PARAMETRIZED)] if PARAMETRIZED in path else path)


def _is_tensor(given: Any) -> bool:
    """Whether it is a tensor, or a name with one."""
    return isinstance(given[1] if isinstance(given, tuple) and len(given) == 2 else given, Tensor)
