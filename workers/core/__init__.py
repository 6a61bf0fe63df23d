"""The control mathematics of reward fine-tuning; imports torch and nothing else."""
