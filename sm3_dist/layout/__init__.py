"""The layout wing: which part of a tensor a rank holds.

A rank holds a list of boxes of the original tensor (:mod:`~sm3_dist.layout.box`); one :class:`LocalShard` says which,
and who shares which accumulator entries. The adapters (``whole``, ``dtensor``, ``flat``, ``zero``) turn each wrapper's
own description into that, and :mod:`~sm3_dist.layout.describe` picks the adapter. It imports nothing else of the
package, and never computes an update or sends anything.
"""
