"""What ``launch/compare.py`` is made of."""
