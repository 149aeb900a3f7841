"""The traps of published kernels, the contract with autograd, the refusals, reduced precision, and memory."""

import math
import subprocess
import sys

import pytest
import torch

from ray_kd.losses import fused_linear_kd_loss
from ray_kd.losses.divergences import jsd
from ray_kd.losses.sparse_chunk import _padded_distinct_ids, distinct_ids
from tests.reference.kd_batch import draw, grads_of, kinds, with_grads
from tests.reference.kd_loss import REFERENCES, kd_loss

KINDS = kinds()
DENSE = {"divergence": "forward_kl", "tail": "bucket", "ce_weight": 0.5}
SPARSE = {"divergence": "jsd", "tail": "renormalize"}
SPARSE_GRAD = SPARSE | {"sparse_weight_grad": True}
dense_gradients = pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
both_paths = pytest.mark.parametrize("options", [DENSE, SPARSE, SPARSE_GRAD], ids=["dense", "sparse", "sparse_grad"])


def head_grad(batch, **options):
    leaves = with_grads(batch)
    fused_linear_kd_loss(**leaves, **options).loss.backward()
    return leaves["lm_head_weight"].grad


# -- traps ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_and_both_weights_reach_the_gradient():
    batch = draw()
    kd_only = head_grad(batch, kd_weight=1.0, ce_weight=0.0)
    ce_only = head_grad(batch, kd_weight=0.0, ce_weight=1.0)
    mixed = head_grad(batch, kd_weight=0.25, ce_weight=3.0)
    logits = with_grads(batch)
    cross_entropy = torch.nn.functional.cross_entropy(
        logits["hidden"] @ logits["lm_head_weight"].T, batch["labels"], reduction="mean"
    )
    cross_entropy.backward()
    torch.testing.assert_close(ce_only, logits["lm_head_weight"].grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mixed, 0.25 * kd_only + 3.0 * ce_only, rtol=1e-9, atol=1e-12)


@both_paths
def test_temperature_squared_scales_the_gradient_and_the_value_alike(options):
    """A directional derivative of the value at T = 2 is the gradient's: T^2 is in both or the two differ by it."""
    batch = draw(temperature=2.0)
    leaves = with_grads(batch)
    fused_linear_kd_loss(**leaves, **options, temperature=2.0).loss.backward()
    step = 1e-6
    values = [
        fused_linear_kd_loss(**batch | {"hidden": batch["hidden"] + sign * step}, **options, temperature=2.0).loss
        for sign in (1, -1)
    ]
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(leaves["hidden"].grad.sum()), rel=1e-6)


