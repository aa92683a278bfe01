"""The page to talk to models, in a real browser: `pytest tests/test_talk_page.py`, about 30 s

Without Chromium all of it is skipped. On Debian and Ubuntu `apt-get install chromium` brings it.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny
from helpers import browser
from helpers.browser import Browser, Page
from helpers.methods import TRAIN, finetune
from helpers.server import KEY, Server

from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.lora import LoRA

pytestmark = pytest.mark.skipif(
    browser.PROGRAM is None, reason="needs Chromium: apt-get install chromium, or Google Chrome"
)

QUESTION = "What is the page made of?"
HOSTILE = """Of this:
<script>document.title = "owned"</script>
<img src=x onerror="document.title='owned'">"""
BUSY, IDLE = "stopper !== null", "stopper === null"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, sample_dir: Path) -> Path:
    """A tiny model that can read so much that it never comes to the end of an answer by itself."""
    changes = dict(max_position_embeddings=60_000, vocab_size=49152)
    return make_tiny(tmp_path_factory.mktemp("long") / "tiny", sample_dir, **changes)


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint: Path) -> Iterator[Server]:
    """A server with a key and room for two requests: base, and a LoRA that has learned to answer with HTML."""
    folder = tmp_path_factory.mktemp("run")
    questions = [QUESTION, "Who?", "What else is there?", "And now?"]
    rows = [{"instruction": question, "output": HOSTILE, "split": "train"} for question in questions]
    rows.append({"instruction": "Why?", "output": HOSTILE, "split": "val"})
    prepare(rows, DataArgs(checkpoint_dir=checkpoint, data_dir=folder / "data"))
    train = replace(TRAIN, learning_rate=0.05, max_steps=20, epochs=20, eval_interval=20, save_interval=20)
    lora = LoRA(mlp=True, head=True)  # with the head it knows the answer by heart in seconds
    finetune("lora", checkpoint, folder / "data", folder / "tuned", train=train, lora=lora)
    flags = ["--finetuned", folder / "tuned", "--with_base", "--api_key", KEY, "--max_new_tokens", "50000"]
    server = Server(checkpoint, *flags, "--max_batch", "1", "--max_waiting", "0")
    yield server
    server.end()
    assert "Traceback" not in server.log.result() and "ERROR" not in server.log.result()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.end()


@pytest.fixture
def page(server: Server, chromium: Browser) -> Iterator[Page]:
    """The page, with the server's key."""
    page = with_key(Page(chromium, server.url))
    yield page
    page.close()
    server.wait_until_idle()


def with_key(page: Page) -> Page:
    """Types the key where the page asks for it."""
    page.wait_for("document.activeElement.id === 'key'")
    page.type(KEY)
    page.press("Enter")
    page.wait_for("models.length === 2")
    return page


def ask(page: Page, question: str) -> None:
    """Types a question, sends it, and waits for the answers."""
    n_turns = len(page.texts(".turn"))
    page.fill("#question", question)
    page.press("Enter")
    page.wait_for(f"document.querySelectorAll('.turn').length === {n_turns + 1}")
    page.wait_for(IDLE)


def answers(page: Page) -> dict[str, str]:
    """The last answer of each model, by the name above it."""
    names = page.texts(".turn:last-child h3")
    return dict(zip(names, page.texts(".turn:last-child .answer"), strict=True))


def bodies(page: Page) -> list[dict[str, Any]]:
    """The questions that the page has asked the server."""
    return [json.loads(request["postData"]) for request in page.requests() if request["method"] == "POST"]


def expected(server: Server, model: str, messages: list[dict[str, str]], **options: Any) -> str:
    """What OpenAI's client gets."""
    answer = server.client().chat.completions.create(model=model, messages=messages, **options)
    return answer.choices[0].message.content


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


# ---- talking


