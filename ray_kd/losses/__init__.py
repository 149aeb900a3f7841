"""Distillation losses on plain tensors: torch only, no ray, deepspeed or transformers; everything runs on CPU."""

from ray_kd.head import Head
from ray_kd.losses.fused_linear import LossOutput, fused_linear_dense_kd_loss, fused_linear_kd_loss

__all__ = ["Head", "LossOutput", "fused_linear_dense_kd_loss", "fused_linear_kd_loss"]
