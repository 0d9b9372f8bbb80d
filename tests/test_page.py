"""The chat page of serve.py --page: what the server sends, and the page itself in a headless Chromium."""

import http.client
import json
import re
import threading
import time
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import needs

needs("openai")


import chat
import commands.chat
import merge_lora
from inference.generate import Answer
from inference.jobs import StopGenerating
from inference.markup import Piece
from inference.page_routes import FILES, describe_model
from inference.requests import RequestError
from tests.browser import chromium, read_requests
from tests.conftest import ROOT, wait_until
from tests.serving import endless, serving
from tests.test_saved import write_result

PAGE = ROOT / "inference" / "page"


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """A merged model, and a copy that never stops."""
    root = tmp_path_factory.mktemp("page")
    write_result(checkpoints["untied"], "tokens", root / "tokens")
    merge_lora.main([str(root / "tokens"), str(root / "merged")])
    endless(root / "merged", root / "endless")
    return root


@pytest.fixture(scope="module")
def merged(models):
    with serving(models / "merged", "--page") as served:
        yield served


@pytest.fixture(scope="module")
def unending(models):
    with serving(models / "endless", "--page") as served:
        yield served


def get(served, path, **headers):
    """Returns: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


# ---- what the server sends ----


def test_files_and_their_policy(merged):
    assert set(FILES) == {"/", *(f"/page/{path.name}" for path in PAGE.iterdir() if path.name != "index.html")}
    for path, file in FILES.items():
        status, headers, body = get(merged, path)
        assert (status, body) == (200, file.read_text())
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers
    for path in ("/page/", "/page/absent.js", "/page/../page_routes.py", "/page/%2e%2e/gate.py", "/page/index.html"):
        assert get(merged, path)[0] == 404


def test_files_name_nothing_elsewhere_and_parse_no_html():
    for path in PAGE.iterdir():
        text = path.read_text()
        assert not re.search(r"https?://|(?:src|href)=\"//|@import", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
    assert not re.search(
        r"<script(?! type=\"module\" src=)|<style|\son\w+=|\sstyle=", (PAGE / "index.html").read_text()
    )


def test_with_a_key_files_are_open_and_everything_else_is_not(models):
    with serving(models / "merged", "--page", "--api_key", "s3cret") as served:
        for path in FILES:
            status, _, body = get(served, path)
            assert status == 200 and "s3cret" not in body and "merged" not in body
        for path in ("/page/model.json", "/v1/models", "/health", "/page/absent", "//", "/page/page.js/"):
            assert get(served, path)[0] == get(served, path, Authorization="Bearer x")[0] == 401, path
        status, _, body = get(served, "/page/model.json", Authorization="Bearer s3cret")
        assert status == 200 and json.loads(body)["name"] == "merged"


def test_without_a_key_other_names_for_this_machine_get_no_page(merged, models):
    for path in (*FILES, "/page/model.json"):
        assert get(merged, path, Host="evil.example")[0] == 403
        assert get(merged, path, Host="localhost:1")[0] == 200
    with serving(models / "merged") as without:
        assert get(without, "/")[0] == get(without, "/page/model.json")[0] == 404


def test_a_page_elsewhere_cannot_ask(merged):
    """Without a preflight, which gets no leave here, a browser sends no JSON: other types are no request."""
    connection = http.client.HTTPConnection(urlsplit(merged.url).netloc, timeout=60)
    body = json.dumps({"model": "merged", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind, "Origin": "http://evil.example"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        assert response.status == 400, response.read()
        response.read()
    connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://evil.example"})
    response = connection.getresponse()
    assert response.status == 405 and not [name for name in response.headers if name.lower().startswith("access-")]


def test_what_the_page_shows_of_the_model(merged, unending):
    shown = describe_model(merged.handler)
    assert (shown["name"], shown["stop_tokens"]) == ("merged", ["<|im_end|>", "<|endoftext|>"])
    assert shown["decoding"]["temperature"] == 0 and shown["decoding"]["max_tokens"] == 1024
    assert describe_model(unending.handler)["stop_tokens"] == []


def test_texts_are_there_in_both_languages():
    english, chinese = (PAGE / "texts.js").read_text().split("  zh: {")
    names = [re.findall(r"^    (\w+):", text, flags=re.M) for text in (english, chinese)]
    assert names[0] == names[1] and len(names[0]) > 20
    used = set(re.findall(r'data-(?:text|placeholder)="(\w+)"', (PAGE / "index.html").read_text()))
    assert used <= set(names[0])


def test_vllm_has_no_page(models, run_script):
    code, _, stderr = run_script("serve.py", models / "merged", "--engine", "vllm", "--page")
    assert (code, stderr) == (2, "error: --page: has no effect with --engine vllm, which has no page\n")


# ---- the page in a browser ----


class Page:
    """A page that is open in a browser."""

    def __init__(self, browser, served):
        self.browser, self.served = browser, served
        browser.get(f"{served.url}/page/page.css")  # where no script keeps anything
        browser.execute_script("sessionStorage.clear()")
        self.open()

    def open(self):
        self.browser.get(self.served.url)
        wait_until(lambda: self.browser.title != "Chat" or self.shows("#key-dialog"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def shows(self, selector):
        return any(element.is_displayed() for element in self.all(selector))

    def texts(self, selector):
        """Whole texts, as they are, of all that fit."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.browser.execute_script(script, selector)

    @property
    def answers(self):
        return self.texts(".assistant .said")

    @property
    def questions(self):
        return self.texts(".user .said")

    def type(self, text, selector="#question"):
        """Newlines are typed as a user types them."""
        box = self.one(selector)
        for number, line in enumerate(text.split("\n")):
            box.send_keys(("\ue008\ue007\ue008" if number else "") + line)  # Shift down, Enter, Shift up

    def set(self, **values):
        for name, value in values.items():
            self.browser.execute_script("arguments[0].value = arguments[1]", self.one(f"#{name}"), str(value))

    def ask(self, text):
        self.type(text + "\ue007")
        self.wait_for_answer()

    def wait_for_answer(self):
        wait_until(lambda: not self.shows("#stop"))

    def click(self, selector):
        self.one(selector).click()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def page(browser, merged):
    return Page(browser, merged)


