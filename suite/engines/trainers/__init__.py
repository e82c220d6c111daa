"""Trainers (policy pi): dense models with transformers, mixtures of experts with megatron-core."""
