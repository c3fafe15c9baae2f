"""Several processes: accumulators averaged over a group, instead of DDP's reducer or without DDP.

Nothing of this is imported before torch.distributed is in use.
"""