@pytest.fixture
def long_page(browser, unending):
    return Page(browser, unending)


@pytest.fixture
def asked(merged, monkeypatch):
    """Bodies of the requests that came."""
    bodies, read = [], merged.handler._read
    monkeypatch.setattr(merged.handler, "_read", lambda body, client: bodies.append(body) or read(body, client))
    return bodies


@pytest.fixture
def answering(merged, monkeypatch):
    """Sets what the model says: texts or pieces, or functions that are called when their turn comes."""

    def say(*parts):
        def answer(job):
            for part in parts:
                if callable(part):
                    part()
                else:
                    job.put(Piece("content", part) if isinstance(part, str) else part)
            return Answer("", "stop", len(parts))

        monkeypatch.setattr(merged.handler, "_answer", answer)

    return say


@pytest.mark.slow
def test_answers_are_those_of_chat_word_for_word(page, models, capsys):
    words = [str(models / "merged"), "--max_new_tokens", "40", "--system", "Be kind."]
    session = commands.chat.Chat(chat.build_parser().parse_args(words))
    page.set(system="Be kind.", max_tokens=40, temperature=0)
    for question in ("Who are you?", "你好，你是谁？", "two\nlines <|im_end|> **x** <b>"):
        session.ask(question)
        page.ask(question)
    said = [turn["content"] for turn in session.history]
    assert page.questions == said[::2] and page.answers == said[1::2]
    assert all(len(text) > 20 for text in page.answers)
    assert [note.startswith("cut after 40") for note in page.texts(".ending")] == [True] * 3
    assert page.one("h1").text == "merged" and page.one("#stop-tokens").text == "stops at <|im_end|> <|endoftext|>"


