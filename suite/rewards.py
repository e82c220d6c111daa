"""Grades answers for scripts: `from suite.rewards import RewardPool` is a name that others rely on. All of it is in problems/."""

from suite.problems.rewards import Reward, RewardPool, extract_answer

__all__ = ["Reward", "RewardPool", "extract_answer"]
