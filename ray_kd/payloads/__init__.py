"""What the teacher said about each target position: one kind a file, numpy in, numpy out, no pickle.

A file holds one frozen dataclass with `encode(wire) -> bytes` and the classmethod `decode(bytes)`, the tuple `WIRES` of
its encodings (the first is the default, `decode` reads them all), a function `nbytes_per_token(...)`, the most that any
of them takes, and `example(num_tokens, rng)`, which draws a payload for tests and benchmarks.
The wire carries facts, not choices: renormalising and tail handling are options of the loss.
"""

from ray_kd.payloads.features import Features, FeatureSpec
from ray_kd.payloads.hidden_states import HiddenStates
from ray_kd.payloads.topk_logprobs import TopKLogprobs

TOPK_LOGPROBS, HIDDEN_STATES, FEATURES = "topk_logprobs", "hidden_states", "features"

__all__ = ["FEATURES", "HIDDEN_STATES", "TOPK_LOGPROBS", "FeatureSpec", "Features", "HiddenStates", "TopKLogprobs"]
