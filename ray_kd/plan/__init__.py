"""What a run takes, before anything is paid for: from the models' config.json, without weights, Ray or GPUs.

sizes.py        parameters and FLOPs
activations.py  what a forward keeps, on fake tensors
memory.py       of a train worker at each ZeRO stage, of a teacher
placement.py    which processes share a GPU
devices.py rates.py measure.py   how fast: a table of GPUs, or a few passes here
scale.py        more GPUs, simulated
planning.py     all of it together; tables.py, as text
"""

from ray_kd.plan.planning import Asked, Plan, plan
from ray_kd.plan.tables import describe

__all__ = ["Asked", "Plan", "describe", "plan"]
