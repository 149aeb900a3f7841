"""Text segments -> token ids, labels and bytes per token, and what a tokenizer's identity is.

A document is tokenised whole, as it will be at inference, and never segment by segment: SentencePiece would start
every segment with a space of its own. Character offsets then say which tokens are trained. Loads transformers
(3 s, once per process) when a tokenizer is needed; `tokenizer_identity` of a local folder does not.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_kd.data.records import Document, Segment
from ray_kd.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def tokenizer_identity(path: str, revision: str | None) -> list[list[str]]:
    """[[file name, sha256]] of the tokenizer's files, the chat template included. A hub id is downloaded first.

    Raises ConfigError when there is no such folder or hub id, or no tokenizer in it.
    """
    folder = Path(path) if Path(path).exists() else _download(path, revision)
    found = sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
    if not found:
        raise ConfigError(f"'{path}' holds no tokenizer (looked for {', '.join(TOKENIZER_FILES[:3])}, ...)")
    return [[str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in found]


@functools.lru_cache(maxsize=2)
def load_tokenizer(path: str, revision: str | None) -> Any:
    """The tokenizer of a local folder or hub id, once per process. Raises ConfigError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        from ray_kd.models.folder import why_not

        raise ConfigError(f"tokenizer of '{path}' cannot be loaded: {why_not(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer of '{path}' is not a fast one: save it with a tokenizer.json")
    return tokenizer


@functools.lru_cache(maxsize=2)
def bos_segments(tokenizer: Any) -> tuple[Segment, ...]:
    """The bos token as an untrained segment where the tokenizer starts a plain text with one, else nothing."""
    ids = tokenizer("").input_ids
    has_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    return (Segment(tokenizer.bos_token, is_trained=False),) if has_bos else ()


def eos_segment(tokenizer: Any) -> Segment:
    """The end of a document, trained, so that the student learns to stop. Raises ConfigError without an eos token."""
    if tokenizer.eos_token is None:
        raise ConfigError(f"tokenizer of '{tokenizer.name_or_path}' has no eos_token: set it in tokenizer_config.json")
    return Segment(tokenizer.eos_token, is_trained=True)


def pad_id(tokenizer: Any) -> int:
    """The id that fills a row: pad, else eos, else 0. Never attended to by a document and never trained."""
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    return int(known[0])


def check_unicode(segments: Sequence[Segment]) -> None:
    """Raises ValueError for text that is no valid Unicode: JSON can escape a lone surrogate, UTF-8 cannot hold it."""
    try:
        for segment in segments:
            segment.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds a lone surrogate {error.object[error.start]!a}") from error


def encode(documents: Sequence[Sequence[Segment]], tokenizer: Any) -> list[Document]:
    """Tokenise documents given as segments. No special tokens are added: what is wanted stands in the segments.

    A token is trained when it covers any character of a trained segment, so one that straddles the border is.
    """
    if not documents:
        return []
    texts = ["".join(segment.text for segment in segments) for segments in documents]
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    is_special = np.zeros(1 + max([len(tokenizer), *tokenizer.all_special_ids]), dtype=np.bool_)
    is_special[list(tokenizer.all_special_ids)] = True
    return [
        _document(segments, text, np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2), is_special)
        for segments, text, ids, offsets in zip(
            documents, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _document(
    segments: Sequence[Segment],
    text: str,
    input_ids: NDArray[np.int32],
    offsets: NDArray[np.int64],  # [L, 2] first and past-last character
    is_special: NDArray[np.bool_],  # [ids]
) -> Document:
    trained_before = np.zeros(len(text) + 1, dtype=np.int64)  # trained characters before each character
    edges = np.cumsum([0] + [len(segment.text) for segment in segments])
    is_trained_char = np.zeros(len(text), dtype=np.bool_)
    for segment, start, end in zip(segments, edges[:-1], edges[1:], strict=True):
        is_trained_char[start:end] = segment.is_trained
    np.cumsum(is_trained_char, out=trained_before[1:])
    # A token that stands for no character (a prefix space of SentencePiece) belongs to the character after it.
    past = np.minimum(np.maximum(offsets[:, 1], offsets[:, 0] + 1), len(text))
    is_trained = trained_before[past] > trained_before[np.minimum(offsets[:, 0], past)]
    # Ends only grow: a space that offsets leave out counts with its word, and a character that several byte tokens
    # share counts once, so the sum is the text's own length.
    ends = np.maximum.accumulate(_byte_ends(text)[offsets[:, 1]]) if len(offsets) else offsets[:, 1]
    nbytes = ends.copy()
    nbytes[1:] -= ends[:-1]
    nbytes[is_special[input_ids]] = 0
    return Document(input_ids, is_trained, nbytes.astype(np.int32))


def _byte_ends(text: str) -> NDArray[np.int64]:
    """UTF-8 bytes before each character of the text, and of all of it: int64 [len(text) + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:  # no network, no such repository, a malformed name
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{name}' is neither a folder nor a hub id that can be read: {reason}") from error
