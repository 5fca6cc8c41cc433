"""Record what optax's SM3 computes, so that the tests need no JAX.

    pip install optax && python tests/data/make_optax_sm3.py

writes optax_sm3.json beside this file: for each case the gradients of every step and the scaled updates.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

SHAPES = [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)]
CASES = [{"b1": 0.0, "b2": 1.0}, {"b1": 0.9, "b2": 1.0}, {"b1": 0.0, "b2": 0.95}, {"b1": 0.9, "b2": 0.95}]
EPS = 1e-30
STEPS = 4


def record(shape: tuple[int, ...], b1: float, b2: float) -> dict[str, object]:
    """Gradients and updates of one tensor over a few steps."""
    rng = np.random.default_rng(0)
    transform = optax.scale_by_sm3(b1=b1, b2=b2, eps=EPS)
    state = transform.init(jnp.zeros(shape, jnp.float32))
    grads, updates = [], []
    for _ in range(STEPS):
        grad = rng.standard_normal(shape).astype(np.float32)
        update, state = transform.update(jnp.asarray(grad), state)
        grads.append(grad.tolist())
        updates.append(np.asarray(update).tolist())
    return {"b1": b1, "b2": b2, "eps": EPS, "grads": grads, "updates": updates}


if __name__ == "__main__":
    recorded = {"optax": optax.__version__, "cases": [record(shape, **case) for shape in SHAPES for case in CASES]}
    Path(__file__).with_name("optax_sm3.json").write_text(json.dumps(recorded) + "\n")
