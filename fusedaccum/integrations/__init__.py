"""What others expect of us: torch.optim, checkpoints, frameworks and engines."""
