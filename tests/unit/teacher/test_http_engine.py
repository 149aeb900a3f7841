"""The HTTP engine against a server that answers from a known distribution and fails on demand; both protocols."""

import copy
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate

import numpy as np
import pyarrow as pa
import pytest
from transformers import LlamaConfig

from ray_kd import config as configuration
from ray_kd import plugins, refusal, schema
from ray_kd.errors import ConfigError, RetryableError
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.documents import Document, documents
from ray_kd.teacher.engine import Request, RowError, Stats
from ray_kd.teacher.engines import fake
from ray_kd.teacher.engines._http_client import seconds
from ray_kd.teacher.engines._prompt_logprobs import PROTOCOLS, UnusableReply, decode
from ray_kd.teacher.engines.http import Engine
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from tests.fault_server import Fault, FaultServer, serving
from tests.tiny import VOCAB_SIZE

TOP_K = 8
KEY = "sk-Secret0fTheTests"
KINDS = ("openai", "sglang")
NUM_DOCUMENTS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model folder without weights: they are on the server."""
    folder = tmp_path_factory.mktemp("teacher")
    LlamaConfig(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving(FaultServer()) as one:
        yield one


@pytest.fixture
def build(model, server):
    """An engine for the server; closed at the end."""
    engines = []

    def make(protocol="openai", batch_size=1, **options) -> Engine:
        value = {
            "kind": "http", "url": server.url, "protocol": protocol, "backoff_s": 0.001, "max_retries": 3,
            "timeout_s": 5.0, "deadline_s": 20.0, **options,
        }  # fmt: skip
        module, config = plugins.options("teacher.engines", value, "teacher.engine")
        engines.append(module.Engine(config, model=model, batch_size=batch_size))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def some_rows() -> dict[str, np.ndarray]:
    """Row 0: documents of 5, 1 and 4 tokens; 1: one of 10; 2: nothing to predict; 3: 4 and padding; 4: one of 10."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (5, 10)).astype(np.int32)
    ids[:, 0] = np.arange(3, 8)  # tells rows apart
    positions = np.array(
        [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3], range(10), range(10), [0, 1, 2, 3, *range(6)], range(10)], np.int32
    )
    labels = ids.copy()
    labels[0, 1] = labels[1, 7:] = labels[2] = labels[3, 4:] = labels[4, :5] = schema.IGNORED_LABEL
    return {"row_id": np.arange(5), "input_ids": ids, "labels": labels, "position_ids": positions}


ROWS = some_rows()


def ask(engine: Engine, top_k: int = TOP_K, rows=ROWS) -> list:
    return engine.annotate(rows, Request(top_k=top_k))


def expected(top_k: int = TOP_K) -> list:
    return fake.Engine(fake.Config(vocab_size=VOCAB_SIZE)).annotate(ROWS, Request(top_k=top_k))


def assert_right(answers: list, wrong_rows: tuple[int, ...] = ()) -> None:
    """The known distribution, bit for bit, in every row but those that are to be errors."""
    assert [isinstance(answer, RowError) for answer in answers] == [row in wrong_rows for row in range(len(answers))]
    for answer, right in zip(answers, expected(), strict=True):
        if not isinstance(answer, RowError):
            assert answer.encode() == right.encode()


def num_asked(server: FaultServer) -> int:
    """Requests for answers that arrived."""
    return sum(one.body is not None for one in server.asked)


