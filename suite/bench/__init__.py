"""Maintainers' benchmarks against other libraries: `suite bench`."""
