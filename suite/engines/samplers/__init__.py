"""Samplers (policy mu): vLLM, and transformers' forward pass as the plain one."""
