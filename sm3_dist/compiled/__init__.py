"""The compiled wing: the library that was made of the C sources, where there is one, and looks at tensors through it.

Whether it fits the sources that lie here (``sources``), what it can be asked (``library``), where and how thousands of
tensors lie in memory (``look``), and which of them have an element that is not finite (``search``). Its own kernels are
:mod:`sm3_dist.kernels.c`'s.
"""
