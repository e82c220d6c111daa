"""The engines: weights and batches, losses, rounded arithmetic, and the sync from trainer to sampler with its proof."""