def of_row(row: int):
    """Whether a request is about this row."""
    return lambda prompts: any(prompt[0] == ROWS["input_ids"][row, 0] for prompt in prompts)


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_are_those_of_the_distribution(build, server, protocol, batch_size):
    assert_right(ask(build(protocol, batch_size)))
    per_request = batch_size if protocol == "openai" else 1
    assert num_asked(server) == -(-NUM_DOCUMENTS // per_request)


@pytest.mark.parametrize("protocol", KINDS)
def test_the_whole_vocabulary_can_be_asked_for(build, protocol):
    for answer, right in zip(ask(build(protocol), VOCAB_SIZE), expected(VOCAB_SIZE), strict=True):
        assert answer.encode() == right.encode()


def test_vllm_is_asked_with_token_ids(build, server):
    ask(build("openai", batch_size=16))
    models, one = server.asked
    assert (models.path, one.path) == ("/v1/models", "/v1/completions")
    prompts = [document.prompt.tolist() for document in documents(ROWS)]
    assert one.body == {
        "model": "served", "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_K,
    }  # fmt: skip
    assert "authorization" not in one.headers


def test_sglang_is_asked_with_token_ids_from_the_first_target_on(build, server):
    ask(build("sglang", max_concurrency=1))
    assert {one.path for one in server.asked} == {"/generate"}
    assert server.asked[-1].body == {
        "input_ids": ROWS["input_ids"][4].tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 4,
        "top_logprobs_num": TOP_K,
        "return_text_in_logprobs": False,
    }


@pytest.mark.parametrize("protocol", KINDS)
def test_replies_in_another_order_reach_their_documents(build, server, protocol):
    last_came = threading.Event()

    def last_first(number, prompts):
        if number == NUM_DOCUMENTS - 1:
            last_came.set()
        else:
            assert last_came.wait(timeout=5)
            time.sleep(0.1)

    server.fault = last_first
    assert_right(ask(build(protocol, max_concurrency=8)))
    assert server.most_at_once == NUM_DOCUMENTS


def test_choices_in_another_order_reach_their_documents(build, server):
    server.fault = lambda number, prompts: Fault(edit=lambda reply: {**reply, "choices": reply["choices"][::-1]})
    assert_right(ask(build(batch_size=16)))
    assert num_asked(server) == 1


def test_no_more_requests_at_once_than_allowed_and_connections_are_kept(build, server):
    server.fault = lambda number, prompts: Fault(delay_s=0.02)
    engine = build(max_concurrency=2)
    for _ in range(3):
        assert_right(ask(engine))
    assert server.most_at_once == 2
    assert len({one.connection for one in server.asked}) == 2


def test_it_answers_from_another_thread(build):
    answers = []
    engine = build()
    thread = threading.Thread(target=lambda: answers.extend(ask(engine)))
    thread.start()
    thread.join()
    assert_right(answers)
    assert_right(ask(engine))


def test_stats_are_of_the_prompts_and_the_tries_after_the_first(build, server):
    engine = build(batch_size=16)
    num_tokens = sum(len(document.prompt) for document in documents(ROWS))
    ask(engine)
    assert engine.stats == Stats(num_tokens, num_tokens, 0)
    server.fault = lambda number, prompts: Fault(500) if number == 1 else None
    ask(engine)
    assert engine.stats == Stats(2 * num_tokens, 2 * num_tokens, 1)
    # Three retries of all documents together, then one request for each, and three more for the one that fails.
    server.fault = lambda number, prompts: Fault(500) if of_row(1)(prompts) else None
    assert_right(ask(engine), wrong_rows=(1,))
    assert engine.stats == Stats(3 * num_tokens, 3 * num_tokens, 1 + 3 + NUM_DOCUMENTS + 3)


def test_tries_of_a_call_that_fails_count_too(build, server):
    engine = build(max_concurrency=1)  # the first document fails the call; of no other was a second try made by then
    server.fault = lambda number, prompts: Fault(503)
    with pytest.raises(RetryableError):
        ask(engine)
    assert engine.stats.tokens == 0
    assert engine.stats.retries == 3


def without_a_position(reply):
    reply = copy.deepcopy(reply)
    positions = (
        reply["choices"][0]["prompt_logprobs"] if "choices" in reply else reply["meta_info"]["input_top_logprobs"]
    )
    positions.pop()
    return reply


def with_first_entry(**values):
    """An edit of the likeliest entry after the first token: its id, its logprob."""

    def edit(reply):
        reply = copy.deepcopy(reply)
        if "choices" in reply:
            entries = reply["choices"][0]["prompt_logprobs"][-1]
            name = next(name for name in entries if entries[name]["rank"] == 1)
            entry = entries.pop(name)
            entries[str(values.get("id", name))] = {**entry, "logprob": values.get("logprob", entry["logprob"])}
        else:
            entry = reply["meta_info"]["input_top_logprobs"][-1][0]
            entry[:2] = [values.get("logprob", entry[0]), values.get("id", entry[1])]
        return reply

    return edit


TRANSIENT = {
    "500": Fault(status=500),
    "502": Fault(status=502),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "503 without a reason": Fault(status=503, message=""),
    "cut JSON": Fault(cut=-20),
    "no JSON": Fault(edit=lambda reply: "hello"),
    "empty": Fault(cut=0),
    "connection lost in the reply": Fault(cut=50, announces_all=True),
    "connection lost before it": Fault(is_dropped=True),
    "late": Fault(delay_s=2.0),
    "damaged gzip": Fault(is_gzip=True, cut=-20),
    "positions": Fault(edit=without_a_position),
    "a logprob that is a word": Fault(edit=with_first_entry(logprob="low")),
    "an id that is a word": Fault(edit=with_first_entry(id="low")),
    "an id of 100 digits": Fault(edit=with_first_entry(id=10**100)),
    "another object": Fault(edit=lambda reply: {"object": "error"}),
}


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize("case", TRANSIENT)
def test_what_may_pass_is_tried_again(build, server, protocol, case):
    server.fault = lambda number, prompts: TRANSIENT[case] if number in (1, 2) else None
    timeout_s = 1.5 if case == "late" else 5.0
    assert_right(ask(build(protocol, max_concurrency=1, timeout_s=timeout_s)))
    assert num_asked(server) == NUM_DOCUMENTS + 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda choices: choices[:1],
        lambda choices: [choices[0], choices[0]],
        lambda choices: [{**choices[0], "index": 1}, {**choices[1], "index": 0}],  # each the answer to the other prompt
    ],
)
def test_choices_that_do_not_fit_the_prompts_are_tried_again(build, server, edit):
    server.fault = lambda number, prompts: (
        Fault(edit=lambda reply: {**reply, "choices": edit(reply["choices"])}) if number == 0 else None
    )
    rows = {name: column[[1, 4]] for name, column in ROWS.items()}
    for answer, right in zip(ask(build(batch_size=2), rows=rows), (expected()[1], expected()[4]), strict=True):
        assert answer.encode() == right.encode()
    assert num_asked(server) == 2


