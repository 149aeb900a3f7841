"""vLLM in this process: each packed document is a prompt, and no token is generated that anyone reads.

vLLM reports, for every token of a prompt, the K likeliest tokens at its place given those before it; the one token
that it has to generate brings the same for what follows the prompt. So a prompt that ends at the last target has one
entry per token, entry p for what follows token p, and nothing needs to be shifted. It also fits a model whose whole
context the document fills: the prompt is one token shorter than that, and vLLM wants room for one more.

Costs: on the device log-probabilities [tokens, vocabulary] in fp32 of up to `max_num_batched_tokens` tokens, a few
times over; in Python about 6 kB a token at K = 64 until a call's answers are arrays, of `batch_size` rows at a time.
Run with vLLM 0.32 (`make test-vllm`, on CPU); imported when an engine is built, so this file loads without it.

n tokens of a prompt, m targets of a document, K top-k.
"""

import gc
import os
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from ray_kd.errors import ConfigError
from ray_kd.models import check_model, local_folder
from ray_kd.payloads import TOPK_LOGPROBS, TopKLogprobs
from ray_kd.plugins import nearest
from ray_kd.teacher.documents import Document, DocumentAnswer, documents, payloads
from ray_kd.teacher.engine import TOPK, Request, RowError, Rows, Stats, batches, check_request

_MAX_NUM_SEQS = 256
_CPU_KV_CACHE_BYTES = 1 << 30
# Read by vLLM while it is imported or builds an engine; what the user has set stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process: nothing is left behind when it is killed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a teacher on CPU takes all cores, whatever `teacher.threads` says
}


@dataclass
class Config:
    """Options of `teacher.engine: {kind: vllm}`."""

    tensor_parallel_size: int = 1
    """GPUs one copy of the model is split over; `teacher.pool.num_gpus` must be as many."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, activations and KV cache; on a CPU the KV cache has 1 GiB instead."""
    max_model_len: int | None = None
    """Longest document in tokens. Default: the model's context, which the KV cache then has to hold at least once."""
    max_num_batched_tokens: int = 2048
    """Tokens per forward; longer documents go through in pieces. Log-probabilities exist over the whole vocabulary for
    that many tokens at a time: 1 GB a copy at 128k entries."""
    enforce_eager: bool = True
    """false: compile the model and record CUDA graphs, a minute or more per actor; they speed up generation most, which
    is not done here."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other argument of vllm.LLM, such as {kv_cache_memory_bytes: 4000000000, quantization: fp8}."""


