"""Trains the student: loop, step, DeepSpeed (`zero.py`, `fragments.py`), collation and schedule."""