def test_a_gzip_reply_is_decompressed(build, server):
    server.fault = lambda number, prompts: Fault(is_gzip=True)
    for answer, right in zip(ask(build(batch_size=16), VOCAB_SIZE), expected(VOCAB_SIZE), strict=True):
        assert answer.encode() == right.encode()
    assert server.asked[-1].headers["accept-encoding"] == "gzip, deflate"


def test_waits_grow_and_are_those_of_retry_after(build, server, monkeypatch):
    waits = []

    async def sleep(delay_s):
        waits.append(delay_s)

    monkeypatch.setattr("ray_kd.teacher.engines._http_client.asyncio.sleep", sleep)
    server.fault = lambda number, prompts: Fault(status=500) if number < 8 else None
    assert_right(ask(build("sglang", max_concurrency=1, max_retries=8, backoff_s=1.0, deadline_s=1e6)))
    for wait_s, longest in zip(waits, (1, 2, 4, 8, 16, 30, 30, 30), strict=True):
        assert longest / 2 <= wait_s <= longest
    assert len({wait_s / longest for wait_s, longest in zip(waits, (1, 2, 4, 8, 16, 30, 30, 30), strict=True)}) > 4

    waits.clear()
    server.fault = lambda number, prompts: Fault(status=429, headers={"Retry-After": "7"}) if number == 13 else None
    ask(build("sglang", max_concurrency=1))
    assert waits == [7.0]


