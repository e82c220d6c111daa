"""Prompts and their grading: problem files, chat templates, rewards, the answer graders. No torch."""
