"""The loss against a teacher's whole distribution, by its hidden states: its twin is the top-k twin with K = V."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from ray_kd.head import Head
from ray_kd.losses import fused_linear_dense_kd_loss, fused_linear_kd_loss
from tests.reference.kd_batch import draw, grads_of, kinds, with_grads
from tests.reference.kd_loss import REFERENCES, kd_loss

N, V, D = 7, 19, 6
HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64)},
    "capped_and_scaled": {"softcap": 5.0, "scale": 1.3},
}
ON_DISK = [kind for kind in kinds() if kind in REFERENCES]


def said(dtype=torch.float64, vocab_size=V, **head):
    """The teacher's hidden states [N, D] and its head."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (N, vocab_size))
    return hidden.to(dtype), Head(weight.to(dtype), **head)


def teacher_logprobs(hidden, head, temperature):
    """[N, V'] by the definition of a head."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return torch.log_softmax(logits / temperature, -1)


def drawn(**options):
    """What the student's side of the loss takes."""
    batch = draw(num_tokens=N, vocab_size=V, **options)
    return {name: value for name, value in batch.items() if not name.startswith("teacher")}


def as_topk(hidden, head, temperature):
    """The same teacher as ids and log-probabilities with K = V'."""
    logprobs = teacher_logprobs(hidden, head, temperature)
    return {"teacher_ids": torch.arange(logprobs.shape[1]).expand_as(logprobs), "teacher_logprobs": logprobs}


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("with_ignored", [False, True], ids=["all_valid", "ignored_rows"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7], ids=["kd_only", "kd_and_ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=["T1", "T2"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("divergence", ON_DISK)
def test_value_metrics_and_gradients_equal_the_definition(
    divergence, head, temperature, ce_weight, with_ignored, with_bias
):
    batch = drawn(with_bias=with_bias, with_ignored=with_ignored)
    teacher_hidden, teacher_head = said(**HEADS[head])
    options = {"divergence": divergence, "temperature": temperature, "kd_weight": 1.3, "ce_weight": ce_weight}
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_dense_kd_loss(
        **fast, **options, teacher_hidden=teacher_hidden, teacher_head=teacher_head, chunk_size=3
    )
    loss, metrics = kd_loss(**slow, **options, **as_topk(teacher_hidden, teacher_head, temperature))
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
    for name, expected in metrics.items():
        assert float(out.metrics[name]) == pytest.approx(expected, rel=1e-9, abs=1e-11), name
    for name, grad in grads_of(fast).items():
        torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_the_teacher_does_not_have_are_impossible_to_it(temperature):
    """Forward KL over all of V, q = 0 on the last three: the teacher's tokens, the student not renormalised on them."""
    batch = drawn()
    teacher_hidden, teacher_head = said(vocab_size=V - 3)
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_dense_kd_loss(
        **fast, teacher_hidden=teacher_hidden, teacher_head=teacher_head, temperature=temperature
    )
    loss, _ = kd_loss(
        **slow, **as_topk(teacher_hidden, teacher_head, temperature), tail="drop", temperature=temperature
    )
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
    for name, grad in grads_of(fast).items():
        if grad is not None:
            torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-9, atol=1e-11)
    # A teacher that excludes them says the same as one that does not have them.
    excluding = torch.cat([torch.zeros(V - 3), torch.full((3,), -math.inf)]).double()
    wide = Head(torch.cat([teacher_head.weight, torch.ones(3, D)]), excluding)
    for divergence in ON_DISK:
        values = [
            fused_linear_dense_kd_loss(
                **batch, teacher_hidden=teacher_hidden, teacher_head=head, divergence=divergence
            ).loss
            for head in (teacher_head, wide)
        ]
        assert torch.isfinite(values[0]), divergence
        torch.testing.assert_close(*values)


@pytest.mark.parametrize("divergence", [*ON_DISK, "cosine"])
def test_a_token_that_both_heads_exclude_is_not_there(divergence):
    """As in a student made of the teacher's layers; the same as heads without the token, and finite."""
    batch = drawn(with_bias=True)
    teacher_hidden, teacher_head = said(bias=torch.zeros(V, dtype=torch.float64))
    batch["lm_head_bias"][7] = teacher_head.bias[7] = -math.inf
    batch["labels"] = batch["labels"].clamp(max=6)
    kept = [token for token in range(V) if token != 7]
    fewer = batch | {name: batch[name][kept] for name in ("lm_head_weight", "lm_head_bias")}
    results = []
    for one, head in ((batch, teacher_head), (fewer, Head(teacher_head.weight[kept]))):
        leaves = with_grads(one)
        out = fused_linear_dense_kd_loss(
            **leaves, teacher_hidden=teacher_hidden, teacher_head=head, divergence=divergence, ce_weight=0.3
        )
        out.loss.backward()
        results.append((out.loss.detach(), leaves["hidden"].grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_float16_student_and_a_head_of_another_type(head_dtype):
    """Gradients that are scaled late, after a factor as large as a loss scale."""
    batch = drawn(dtype=torch.float16)
    teacher_hidden, teacher_head = said(head_dtype)
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_dense_kd_loss(
        **fast, teacher_hidden=teacher_hidden, teacher_head=teacher_head, ce_weight=0.5, num_valid_tokens=4096
    )
    loss, _ = kd_loss(**slow, **as_topk(teacher_hidden, teacher_head, 1.0), ce_weight=0.5, num_valid_tokens=4096)
    (1024 * out.loss).backward()
    (1024 * loss).backward()
    for name in ("hidden", "lm_head_weight"):
        got, expected = fast[name].grad.double(), slow[name].grad.double()
        assert float((got - expected).norm() / expected.norm()) < 2e-2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", ON_DISK)
def test_reduced_precision_stays_near_float64(divergence, dtype):
    batch = drawn(dtype=dtype, with_bias=True)
    teacher_hidden, teacher_head = said(dtype)
    fast, slow = with_grads(batch), with_grads(batch)
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 2.0}
    out = fused_linear_dense_kd_loss(
        **fast, **options, teacher_hidden=teacher_hidden, teacher_head=teacher_head, chunk_size=4
    )
    loss, _ = kd_loss(**slow, **options, **as_topk(teacher_hidden, teacher_head, 2.0))
    out.loss.backward()
    loss.backward()
    assert out.loss.dtype == torch.float32
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for name, grad in grads_of(fast).items():
        expected = grads_of(slow)[name].double()
        assert grad.dtype == dtype
        assert float((grad.double() - expected).norm() / expected.norm()) < tolerance, name


def test_a_temperature_has_no_part_in_cosine():
    batch = drawn()
    teacher_hidden, teacher_head = said()
    losses = [
        fused_linear_dense_kd_loss(
            **batch, teacher_hidden=teacher_hidden, teacher_head=teacher_head, divergence="cosine", temperature=t
        ).loss
        for t in (1.0, 3.0)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_cosine_equals_autograd_of_torchs_own(ce_weight):
    batch = drawn(with_bias=True, with_ignored=True)
    teacher_hidden, teacher_head = said(softcap=5.0)
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_dense_kd_loss(
        **fast, teacher_hidden=teacher_hidden, teacher_head=teacher_head, divergence="cosine", ce_weight=ce_weight,
        chunk_size=2,
    )  # fmt: skip
    valid = batch["labels"] != -100
    z = (slow["hidden"] @ slow["lm_head_weight"].T + slow["lm_head_bias"])[valid]
    v = (5.0 * (teacher_hidden @ teacher_head.weight.T / 5.0).tanh())[valid]
    loss = (1 - functional.cosine_similarity(z, v, dim=-1)).mean()
    loss = loss + ce_weight * functional.cross_entropy(z, batch["labels"][valid])
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
    for name, grad in grads_of(fast).items():
        torch.testing.assert_close(grad, grads_of(slow)[name], rtol=1e-9, atol=1e-11)


def test_cosine_is_half_of_ligers_at_its_default_beta():
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

    batch = with_grads(drawn(dtype=torch.float32))
    teacher_hidden, teacher_head = said(torch.float32)
    out = fused_linear_dense_kd_loss(
        **batch, teacher_hidden=teacher_hidden, teacher_head=teacher_head, divergence="cosine"
    )
    out.loss.backward()
    others = with_grads({name: batch[name].detach() for name in ("hidden", "lm_head_weight", "lm_head_bias")
                         if batch[name] is not None})  # fmt: skip
    liger = LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    theirs = liger(others["hidden"], others["lm_head_weight"], teacher_hidden, teacher_head.weight, batch["labels"])
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    theirs.backward()
    torch.testing.assert_close(out.loss / 2, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch["hidden"].grad / 2, others["hidden"].grad, rtol=1e-4, atol=1e-6)


def test_it_is_the_top_k_loss_with_every_token_sent():
    batch = drawn(with_bias=True)
    teacher_hidden, teacher_head = said()
    dense = fused_linear_dense_kd_loss(**batch, teacher_hidden=teacher_hidden, teacher_head=teacher_head, ce_weight=0.5)
    topk = fused_linear_kd_loss(**batch, **as_topk(teacher_hidden, teacher_head, 1.0), ce_weight=0.5)
    torch.testing.assert_close(dense.loss, topk.loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_rows", [0, 5], ids=["no_rows", "all_ignored"])
def test_nothing_to_learn_from_is_a_zero_loss_with_zero_gradients(num_rows):
    batch = drawn(with_bias=True)
    batch["hidden"], batch["labels"] = batch["hidden"][:num_rows], torch.full((num_rows,), -100)
    teacher_hidden, teacher_head = said()
    leaves = with_grads(batch)
    out = fused_linear_dense_kd_loss(**leaves, teacher_hidden=teacher_hidden[:num_rows], teacher_head=teacher_head)
    out.loss.backward()
    assert out.loss.item() == 0
    for name, grad in grads_of(leaves).items():
        assert grad.shape == leaves[name].shape
        assert not grad.any()


def test_no_gradient_reaches_the_teacher_and_it_is_left_as_it_was():
    batch = with_grads(drawn(dtype=torch.float32))
    teacher_hidden, teacher_head = said(torch.float32, softcap=3.0)
    before = teacher_hidden.clone(), teacher_head.weight.clone()
    teacher_hidden.requires_grad_()
    teacher_head.weight.requires_grad_()
    fused_linear_dense_kd_loss(
        **batch, teacher_hidden=teacher_hidden, teacher_head=teacher_head, temperature=2.0
    ).loss.backward()
    assert teacher_hidden.grad is teacher_head.weight.grad is None
    frozen = {name: value.detach() if value is not None else None for name, value in batch.items()}
    out = fused_linear_dense_kd_loss(**frozen, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
    assert not out.loss.requires_grad
    assert torch.equal(teacher_hidden, before[0])
    assert torch.equal(teacher_head.weight, before[1])


REFUSED = {
    "width": ({"teacher_hidden": torch.zeros(N, D + 1)}, r"teacher_hidden \[7, 7\].*\[7, 6\]"),
    "rows": ({"teacher_hidden": torch.zeros(N - 1, D)}, r"\[6, 6\].*\[7, 6\]"),
    "integers": ({"teacher_hidden": torch.zeros(N, D, dtype=torch.int16)}, "int16 must be floating"),
    "vocabulary": ({"teacher_head": Head(torch.zeros(V + 1, D))}, "20 is larger than the student's of 19"),
    "no_head": ({"teacher_head": torch.zeros(V, D)}, r"a Tensor; it must be a ray_kd.losses.Head"),
    "bias": ({"teacher_head": Head(torch.zeros(V, D), torch.zeros(V - 1))}, r"bias of teacher_head \[18\].*\[19\]"),
    "bias_dtype": ({"teacher_head": Head(torch.zeros(V, D), torch.zeros(V).half())}, "float16 must be.*float32"),
    "device": ({"teacher_hidden": torch.zeros(N, D, device="meta")}, "teacher_hidden is on meta"),
    "not_finite": ({"teacher_hidden": torch.full((N, D), math.nan)}, "NaN"),
    "label": ({"labels": torch.full((N,), V)}, "19.*18"),
    "temperature": ({"temperature": 0.0}, "temperature: 0.0"),
    "weight": ({"kd_weight": -1.0}, "kd_weight: -1.0"),
    "divergence": ({"divergence": "forward"}, "forward_kl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_was_seen_and_what_is_allowed(case):
    options, message = REFUSED[case]
    teacher_hidden, teacher_head = said()
    arguments = drawn() | {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head} | options
    with pytest.raises(ValueError, match=message) as error:
        fused_linear_dense_kd_loss(**arguments)
    assert "\n" not in str(error.value)


MEASURE = """
import resource, torch
from ray_kd.head import Head
from ray_kd.losses import fused_linear_dense_kd_loss
torch.set_num_threads(1)
N, H, V = 2048, 32, 24000
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
said, head, labels = torch.randn(N, H), Head(torch.randn(V, H)), torch.zeros(N, dtype=torch.long)
def step(rows):
    loss = fused_linear_dense_kd_loss(hidden[:rows], weight, said[:rows], head, labels[:rows], chunk_size=64,
                                      temperature=2.0, ce_weight=0.5, divergence="jsd")
    loss.loss.backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8)
before = peak()
step(N)
print(peak() - before, 4 * N * V // 1024)
"""


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_ever_allocated():
    """Two chunks of 64 of 2048 rows are 1/16 of one side's logits."""
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    added_kib, full_kib = map(int, out.stdout.split())
    assert added_kib < full_kib / 6