def test_retry_after_is_a_number_or_a_date():
    assert [seconds(value) for value in ("", "soon", "0", " 12 ")] == [0, 0, 0, 12]
    assert 28 < seconds(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert seconds(formatdate(time.time() - 30, usegmt=True)) == 0


@pytest.mark.parametrize("protocol", KINDS)
def test_a_server_that_always_fails_fails_the_call(build, server, protocol):
    server.fault = lambda number, prompts: Fault(status=503)
    message = (
        rf"^the teacher's server {server.url} gave no usable answer in \d+\.\d s and 4 tries; the last: HTTP 503: the"
    )
    with pytest.raises(RetryableError, match=message) as raised:
        ask(build(protocol), rows={name: column[1:2] for name, column in ROWS.items()})
    assert "\n" not in str(raised.value)
    assert num_asked(server) == 4


def test_no_server_at_all(build, server):
    with pytest.raises(RetryableError, match=r"127\.0\.0\.1:9 gave no usable answer in .* 3 tries.*Connect"):
        ask(build(url="http://127.0.0.1:9", max_retries=2))
    assert server.asked == []


def test_a_server_that_never_answers_fails_the_call_at_the_deadline(build, server):
    server.fault = lambda number, prompts: Fault(delay_s=3.0)
    start = time.monotonic()
    with pytest.raises(RetryableError, match=r"in \d\.\d s and [23] tries; the last: no answer within 0\.\d+ s"):
        ask(build(timeout_s=0.4, deadline_s=1.0, max_retries=1000))
    assert time.monotonic() - start < 2.5


def test_a_wait_beyond_the_deadline_is_not_waited(build, server):
    server.fault = lambda number, prompts: Fault(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(RetryableError, match=r"in \d\.\d s and 1 try; the last: HTTP 429"):
        ask(build(), rows={name: column[1:2] for name, column in ROWS.items()})
    assert num_asked(server) == 1


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(edit=without_a_position), r"4 tries; the last: an unusable reply: 6 positions for 7 tokens"),
        (Fault(cut=-1), r"4 tries; the last: an unusable reply: malformed JSON"),
        (Fault(status=500, message="a bug"), r"4 tries; the last: HTTP 500: a bug"),
        # vLLM 0.32 for a prompt that the model computes NaN for
        (Fault(400, message="Out of range float values are not JSON compliant"), "4 tries; the last: HTTP 400: Out of"),
    ],
)
def test_a_document_that_is_never_answered_usably_is_an_error_of_its_row(build, server, protocol, fault, reason):
    server.fault = lambda number, prompts: fault if of_row(1)(prompts) else None
    answers = ask(build(protocol))
    assert_right(answers, wrong_rows=(1,))
    assert re.search(reason, answers[1].reason)
    assert num_asked(server) == NUM_DOCUMENTS - 1 + 4


def test_a_request_that_fails_as_a_whole_is_taken_apart(build, server):
    server.fault = lambda number, prompts: Fault(status=500) if of_row(1)(prompts) else None
    assert_right(ask(build(batch_size=16)), wrong_rows=(1,))
    assert num_asked(server) == 4 + (NUM_DOCUMENTS - 1) + 4


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_does_not_answer_one_document_fails_the_call(build, server, status):
    """It says nothing about the document: its row is not given up."""
    server.fault = lambda number, prompts: Fault(status=status) if of_row(1)(prompts) else None
    with pytest.raises(RetryableError, match=f"HTTP {status}"):
        ask(build())


def test_unusable_replies_to_everything_fail_the_call(build, server):
    server.fault = lambda number, prompts: Fault(edit=without_a_position)
    with pytest.raises(RetryableError, match="unusable reply"):
        ask(build())
    assert num_asked(server) == 4 * NUM_DOCUMENTS


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"logprob": float("nan")}, "not finite at 1 of 6"),
        ({"logprob": None}, "not finite at 1 of 6"),
        ({"logprob": float("inf")}, "not finite at 1 of 6"),
        ({"id": VOCAB_SIZE}, f"token {VOCAB_SIZE}, outside its vocabulary of {VOCAB_SIZE}"),
        ({"id": -1}, "outside its vocabulary"),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_error_of_its_row_at_once(build, server, protocol, values, reason):
    # The token that stands there may be the one that is edited; then the reply would not fit the prompt.
    server.fault = lambda number, prompts: Fault(edit=with_first_entry(**values)) if of_row(1)(prompts) else None
    answers = ask(build(protocol))
    assert_right(answers, wrong_rows=(1,))
    assert reason in answers[1].reason
    assert num_asked(server) == NUM_DOCUMENTS


def test_the_least_number_of_vllm_is_a_probability_of_zero(build, server):
    def edit(reply):
        reply = copy.deepcopy(reply)
        for entry in reply["choices"][0]["prompt_logprobs"][-1].values():
            if entry["rank"] > 3:
                entry["logprob"] = -9999.0
        return reply

    server.fault = lambda number, prompts: Fault(edit=edit)
    answer = ask(build())[1]
    assert np.isneginf(answer.logprobs[-1]).tolist() == [False] * 3 + [True] * 5
    assert np.isfinite(answer.logprobs[:-1]).all()


