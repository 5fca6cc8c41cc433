"""The step wing: one step of one optimizer.

An ``Entry`` is one tensor with its shard and state, the ``StepPlan`` works through all of them, and what the state and
the param groups may be is told here. It may import the layout, maths and ranks wings, and never a kernel: the optimizer
hands the plan what makes kernels of entries.
"""