def test_a_conversation_with_two_models(page: Page, server: Server) -> None:
    """Each answer comes in parts into its own column and is the API's, and each model goes on with its own answers."""
    page.fill("#max_tokens", "40")
    page.value(
        "sizes = []; new MutationObserver(() => sizes.push(document.querySelector('.answer')?.textContent.length))"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    ask(page, QUESTION)
    first = answers(page)
    assert list(first) == ["base", "tuned"] and first["base"] != first["tuned"]
    for name, answer in first.items():
        assert answer == expected(server, name, [user(QUESTION)], temperature=0, max_tokens=40)
    assert len({size for size in page.value("sizes") if size}) > 10
    assert page.value("sizes.every((size, i) => i === 0 || !sizes[i - 1] || size >= sizes[i - 1])")

    # beside each other, and that an answer was cut is said
    left, right = page.value("[...document.querySelectorAll('section')].map((e) => e.getBoundingClientRect().x)")
    assert left + 300 < right
    assert "Cut" in page.text("section:first-child .note")

    # a second turn, of two lines
    page.click("#question")
    page.type("And")
    page.press("Enter", shift=True)
    page.type("then?")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('.turn').length === 2")
    page.wait_for(IDLE)
    for name, answer in answers(page).items():
        history = [user(QUESTION), {"role": "assistant", "content": first[name]}, user("And\nthen?")]
        assert answer == expected(server, name, history, temperature=0, max_tokens=40)
    assert page.text(".turn:last-child h2") == "And\nthen?"

    # a new conversation knows nothing of it
    page.click("#new")
    assert page.texts(".turn") == []
    ask(page, QUESTION)
    assert answers(page) == first
    assert page.errors() == [failed_without_key(server)]


def failed_without_key(server: Server) -> str:
    """What Chromium itself writes to the console when the page asks without a key for the first time."""
    return f"Failed to load resource: the server responded with a status of 401 (Unauthorized) {server.url}v1/models"


def test_settings_arrive(page: Page, server: Server) -> None:
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.9")
    page.fill("#max_tokens", "25")
    page.fill("#seed", "7")
    ask(page, "Who?")
    messages = [{"role": "system", "content": "Be brief."}, user("Who?")]
    options = {"temperature": 0.9, "max_tokens": 25, "seed": 7}
    assert bodies(page) == [
        {"model": name, "messages": messages, **options, "stream": True} for name in ("base", "tuned")
    ]
    assert answers(page) == {name: expected(server, name, messages, **options) for name in ("base", "tuned")}
    # empty fields are the server's to decide
    for field in ("system", "temperature", "max_tokens", "seed"):
        page.fill(f"#{field}", "")
    page.click("#new")
    page.click("#question")
    page.type("Who?")
    page.press("Enter")
    page.wait_for(BUSY)
    page.press("Escape")
    page.wait_for(IDLE)
    assert bodies(page)[-1] == {"model": "tuned", "messages": [user("Who?")], "stream": True}


@pytest.mark.parametrize("way", ["Escape", "Stop", "New conversation"])
def test_an_answer_is_stopped_and_one_goes_on(way: str, page: Page, server: Server) -> None:
    page.fill("#max_tokens", "50000")
    page.click("#question")
    page.type("Count.")
    page.press("Enter")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 50")
    assert server.n_open() > 0
    if way == "Escape":
        page.press("Escape")
    else:
        page.click("#stop" if way == "Stop" else "#new")
    page.wait_for(IDLE)
    server.wait_until_idle()

    stopped = "" if way == "New conversation" else answers(page)["base"]
    page.fill("#max_tokens", "10")
    ask(page, "And now?")
    before = [user("Count."), {"role": "assistant", "content": stopped}] if stopped else []
    asked = {body["model"]: body["messages"] for body in bodies(page)[-2:]}
    assert asked["base"] == [*before, user("And now?")]
    assert answers(page)["base"] == expected(server, "base", asked["base"], temperature=0, max_tokens=10)


def test_a_long_answer_is_followed_and_a_reader_left_alone(page: Page) -> None:
    page.fill("#max_tokens", "50000")
    page.fill("#question", "Count.")
    page.press("Enter")
    root = "document.documentElement"
    page.wait_for(f"{root}.scrollHeight > {root}.clientHeight + 200")
    assert page.value(f"{root}.scrollHeight - {root}.scrollTop - {root}.clientHeight") < 2
    page.value("scrollTo(0, 50)")
    height = page.value(f"{root}.scrollHeight")
    page.wait_for(f"{root}.scrollHeight > {height + 100}")
    assert page.value(f"{root}.scrollTop") == 50
    page.press("Escape")
    page.wait_for(IDLE)


# ---- what may go wrong


def test_what_the_server_refuses_is_said(page: Page, server: Server) -> None:
    page.fill("#temperature", "-1")
    ask(page, "Who?")
    (said,) = {*page.texts(".turn .error")}
    assert said.startswith("temperature is -1: ")
    assert page.value("document.getElementById('question').value") == "Who?"  # it need not be typed again

    # too many at once: another client has all places
    page.fill("#temperature", "0")
    stream = [
        server.client().chat.completions.create(
            model="base", messages=[user("Count.")], temperature=0, max_tokens=50_000, stream=True
        )
        for _ in range(2)
    ]
    page.click("#new")
    ask(page, "Who?")
    assert {*page.texts(".turn .error")} == {"Too many requests wait already. Try again later."}
    for one in stream:
        one.close()
    server.wait_until_idle()
    page.fill("#max_tokens", "10")
    page.click("#question")
    page.press("Enter")  # the question is still there
    page.wait_for("document.querySelectorAll('.answer').length === 2")
    page.wait_for(IDLE)
    # what was refused is no part of the conversation
    assert bodies(page)[-1]["messages"] == [user("Who?")]


def test_a_wrong_key_is_said(server: Server, chromium: Browser) -> None:
    page = Page(chromium, server.url)
    page.wait_for("document.activeElement.id === 'key'")
    assert page.text("#problem") == "This server asks for a key."
    page.type("another")
    page.press("Enter")
    page.wait_for("document.getElementById('problem').textContent.includes('not the key')")
    page.fill("#key", KEY)
    page.press("Enter")
    page.wait_for("models.length === 2")
    assert page.value("document.getElementById('problem').hidden && document.getElementById('key-form').hidden")
    page.close()


def test_a_server_that_goes(checkpoint: Path, chromium: Browser) -> None:
    """In the middle of an answer, and before a question. Without a key none is asked for."""
    server = Server(checkpoint, "--max_new_tokens", "50000", "--model_name", "alone")
    try:
        page = Page(chromium, server.url)
        page.wait_for("models.length === 1")
        assert page.errors() == [] and page.value("document.getElementById('key-form').hidden")
        page.fill("#max_tokens", "50000")
        page.click("#question")
        page.type("Count.")
        page.press("Enter")
        page.wait_for("document.querySelector('.answer')?.textContent.length > 50")
    finally:
        server.end()
    page.wait_for(IDLE)
    assert page.texts(".turn .error") == ["The server has gone before the answer was complete."]
    ask(page, "Are you there?")
    assert page.texts(".turn:last-child .error") == ["The server does not answer. Does it still run?"]
    page.close()


def test_an_answer_is_text_and_nobody_else_is_asked(page: Page, server: Server) -> None:
    ask(page, QUESTION)
    assert answers(page)["tuned"] == HOSTILE
    assert page.text("section:last-child .answer") == HOSTILE  # as it is shown, with its lines
    ask(page, HOSTILE)
    assert page.text(".turn:last-child h2") == HOSTILE
    assert page.value("document.title") == "lit-gpt"
    assert page.value("document.querySelectorAll('main script, main img').length") == 0
    # a script that came into the page nevertheless would be refused
    page.value(f"document.querySelector('main').insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    page.value("new Promise((resolve) => setTimeout(resolve, 100))")
    assert page.value("document.title") == "lit-gpt"
    refused = [error for error in page.errors() if error != failed_without_key(server)]
    assert len(refused) == 2 and all("violates the following Content Security Policy" in error for error in refused)
    asked = {request["url"] for request in page.requests()} - {f"{server.url}x"}  # the image, which was refused
    assert {url for url in asked if not url.startswith((server.url, "data:"))} == set()


# ---- for everybody


def test_keys_reach_everything_and_the_focus_is_seen(page: Page) -> None:
    reached = []
    page.wait_for("document.activeElement.id === 'question'")
    page.press("Tab")
    for _ in range(8):
        style = page.value(
            "{const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement);"
            " [outlineStyle, outlineWidth]}"
        )
        reached.append(page.value("document.activeElement.id || document.activeElement.tagName"))
        assert style == ["solid", "2px"], reached
        page.press("Tab", shift=True)
    assert reached == ["send", "question", "new", "seed", "max_tokens", "temperature", "system", "SUMMARY"]

    # the focus is not lost with a button that goes
    page.fill("#max_tokens", "50000")
    page.click("#question")
    page.type("Count.")
    page.press("Tab")
    page.press("Enter")
    page.wait_for(BUSY)
    assert page.value("document.activeElement.id") == "stop"
    page.press("Enter")
    page.wait_for(IDLE)
    assert page.value("document.activeElement.id") == "question"


def test_everything_has_a_name_and_a_role(page: Page) -> None:
    page.fill("#max_tokens", "10")
    ask(page, "Who?")
    named = page.accessible()
    roles = {"textbox", "spinbutton", "button", "DisclosureTriangle", "log", "region", "heading"}
    assert {node for node in named if node[0] in roles} == {
        ("DisclosureTriangle", "Settings"),
        ("textbox", "System prompt"),
        ("spinbutton", "Temperature"),
        ("spinbutton", "Tokens at most"),
        ("spinbutton", "Seed"),
        ("button", "New conversation"),
        ("log", "Conversation"),
        ("heading", "Who?"),
        ("region", "base"),
        ("heading", "base"),
        ("region", "tuned"),
        ("heading", "tuned"),
        ("textbox", "Question"),
        ("button", "Send"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_on_a_narrow_screen(dark: bool, server: Server, chromium: Browser) -> None:
    """On 360 pixels nothing is cut off or has to be moved aside, and each text stands out from what is behind it."""
    page = with_key(Page(chromium, server.url, width=360, height=640, dark=dark))
    page.click("summary")
    page.fill("#max_tokens", "10")
    ask(page, "A" * 300)
    page.fill("#temperature", "-1")
    ask(page, "Who?")
    assert page.text(".note") and page.text(".turn .error")
    assert page.value("document.documentElement.scrollWidth") == 360
    boxes = page.value("[...document.querySelectorAll('main *, form *')].map((e) => e.getBoundingClientRect().right)")
    assert max(boxes) <= 360
    lefts = page.value("[...document.querySelectorAll('section')].map((e) => e.getBoundingClientRect().x)")
    assert len({*lefts}) == 1  # one below the other
    ratios = page.value(CONTRASTS)
    assert len(ratios) > 10 and min(ratios.values()) >= 4.5, ratios
    background = page.value("getComputedStyle(document.getElementById('form')).backgroundColor")
    assert (background != "rgb(255, 255, 255)") == dark
    page.close()


# of each element with text, and of the field's hint: the contrast with the nearest background that is not transparent.
# The formula is WCAG's: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba(getComputedStyle(document.getElementById("form")).backgroundColor);  // the page's own
  };
  const contrast = (element, pseudo) => {
    const [a, b] = [rgba(getComputedStyle(element, pseudo).color), background(element)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const ratios = {hint: contrast(document.getElementById("question"), "::placeholder")};
  const isText = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "";
  for (const element of document.body.querySelectorAll("*:not(script)")) {
    const hasText = [...element.childNodes].some(isText) || element.matches("input, textarea");
    if (hasText && element.checkVisibility()) {
      ratios[`${element.tagName} ${element.id} ${element.className} ${Object.keys(ratios).length}`] = contrast(element);
    }
  }
  return ratios;
})()"""