@pytest.mark.slow
def test_an_answer_is_shown_as_it_comes(page, answering):
    go_on = threading.Event()
    answering("First ", go_on.wait, "second.")
    page.type("x\ue007")
    wait_until(lambda: page.answers == ["First "])
    assert page.shows("#stop") and not page.shows("#send, .edit, .retry")
    go_on.set()
    page.wait_for_answer()
    assert page.answers == ["First second."] and page.texts(".ending") == ["3 tokens"] and not page.shows("#notice")
    assert page.one("#question").get_attribute("value") == ""


@pytest.mark.slow
def test_stop_ends_the_generation(long_page, unending, monkeypatch):
    page, handler = long_page, unending.handler
    whole = unending.ask("Who are you?", max_tokens=900).choices[0].message.content
    over = StopGenerating.__call__
    monkeypatch.setattr(StopGenerating, "__call__", lambda *words, **more: time.sleep(0.02) or over(*words, **more))
    page.set(max_tokens=900)
    page.type("Who are you?\ue007")
    wait_until(lambda: page.answers[0])
    page.click("#stop")
    page.wait_for_answer()
    wait_until(lambda: handler._num_waiting == 0)
    handler._thread.submit(lambda: None).result(timeout=5)  # the thread generates no more; the whole takes 18 s
    (cut,) = page.answers
    assert page.texts(".ending") == ["stopped by you"] and cut != whole and whole.startswith(cut)
    page.type("And then?\ue007")  # what was said stays in the conversation
    wait_until(lambda: len(page.answers) == 2 and page.answers[1])
    page.click("#clear")
    wait_until(lambda: handler._num_waiting == 0)
    assert page.answers == page.questions == [] and not page.shows("#stop, #notice")


@pytest.mark.slow
def test_answer_again(long_page):
    page = long_page
    page.set(max_tokens=20, temperature=1.5)
    page.ask("Who are you?")
    texts = set(page.answers)
    for seed in ("", "7", "7", "8"):
        page.set(seed=seed)
        page.click(".retry")
        page.wait_for_answer()
        assert page.questions == ["Who are you?"] and len(page.answers) == 1
        texts |= set(page.answers)
    assert len(texts) == 4  # seed 7 said the same twice


@pytest.mark.slow
def test_an_earlier_question_is_changed(page, asked):
    page.set(max_tokens=4)
    for question in ("one", "two", "three"):
        page.ask(question)
    page.all(".edit")[1].click()
    assert page.one(".editor").get_attribute("value") == "two" and not page.shows(".retry, .edit")
    page.click(".cancel")
    assert page.questions == ["one", "two", "three"] and len(asked) == 3
    page.all(".edit")[1].click()
    page.type(" and a half\nmore", ".editor")
    page.click(".save")
    page.wait_for_answer()
    assert page.questions == ["one", "two and a half\nmore"] and len(page.answers) == 2
    assert asked[3]["messages"] == [*asked[1]["messages"][:2], {"role": "user", "content": page.questions[1]}]


@pytest.mark.slow
def test_what_is_asked_is_what_stands_there(page, asked):
    page.ask("plain")
    messages = [{"role": "user", "content": "plain"}]
    streamed = {"model": "merged", "stream": True, "stream_options": {"include_usage": True}}
    assert asked == [{**streamed, "messages": messages}]
    chosen = dict(temperature=0.5, top_p=0.9, top_k=40, repetition_penalty=1.1, max_tokens=3, seed=7)
    page.set(system="Be kind.", **chosen)
    page.click("#clear")
    page.ask("plain")
    system = {"role": "system", "content": "Be kind."}
    assert asked[1] == {**streamed, **chosen, "messages": [system, *messages]}
    for name, wrong in {"temperature": "warm", "seed": "9007199254740993", "top_k": "1e999"}.items():
        page.set(**{name: wrong})
        page.ask("again")
        assert page.one("#notice").text == f"{name}: expected a number" and len(asked) == 2
        page.set(**{name: ""})
    page.set(temperature=-1)
    page.click(".retry")
    wait_until(lambda: page.shows("#notice"))
    assert "must be from 0 to 100" in page.one("#notice").text
    page.set(temperature="")
    page.click(".retry")
    page.wait_for_answer()
    assert not page.shows("#notice") and len(page.answers) == 2


