"""A server in a process of its own, asked by OpenAI's client and by hand: `pytest tests/test_serve.py`, about 1 min"""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import openai
import pydantic
import pytest
import schemathesis
import torch
from conftest import ROOT, make_tiny
from helpers.methods import finetune
from helpers.runs import write_data
from helpers.scripts import load
from helpers.server import BATCH, CHAT, COMPLETIONS, KEY, WAITING, Server, endless
from helpers.shell import python
from helpers.tiny_tokenizers import SPECIAL, TEXTS, byte_level, metaspace, sentencepiece, write
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.prompts import render
from lit_gpt.generate.decode import generate
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.engine_thread import Busy, EngineFailed, EngineThread
from lit_gpt.generate.make_requests import RequestMaker
from lit_gpt.generate.protocol import ProcessBody
from lit_gpt.generate.sampling import Sampling
from lit_gpt.generate.token_texts import TokenOffsets, TokenTexts
from lit_gpt.runs.load_finetuned import UseArgs
from lit_gpt.runs.side_by_side import load_models_for_use

QUESTION = [{"role": "user", "content": "Who was Ada?"}]
PROMPT = "Once upon a time"
BLOCK = 60_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, sample_dir: Path) -> Path:
    """A tiny model that can read so much that it never comes to the end of an answer by itself."""
    shape = dict(vocab_size=49152, max_position_embeddings=BLOCK)
    return make_tiny(tmp_path_factory.mktemp("long") / "tiny", sample_dir, **shape)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    server = Server(checkpoint, "--api_key", KEY, "--max_new_tokens", "50000", "--model_name", "tiny")
    yield server
    server.end()
    assert "Traceback" not in server.log.result() and "ERROR" not in server.log.result()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GPT:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def greedy(model: GPT, tokenizer: Tokenizer, prompt: torch.Tensor, n: int) -> list[int]:
    """The tokens of a greedy answer, by the other way to generate."""
    out = generate(model, prompt, len(prompt) + n, temperature=0.0, eos_id=tokenizer.stop_ids)
    return out[len(prompt) :].tolist()


def logprobs(model: GPT, tokens: list[int]) -> torch.Tensor:
    """What the model thinks of each token but the first, and of all others in its place, (T - 1, V), in float64."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, :-1].double().log_softmax(-1)


def ask_for(schema: dict[str, Any], name: str = "a") -> dict[str, Any]:
    """The body of a request for an answer by a schema."""
    return {
        "messages": QUESTION,
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
    }


# each line of it doubles the time to read it
DOUBLING = {"allOf": [{"type": "string", "pattern": f"^.*[a-f]{{{i}}}.*x$"} for i in range(1, 40)]}


# ---- OpenAI


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here, expected one of tiny"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)


def test_chat_says_what_generate_says(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = encode_question(render("chat", {"messages": messages}, tokenizer), tokenizer)
    tokens = greedy(model, tokenizer, prompt, 30)
    expected = tokenizer.decode(tokens)
    options: dict[str, Any] = dict(model="tiny", messages=messages, temperature=0, max_completion_tokens=30)

    whole = server.client().chat.completions.create(**options, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert choice.message.content == expected and choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(tokens)) == (len(prompt), 30)
    values = logprobs(model, [*prompt.tolist(), *tokens])[-30:]
    shown = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in shown).decode(errors="replace") == expected
    for row, token, token_id in zip(values, shown, tokens, strict=True):
        top = row.topk(3)
        assert token.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert token.top_logprobs[0].token == token.token  # it is greedy

    # parts of content may be given, and an answer in parts
    parts = [{"type": "text", "text": "Who was "}, {"type": "text", "text": "Ada?"}]
    stream = server.client().chat.completions.create(
        **options | {"messages": [messages[0], {"role": "user", "content": parts}]},
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 10 and last.choices == [] and last.usage.completion_tokens == 30


class Person(pydantic.BaseModel):
    """What a client may ask for, with bounds, so that a random model comes to an end."""

    name: Annotated[str, pydantic.Field(max_length=8)]
    age: Annotated[int, pydantic.Field(ge=0, lt=150)]
    likes: Annotated[list[Literal["tea", "coffee"]], pydantic.Field(max_length=3)]
    mother: Optional["Person"]  # noqa: UP045 # a class is not there yet in its own body


def test_answers_are_json_by_a_schema(server: Server) -> None:
    """As OpenAI's client asks for them, whole and in parts."""
    client = server.client()
    options: dict[str, Any] = dict(model="tiny", messages=QUESTION, max_tokens=2000)
    for seed in range(4):
        whole = client.chat.completions.parse(**options, response_format=Person, temperature=1.5, seed=seed)
        (choice,) = whole.choices
        assert isinstance(choice.message.parsed, Person) and choice.finish_reason == "stop"
        with client.chat.completions.stream(**options, response_format=Person, temperature=1.5, seed=seed) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == choice.message.content
        assert final.choices[0].message.parsed == choice.message.parsed
    # any object, which may be cut as any answer may
    create = client.chat.completions.create
    cut = create(**options | {"max_tokens": 5}, response_format={"type": "json_object"})
    assert cut.choices[0].message.content.startswith("{") and cut.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**options | {"max_tokens": 5}, response_format=Person)
    # n answers, and no chat
    response_format = ask_for({"enum": ["a", "b"]})["response_format"]
    several = create(**options, n=3, response_format=response_format)
    assert {choice.message.content for choice in several.choices} <= {'"a"', '"b"'}
    completion = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=50, extra_body={"response_format": response_format}
    )
    assert completion.choices[0].text in ('"a"', '"b"')


