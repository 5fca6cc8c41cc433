"""What ``launch/memory.py`` and ``launch/watch.py`` measure memory with."""