class Engine:
    """Loads the model once; the documents of at most `batch_size` rows are handed to vLLM together."""

    provides = frozenset({TOPK_LOGPROBS})
    selections = frozenset({TOPK})
    any_temperature = False  # vLLM scales what it generates, not what it says of a prompt
    is_local_model = True
    package = "vllm"
    takes_batch_tokens = False

    def __init__(
        self,
        config: Config,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int = 4,
    ) -> None:
        """Raises ConfigError when vLLM is missing or made for another device, for an unknown or reserved option,
        and for a model or a setting that vLLM refuses.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"teacher.engine 'vllm' needs vLLM, which cannot be imported here ({error}): pip install '.[vllm]'"
            ) from error
        if current_platform.device_type != device:
            raise ConfigError(
                f"teacher.engine 'vllm' is to run on {device!r} (teacher.pool.num_gpus), but the vLLM installed here "
                f"computes on {current_platform.device_type or 'nothing that it found'!r}"
            )
        folder = local_folder(model)
        model_config = check_model(folder, revision, "teacher")
        given: dict[str, Any] = {
            "model": folder,
            "revision": revision,
            "dtype": _dtype(dtype, model_config.dtype, model),
            "tensor_parallel_size": config.tensor_parallel_size,
            # Not Ray, which vLLM would take inside of a placement group: this process has its GPUs already.
            "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "max_model_len": config.max_model_len,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_num_seqs": min(_MAX_NUM_SEQS, config.max_num_batched_tokens),
            "enforce_eager": config.enforce_eager,
            "trust_remote_code": False,
            "skip_tokenizer_init": True,  # ids in, ids out
            # No limit: how many are asked for is known with the first request. It reserves nothing.
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",  # before the sampler's own changes
            # A cached prefix has no log-probabilities; 0.32 does not read the cache for requests that want some, and
            # there would be nothing to gain from it: a prompt does not come twice.
            "enable_prefix_caching": False,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            "use_tqdm_on_load": False,
        }
        if device == "cpu" and "kv_cache_memory_bytes" not in config.options:
            given["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
        _check_options(config.options, set(given), {one.name for one in fields(vllm.EngineArgs)})
        try:
            self._llm: Any = vllm.LLM(**given, **config.options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"vLLM cannot load model '{model}': {' '.join(str(error).split())}") from error
        self.stats = Stats()
        self._sampling_params = vllm.SamplingParams
        self._vocab_size = int(model_config.vocab_size)
        self._batch_size = batch_size

    def annotate(self, rows: Rows, request: Request) -> list[TopKLogprobs | RowError]:
        """One payload per row, in order; a row with a non-finite value anywhere is a RowError of its own."""
        check_request(request, self.provides, self.selections, self._vocab_size, self.any_temperature)
        params = self._sampling_params(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=request.top_k,
            logprobs=request.top_k,
            flat_logprobs=True,
            detokenize=False,
        )
        answers: list[TopKLogprobs | RowError] = []
        for batch in batches(rows, self._batch_size):
            asked = documents(batch)
            found = self._ask(asked, params)
            is_broken = [bool(np.isnan(one.logprobs).any()) for one in found]
            for place in np.flatnonzero(is_broken):  # by itself, or by one before it: see WorkerExtension
                self._llm.collective_rpc("zero_kv_cache")
                found[place] = self._ask([asked[place]], params)[0]
            if any(is_broken):
                self._llm.collective_rpc("zero_kv_cache")
            self.stats.tokens += sum(len(document.prompt) - 1 for document in asked)
            self.stats.retries += sum(is_broken)
            answers.extend(payloads(batch, asked, found, request, self._vocab_size))
        return answers

    def _ask(self, asked: list[Document], params: Any) -> list[DocumentAnswer]:
        """Without the token that the last target predicts: what follows the prompt is said by the generated one."""
        prompts = [{"prompt_token_ids": document.prompt[:-1].tolist()} for document in asked]
        outputs = self._llm.generate(prompts, params, use_tqdm=False) if prompts else []
        self.stats.places += sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        return [
            answer(output.prompt_logprobs, output.outputs[0].logprobs, document, params.logprobs)
            for output, document in zip(outputs, asked, strict=True)
        ]

    def close(self) -> None:
        """Free the model and vLLM's process group, so that the memory can be used again."""
        llm = self.__dict__.pop("_llm", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()  # engine and workers refer to each other


class WorkerExtension:
    """Added to vLLM's worker class, which has `model_runner`.

    A document with a NaN leaves it in its pages of the KV cache, and the attention on CPU (0.32) lets it into every
    later document that gets one of these pages: it is masked by a weight of 0, and 0 x NaN is NaN. So documents that
    come out broken are asked for again, each with a clean cache, and only those that broke it are broken again.
    """

    model_runner: Any

    def zero_kv_cache(self) -> None:
        """Takes effect between two calls of `generate`, when no document is under way."""
        for pages in self.model_runner.kv_caches:
            pages.zero_()


class FlatLogprobs(Protocol):
    """vLLM's lists over all entries of all positions, where each position has K + 1 of them (vllm.logprobs).

    The token that is there (in the prompt, or generated) comes first, with its rank in the vocabulary, then the K
    likeliest with ranks 1 to K; so it comes twice when it is one of them. The first token of a prompt has no entries.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


def answer(prompt: FlatLogprobs, following: FlatLogprobs, document: Document, top_k: int) -> DocumentAnswer:
    """What vLLM says of a document's n tokens without the last, and of what follows them, at the targets.

    prompt: n - 2 positions; following: one. Raises RuntimeError when they are not laid out as `FlatLogprobs` says.
    """
    shape = (len(document.prompt) - 1, top_k + 1)
    ids, logprobs, ranks = (
        np.array(first + second)
        for first, second in (
            (prompt.token_ids, following.token_ids),
            (prompt.logprobs, following.logprobs),
            (prompt.ranks, following.ranks),
        )
    )
    if ids.size != shape[0] * shape[1] or (ranks.reshape(shape)[:, 1:] != np.arange(1, top_k + 1)).any():
        raise RuntimeError(
            f"vLLM answered {ids.size} entries for {shape[0]} tokens, which are not, for each, the token itself and "
            f"the {top_k} likeliest in order: this version lays them out differently"
        )
    at_targets = (document.targets, slice(1, None))
    return DocumentAnswer(
        ids.reshape(shape)[at_targets].astype(np.int64), logprobs.reshape(shape)[at_targets].astype(np.float32)
    )


def _dtype(asked: str, saved: Any, model: str) -> str:
    """vLLM's own `auto` would make bfloat16 of a model saved in float32."""
    if asked != "auto":
        return asked
    if saved is None:
        raise ConfigError(
            f"teacher.dtype is 'auto', but the config.json of '{model}' names no dtype: set teacher.dtype"
        )
    return str(saved).removeprefix("torch.")


def _check_options(options: dict[str, Any], reserved: set[str], known: set[str]) -> None:
    for name in options:
        key = f"teacher.engine.options.{name}"
        if name in reserved:
            raise ConfigError(f"{key} is set by the engine, or an option of its own")
        if name not in known:
            raise ConfigError(f"{key} is no argument of vllm.LLM{nearest(name, known)}")