@pytest.mark.parametrize("divergence", sorted(set(KINDS) - {"total_variation"}))
def test_a_complete_support_has_no_bucket(divergence):
    """Teacher == student over all of V, through fp16: the missing mass is noise of the wire, not a tail.

    Total variation is of first order in the wire's rounding, the others of second.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), torch.randn(40, 16)
    logprobs = torch.log_softmax(hidden @ weight.T, -1).half().float()
    ids = torch.arange(40).expand(64, 40)
    out = fused_linear_kd_loss(hidden, weight, ids, logprobs, torch.zeros(64, dtype=torch.long), divergence=divergence)
    assert -1e-6 < float(out.metrics["kd_loss"]) < 2e-6


@both_paths
@pytest.mark.parametrize("num_rows", [0, 5], ids=["no_rows", "all_ignored"])
def test_nothing_to_learn_from_is_a_zero_loss_with_zero_gradients(options, num_rows):
    batch = draw(with_bias=True)
    for name in ("hidden", "teacher_ids", "teacher_logprobs", "labels"):
        batch[name] = batch[name][:num_rows]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    leaves = with_grads(batch)
    out = fused_linear_kd_loss(**leaves, **options)
    out.loss.backward()
    assert out.loss.item() == 0
    assert int(out.metrics["num_valid_tokens"]) == 0
    for name, grad in grads_of(leaves).items():
        assert grad.shape == leaves[name].shape
        assert not grad.any()


@both_paths
def test_tensors_need_not_be_contiguous(options):
    batch = draw(with_empty=True)
    strided = {
        name: torch.stack([value, value], -1)[..., 0] if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    strided["lm_head_weight"] = batch["lm_head_weight"].t().contiguous().t()
    assert not any(value.is_contiguous() for value in strided.values() if value is not None)
    expected, got = with_grads(batch), with_grads(strided)
    for leaves in (expected, got):
        fused_linear_kd_loss(**leaves, **options).loss.backward()
    for name, grad in grads_of(got).items():
        torch.testing.assert_close(grad, grads_of(expected)[name], rtol=1e-12, atol=1e-14)


@dense_gradients
def test_a_mass_a_little_over_one_is_rounding(options):
    """Log-probabilities that went through bf16."""
    batch = draw(vocab_size=40, top_k=40, dtype=torch.float32)
    batch["teacher_logprobs"] = batch["teacher_logprobs"].bfloat16().float()
    assert float(batch["teacher_logprobs"].exp().sum(-1).max()) > 1
    assert torch.isfinite(fused_linear_kd_loss(**batch, **options).loss)


@both_paths
def test_ignored_rows_may_hold_anything(options):
    batch = draw(with_ignored=True)
    ignored = batch["labels"] == -100
    expected = head_grad(batch, **options)
    batch["teacher_logprobs"][ignored] = math.nan
    batch["teacher_ids"][ignored] = 10**6
    torch.testing.assert_close(head_grad(batch, **options), expected, rtol=0, atol=0)


def test_small_entries_keep_their_relative_precision_in_bf16():
    """p_i near 5e-5 on the teacher's tokens and a tail as small: p_i - q_i must not drown in a rounded a * p_i."""
    vocab_size, top_k = 64, 8
    torch.manual_seed(1)
    logits = torch.full((vocab_size,), -30.0)
    logits[0] = 0.0
    logits[1:top_k] = math.log(5e-5) + torch.randn(top_k - 1) * 0.3
    logits[top_k] = math.log(5e-5)
    logits = logits.bfloat16()
    # hidden = 1 and H = 1: the head's column is the logits, and its gradient is the gradient by the logits.
    weight = logits[:, None].clone().requires_grad_()
    q = torch.softmax(logits[:top_k].double(), -1)
    q[1:] *= torch.linspace(0.5, 1.5, top_k - 1)
    q[0] = 0.9 - q[1:].sum()
    ids = torch.arange(top_k)[None]
    out = fused_linear_kd_loss(
        torch.ones(1, 1, dtype=torch.bfloat16), weight, ids, q.log().float()[None], torch.zeros(1, dtype=torch.long)
    )
    out.loss.backward()
    p = torch.softmax(logits.double(), -1)
    expected = (p[:top_k] - q)[1:]
    error = (weight.grad[1:top_k, 0].double() - expected).norm() / expected.norm()
    assert float(error) < 0.008


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("temperature", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("ce_weight", [1e-9, 1e9])
def test_a_weight_far_from_the_other_keeps_the_gradient(ce_weight, temperature, dtype):
    """The number taken out of a row is then tiny, or what is left of the other exponential."""
    batch = draw(temperature=temperature, dtype=dtype)
    fast, slow = with_grads(batch), with_grads(batch)
    options = {"temperature": temperature, "ce_weight": ce_weight}
    fused_linear_kd_loss(**fast, **options).loss.backward()
    kd_loss(**slow, **options)[0].backward()
    for name in ("hidden", "lm_head_weight"):
        got, expected = fast[name].grad.double(), slow[name].grad.double()
        assert float((got - expected).norm() / expected.norm()) < (1e-11 if dtype == torch.float64 else 2e-2), name


def test_the_loss_does_not_drift_over_many_chunks_in_bf16():
    """256 chunks of a large loss: an accumulator in bf16 stops growing."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 8).bfloat16() * 4, torch.randn(50, 8).bfloat16() * 4
    ids = torch.randint(0, 50, (512, 1))
    args = (hidden, weight, ids, torch.full((512, 1), -0.1), ids[:, 0])
    many = fused_linear_kd_loss(*args, chunk_size=2).loss
    torch.testing.assert_close(many, fused_linear_kd_loss(*args, chunk_size=512).loss, rtol=1e-5, atol=0)


def test_a_tail_far_below_float_epsilon_stays_finite():
    hidden = torch.eye(3)
    weight = torch.tensor([[200.0, 0.0, 0.0], [0.0, 90.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    logprobs = torch.tensor([[0.0, -200.0], [-0.7, -0.7], [-1e-3, -1e4]])
    for divergence in KINDS:
        leaves = with_grads(
            {"hidden": hidden, "lm_head_weight": weight, "teacher_ids": ids, "teacher_logprobs": logprobs}
        )
        out = fused_linear_kd_loss(**leaves, labels=torch.tensor([0, 1, 2]), divergence=divergence, ce_weight=1.0)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert all(torch.isfinite(grad).all() for grad in grads_of(leaves | {"lm_head_bias": None}).values())


# -- normalisation and metrics --------------------------------------------------------------------------------------


@both_paths
def test_micro_batches_with_the_global_count_add_up_to_the_whole(options):
    batch = draw(with_ignored=True)
    leaves = with_grads(batch)
    whole = fused_linear_kd_loss(**leaves, **options)
    whole.loss.backward()
    count = int(whole.metrics["num_valid_tokens"])
    parts = with_grads(batch)
    sums = dict.fromkeys(whole.metrics, 0.0)
    for rows in (slice(0, 2), slice(2, 7)):
        part = parts | {name: parts[name][rows] for name in ("hidden", "teacher_ids", "teacher_logprobs", "labels")}
        out = fused_linear_kd_loss(**part, **options, num_valid_tokens=count)
        out.loss.backward()
        sums = {name: total + float(out.metrics[name]) for name, total in sums.items()}
    for name, total in sums.items():
        assert total == pytest.approx(float(whole.metrics[name]), rel=1e-9, nan_ok=True), name
    for name, grad in grads_of(parts).items():
        if grad is not None:
            torch.testing.assert_close(grad, grads_of(leaves)[name], rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_weighted_sum_of_its_metrics():
    out = fused_linear_kd_loss(**draw(temperature=2.0), temperature=2.0, kd_weight=0.3, ce_weight=2.0)
    assert float(out.loss) == pytest.approx(0.3 * float(out.metrics["kd_loss"]) + 2.0 * float(out.metrics["ce_loss"]))


def test_metrics_are_detached_and_the_count_may_be_a_tensor():
    batch = with_grads(draw())
    out = fused_linear_kd_loss(**batch, num_valid_tokens=torch.tensor(7))
    assert not any(value.requires_grad for value in out.metrics.values())
    torch.testing.assert_close(out.loss, fused_linear_kd_loss(**batch).loss)


# -- autograd -------------------------------------------------------------------------------------------------------


@dense_gradients
def test_gradcheck(options):
    batch = draw(with_bias=True, with_empty=True)

    def loss(hidden, weight, bias):
        leaves = batch | {"hidden": hidden, "lm_head_weight": weight, "lm_head_bias": bias}
        return fused_linear_kd_loss(**leaves, **options, chunk_size=3).loss

    leaves = with_grads(batch)
    assert torch.autograd.gradcheck(loss, (leaves["hidden"], leaves["lm_head_weight"], leaves["lm_head_bias"]))


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_backward_multiplies_by_the_factor_it_is_given(options, dtype):
    batch = draw(with_bias=True, dtype=dtype)
    plain, scaled = with_grads(batch), with_grads(batch)
    fused_linear_kd_loss(**plain, **options).loss.backward()
    (fused_linear_kd_loss(**scaled, **options).loss * (1 / 3)).backward()
    for name, grad in grads_of(scaled).items():
        torch.testing.assert_close(grad.double(), grads_of(plain)[name].double() / 3, rtol=2**-8, atol=1e-12)


@pytest.mark.parametrize("num_valid_tokens", [None, 20])
def test_a_sparse_gradient_of_the_head_is_the_dense_one(num_valid_tokens):
    batch = draw(num_tokens=300, vocab_size=90, with_bias=True)  # three chunks, with tokens in common
    dense, sparse = with_grads(batch), with_grads(batch)
    fused_linear_kd_loss(**dense, **SPARSE, num_valid_tokens=num_valid_tokens).loss.backward()
    fused_linear_kd_loss(**sparse, **SPARSE_GRAD, num_valid_tokens=num_valid_tokens).loss.backward()
    assert sparse["lm_head_weight"].grad.is_sparse
    for name, grad in grads_of(sparse).items():
        torch.testing.assert_close(grad.to_dense(), grads_of(dense)[name])


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.SparseAdam], ids=lambda o: o.__name__)
def test_a_sparse_gradient_trains_the_rows_that_the_teacher_names(optimiser):
    batch = draw(num_tokens=4, vocab_size=90, top_k=3)
    weight = batch["lm_head_weight"].clone().requires_grad_()
    fused_linear_kd_loss(**batch | {"lm_head_weight": weight}, **SPARSE_GRAD).loss.backward()
    optimiser([weight], lr=0.1).step()
    changed = (weight.detach() != batch["lm_head_weight"]).any(-1).nonzero().flatten()
    ids = batch["teacher_ids"][batch["labels"] != -100]
    assert set(changed.tolist()) == set(ids[ids >= 0].tolist())


def test_a_retained_graph_gives_right_gradients_again_and_leaves_the_first_alone():
    batch = with_grads(draw())
    out = fused_linear_kd_loss(**batch)
    weight = batch["lm_head_weight"]
    (expected,) = torch.autograd.grad(fused_linear_kd_loss(**batch).loss, weight)
    (first,) = torch.autograd.grad(3 * out.loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, weight, retain_graph=True)
    torch.testing.assert_close(first, 3 * expected)
    torch.testing.assert_close(second, expected)
    first.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.loss, weight)


def test_backward_twice_without_retaining_is_refused_and_so_is_a_second_derivative():
    batch = with_grads(draw())
    out = fused_linear_kd_loss(**batch)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    loss = fused_linear_kd_loss(**batch).loss
    (grad,) = torch.autograd.grad(loss, batch["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_tied_weights_collect_both_gradients():
    batch, tokens = draw(vocab_size=19, width=5), torch.tensor([1, 4, 4, 0, 7, 9, 18])
    grads = []
    for loss_of in (lambda **kw: fused_linear_kd_loss(**kw, **DENSE).loss, lambda **kw: kd_loss(**kw, **DENSE)[0]):
        weight = batch["lm_head_weight"].clone().requires_grad_()
        loss_of(**batch | {"hidden": torch.tanh(weight[tokens]), "lm_head_weight": weight}).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@both_paths
def test_no_gradient_is_computed_where_none_is_asked_for(options, monkeypatch):
    batch = with_grads(draw())
    expected = fused_linear_kd_loss(**batch, **options).loss.item()

    def refuse(*args):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("ray_kd.losses.topk_chunk.logit_gradient", refuse)
    monkeypatch.setattr("ray_kd.losses.sparse_chunk.logit_gradient", refuse)
    with torch.no_grad():
        out = fused_linear_kd_loss(**batch, **options)
    assert not out.loss.requires_grad
    assert float(out.loss) == expected
    frozen = {name: value.detach() if value is not None else None for name, value in batch.items()}
    assert not fused_linear_kd_loss(**frozen, **options).loss.requires_grad


def test_a_trained_head_over_frozen_hidden_states():
    batch = draw()
    leaves = batch | {"lm_head_weight": batch["lm_head_weight"].clone().requires_grad_()}
    fused_linear_kd_loss(**leaves, **DENSE).loss.backward()
    torch.testing.assert_close(leaves["lm_head_weight"].grad, head_grad(batch, **DENSE))


def test_autocast_does_not_lower_the_precision():
    batch = draw(dtype=torch.float32)
    expected = head_grad(batch, **DENSE)
    with torch.autocast("cpu", torch.bfloat16):
        actual = head_grad(batch, **DENSE)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# -- options --------------------------------------------------------------------------------------------------------


def test_a_divergence_is_named_mapped_or_configured():
    batch = draw()
    expected = fused_linear_kd_loss(**batch, divergence="jsd", beta=0.2).loss
    for divergence in ({"kind": "jsd", "beta": 0.2}, jsd.Config(beta=0.2)):
        torch.testing.assert_close(fused_linear_kd_loss(**batch, divergence=divergence).loss, expected)
    by_keyword = fused_linear_kd_loss(**batch, divergence={"kind": "jsd"}, beta=0.2).loss
    torch.testing.assert_close(by_keyword, expected)
    forward = fused_linear_kd_loss(**batch, divergence="forward_kl", beta=7.0).loss
    torch.testing.assert_close(forward, fused_linear_kd_loss(**batch).loss)


def test_a_third_partys_divergence_is_a_dotted_module_name(tmp_path, monkeypatch):
    package = tmp_path / "their_kd"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "half_forward.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    factor: float = 0.5\n"
        "def divergence(log_p, log_q, config):\n"
        "    q = log_q.exp()\n"
        "    return config.factor * (q * (log_q - log_p)).sum(-1), -config.factor * q\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = draw()
    out = fused_linear_kd_loss(**batch, divergence={"kind": "their_kd.half_forward", "factor": 0.25})
    torch.testing.assert_close(out.loss, 0.25 * fused_linear_kd_loss(**batch).loss)
    with pytest.raises(ValueError, match="drop"):
        fused_linear_kd_loss(**batch, divergence="their_kd.half_forward", tail="drop")


@pytest.mark.parametrize("ce_weight", [0.0, 0.5], ids=["sparse", "dense"])
def test_a_payload_at_another_temperature_is_rescaled_on_the_support(ce_weight):
    """log_softmax(log q / T) over I is the teacher at T, renormalised, whatever its full vocabulary was."""
    at_one, at_two = draw(temperature=1.0), draw(temperature=2.0)
    torch.testing.assert_close(at_one["teacher_ids"], at_two["teacher_ids"])
    options = {"tail": "renormalize", "temperature": 2.0, "ce_weight": ce_weight}
    rescaled = fused_linear_kd_loss(**at_one, **options, payload_temperature=1.0)
    torch.testing.assert_close(rescaled.loss, fused_linear_kd_loss(**at_two, **options).loss)


REFUSED = {
    "unknown_tail": ({"tail": "bukcet"}, "unknown tail 'bukcet'.*bucket.*Allowed: bucket, renormalize, drop"),
    "unknown_divergence": ({"divergence": "foward_kl"}, "foward_kl.*forward_kl"),
    "unknown_option": ({"divergence": {"kind": "jsd", "betta": 0.1}}, "betta.*beta"),
    "not_a_divergence": ({"divergence": 3}, "3 is neither.*forward_kl"),
    "reverse_kl_drop": ({"divergence": "reverse_kl", "tail": "drop"}, "'drop'.*reverse_kl.*bucket, renormalize"),
    "jsd_drop": ({"divergence": "jsd", "tail": "drop"}, "'drop'.*jsd.*bucket, renormalize"),
    "gkd_drop": ({"divergence": "gkd", "tail": "drop"}, "'drop'.*gkd"),
    "zero_temperature": ({"temperature": 0.0}, "temperature.*0.0"),
    "negative_temperature": ({"temperature": -1.0}, "temperature.*-1.0"),
    "nan_temperature": ({"temperature": math.nan}, "temperature.*nan"),
    "negative_weight": ({"ce_weight": -0.1}, "ce_weight.*-0.1"),
    "beta_zero": ({"divergence": "jsd", "beta": 0.0}, r"beta=0.0.*\(0, 1\)"),
    "beta_one": ({"divergence": "jsd", "beta": 1.0}, r"beta=1.0.*\(0, 1\)"),
    "gkd_beta": ({"divergence": "gkd", "beta": 1.5}, r"beta=1.5.*\[0, 1\]"),
    "bucket_other_temperature": ({"temperature": 2.0, "payload_temperature": 1.0}, "'bucket'.*2.0.*1.0.*renormalize"),
    "drop_other_temperature": (
        {"tail": "drop", "temperature": 2.0, "payload_temperature": 1.0},
        "'drop'.*2.0.*1.0.*renormalize",
    ),
    "zero_chunk": ({"chunk_size": 0}, "chunk_size=0"),
    "zero_count": ({"num_valid_tokens": 0}, "num_valid_tokens=0"),
    "hidden_width": ({"hidden": torch.zeros(7, 6, dtype=torch.float64)}, r"\[7, 6\].*\[19, 5\]"),
    "hidden_rank": ({"hidden": torch.zeros(7, 1, 5, dtype=torch.float64)}, r"\[7, 1, 5\]"),
    "bias_shape": ({"lm_head_bias": torch.zeros(18, dtype=torch.float64)}, r"\[18\].*19"),
    "mixed_dtypes": ({"hidden": torch.zeros(7, 5)}, "float32.*float64"),
    "another_device": (
        {"teacher_ids": torch.zeros(7, 4, dtype=torch.long, device="meta")},
        "teacher_ids is on meta.*cpu",
    ),
    "labels_shape": ({"labels": torch.zeros(6, dtype=torch.long)}, r"\[6\].*N = 7"),
    "logprobs_shape": ({"teacher_logprobs": torch.zeros(7, 3)}, r"\[7, 3\]"),
    "float_ids": ({"teacher_ids": torch.zeros(7, 4)}, "float32.*integers"),
    "more_tokens_than_vocabulary": (
        {"teacher_ids": torch.zeros(7, 20, dtype=torch.long), "teacher_logprobs": torch.zeros(7, 20)},
        "K = 20.*19",
    ),
    "id_outside_vocabulary": ({"teacher_ids": torch.full((7, 4), 19)}, "19 is outside.*19"),
    "label_outside_vocabulary": ({"labels": torch.full((7,), 19)}, "19.*18"),
    "negative_label": ({"labels": torch.full((7,), -1)}, "-1.*-100"),
    "nan_logprobs": ({"teacher_logprobs": torch.full((7, 4), math.nan)}, "NaN"),
    "infinite_logprobs": ({"teacher_logprobs": torch.full((7, 4), math.inf)}, "mass of inf"),
    "logits_for_logprobs": ({"teacher_logprobs": torch.zeros(7, 4)}, r"mass of 4; allowed: up to 1\.05.*not logits"),
    "no_teacher_tokens": (
        {"teacher_ids": torch.zeros(7, 0, dtype=torch.long), "teacher_logprobs": torch.zeros(7, 0)},
        "K = 0.*1 to",
    ),
    "needs_whole_logits": ({"divergence": "cosine"}, "'cosine' compares whole logits.*teacher.payload=hidden_states"),
    "sparse_gradient_of_a_bucket": ({"sparse_weight_grad": True}, "with tail bucket, ce_weight=0.0.*renormalize"),
    "sparse_gradient_with_ce": (
        {"sparse_weight_grad": True, "tail": "renormalize", "ce_weight": 0.5},
        "ce_weight=0.5.*ce_weight 0",
    ),
    "repeated_ids": ({"teacher_ids": torch.zeros(7, 4, dtype=torch.long), "validate": True}, "repeat"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_was_seen_and_what_is_allowed(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        fused_linear_kd_loss(**draw() | options)
    assert "\n" not in str(error.value)


# -- precision and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [DENSE, SPARSE, {"temperature": 2.0, "ce_weight": 1.0}]
    + [{"divergence": kind} for kind in KINDS if kind in REFERENCES],
    ids=["dense", "sparse", "T2", *(kind for kind in KINDS if kind in REFERENCES)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_reduced_precision_stays_near_float64(dtype, tolerance, options):
    batch = draw(num_tokens=96, width=32, vocab_size=300, top_k=16, with_bias=True, dtype=dtype)
    batch["lm_head_weight"] *= 0.3
    fast, slow = with_grads(batch), with_grads(batch)
    out = fused_linear_kd_loss(**fast, **options, chunk_size=32)
    loss, _ = kd_loss(**slow, **options)
    out.loss.backward()
    loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    for name, grad in grads_of(fast).items():
        assert grad.dtype == dtype
        expected = grads_of(slow)[name].double()
        assert float((grad.double() - expected).norm() / expected.norm()) < tolerance, name


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 64)], ids=str)
def test_distinct_ids_without_a_size_that_depends_on_values(shape):
    ids = torch.randint(0, 9, shape)
    for distinct, place in (distinct_ids(ids), _padded_distinct_ids(ids)):
        torch.testing.assert_close(distinct[place], ids)
    distinct, place = _padded_distinct_ids(ids)
    assert distinct.numel() == ids.numel()
    assert int(place.max()) + 1 == ids.unique().numel()
    assert not distinct[int(place.max()) + 1 :].any()


MEASURE = """
import resource, sys, torch
from ray_kd.losses import fused_linear_kd_loss
torch.set_num_threads(1)
N, H, V, K = 2048, 32, 24000, 8
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
logprobs, labels = torch.full((N, K), -3.0), torch.zeros(N, dtype=torch.long)
def step(rows, **options):
    rows = slice(0, rows)
    fused_linear_kd_loss(hidden[rows], weight, ids[rows], logprobs[rows], labels[rows], **options).loss.backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8, ce_weight=1.0, chunk_size=8)
