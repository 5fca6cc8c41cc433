"""The keys of what a checkpoint has of a tensor, and what is said where they are not those that an optimizer needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sm3_dist.maths.momentum_code import MOMENTUM_BUFFER, MOMENTUM_CODE, OLD_CODE, refusal_of_old_codes

ADAMS = "exp_avg_sq"
"""What Adam's state has and SM3's has not."""
OPTIONAL = {
    MOMENTUM_BUFFER: "momentum > 0",
    MOMENTUM_CODE: "momentum_dtype=torch.int8",
    "update_square_average": "update_rms",
}
"""What only some hyperparameters need."""
MOMENTA = {MOMENTUM_BUFFER: MOMENTUM_CODE, MOMENTUM_CODE: MOMENTUM_BUFFER}
"""Each form of the momentum with the other, from which it can be made."""


def missing(names: Sequence[str], found: Iterable[str]) -> str:
    """What to say where there is nothing for these tensors."""
    return (
        f"the loaded state has nothing for {len(names)} of the optimizer's tensors: {', '.join(list(names)[:5])}. It "
        f"has {', '.join(list(found)[:5]) or 'none'}. Load the checkpoint of this model, or pass "
        "StateDictOptions(strict=False) to keep what these tensors have."
    )


def missing_key(name: str, key: str, found: Sequence[str]) -> str:
    """What to say where there is something for a tensor, but not this."""
    if ADAMS in found:
        hint = "This is the state of Adam; convert it with sm3_dist.checkpoint.from_adamw."
    elif key in OPTIONAL:
        hint = f"It is needed for {OPTIONAL[key]}: make the optimizer with the hyperparameters that it was saved with."
    elif "accumulator_0" in found:
        hint = "It was saved with other covers: make the optimizer with the cover_block of then (torch-SM3 has None)."
    else:
        hint = "It is not the state of SM3."
    return f"the loaded state of {name!r} has no {key}, but {list(found)}. {hint}"


def surplus(name: str, keys: Sequence[str]) -> str:
    """What to say where there is more for a tensor than can be read in place."""
    if OLD_CODE in keys:
        return refusal_of_old_codes(repr(name))
    why = ", ".join(OPTIONAL.get(key, "other covers") for key in keys)
    return (
        f"the loaded state of {name!r} has {', '.join(keys)} too, for which this optimizer has no place: it was saved "
        f"with {why}. Make the optimizer with the hyperparameters that it was saved with."
    )