REFUSED = {
    "cap": (
        {"max_logprobs": 5}, {},
        r"sends 5 tokens a position, teacher\.top_k is 8: .*--max-logprobs 8.* set teacher.top_k=5$",
    ),
    "400 cap": (
        {"fault": lambda number, prompts: Fault(400, message="Requested prompt logprobs of 8, which is greater than")},
        {}, r"refused /v1/completions with HTTP 400: Requested prompt logprobs of 8,.* start it with a --max-logprobs",
    ),
    "context": ({"max_model_len": 7}, {}, r"HTTP 400: .*context length is 7 tokens\.; lower data\.sequence_length"),
    "context of the prompt alone": (
        {"fault": lambda number, prompts: Fault(400, message="max_tokens must be at least 1, got 0.")}, {},
        r"got 0\.; lower data\.sequence_length, or raise --max-model-len",
    ),
    "401": ({"api_key": "other"}, {"api_key_env": "TEACHER_KEY"}, r"HTTP 401: .*; check the key in TEACHER_KEY$"),
    "no key": ({"api_key": KEY}, {}, r"HTTP 401: .*; name the key's variable in api_key_env$"),
    "404": ({"fault": lambda number, prompts: Fault(404)}, {}, "HTTP 404: the server's own words$"),
    "redirect": (
        {"fault": lambda number, prompts: Fault(307, headers={"Location": "http://127.0.0.1:9/"})}, {}, "HTTP 307",
    ),
    "models": ({"models": ["a", "b"]}, {}, r"serves a, b: name one in teacher\.engine\.served_model"),
    "no model": ({"models": []}, {}, "serves no model"),
    "not vLLM": (
        {"fault": lambda number, prompts: Fault(edit=lambda reply: {"choices": [{"index": 0, "text": "x"}]})}, {},
        "sends no prompt_logprobs: vLLM does",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_will_never_pass_is_refused_at_once(build, server, monkeypatch, case):
    settings, options, message = REFUSED[case]
    monkeypatch.setenv("TEACHER_KEY", KEY)
    for name, value in settings.items():
        setattr(server, name, value)
    rows = {name: column[1:2] for name, column in ROWS.items()}
    with pytest.raises(ConfigError, match=message) as raised:
        ask(build(**options), rows=rows)
    assert "\n" not in str(raised.value)
    assert len(server.asked) <= 2  # /v1/models, then one request


def test_sglang_with_a_cap_is_refused_too(build, server):
    def edit(reply):
        reply["meta_info"]["input_top_logprobs"] = [
            entry and entry[:5] for entry in reply["meta_info"]["input_top_logprobs"]
        ]
        return reply

    server.fault = lambda number, prompts: Fault(edit=edit)
    with pytest.raises(ConfigError, match="sends 5 tokens a position"):
        ask(build("sglang"))


def test_the_models_name_on_the_server(build, server, model):
    server.models = ("other", model)
    ask(build())
    assert server.asked[-1].body["model"] == model
    server.asked.clear()
    ask(build(served_model="lora", url=server.url + "/v1/"))
    assert {one.path for one in server.asked} == {"/v1/completions"}
    assert {one.body["model"] for one in server.asked} == {"lora"}


def test_the_key_is_sent_and_appears_nowhere(build, server, monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    server.api_key = KEY
    engine = build(api_key_env="TEACHER_KEY")
    server.fault = lambda number, prompts: Fault(status=500, message=f"you sent Bearer {KEY}") if number == 0 else None
    assert_right(ask(engine))
    assert {one.headers["authorization"] for one in server.asked} == {f"Bearer {KEY}"}
    said = []
    for fault in (Fault(400, message=f"bad key {KEY}"), Fault(503, message=KEY), Fault(429, message=KEY)):
        server.fault = lambda number, prompts, fault=fault: fault
        with pytest.raises((ConfigError, RetryableError)) as raised:
            ask(engine)
        said.extend([str(raised.value), repr(raised.getrepr(chain=True))])
    server.fault = lambda number, prompts: Fault(500, message=KEY) if of_row(1)(prompts) else None
    said.append(ask(engine)[1].reason)
    server.api_key = "another"  # the server repeats what it got
    with pytest.raises(ConfigError, match=r"Bearer \*\*\*") as raised:
        ask(engine)
    said.append(str(raised.value))
    chosen = f"teacher.engine={{kind: http, url: {server.url}, api_key_env: TEACHER_KEY}}"
    loaded = configuration.load(None, ["run.dir=r", "data.source=x", "teacher.model=t", "student.model=s", chosen])
    said.extend([configuration.to_yaml(loaded), repr(engine), str(vars(engine._config)), caplog.text])
    assert "***" in caplog.text
    assert "TEACHER_KEY" in configuration.to_yaml(loaded)
    assert not [text for text in said if KEY in text]


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is not set on this node"), (" ", "is not set"), ("a\nb", "plain")]
)
def test_a_key_that_is_not_there_is_refused(build, monkeypatch, value, message):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError, match=f"environment variable TEACHER_KEY .*{message}"):
        build(api_key_env="TEACHER_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "10.0.0.1:8000"}, r"url is '10\.0\.0\.1:8000': allowed is http://host:port"),
        ({"url": "ftp://host"}, "allowed is http://"),
        ({"url": f"http://user:{KEY}@host"}, "a key goes by api_key_env"),
        ({"url": f"https://host/v1?key={KEY}"}, "a key goes by api_key_env"),
        ({"url": "http://10.0.0.1:8000", "api_key_env": "A_KEY"}, "would carry the key of A_KEY in clear text"),
        ({"url": "http://localhost.example:8000", "api_key_env": "A_KEY"}, "in clear text: use https://, or set"),
        ({"protocol": "grpc"}, r"protocol is 'grpc': allowed is openai \| sglang"),
        ({"protocol": "sglang", "served_model": "m"}, "served_model has no effect with protocol sglang"),
        ({"max_concurrency": 0}, "max_concurrency is 0: allowed is at least 1"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"timeout_s": 0}, "timeout_s is 0.0: allowed is above 0"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"api_key_env": KEY}, "is not the name of an environment variable"),
        ({"port": 8000}, "unknown option 'port'"),
    ],
)
def test_options_are_checked_before_anything_starts(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        plugins.options("teacher.engines", {"kind": "http", "url": "http://h", **options}, "teacher.engine")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://10.0.0.1", "api_key_env": "A_KEY", "insecure": True},
        {"url": "https://10.0.0.1", "api_key_env": "A_KEY"},
        {"url": "http://10.0.0.1"},
        {"url": "http://127.0.0.2:1", "api_key_env": "A_KEY"},
        {"url": "http://[::1]:1", "api_key_env": "A_KEY"},
        {"url": "http://localhost:1", "api_key_env": "A_KEY"},
    ],
)
def test_addresses_that_a_key_may_travel_to(options):
    plugins.options("teacher.engines", {"kind": "http", **options}, "teacher.engine")