step(8, tail="renormalize")
before = peak()
step(N, tail="renormalize")
sparse = peak()
step(N, ce_weight=1.0, chunk_size=64)
print(sparse - before, peak() - before, 4 * N * V // 1024)
"""


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_ever_allocated():
    """Peak resident memory, in a process of its own: a chunk of 64 of 2048 rows needs 1/32 of the logits."""
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    sparse_kib, dense_kib, full_kib = map(int, out.stdout.split())
    assert sparse_kib < full_kib / 8
    assert dense_kib < full_kib / 8


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("num_valid_tokens", [64, 65_536])
def test_float16_gradients_survive_a_large_batch(tail: str, num_valid_tokens: int) -> None:
    """A global batch of many tokens divides every entry by n: rounded to float16 before the loss scale, most would be
    zero (54 % error at n = 65,536, measured)."""
    torch.manual_seed(0)
    num_rows, width, vocab, top_k, loss_scale = 64, 32, 2000, 16, 65_536.0
    hidden = (torch.randn(num_rows, width) * 0.5).half()
    weight = (torch.randn(vocab, width) * 0.2).half()
    ids = torch.stack([torch.randperm(vocab)[:top_k] for _ in range(num_rows)])
    logprobs = torch.log_softmax(torch.randn(num_rows, vocab), -1).gather(1, ids)
    labels = torch.randint(0, vocab, (num_rows,))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        out = fused_linear_kd_loss(
            *leaves, ids, logprobs, labels, tail=tail, num_valid_tokens=num_valid_tokens, chunk_size=16
        )
        (out.loss * loss_scale).backward()
        return [leaf.grad.double() / loss_scale for leaf in leaves if leaf.grad is not None]

    for half, exact in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (half - exact).norm() < 5e-3 * exact.norm()
