"""The maths wing: the update of one box of one tensor, its rounding and its codes, and the reference that defines it.

It may import :mod:`sm3_dist.layout` for the boxes that it walks, and never ``torch.distributed``: whatever ranks must
tell one another, they have told before the maths begins.
"""
