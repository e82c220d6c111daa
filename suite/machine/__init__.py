"""The machine: what it has, whether it can run a task, and the processes started on it. No torch."""
