"""The reward that an HTTP service gives: what is sent, what is tried again, and what stops training in one line."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lf_lightning import InputError
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.models import RewardService
from lf_lightning.models.rewards import RewardBatch, RewardSetting, combined_scores
from lf_lightning.types import TrainingStopped

TOKENIZER = byte_tokenizer()
PROMPT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
RESPONSES = ("one", "zwölf", "three 3", "", "5")
SECRET = "s3cr3t-of-the-house"
Answer = tuple[int, dict[str, str], str]


class Service:
    """A server on a free port. `answers` are given in turn; then each text's score is its length."""

    def __init__(self, *answers: Answer, port: int = 0) -> None:
        self.answers, self.seen, self.wait = list(answers), [], threading.Event()
        self.wait.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.seen.append((self.path, dict(self.headers), json.loads(body)))
                service.wait.wait(20)
                status, headers, text = service.answer(json.loads(body)["messages"])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that no longer waits
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/score"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, texts: list[str]) -> Answer:
        if self.answers:
            return self.answers.pop(0)
        return 200, {}, json.dumps({"scores": [len(text) for text in texts]})

    def close(self) -> None:
        self.wait.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def batch_of(responses: tuple[str, ...]) -> RewardBatch:
    return RewardBatch(
        prompt_ids=(tuple(TOKENIZER(PROMPT)["input_ids"]),) * len(responses),
        response_ids=tuple(tuple(TOKENIZER(f"{each}<|im_end|>")["input_ids"]) for each in responses),
        is_stopped=(True,) * len(responses),
        references=("",) * len(responses),
        tokenizer=TOKENIZER,
    )


def prepared(url: str, **options: Any) -> RewardService:
    reward = RewardService(url, **{"backoff": 0.0, "retries": 2, **options})
    reward.prepare(RewardSetting(policy=None, tokenizer=TOKENIZER, device=torch.device("cpu")))
    return reward


def scored(reward: RewardService, responses: tuple[str, ...] = RESPONSES) -> list[float]:
    prompts = (PROMPT,) * len(responses)
    return combined_scores([reward], prompts, responses, batch_of(responses))[:, 0].tolist()


def stopped(reward: RewardService, responses: tuple[str, ...] = RESPONSES) -> str:
    with pytest.raises(TrainingStopped) as caught:
        scored(reward, responses)
    message = str(caught.value)
    assert message.startswith("model.init_args.rewards: RewardService: http"), message
    assert "\n" not in message
    assert message.endswith("Mend the service, and continue with --ckpt_path last.")
    return message


def ok(scores: Any) -> Answer:
    return 200, {}, json.dumps({"scores": scores})


# ---------------------------------------------------------------------- what is sent and read


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (32, [5])])
def test_texts_are_sent_whole_and_in_order_in_requests_of_batch_size(
    service: Service, batch_size: int, sizes: list[int]
) -> None:
    texts = [f"{PROMPT}{response}<|im_end|>" for response in RESPONSES]
    found = scored(prepared(service.url, batch_size=batch_size))
    assert found == [float(len(text)) for text in texts]
    assert found[1] - found[0] == 2.0  # zwölf has two letters more than one, and not three
    assert [len(body["messages"]) for _, _, body in service.seen] == sizes
    assert [text for _, _, body in service.seen for text in body["messages"]] == texts
    for path, headers, body in service.seen:
        assert (path, headers["Content-Type"]) == ("/score", "application/json")
        assert {name: value for name, value in body.items() if name != "messages"} == {"model": "model"}
        assert "Authorization" not in headers


def test_scores_are_read_as_they_are_written(service: Service) -> None:
    service.answers = [(200, {}, '{"scores": [-1.25, 3, 1e30, 0.1], "other": 7}')]
    assert scored(prepared(service.url), RESPONSES[:4]) == pytest.approx([-1.25, 3.0, 1e30, 0.1], rel=1e-7)


