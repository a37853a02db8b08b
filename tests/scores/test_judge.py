"""A judge behind an address: what it is asked, what of its replies is a score, what is tried again,
and that nobody sees the key."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmpipe.errors import UserError
from llmpipe.scores.judge import Judge, in_words, key_of

KEY = "abc-123-not-to-be-seen"
QUESTION = {"prompt": "2 + 2?", "response": "It is {prompt}.", "reference": "4"}


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}), {}


@contextmanager
def served(answer):
    """A server that answers so: `answer` of (path, headers, body) -> status, text, headers."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            status, text, headers = answer(len(asked), body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            with suppress(BrokenPipeError):  # of who has not waited
                self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge(url, waited=None, **changes):
    values = {
        "url": url,
        "model": "wise",
        "template": "Rate {response} to {prompt}, where {reference} is right, {not this}.",
        "key": KEY,
        "bounds": None,
        "timeout": 5.0,
        "retries": 2,
        "wait": (waited if waited is not None else []).append,
    }
    return Judge(**values | changes)


def test_what_is_asked_and_what_is_read():
    with served(lambda n, body: completion("<think>1 or 9?</think>I say: 7.5")) as (url, asked):
        assert judge(f"{url}/").score(QUESTION) == 7.5
    ((path, headers, body),) = asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    (message,) = body.pop("messages")
    assert body == {"model": "wise", "temperature": 0}
    text = "Rate It is {prompt}. to 2 + 2?, where 4 is right, {not this}."
    assert message == {"role": "user", "content": text}, "an answer is not read as a template"


def test_without_a_key_there_is_no_header():
    with served(lambda n, body: completion("3")) as (url, asked):
        assert judge(url, key=None).score(QUESTION) == 3
    assert "Authorization" not in asked[0][1]


def test_many_are_asked_at_once_and_scores_are_in_order():
    def answer(n, body):
        return completion(body["messages"][0]["content"].split()[1])

    with served(answer) as (url, asked):
        questions = [QUESTION | {"response": str(i)} for i in range(30)]
        assert judge(url).scores(questions) == list(range(30))
    assert len(asked) == 30


@pytest.mark.parametrize(
    ("first", "waits"),
    [
        ((503, "busy", {}), [1.0]),
        ((429, "slowly", {"Retry-After": "7"}), [7.0]),
        ((429, "slowly", {"Retry-After": "3600"}), [30.0]),
        ((429, "slowly", {"Retry-After": "Wed, 21 Oct"}), [1.0]),
        ((200, "<html>", {}), [1.0]),
        ((200, "[]", {}), [1.0]),
        (completion("no number"), [1.0]),
        (completion(None), [1.0]),
        (completion("11"), [1.0]),
    ],
)
def test_what_is_tried_again(first, waits):
    waited = []
    with served(lambda n, body: first if n == 1 else completion("5")) as (url, asked):
        assert judge(url, waited, bounds=(1, 10)).score(QUESTION) == 5
    assert len(asked) == 2 and waited == waits


@pytest.mark.parametrize(
    ("answer", "code", "tries", "message"),
    [
        ((500, "on fire", {}), 5, 3, r"HTTP 500: on fire \(3 tries\)"),
        (completion("hm"), 2, 3, r"says no number: 'hm' \(3 tries\)"),
        (completion("0"), 2, 3, r"says 0, which is not between 1 and 10 \(3 tries\)"),
        ((200, "{}", {}), 2, 3, r"is no chat completion: {}"),
        ((401, f"no such key: {KEY}", {}), 2, 1, r"HTTP 401: no such key: \[redacted\]"),
        ((404, '{"error":\n "no model"}', {}), 2, 1, r'HTTP 404: {"error": "no model"}'),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), 2, 1, "HTTP 302"),
    ],
)
def test_failure_is_one_line(answer, code, tries, message):
    with (
        served(lambda n, body: answer) as (url, asked),
        pytest.raises(UserError, match=message) as refused,
    ):
        judge(url, bounds=(1, 10)).scores([QUESTION])
    assert refused.value.code == code and len(asked) == tries
    assert "\n" not in refused.value.message and KEY not in str(refused.value)
    assert refused.value.message.startswith(f"judge: {url}: ")


def test_a_server_that_is_not_there():
    waited = []
    with pytest.raises(UserError, match=r"refused \(3 tries\)") as refused:
        judge("http://127.0.0.1:9/v1", waited).score(QUESTION)
    assert refused.value.code == 5 and waited == [1.0, 2.0]


def test_a_server_that_does_not_answer_in_time():
    done = threading.Event()

    def answer(n, body):
        done.wait(5)
        return completion("1")

    with served(answer) as (url, _):
        with pytest.raises(UserError, match="timed out") as refused:
            judge(url, timeout=0.05, retries=0).score(QUESTION)
        done.set()
    assert refused.value.code == 5


def test_the_key_is_the_environments(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", f"{KEY}\n")
    assert key_of("JUDGE_API_KEY") == KEY and key_of(None) is None
    monkeypatch.setenv("JUDGE_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="holds what is no key"):
        key_of("JUDGE_API_KEY")
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(UserError, match="JUDGE_API_KEY is not set"):
        key_of("JUDGE_API_KEY")


def test_a_prompt_in_words():
    turn = {"role": "user", "content": "2 + 2?"}
    assert in_words("2 + 2 =") == "2 + 2 =" and in_words([turn]) == "2 + 2?"
    said = in_words([{"role": "system", "content": "Be brief."}, turn])
    assert said == "system: Be brief.\n\nuser: 2 + 2?"
