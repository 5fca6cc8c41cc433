"""The planner wing: what a model will need on each rank, before anything is rented.

The function :func:`sm3_dist.plan`, the command ``python -m sm3_dist plan``, and what they know: decoders by size, other
optimizers' bytes, and the volume of collectives. It may import every other wing, and never builds an optimizer or sends
anything.
"""