def test_an_address_is_required():
    with pytest.raises(ConfigError, match=r"teacher\.engine\.url is missing"):
        plugins.options("teacher.engines", "http", "teacher.engine")


def test_requests_that_cannot_be_served_are_refused(build, server):
    engine = build()
    for request, message in (
        (Request(kind="hidden_states"), "provides topk_logprobs, not 'hidden_states'"),
        (Request(selection="sample"), "selects by topk, not 'sample'"),
        (Request(temperature=2.0), r"temperature is 2\.0; the engine answers at 1 alone"),
        (Request(top_k=VOCAB_SIZE + 1), f"allowed: 1 to the vocabulary size {VOCAB_SIZE}"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.annotate(ROWS, request)
    assert server.asked == []


def test_nothing_to_ask_and_closing_twice_are_harmless(build, server):
    engine = build()
    assert ask(engine, rows={name: column[:0] for name, column in ROWS.items()}) == []
    (answer,) = ask(engine, rows={name: column[2:3] for name, column in ROWS.items()})
    assert isinstance(answer, TopKLogprobs)
    assert answer.ids.shape == (0, TOP_K)
    assert server.asked == []
    engine.close()
    assert_right(ask(engine))  # connects again
    engine.close()
    engine.close()


def test_a_refusal_that_only_the_server_knows_reaches_the_driver(server, model, tmp_path):
    server.max_logprobs = 5
    value = {"kind": "http", "url": server.url}
    stage = TeacherStage(EngineSpec(value, model, None, "auto", 4, False, 1), Request(top_k=TOP_K), str(tmp_path))
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(ROWS[name].reshape(-1)), 10)
        for name in (schema.INPUT_IDS, schema.LABELS, schema.POSITION_IDS)
    }
    ids, weight = pa.array(np.arange(5)), pa.array(np.ones(5, np.float32))
    block = pa.table({schema.ROW_ID: ids, **lists, schema.SLOT: ids, schema.WEIGHT: weight})
    with pytest.raises(ConfigError, match="sends 5 tokens"):
        stage(block)
    with pytest.raises(ConfigError, match="sends 5 tokens"):
        refusal.Reported(tmp_path).check()
    stage._engine().close()