@pytest.mark.slow
def test_a_reload_keeps_the_conversation_and_clear_forgets_it(page, asked):
    page.set(system="Be kind.", max_tokens=4)
    page.ask("你好")
    before = page.questions, page.answers
    page.open()
    assert (page.questions, page.answers) == before and page.one("#system").get_attribute("value") == "Be kind."
    page.ask("And now?")
    assert asked[1]["messages"][:3] == [*asked[0]["messages"], {"role": "assistant", "content": before[1][0]}]
    page.click("#clear")
    page.open()
    assert page.questions == page.answers == [] and page.one("#max_tokens").get_attribute("value") == "4"


@pytest.mark.slow
def test_a_page_that_is_left_keeps_what_had_come(page, answering):
    go_on = threading.Event()
    answering("Half ", go_on.wait, "whole")
    page.type("x\ue007")
    wait_until(lambda: page.answers == ["Half "])
    page.open()
    go_on.set()
    assert page.answers == ["Half "] and page.texts(".ending") == ["broken off"] and page.shows(".retry")


MARKED = """# Title
Some **bold with `code`**, `**code**` and <script>window.hacked = 1</script>.
- one
  2. two <img src=x onerror="window.hacked = 1">
```html
<script>window.hacked = 1</script> **not bold**
```
<tool_call>
{"name": "f", "arguments": {}}
</tool_call> 3 * 4 ** 5 ` &lt; <b>bold</b> [x](javascript:window.hacked=1) 2**3**4
"""


@pytest.mark.slow
def test_markup_is_set_off_and_every_character_stays(page, answering):
    answering(*re.findall(r"(?s).{1,7}", MARKED))
    page.ask(MARKED)
    assert page.answers == page.questions == [MARKED]
    assert page.texts(".assistant strong") == ["**bold with `code`**", "**3**"]
    assert page.texts(".said div code") == ["`code`", "`**code**`"]
    assert page.texts(".heading, .item") == [line + "\n" for line in MARKED.split("\n") if re.match(r"#|\s*[-2]", line)]
    assert page.texts("pre code") == ["<script>window.hacked = 1</script> **not bold**\n"]
    assert page.one(".assistant .said").text.count("<script>") == 2
    assert not page.all(".said script, .said img, .said b, .said a")
    assert page.browser.execute_script("return window.hacked") is None


RENDER = """
const done = arguments[1];
import("/page/markdown.js").then(({ renderAnswer }) => done(arguments[0].map((text) => {
  const box = document.createElement("div");
  box.append(...renderAnswer(text));
  return [box.textContent, [...new Set([...box.querySelectorAll("*")].map((e) => e.localName))]];
})), (error) => done(String(error)));
"""
PIECES = st.sampled_from(
    ["`", "``", "```", "~~~", "**", "*", "\n", " ", "- ", "1. ", "# ", "a", "<b>", "</script>", "你"]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=40))


@pytest.mark.slow
def test_no_character_of_any_text_is_lost(page):
    @settings(max_examples=60)
    @given(st.lists(TEXTS, min_size=20, max_size=20))
    def check(texts):
        for text, (shown, tags) in zip(texts, page.browser.execute_async_script(RENDER, texts), strict=True):
            assert shown == text
            assert set(tags) <= {"div", "span", "strong", "code", "pre"}

    check()


