"""The Triton backend: the kernel, how tensors are cut into tiles for it, and what launches it."""
