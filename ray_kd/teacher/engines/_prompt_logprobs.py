"""What two kinds of server are asked for the log-probabilities of a prompt, and how their replies are read.

`openai`: vLLM's /v1/completions (`prompt_logprobs` is its own addition to the API) and servers that do the same.
    choices[i].prompt_logprobs has an entry per prompt token, null for the first; entry t maps token ids (as strings) to
    {logprob, rank, decoded_token}: what was likely at t given the tokens before it. The K likeliest, and the token that
    stands there when it is not one of them. vLLM writes -inf as -9999.
`sglang`: SGLang's /generate. meta_info.input_top_logprobs has an entry per prompt token from `logprob_start_len` on,
    null for the first of them; the others are lists of [logprob, token id, text], the likeliest first. SGLang writes a
    number that is not finite as null. (Written from its documentation and source; no SGLang server was run.)

Nothing here talks to anyone. A prompt token costs, at K = 64, 5.5 kB of text and 170 us of a core with vLLM, 2.3 kB
and 60 us with SGLang; with orjson installed 115 and 40 us. More than anything else on this side.

m targets of a document, K top-k.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_kd.errors import ConfigError
from ray_kd.teacher.documents import Document, DocumentAnswer

try:  # twice as fast; not required
    import orjson
except ImportError:
    orjson = None

_VLLM_MINUS_INFINITY = -9999.0


class UnusableReply(ValueError):
    """A reply that says nothing usable about what was asked; another try may."""


@dataclass(frozen=True)
class Protocol:
    """One kind of server."""

    path: str
    """Where it is asked, after the server's address."""
    takes_batches: bool
    """Whether one request may hold several prompts."""
    request: Callable[[Sequence[Document], int, str], dict[str, Any]]
    """(documents, K, the model's name there) -> what to send."""
    answers: Callable[[Any, Sequence[Document], int], list[DocumentAnswer]]
    """(decoded reply, documents, K) -> one answer a document, in order. Raises UnusableReply for a reply that does not
    fit the documents, ConfigError for a server that does not send K tokens a position."""


def decode(body: bytes) -> Any:
    """The JSON of a reply, NaN and Infinity included. Raises UnusableReply when it is cut short or no JSON."""
    try:
        if orjson is not None:
            try:
                return orjson.loads(body)
            except ValueError:  # NaN too, which the standard library reads
                pass
        return json.loads(body)
    except ValueError as error:
        raise UnusableReply(f"malformed JSON of {len(body)} bytes ({error})") from error


def _openai_request(documents: Sequence[Document], top_k: int, model: str) -> dict[str, Any]:
    # Prompts travel as ids, never as text. One token is generated, the least that vLLM allows; the temperature is its.
    prompts = [document.prompt.tolist() for document in documents]
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}


def _openai_answers(reply: Any, documents: Sequence[Document], top_k: int) -> list[DocumentAnswer]:
    choices = _item(reply, "choices", list)
    if len(choices) != len(documents):
        raise UnusableReply(f"{len(choices)} choices for {len(documents)} prompts")
    by_index = {_item(choice, "index", int): choice for choice in choices}
    if sorted(by_index) != list(range(len(documents))):
        raise UnusableReply(f"choices of index {sorted(by_index)} for {len(documents)} prompts")
    return [_openai_answer(by_index[index], document, top_k) for index, document in enumerate(documents)]


def _openai_answer(choice: dict[str, Any], document: Document, top_k: int) -> DocumentAnswer:
    if choice.get("prompt_logprobs") is None:
        raise ConfigError("the teacher's server sends no prompt_logprobs: vLLM does, and SGLang with protocol=sglang")
    positions = _item(choice, "prompt_logprobs", list)
    if len(positions) != len(document.prompt):
        raise UnusableReply(f"{len(positions)} positions for {len(document.prompt)} tokens")
    chosen = [positions[target + 1] for target in document.targets]
    for target, entries in zip(document.targets, chosen, strict=True):
        # The token that stands there is always among the entries: a reply to another prompt would lack it.
        if not isinstance(entries, dict) or str(document.prompt[target + 1]) not in entries:
            raise UnusableReply(f"position {target + 1} is not of the token that was asked")
    try:
        ids = np.array([int(token) for entries in chosen for token in entries], np.int64)
        values = list(chain.from_iterable(entries.values() for entries in chosen))
        ranks = np.array([value["rank"] for value in values], np.int64)
        logprobs = _logprobs([value["logprob"] for value in values])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnusableReply(f"entries that are not {{id: {{logprob, rank}}}} ({error!r})") from error
    counts = np.array([len(entries) for entries in chosen])
    position = np.repeat(np.arange(len(chosen)), counts)
    # The rank tells a server that sends fewer than K, and the token that stands there, from one that sends K.
    _require(top_k, int(np.bincount(position, weights=ranks <= top_k, minlength=len(chosen)).min()))
    logprobs[logprobs == _VLLM_MINUS_INFINITY] = -np.inf
    order = np.lexsort((ranks, position))
    best = order[(np.cumsum(counts) - counts)[:, None] + np.arange(top_k)]  # [m, K]
    return DocumentAnswer(ids[best], logprobs[best])


def _sglang_request(documents: Sequence[Document], top_k: int, model: str) -> dict[str, Any]:
    (document,) = documents
    return {
        "input_ids": document.prompt.tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": int(document.targets[0]),
        "top_logprobs_num": top_k,
        "return_text_in_logprobs": False,
    }


def _sglang_answers(reply: Any, documents: Sequence[Document], top_k: int) -> list[DocumentAnswer]:
    (document,) = documents
    start = document.targets[0]
    positions = _item(_item(reply, "meta_info", dict), "input_top_logprobs", list)
    if len(positions) != len(document.prompt) - start:
        raise UnusableReply(f"{len(positions)} positions for {len(document.prompt) - start} tokens")
    chosen = [positions[target + 1 - start] for target in document.targets]
    if not all(isinstance(entries, list) for entries in chosen):
        raise UnusableReply("positions that are not lists of entries")
    _require(top_k, min(len(entries) for entries in chosen))
    try:
        shape = (len(chosen), top_k)
        ids = np.array([entry[1] for entries in chosen for entry in entries[:top_k]], np.int64).reshape(shape)
        logprobs = _logprobs([entry[0] for entries in chosen for entry in entries[:top_k]]).reshape(shape)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise UnusableReply(f"entries that are not [logprob, id, text] ({error!r})") from error
    if (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
        raise UnusableReply("a position that names a token twice")
    return [DocumentAnswer(ids, logprobs)]


PROTOCOLS = {
    "openai": Protocol("/v1/completions", True, _openai_request, _openai_answers),
    "sglang": Protocol("/generate", False, _sglang_request, _sglang_answers),
}


def _logprobs(values: list[Any]) -> NDArray[np.float32]:
    """null, which is how some servers write a number that is not finite, becomes NaN."""
    return np.array(values, np.float32)


def _item(mapping: Any, key: str, kind: type) -> Any:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind):
        raise UnusableReply(f"a reply without {key}")
    return value


def _require(top_k: int, fewest: int) -> None:
    """A server that sends fewer tokens than asked for caps them, and always will."""
    if fewest < top_k:
        raise ConfigError(
            f"the teacher's server sends {fewest} tokens a position, teacher.top_k is {top_k}: "
            f"raise the server's limit (vLLM: --max-logprobs {top_k}) or set teacher.top_k={fewest}"
        )