@pytest.mark.slow
def test_a_model_that_repeats_itself_does_not_hold_up_the_page(page):
    page.browser.set_script_timeout(30)
    for unit in ("`", "**", "**a", "`a", "```\n", "a** ", "- ", "# ", " "):
        text = unit * (200_000 // len(unit))
        ((shown, _),) = page.browser.execute_async_script(RENDER, [text])
        assert shown == text


@pytest.mark.slow
def test_reasoning_stands_apart(page, answering, asked):
    answering(Piece("reasoning", "I <b>think</b>."), "So it is.")
    page.ask("x")
    assert page.texts(".thought .text") == ["I <b>think</b>."] and page.answers == ["So it is."]
    page.click(".thought summary")
    page.ask("y")
    reasoned = {"role": "assistant", "content": "So it is.", "reasoning_content": "I <b>think</b>."}
    assert asked[1]["messages"][1] == reasoned


@pytest.mark.slow
def test_what_goes_wrong_is_said_and_can_be_tried_again(page, answering):
    def fail():
        raise RequestError("not enough memory", status=503)

    answering("Half", fail)
    page.ask("x")
    assert page.one("#notice").text and page.answers == ["Half"] and page.texts(".ending") == ["broken off"]
    answering()
    page.click(".retry")
    page.wait_for_answer()
    assert page.one("#notice").text == "The answer was empty." and page.answers == []
    answering("Whole")
    page.click(".retry")
    page.wait_for_answer()
    assert page.answers == ["Whole"] and not page.shows("#notice")


@pytest.mark.slow
def test_a_server_that_is_gone(browser, models):
    with serving(models / "merged", "--page") as served:
        page = Page(browser, served)
    page.ask("x")
    wait_until(lambda: page.shows("#notice"))
    assert page.one("#notice").text in ("The connection to the server broke off.", "The server cannot be reached.")
    assert page.questions == ["x"] and page.shows(".retry")


@pytest.mark.slow
def test_the_key_is_asked_for(browser, models):
    with serving(models / "merged", "--page", "--api_key", "s3cret") as served:
        page = Page(browser, served)
        assert page.shows("#key-dialog") and not page.one("h1").text and not page.one("#key-error").text
        for wrong in ("guess", "密钥"):
            page.one("#key").clear()
            page.type(wrong + "\ue007", "#key")
            wait_until(lambda: page.one("#key-error").text == "That is not the key.")
        page.one("#key").clear()
        page.type("s3cret\ue007", "#key")
        wait_until(lambda: page.one("h1").text == "merged")
        page.set(max_tokens=3)
        page.ask("x")
        assert len(page.answers) == 1
        page.open()  # the tab knows it still
        wait_until(lambda: page.one("h1").text == "merged")
        assert "s3cret" not in page.browser.current_url + page.browser.page_source
        assert page.browser.execute_script("return localStorage.length + document.cookie.length") == 0


@pytest.mark.slow
def test_enter_of_an_input_method_sends_nothing(page, asked):
    page.type("ni hao")
    press = "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: arguments[1]}))"
    page.browser.execute_script(press, page.one("#question"), True)
    page.type("\n")
    assert page.questions == [] and page.one("#question").get_attribute("value") == "ni hao\n"
    page.browser.execute_script(press, page.one("#question"), False)
    page.wait_for_answer()
    assert page.questions == ["ni hao\n"]


@pytest.mark.slow
def test_the_interface_in_chinese(tmp_path, merged):
    with chromium(tmp_path, language="zh-CN") as browser:
        page = Page(browser, merged)
        assert page.one("#send").text == "发送" and page.one("#stop-tokens").text == "停止于 <|im_end|> <|endoftext|>"
        page.click("#language")
        assert page.one("#send").text == "Send"
        page.open()
        assert page.one("#send").text == "Send"  # this tab's choice


@pytest.mark.slow
def test_nothing_is_asked_elsewhere_and_nothing_is_complained_of(page):
    read_requests(page.browser)
    page.browser.get_log("browser")
    page.open()
    page.set(max_tokens=3)
    page.ask("x")
    requests = read_requests(page.browser)
    assert {url.removeprefix(page.served.url) for url in requests} == {
        *FILES,
        "/page/model.json",
        "/v1/chat/completions",
    }
    assert page.browser.get_log("browser") == []
