"""What torchrun runs: the training job, and the programs that measure it."""