DOCUMENT = Document(0, np.array([7, 8, 9], np.int32), np.array([1]))


def vllm_reply(entries) -> dict:
    return {"choices": [{"index": 0, "prompt_logprobs": [None, {}, entries]}]}


def sglang_reply(entries) -> dict:
    return {"meta_info": {"input_top_logprobs": [None, entries]}}


def entry(logprob: float, rank: int) -> dict:
    return {"logprob": logprob, "rank": rank, "decoded_token": None}


def test_the_k_of_best_rank_are_kept_most_likely_first():
    entries = {"9": entry(-5.0, 17), "4": entry(-2.0, 2), "3": entry(-1.0, 1), "6": entry(-3.0, 3)}
    (answer,) = PROTOCOLS["openai"].answers(vllm_reply(entries), [DOCUMENT], 3)
    assert (answer.ids.dtype, answer.logprobs.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(answer.ids, [[3, 4, 6]])
    np.testing.assert_array_equal(answer.logprobs, [[-1, -2, -3]])
    entries = {"9": entry(-2.0, 2), "3": entry(-1.0, 1), "6": entry(-3.0, 3)}  # the token that stands there is likely
    (answer,) = PROTOCOLS["openai"].answers(vllm_reply(entries), [DOCUMENT], 3)
    np.testing.assert_array_equal(answer.ids, [[3, 9, 6]])


def test_the_token_that_stands_there_is_not_one_of_the_k():
    """A server with a cap of 2 that is asked for 3 sends three entries all the same."""
    entries = {"9": entry(-5.0, 17), "4": entry(-2.0, 2), "3": entry(-1.0, 1)}
    with pytest.raises(ConfigError, match=r"sends 2 tokens a position, teacher\.top_k is 3"):
        PROTOCOLS["openai"].answers(vllm_reply(entries), [DOCUMENT], 3)


def test_sglangs_entries_are_taken_as_they_come():
    entries = [[-1.0, 3, None], [-2.0, 9, "x"], [-4.0, 6, None]]
    (answer,) = PROTOCOLS["sglang"].answers(sglang_reply(entries), [DOCUMENT], 2)
    np.testing.assert_array_equal(answer.ids, [[3, 9]])
    np.testing.assert_array_equal(answer.logprobs, [[-1, -2]])


BROKEN = {
    "of another prompt": ("openai", vllm_reply({"3": entry(-1.0, 1), "4": entry(-2.0, 2)}), "not of the token"),
    "null": ("openai", vllm_reply(None), "not of the token"),
    "no rank": ("openai", vllm_reply({"9": {"logprob": -1.0}, "4": {"logprob": -2.0}}), "not {id: {logprob, rank}}"),
    "a number": ("openai", vllm_reply({"9": -1.0, "4": -2.0}), "not {id: {logprob, rank}}"),
    "no index": ("openai", {"choices": [{"prompt_logprobs": []}]}, "without index"),
    "a list": ("openai", [], "without choices"),
    "sglang null": ("sglang", sglang_reply(None), "not lists of entries"),
    "sglang numbers": ("sglang", sglang_reply([-1.0, -2.0]), "not [logprob, id, text]"),
    "sglang twice": ("sglang", sglang_reply([[-1.0, 3, None], [-2.0, 3, None]]), "names a token twice"),
    "sglang too long": ("sglang", {"meta_info": {"input_top_logprobs": [None] * 3}}, "3 positions for 2 tokens"),
    "sglang without": ("sglang", {"meta_info": {}}, "without input_top_logprobs"),
    "sglang a list": ("sglang", [{}], "without meta_info"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_replies_that_do_not_fit_are_unusable(case):
    protocol, reply, message = BROKEN[case]
    with pytest.raises(UnusableReply, match=re.escape(message)):
        PROTOCOLS[protocol].answers(reply, [DOCUMENT], 2)


def test_json_is_decoded_with_its_infinities():
    assert decode(b'{"a": [1, -1.5, null]}') == {"a": [1, -1.5, None]}
    assert np.isnan(decode(b"[NaN]")[0])
    assert decode(b"[-Infinity]") == [-np.inf]
    for body in (b"", b'{"a": [1', b"\xff\xfe\x00", json.dumps({"a": 1}).encode() + b"x"):
        with pytest.raises(UnusableReply, match=f"malformed JSON of {len(body)} bytes"):
            decode(body)
