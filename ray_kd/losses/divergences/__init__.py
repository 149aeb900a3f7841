"""One divergence a file; the file name is the config value (`divergence: {kind: jsd, beta: 0.3}` is jsd.py).

A file holds a `Config` dataclass and one function

    divergence(log_p, log_q, config) -> (value [n], score [n, S])

log_p and log_q [n, S] are student and teacher log-probabilities on one common support of S outcomes (the K tokens
the teacher sent, then the bucket when there is one), float32 or float64, finite everywhere: an empty slot holds the
same negligible log-probability on both sides. value is D(q, p); score is dD/d(log p) with the entries of log p taken as
independent. A factor that a paper keeps constant in the gradient is computed from log_p.detach(), and its file says so:
differentiating the value then gives the score. No values are read on the host: no branches on them, no .item().
Temperature, tails, the chain rule through the softmax to the logits, chunking and cross-entropy are
shared machinery (`tail.py`, `fused_linear.py`) and do not belong here.

A divergence with `compares_logits = True` in its Config takes logits instead, u and v [n, V] at temperature T, and its
score is dD/du: for a teacher that is known over the whole vocabulary (`fused_linear_dense_kd_loss`), and for no other.

`Config.tails` names the tail policies the divergence is well posed with; without it: bucket and renormalize,
where log_p and log_q are normalised on the support, so that terms of the score proportional to p may be left out.
"""
