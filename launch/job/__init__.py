"""What the training job of ``launch/train.py`` is made of."""