def test_completions(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    """Several prompts at once, as texts or tokens; with the prompt and its log-probabilities, if asked."""
    texts = [PROMPT, "To be, or not to be: 🦜"]
    prompts = [tokenizer.encode(text) for text in texts]
    answers = [greedy(model, tokenizer, prompt, 12) for prompt in prompts]
    create = server.client().completions.create
    options: dict[str, Any] = dict(model="tiny", temperature=0, max_tokens=12)
    for asked in (texts, [prompt.tolist() for prompt in prompts]):
        result = create(prompt=asked, **options)
        assert [choice.text for choice in result.choices] == [tokenizer.decode(answer) for answer in answers]
        echoed = create(prompt=asked, echo=True, logprobs=2, n=2, **options)
        assert [choice.index for choice in echoed.choices] == [0, 1, 2, 3]
        assert result.usage.prompt_tokens == echoed.usage.prompt_tokens == sum(map(len, prompts))
        for choice in echoed.choices:
            number = choice.index // 2
            tokens = [*prompts[number].tolist(), *answers[number]]
            assert choice.text == texts[number] + tokenizer.decode(answers[number])
            first, *values = choice.logprobs.token_logprobs
            expected = logprobs(model, tokens)
            at_tokens = expected.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
            assert first is None and values == pytest.approx(at_tokens, abs=1e-4)
            for row, top in zip(expected, choice.logprobs.top_logprobs[1:], strict=True):
                assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            pieces = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
            assert all(choice.text[begin:].startswith(piece) for piece, begin in pieces if "bytes:" not in piece)
    # what evaluations ask: the prompt alone
    (choice,) = create(model="tiny", prompt=texts[1], max_tokens=0, echo=True, logprobs=0).choices
    assert choice.text == texts[1] and len(choice.logprobs.tokens) == len(prompts[1])


def test_a_completion_in_parts(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    create = server.client().completions.create
    options: dict[str, Any] = dict(model="tiny", prompt=[PROMPT, "Four"], temperature=1, seed=3, max_tokens=15, n=2)
    whole = create(**options, logprobs=1, echo=False)
    texts = ["" for _ in range(4)]
    values: list[list[float]] = [[] for _ in range(4)]
    offsets: list[list[int]] = [[] for _ in range(4)]
    for chunk in create(**options, logprobs=1, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        values[choice.index] += choice.logprobs.token_logprobs
        offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 4
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    for choice, streamed in zip(whole.choices, values, strict=True):
        assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    echoed = ["" for _ in range(4)]
    for chunk in create(**options, echo=True, stream=True):
        echoed[chunk.choices[0].index] += chunk.choices[0].text
    prompts = [PROMPT, PROMPT, "Four", "Four"]
    assert echoed == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def test_stop_seed_and_bias(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    create = server.client().completions.create
    options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=20)
    whole = create(**options, temperature=0).choices[0].text
    middle = whole[len(whole) // 2 :][:5]
    for stop in (middle, ["not there", middle]):
        (choice,) = create(**options, temperature=0, stop=stop, logprobs=0).choices
        assert (choice.text, choice.finish_reason) == (whole[: whole.find(middle)], "stop")
        assert len(choice.logprobs.tokens) < 20
        streamed = "".join(chunk.choices[0].text for chunk in create(**options, temperature=0, stop=stop, stream=True))
        assert streamed == choice.text

    def sampled(**more: Any) -> list[str]:
        return [choice.text for choice in create(**options, temperature=1, **more).choices]

    assert sampled(seed=5, n=3) == sampled(seed=5, n=3) and len(set(sampled(seed=5, n=3))) == 3
    assert sampled(seed=5) == sampled(seed=5 + 2**32) != sampled(seed=6) and sampled() != sampled()
    assert sampled(top_p=1e-6) == [whole] == sampled(extra_body={"top_k": 1}) == sampled(extra_body={"min_p": 1})
    word = tokenizer.encode(" word").tolist()
    assert len(word) == 1
    assert sampled(logit_bias={str(word[0]): 100}) == [" word" * 20]
    # a stop token is not shown
    (choice,) = create(**options, logit_bias={str(tokenizer.eos_id): 100}, logprobs=1).choices
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("", "stop", [])


def test_an_answer_does_not_depend_on_the_others(server: Server) -> None:
    def said(number: int) -> str:
        create = server.client().completions.create
        return create(model="tiny", prompt=f"{PROMPT} {number}", seed=number, max_tokens=25).choices[0].text

    alone = [said(number) for number in range(BATCH + WAITING)]
    with ThreadPoolExecutor(BATCH + WAITING) as threads:
        assert list(threads.map(said, range(BATCH + WAITING))) == alone
    assert len(set(alone)) == len(alone)


def test_models_side_by_side(tmp_path: Path, tiny_dir: Path) -> None:
    data_dir = write_data(tmp_path / "data", tiny_dir)
    run = tmp_path / "quickstart"
    finetune("lora", tiny_dir, data_dir, run)
    args = UseArgs(precision="32-true")
    models, tokenizer, style = load_models_for_use(args, [run], torch.device("cpu"), with_base=True)
    prompt = encode_question(render(style, {"messages": QUESTION}, tokenizer), tokenizer)
    server = Server(tiny_dir, "--finetuned", run, "--with_base")
    try:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["base", "quickstart"] == list(models)
        said = {}
        for name, model in models.items():
            answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=20)
            said[name] = answer.choices[0].message.content
            assert said[name] == tokenizer.decode(greedy(model, tokenizer, prompt, 20)) and answer.model == name
        assert said["base"] != said["quickstart"]
        run_examples(server)
        # Ctrl-C is how it is ended
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0 and "Traceback" not in server.log.result()
    finally:
        server.end()


def run_examples(server: Server) -> None:
    """What the tutorial prints for a server that runs."""
    page = (ROOT / "tutorials/serve.md").read_text().replace("http://127.0.0.1:8000", server.url.rstrip("/"))
    commands = re.findall(r"^```sh\n(curl .*?)```", page, re.DOTALL | re.MULTILINE)
    programs = re.findall(r"^```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 2 and len(programs) >= 3
    for command in commands:
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert json.loads(result.stdout).keys() & {"choices", "tokens"}
    names: dict[str, Any] = {}  # the later ones go on with what the first has imported
    for program in programs:
        exec(program, names)
    assert len(names["answer"].choices) == 3 and names["said"].text == names["text"]


# ---- the challenge


def test_the_challenge(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    tokens = greedy(model, tokenizer, prompt, 10)
    of_helm = {
        "prompt": PROMPT,
        "temperature": 1e-7,
        "num_return_sequences": 1,
        "max_new_tokens": 10,
        "top_p": 1,
        "echo_prompt": False,
        "top_k_per_token": 2,
        "stop_sequences": [],
    }
    of_schema = {"prompt": PROMPT, "temperature": 0, "num_samples": 1, "max_new_tokens": 10, "top_k": 200, "seed": 1}
    for body, n_top in ((of_helm, 2), (of_schema, 1)):
        status, result, _ = server.ask("POST", "/process", body)
        assert status == 200 and set(result) == {"text", "tokens", "logprob", "request_time"}
        assert result["text"] == tokenizer.decode(tokens) and len(result["tokens"]) == 10
        values = logprobs(model, [*prompt.tolist(), *tokens])
        at_tokens = values.gather(-1, torch.tensor([*prompt.tolist(), *tokens][1:])[:, None])[:, 0]
        assert [token["logprob"] for token in result["tokens"]] == pytest.approx(at_tokens[-10:].tolist(), abs=1e-4)
        assert result["logprob"] == pytest.approx(at_tokens[-10:].sum().item(), abs=1e-3)
        assert all(len(token["top_logprob"]) == n_top for token in result["tokens"])
        assert all(max(token["top_logprob"].values()) == token["logprob"] for token in result["tokens"])
        assert 0 < result["request_time"] < 60

        # the prompt only if it is asked for; each token by what stands before it
        _, echoed, _ = server.ask("POST", "/process", body | {"echo_prompt": True})
        assert echoed["text"] == PROMPT + result["text"]
        assert [token["logprob"] for token in echoed["tokens"]] == pytest.approx([0.0, *at_tokens.tolist()], abs=1e-4)
        assert all(value <= 0 for token in echoed["tokens"] for value in token["top_logprob"].values())

    stop = result["text"][10:14]
    _, stopped, _ = server.ask("POST", "/process", of_helm | {"stop_sequences": [stop]})
    assert stopped["text"] == result["text"][: result["text"].find(stop)]
    _, several, _ = server.ask("POST", "/process", of_schema | {"num_samples": 3, "temperature": 0.8})
    assert len({sample["text"] for sample in several["samples"]}) == 3
    assert several["samples"][0] == {key: several[key] for key in ("text", "tokens", "logprob")}


def test_an_answer_of_the_challenge_ends_with_the_window(tokenizer: Tokenizer) -> None:
    maker = RequestMaker(tokenizer, "chat", 9, max_new_tokens=20, defaults=Sampling(), seeds=random.Random(0))
    n = len(tokenizer.encode(PROMPT))
    assert n < 9
    for asked, expected in ((50, 9 - n), (9 - n, 9 - n), (1, 1)):
        (request,) = maker.of_process(ProcessBody(prompt=PROMPT, max_new_tokens=asked))
        assert request.max_new_tokens == expected
    with pytest.raises(InputError, match="and the model can read 9 in all"):
        maker.of_process(ProcessBody(prompt=PROMPT * 9))


def test_tokenize_and_decode(server: Server, tokenizer: Tokenizer) -> None:
    text = "word " * 3000
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > 2048
    for more, expected in (
        ({}, ids[:2048]),
        ({"max_length": 7}, ids[:7]),
        ({"truncation": False}, ids),
        ({"truncation": False, "max_length": 7}, ids),
    ):
        status, result, _ = server.ask("POST", "/tokenize", {"text": text, **more})
        assert (status, result["tokens"]) == (200, expected) and result["request_time"] > 0
    status, result, _ = server.ask("POST", "/decode", {"tokens": ids[:50]})
    assert (status, result["text"]) == (200, tokenizer.decode(ids[:50])) and result["request_time"] > 0


# ---- what is wrong


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COMPLETIONS, b"", "Field required"),
        (COMPLETIONS, b'{"prompt": "a"', "JSON"),
        (COMPLETIONS, b"[" * 100_000, "body|JSON"),
        (COMPLETIONS, b"\xff\xfe\x00", "body|JSON"),
        (COMPLETIONS, b'{"prompt": "half a pair: \\ud83d"}', "half a surrogate pair"),
        (COMPLETIONS, [], "expected a JSON object"),
        (COMPLETIONS, {}, "prompt: Field required"),
        (COMPLETIONS, {"prompt": []}, "expected a text, a list of texts"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "expected a text, a list of texts"),
        (COMPLETIONS, {"prompt": [-1]}, "expected a text, a list of texts"),
        (COMPLETIONS, {"prompt": [[1, True]]}, "expected a text, a list of texts"),
        (COMPLETIONS, {"prompt": [49152]}, "A token of the prompt is not one of the model's"),
        (COMPLETIONS, {"prompt": ""}, "The prompt has 0 tokens"),
        (COMPLETIONS, {"prompt": ["a"] * 9}, "9 answers are asked for at once, expected 8 at most"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n is 0: Input should be greater than or equal to 1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, "new tokens are asked for, expected 50000 at most"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, 'max_tokens is "many": Input should be a valid integer'),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "No new tokens are asked for"),
        (
            COMPLETIONS,
            {"prompt": "a", "temperature": -1},
            "^temperature is -1: Input should be greater than or equal to 0",
        ),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "^temperature is NaN: Input should be a finite number"),
        (COMPLETIONS, {"prompt": "a", "top_p": 2}, "^top_p is 2: Input should be less than or equal to 1"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a", ""]}, 'stop.1 is "": String should have at least 1 character'),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias.a.*: Input should be a valid integer"),
        (
            COMPLETIONS,
            {"prompt": "a", "logit_bias": {"1": 101}},
            "logit_bias.1 is 101: Input should be less than or equal",
        ),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"49152": 1}}, "logit_bias has token 49152, expected 0 to 49151"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs is 21: Input should be less than or equal to 20"),
        (COMPLETIONS, {"prompt": "a", "frequency_penalty": 1}, "frequency_penalty is not supported here"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix is not supported here"),
        (COMPLETIONS, {"prompt": "a", "promt": "b"}, 'promt is "b": Extra inputs are not permitted'),
        (CHAT, {"messages": []}, "messages: List should have at least 1 item"),
        (CHAT, {"messages": "Who?"}, 'messages is "Who.": Input should be a valid list'),
        (CHAT, {"messages": [{"role": "user"}]}, "a message without content"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "content of user"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, "image_url"),
        (CHAT, {"messages": [*QUESTION, {"role": "assistant", "content": "A"}]}, "The last message is the assistant's"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate pair"),
        (
            CHAT,
            {"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            "The chat template of this model takes no tools",
        ),
        (
            CHAT,
            {"messages": QUESTION, "response_format": {"type": "xml"}},
            'response_format.type is "xml": Input should be',
        ),
        (
            CHAT,
            {"messages": QUESTION, "response_format": {"type": "json_schema"}},
            "expected a json_schema, with a name and a schema",
        ),
        (CHAT, ask_for({"type": "objekt"}), "^The JSON schema cannot be used: Invalid type: objekt. Change it"),
        (CHAT, ask_for({"not": {}}), "cannot be used: Unimplemented keys: ."),
        (CHAT, ask_for({"type": "string"}, name="a b"), 'json_schema.name is "a b": String should match pattern'),
        (CHAT, ask_for(DOUBLING), "cannot be used: to read it takes more than 5 s"),
        (CHAT, {"messages": QUESTION, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * BLOCK}]}, "and the model can read 60000 in all"),
        ("/process", b'{"prompt"', "JSON"),
        ("/process", {"prompt": 3}, "Input should be a valid string"),
        ("/process", {"prompt": "a", "temperature": -1}, "greater than or equal to 0"),
        ("/process", {"prompt": ""}, "The prompt has 0 tokens"),
        ("/tokenize", {}, "Field required"),
        ("/tokenize", {"text": "a", "max_length": -1}, "greater than or equal to 0"),
        ("/decode", {"tokens": [-1]}, "greater than or equal to 0"),
        ("/decode", {"tokens": [10**20]}, "less than"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_refused_in_words(server: Server, path: str, body: Any, said: str, stream: bool) -> None:
    if stream and path.startswith("/v1/") and isinstance(body, dict):
        body = body | {"stream": True}
    status, result, _ = server.ask("POST", path, body)
    if path.startswith("/v1/"):
        assert status == 400 and set(result["error"]) == {"message", "type", "param", "code"}
        message = result["error"]["message"]
    else:
        assert status == 422
        (problem,) = result["detail"]
        assert problem["loc"][0] == "body" and problem["type"]
        message = problem["msg"]
    assert re.search(said, message) and "..." not in message and not message.endswith("..")
    assert server.n_open() == 0


def test_no_route_no_method_no_key_too_large(server: Server) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/../../../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        assert server.ask(method, path)[0] == status
    status, result, _ = server.ask("POST", "/tokenize", b" " * (2 * 2**20 + 1))
    assert status == 413
    for key in ("", "Bearer", "Bearer another", f"bearer{KEY}", f"Bearer {KEY}s", "Bearer caf\xe9"):
        for path in (CHAT, "/process", "/v1/models", "/nowhere"):
            status, result, _ = server.ask("GET", path, Authorization=key)
            assert status == 401 and result["error"]["type"] == "authentication_error"
    with pytest.raises(openai.AuthenticationError):
        server.client("another").models.list()
    assert server.ask("GET", "/health", Authorization="")[0] == 200
    # the page asks for the key itself, and this server alone for anything
    status, page, headers = server.ask("GET", "/", Authorization="")
    assert status == 200 and page == (ROOT / "lit_gpt/generate/talk.html").read_text() and "://" not in page
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    # another program's form of a body, as a browser sends it from another site without asking
    assert server.ask("POST", "/tokenize", {"text": "a"}, **{"Content-Type": "text/plain"})[0] == 422


def test_bytes_that_are_no_http(server: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /process HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(data)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.n_open() == 0


def test_it_is_as_it_describes_itself(checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Requests made from /openapi.json, right ones and wrong ones, get what it says: statuses, forms, events."""
    checks = [
        not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
    ]
    maker = RequestMaker(tokenizer, "chat", BLOCK, 20, Sampling(), random.Random(0))
    app = load(ROOT / "generate/serve.py").make_app(Engine(model, tokenizer), maker, 8, 60, KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    seen: dict[str, set[int]] = {}
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @given(strategy)
        @settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        def answers_as_described(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = ""  # the others are 404, before anything else is looked at
            response = case.call(headers=headers)
            seen.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=checks)

        answers_as_described()
    assert len(seen) == 8 and {status for statuses in seen.values() for status in statuses} >= {200, 400, 404, 422}
    assert all(200 in statuses for label, statuses in seen.items() if label.startswith("POST"))


# ---- many, slow, and gone


@contextmanager
def many(server: Server, body: dict[str, Any], n: int) -> Iterator[list[socket.socket]]:
    connections = [server.begin(COMPLETIONS, body) for _ in range(n)]
    while server.n_open() < n:
        time.sleep(0.05)
    yield connections
    for connection in connections:
        connection.close()
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_and_gone(server: Server, tokenizer: Tokenizer, stream: bool) -> None:
    """When the queue is full, others are told so; when those who wait go, their answers end, running or waiting."""
    with many(server, endless(tokenizer) | {"stream": stream}, BATCH + WAITING) as connections:
        status, result, headers = server.ask("POST", COMPLETIONS, {"prompt": "a"})
        assert status == 429 and result["error"]["type"] == "rate_limit_error" and int(headers["Retry-After"]) > 0
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(model="tiny", messages=QUESTION)
        connections[0].close()
        deadline = time.monotonic() + 20
        while server.n_open() == BATCH + WAITING:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert server.ask("POST", COMPLETIONS, {"prompt": "a"})[0] == 200


def test_an_answer_that_takes_too_long(checkpoint: Path, tokenizer: Tokenizer) -> None:
    server = Server(checkpoint, "--max_seconds", "4", "--max_new_tokens", "50000")
    try:
        # too slow
        with ThreadPoolExecutor() as threads:
            whole = threads.submit(server.ask, "POST", COMPLETIONS, endless(tokenizer))
            in_parts = threads.submit(server.ask, "POST", COMPLETIONS, endless(tokenizer) | {"stream": True})
        status, result, _ = whole.result()
        assert status == 504 and "took longer than this server allows" in result["error"]["message"]
        status, text, _ = in_parts.result()
        *_, last = text.strip().split("\n\n")
        assert status == 200 and "took longer" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.n_open() == 0

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert server.process.stdout.read() == "" and "Traceback" not in server.log.result()
    finally:
        server.end()


def test_an_address_that_is_taken(server: Server, checkpoint: Path) -> None:
    flags = ["--checkpoint_dir", checkpoint, "--port", server.port]
    result = python(ROOT / "generate/serve.py", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: 127.0.0.1:\d+ cannot be used \(.*in use\)\. Choose another --port.*\n", result.stderr)


# ---- the engine's thread


def test_a_failed_engine_is_told_to_all(model: GPT, checkpoint: Path, tokenizer: Tokenizer) -> None:
    broken = load_model(checkpoint)
    request = Request(tokenizer.encode(PROMPT).tolist(), max_new_tokens=1000)

    async def ask() -> None:
        thread = EngineThread(Engine(broken, tokenizer), max_open=2, max_seconds=60)
        calls = [thread.ask([request]) for _ in range(2)]
        with pytest.raises(Busy):
            thread.ask([request])
        async for progress in calls[0].progress():
            assert progress.text and progress.whole is None
            broken.lm_head = None
            break
        for call in calls:
            with pytest.raises(EngineFailed):
                await call.answers()
            call.close()
        with pytest.raises(EngineFailed):
            thread.ask([request])
        await thread.stop()
        assert isinstance(thread.failure, TypeError)

    asyncio.run(ask())


SERVE_BROKEN = """
import random, sys, threading, time, urllib.request
from pathlib import Path
from helpers.scripts import load
from lit_gpt import Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.generate.engine import Engine
from lit_gpt.generate.connections import open_address, run_app, url_of
from lit_gpt.generate.make_requests import RequestMaker
from lit_gpt.generate.sampling import Sampling

model, tokenizer = load_model(sys.argv[1]), Tokenizer(sys.argv[1])
model.lm_head = None
maker = RequestMaker(tokenizer, "chat", 100, 50, Sampling(), random.Random(0))
app = load(Path("generate/serve.py")).make_app(Engine(model, tokenizer), maker, 8, 60)
address = open_address("127.0.0.1", 0)
print("Serving broken at", url_of(address) + ".", file=sys.stderr, flush=True)
run_app(app, address)
"""


def test_a_server_whose_engine_has_failed_ends(checkpoint: Path) -> None:
    """With the error of the engine; who waits is told."""
    server = Server(checkpoint, command=[sys.executable, "-c", SERVE_BROKEN, checkpoint])
    try:
        status, result, _ = server.ask("POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and result["error"] == {
            "message": "The engine has failed.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert server.process.wait(20) == 1
        assert server.log.result().endswith("TypeError: 'NoneType' object is not callable\n")
    finally:
        server.end()


def test_all_requests_of_a_call_or_none(model: GPT, tokenizer: Tokenizer) -> None:
    good = Request(tokenizer.encode(PROMPT).tolist(), max_new_tokens=5)
    engine = Engine(model, tokenizer)

    async def ask() -> None:
        thread = EngineThread(engine, max_open=3, max_seconds=60)
        for wrong, said in (([good, good, Request([], 5)], "0 tokens"), ([good] * 4, "4 answers are asked for")):
            with pytest.raises(InputError, match=said):
                thread.ask(wrong)
            assert (thread.n_open, engine.n_waiting, engine.n_running) == (0, 0, 0)
        call = thread.ask([good] * 3)
        answers = await call.answers()
        call.close()
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        await thread.stop()

    asyncio.run(ask())


# ---- the texts of tokens


def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, sample_dir: Path) -> None:
    folders = {
        "sample": sample_dir,
        "byte-level": write(tmp_path / "1", tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL),
        "metaspace": write(tmp_path / "2", tokenizer_json=metaspace(), tokenizer_config_json=SPECIAL),
        "sentencepiece": write(tmp_path / "3", tokenizer_model=sentencepiece(), tokenizer_config_json=SPECIAL),
    }
    for name, folder in folders.items():
        tokenizer = Tokenizer(folder)
        texts = TokenTexts(tokenizer)
        for text in TEXTS:
            ids = tokenizer.encode(text, bos=False).tolist()
            spelled = b"".join(texts.bytes_of(token) for token in ids)
            assert spelled.decode() in (text, f" {text}"), name
        ids = tokenizer.encode("a 🦜", bos=False).tolist()
        parts = [texts.text_of(token) for token in ids]
        assert parts[-1] in ("🦜", " 🦜", r"bytes:\x9c"), name
        # an answer is said with the space that parts it from its prompt
        prompt, answer = ids[:1], tokenizer.encode("a bcd", bos=False).tolist()[1:]
        together = tokenizer.decode([*prompt, *answer])
        said = texts.opening_space(prompt, answer) + tokenizer.decode(answer)
        assert tokenizer.decode(prompt) + said == together, name
        offsets = TokenOffsets(texts)
        begins = [offsets.push(token) for token in answer]
        assert begins[0] == 0 and offsets.n_characters == len(said), name


def test_tokens_begin_where_their_text_does(tmp_path: Path) -> None:
    """Also behind parts of characters that nothing completes, which a random model says all the time."""
    tokenizer = Tokenizer(write(tmp_path, tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL))
    texts = TokenTexts(tokenizer)
    rng = random.Random(1)
    for _ in range(200):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(12)]
        text = tokenizer.decode(tokens)
        offsets = TokenOffsets(texts)
        for token in tokens:
            begin = offsets.push(token)
            piece = texts.text_of(token)
            if not piece.startswith("bytes:") and token not in tokenizer.special_ids:
                assert text[begin:].startswith(piece), (tokens, token)
