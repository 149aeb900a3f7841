"""What the jobs `benchmark_*` measure and how: candidates, floors, timing in turns, memory in a fresh process."""