# ---------------------------------------------------------------------- what is tried again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failure_that_may_pass_is_tried_again(service: Service, status: int) -> None:
    service.answers = [(status, {}, "busy"), (status, {}, "busy"), ok([1.0, 2.0])]
    assert scored(prepared(service.url), RESPONSES[:2]) == [1.0, 2.0]
    bodies = [body for _, _, body in service.seen]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_failure_that_stays_stops_training_after_as_many_retries(service: Service, retries: int) -> None:
    service.answers = [(503, {}, "busy\n\nstill")] * 9
    message = stopped(prepared(service.url, retries=retries))
    assert "must answer with status 200, got 503 and 'busy still'." in message
    assert len(service.seen) == retries + 1


def test_each_request_has_retries_of_its_own(service: Service) -> None:
    service.answers = [(500, {}, ""), ok([1.0]), (500, {}, ""), ok([2.0]), (500, {}, ""), ok([3.0])]
    assert scored(prepared(service.url, retries=1, batch_size=1), RESPONSES[:3]) == [1.0, 2.0, 3.0]


def test_a_service_that_starts_late_is_waited_for() -> None:
    port = free_port()
    started: list[Service] = []
    timer = threading.Timer(0.3, lambda: started.append(Service(port=port)))
    timer.start()
    try:
        reward = prepared(f"http://127.0.0.1:{port}/score", retries=12, backoff=0.01)
        assert scored(reward, RESPONSES[:1]) == [float(len(f"{PROMPT}one<|im_end|>"))]
    finally:
        timer.join()
        started[0].close()


def test_a_service_that_is_restarted_between_two_steps_answers_again(service: Service) -> None:
    reward = prepared(service.url, retries=3)
    before = scored(reward)
    service.close()
    again = Service(port=service.port)
    try:
        assert scored(reward) == before
        assert len(again.seen) == 1
    finally:
        again.close()


def test_a_service_that_is_not_there_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOUSE_TOKEN", SECRET)
    port = free_port()
    message = stopped(prepared(f"http://127.0.0.1:{port}/score", token_env="HOUSE_TOKEN"))
    assert SECRET not in message
    assert f"http://127.0.0.1:{port}/score must answer, got NewConnectionError after 2 retries" in message


def test_a_slow_answer_is_tried_again_and_then_stops_training(service: Service) -> None:
    service.wait.clear()
    message = stopped(prepared(service.url, timeout=0.05, retries=1))
    assert "/score must answer, got " in message
    assert "ReadTimeoutError after 1 retries" in message
    for _ in range(1000):  # the server may still be reading
        if len(service.seen) < 2:
            time.sleep(0.01)
    assert len(service.seen) == 2


# ---------------------------------------------------------------------- what stops training at once


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}, "no such page"), "must answer with status 200, got 404 and 'no such page'."),
        ((401, {}, "who?"), "must answer with status 200, got 401 and 'who?'."),
        ((302, {"Location": "/elsewhere"}, ""), "must answer with status 200, got 302 and ''."),
        ((307, {"Location": "/elsewhere"}, ""), "must answer with status 200, got 307 and ''."),
        ((201, {}, '{"scores": [1, 2]}'), "must answer with status 200, got 201"),
        ((200, {}, "<html>\nhello</html>"), "must answer in JSON, got '<html> hello</html>'."),
        ((200, {}, ""), "must answer in JSON, got ''."),
        ((200, {}, '{"score": [1, 2]}'), 'must answer {"scores": [...]}, got \'{"score": [1, 2]}\'.'),
        ((200, {}, "[1, 2]"), "must answer {\"scores\": [...]}, got '[1, 2]'."),
        (ok(None), 'must answer {"scores": [...]}, got '),
        (ok({"0": 1, "1": 2}), 'must answer {"scores": [...]}, got '),
        (ok([1.0]), "must give 2 scores to 2 texts, got 1."),
        (ok([1.0, 2.0, 3.0]), "must give 2 scores to 2 texts, got 3."),
        (ok([]), "must give 2 scores to 2 texts, got 0."),
        (ok([1.0, float("nan")]), "must give finite numbers, got nan as score 2 of 2."),
        (ok([float("-inf"), 1.0]), "must give finite numbers, got -inf as score 1 of 2."),
        ((200, {}, '{"scores": [1, 1e999]}'), "must give finite numbers, got inf as score 2 of 2."),
        (ok([1.0, None]), "must give finite numbers, got None as score 2 of 2."),
        (ok(["1.0", 2.0]), "must give finite numbers, got '1.0' as score 1 of 2."),
        (ok([1.0, True]), "must give finite numbers, got True as score 2 of 2."),
        (ok([[1.0], [2.0]]), "must give finite numbers, got [1.0] as score 1 of 2."),
    ],
)
def test_an_answer_that_is_no_score_stops_training_at_once(service: Service, answer: Answer, message: str) -> None:
    service.answers = [answer]
    assert f"{service.url} {message}" in stopped(prepared(service.url), RESPONSES[:2])
    assert len(service.seen) == 1


