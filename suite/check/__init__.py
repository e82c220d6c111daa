"""`suite check MODEL`: how large the gap between sampler and trainer is for one's own checkpoint, or in one's own rollouts,
whether others would call that normal, and whether fp16 would help."""
