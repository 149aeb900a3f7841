"""Evaluation on held-out rows: how far the student is from the teacher and from the text.

In: packed held-out rows, the teacher, the student's forward as a callable. Out: exact KL(teacher || student),
perplexity, bits per byte, agreement of the most likely token (evaluator.py says what each number counts), and where
it comes from (breakdown.py). Beside them greedy answers to prompts (samples.py) and other people's tasks (harness.py).
"""

from ray_kd.eval.breakdown import Breakdown
from ray_kd.eval.evaluator import Evaluator, rows_of_rank
from ray_kd.eval.harness import Harness, open_harness
from ray_kd.eval.samples import generate_samples
from ray_kd.eval.targets import DenseTargets, TeacherTargets, TopKTargets

__all__ = [
    "Breakdown",
    "DenseTargets",
    "Evaluator",
    "Harness",
    "TeacherTargets",
    "TopKTargets",
    "generate_samples",
    "open_harness",
    "rows_of_rank",
]
