"""The ranks wing: what ranks say to one another.

That plans agree (``agreement``, ``rendezvous``), the maxima and sums of a step (``bucket``), the new weights of ZeRO-1
(``weight_gather``), and that replicas have the same gradients (``same_gradients``). It may import
:mod:`sm3_dist.layout` and :mod:`sm3_dist.maths`, and never decides what an update is.
"""