def test_a_long_answer_is_shown_in_part(service: Service) -> None:
    service.answers = [(404, {}, "x" * 5000)]
    assert f"got 404 and '{'x' * 117}...'. Mend" in stopped(prepared(service.url))


def test_a_number_beyond_every_float_stops_training(service: Service) -> None:
    service.answers = [(200, {}, '{"scores": [1, 1' + "0" * 400 + "]}")]
    with pytest.raises(TrainingStopped, match=r"^model\.init_args\.rewards: RewardService: [^\n]*$"):
        scored(prepared(service.url), RESPONSES[:2])


# ---------------------------------------------------------------------- the token


def test_the_token_of_the_environment_arrives_and_is_shown_nowhere(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOUSE_TOKEN", f" {SECRET}\n")
    service.answers = [ok([1.0] * 5), (403, {}, "not you")]
    reward = prepared(service.url, token_env="HOUSE_TOKEN")
    assert scored(reward) == [1.0] * 5
    message = stopped(reward)
    assert [headers["Authorization"] for _, headers, _ in service.seen] == [f"Bearer {SECRET}"] * 2
    assert SECRET not in message
    assert SECRET not in repr(reward)
    assert SECRET not in str(reward.option_values())
    assert reward.option_values()["token_env"] == "HOUSE_TOKEN"


def test_a_token_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setenv("HOUSE_TOKEN", SECRET)
    other = Service()
    service.answers = [(307, {"Location": other.url}, "")]
    try:
        stopped(prepared(service.url, token_env="HOUSE_TOKEN"))
        assert len(service.seen) == 1
        assert other.seen == []
    finally:
        other.close()


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_token_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("HOUSE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("HOUSE_TOKEN", value)
    with pytest.raises(InputError, match=r"RewardService\.token_env: must name a variable that is set, got HOUSE_TOK"):
        prepared("http://127.0.0.1:1/", token_env="HOUSE_TOKEN")


def test_a_token_of_two_lines_is_in_no_message(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOUSE_TOKEN", f"{SECRET}\nX-Other: 1")
    with pytest.raises((InputError, TrainingStopped)) as caught:
        scored(prepared(service.url, token_env="HOUSE_TOKEN"))
    assert SECRET not in str(caught.value)
    assert service.seen == []


def test_a_secret_in_the_address_is_in_no_message() -> None:
    address = f"http://user:{SECRET}@127.0.0.1:{free_port()}/score?key={SECRET}"
    assert SECRET not in stopped(prepared(address, retries=0))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url: must be an address with http:// or https://, got '127.0.0.1:8000'."),
        ({"url": "ftp://host/score"}, "url: must be an address with http:// or https://"),
        ({"url": "http:///score"}, "url: must be an address with http:// or https://"),
        ({"url": ""}, "url: must be an address with http:// or https://"),
        ({"timeout": 0.0}, "timeout: must be positive, got 0.0."),
        ({"timeout": -1.0}, "timeout: must be positive, got -1.0."),
        ({"timeout": float("inf")}, "timeout: must be positive, got inf."),
        ({"timeout": float("nan")}, "timeout: must be positive, got nan."),
        ({"retries": -1}, "retries: must be 0 or more, got -1."),
        ({"backoff": -0.1}, "backoff: must be 0 or more, got -0.1."),
        ({"backoff": float("nan")}, "backoff: must be 0 or more, got nan."),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0."),
    ],
)
def test_an_option_outside_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        RewardService(**{"url": "http://127.0.0.1:1/", **options})
    assert f"model.init_args.rewards: RewardService.{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1/score", "http://host:port/score", "http://host:99999/score"])
def test_an_address_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"RewardService\.url: must be an address"):
        RewardService(url)
