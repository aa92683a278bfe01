"""Answers that are JSON by a schema: `pytest tests/test_json_schema.py`, about 40 s"""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import ROOT
from helpers.models import small_gpt
from helpers.scripts import script
from helpers.shell import python
from helpers.tiny_tokenizers import TEXTS, of_all_kinds

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.generate import json_schema
from lit_gpt.generate.engine import Answer, Engine, Request
from lit_gpt.generate.json_schema import JsonSchemas, Vocabulary
from lit_gpt.generate.sampling import Sampling

SHORT = {"type": "string", "maxLength": 5}


def an_object(**properties) -> dict:
    """All that is named has to be there, and nothing else."""
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


# with bounds everywhere, so that a model that says anything comes to an end
BOUNDED = {
    "nested objects": an_object(a=an_object(b=an_object(c={"type": "boolean"}), d={"type": "null"})),
    "optional fields": an_object(a={"type": "boolean"}, b=SHORT, c={"type": "null"}) | {"required": ["b"]},
    "array": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
    "enum": {"enum": ["red", "Größe 日本 🙂", 7, -1.5, None, True, {"a": [1]}]},
    "integer": {"type": "integer", "minimum": -20, "exclusiveMaximum": 1000},
    "number": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3,5}$"},
    "format": {"type": "string", "format": "date"},
    "unicode": {"type": "string", "pattern": "^[äöüß日本🙂]{1,6}$"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6},
    "anyOf": {"anyOf": [SHORT, an_object(x={"const": 1}), {"type": "boolean"}]},
    "oneOf": {"oneOf": [an_object(kind={"const": "a"}, x=SHORT), an_object(kind={"const": "b"}, y={"type": "null"})]},
    "allOf": {"allOf": [{"properties": {"a": SHORT}, "required": ["a"]}, an_object(a={"minLength": 2})]},
    "map": {"type": "object", "patternProperties": {"^[a-c]$": {"type": "boolean"}}, "maxProperties": 2}
    | {"additionalProperties": False},
    "defs": {"$ref": "#/$defs/pair", "$defs": {"pair": an_object(left=SHORT, right={"$ref": "#/$defs/leaf"})}}
    | {"$defs": {"pair": an_object(left=SHORT, right={"$ref": "#/$defs/leaf"}), "leaf": {"enum": [1, 2]}}},
}
# these may go on, and are valid if they end
UNBOUNDED = {
    "any object": {"type": "object"},
    "anything": {},
    "number": {"type": "number"},
    "string": {"type": "string"},
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": an_object(v={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})
        },
    },
}
SCHEMAS = [*BOUNDED.values(), *UNBOUNDED.values()]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, sample_dir: Path) -> dict[str, Tokenizer]:
    return of_all_kinds(tmp_path_factory.mktemp("tokenizers"), sample_dir)


KINDS = ["sample", "byte-level", "metaspace", "sentencepiece"]


def random_model(tokenizer: Tokenizer) -> GPT:
    """It has some more tokens than the tokenizer, and would say anything, but no JSON."""
    return small_gpt(vocab_size=tokenizer.vocab_size + 20, block_size=1000).eval().requires_grad_(False)


def check(answer: Answer, schema: dict) -> None:
    """An answer that ended by itself is valid."""
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
    else:
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_valid_in_any_company(kind: str, temperature: float, tokenizers: dict[str, Tokenizer]) -> None:
    """Each by its own schema, or none; and those of one alone."""
    tokenizer = tokenizers[kind]
    model = random_model(tokenizer)
    schemas = JsonSchemas(tokenizer)
    prompt = tokenizer.encode("Say: ").tolist()
    requests = []
    for number, schema in enumerate(SCHEMAS):
        sampling = Sampling(temperature, seed=number)
        top_k = Sampling(temperature, top_k=3 if temperature else None, top_p=0.9 if temperature else None, seed=1)
        requests += [
            Request(prompt, 120, sampling, tokenizer.stop_ids, grammar=schemas.grammar(schema)),
            Request([*prompt, *prompt], 120, top_k, tokenizer.stop_ids, grammar=schemas.grammar(schema)),
            Request(prompt, 9, sampling, tokenizer.stop_ids),
        ]
    together = list(Engine(model, tokenizer, max_batch=7).run(requests))
    for number, answer in enumerate(together):
        if answer.request.grammar is not None:
            check(answer, SCHEMAS[number // 3])
            assert answer.finish_reason == "stop" or number // 3 >= len(BOUNDED), answer.text
    for answer in together[::5]:
        (alone,) = Engine(model, tokenizer).run([answer.request])
        assert (alone.tokens, alone.text) == (answer.tokens, answer.text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_that_of_the_tokenizer(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Byte for byte, parts of characters included; and special tokens are no text."""
    tokenizer = tokenizers[kind]
    vocabulary = Vocabulary(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False).tolist()
        if tokenizer.special_ids.isdisjoint(ids) and tokenizer.decode(ids) == text:
            spelled = b"".join(vocabulary.tokens[token] for token in ids).decode()
            assert spelled in (text, f" {text}")
    special = set(vocabulary.special_token_ids)
    assert special >= tokenizer.special_ids | tokenizer.stop_ids
    assert len(special) < 30 and {vocabulary.tokens[token] for token in special} <= {b"", b"\xff"}


def test_what_is_valid_anyway_is_left_as_it_is(tokenizers: dict[str, Tokenizer]) -> None:
    """A model that says digits says the same ones; log-probabilities are its own; a draft changes nothing."""
    tokenizer = tokenizers["byte-level"]
    model = random_model(tokenizer)
    digits = {tokenizer.token_to_id(digit): 1e6 for digit in "123456789"}
    free = Request([1, 2, 3], 30, Sampling(logit_bias=digits), tokenizer.stop_ids, logprobs=2)
    grammar = JsonSchemas(tokenizer).grammar({"type": "integer"})
    bound = replace(free, grammar=grammar)
    for settings in (Sampling(), Sampling(1.0, seed=3), Sampling(1.0, top_k=5, repetition_penalty=1.3, seed=3)):
        requests = [replace(request, sampling=replace(settings, logit_bias=digits)) for request in (free, bound)]
        (expected, answer) = Engine(model, tokenizer).run(requests)
        assert answer.tokens == expected.tokens
        logprobs = [entry.logprob for entry in expected.logprobs]
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(logprobs, abs=1e-9)
        (drafted,) = Engine(model, tokenizer, draft_tokens=4).run([requests[1]])
        assert drafted.tokens == expected.tokens


def test_log_probabilities_are_the_model_s_own(tokenizers: dict[str, Tokenizer]) -> None:
    """Before others are forbidden: the likeliest tokens are none of JSON. Drafts are refused where they do not fit."""
    tokenizer = tokenizers["byte-level"]
    model = random_model(tokenizer)
    schema = {"type": "array", "items": {"enum": ["abc"]}, "minItems": 9, "maxItems": 9}
    request = Request([1, 2, 3], 200, stop_ids=tokenizer.stop_ids, logprobs=1)
    request = replace(request, grammar=JsonSchemas(tokenizer).grammar(schema))
    (answer,) = Engine(model, tokenizer).run([request])
    check(answer, schema)
    book = model(torch.tensor([[1, 2, 3, *answer.tokens]]))[0, 2:-1].log_softmax(-1)
    expected = [row[token].item() for row, token in zip(book, answer.tokens, strict=True)]
    assert [entry.logprob for entry in answer.logprobs] == pytest.approx(expected, abs=1e-9)
    assert [entry.top[0][0] for entry in answer.logprobs] == book.argmax(-1).tolist() != answer.tokens
    engine = Engine(model, tokenizer, draft_tokens=6)
    (drafted,) = engine.run([request])
    assert drafted.tokens == answer.tokens and engine.batches[""].n_steps < len(answer.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_wants_to_end_or_to_say_spaces(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    """It ends where JSON does, and not before; spaces come to an end; and special tokens are never said."""
    tokenizer = tokenizers[kind]
    model = random_model(tokenizer)
    schemas = JsonSchemas(tokenizer)
    schema = an_object(a={"type": "integer", "maximum": 99}, b={"type": "array", "items": SHORT, "maxItems": 2})
    vocabulary = Vocabulary(tokenizer)
    blank = [token for token, spelled in enumerate(vocabulary.tokens) if spelled and not spelled.strip()]
    assert len(blank) > 1
    for liked in (tokenizer.stop_ids, blank, tokenizer.special_ids - tokenizer.stop_ids):
        sampling = Sampling(logit_bias=dict.fromkeys(liked, 1000.0))
        request = Request([1, 2], 400, sampling, tokenizer.stop_ids, grammar=schemas.grammar(schema))
        (answer,) = Engine(model, tokenizer).run([request])
        assert answer.finish_reason == "stop"
        check(answer, schema)
        assert tokenizer.special_ids.isdisjoint(answer.tokens[:-1])
    # a number may go on, and ends as soon as it can
    likes_to_end = Sampling(logit_bias=dict.fromkeys(tokenizer.stop_ids, 1000.0))
    request = Request([1, 2], 40, likes_to_end, tokenizer.stop_ids, grammar=schemas.grammar({"type": "integer"}))
    (answer,) = Engine(model, tokenizer).run([request])
    assert answer.finish_reason == "stop" and len(answer.text.removeprefix("-")) == 1
    # an engine that knows no stop token ends where nothing more may come
    request = Request([1, 2], 40, grammar=schemas.grammar({"const": {"a": 1}}))
    (answer,) = Engine(model, tokenizer).run([request])
    assert answer.finish_reason == "stop" and json.loads(answer.text) == {"a": 1}


def test_whoever_goes_leaves_nothing_behind(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    engine = Engine(random_model(tokenizer), tokenizer, max_batch=1)
    request = Request([1, 2], 50, stop_ids=tokenizer.stop_ids)
    requests = [replace(request, grammar=JsonSchemas(tokenizer).grammar({"type": "string"})) for _ in range(2)]
    answers = [engine.add(request) for request in requests]
    constraints = [weakref.ref(engine.under_way[answer].constraint) for answer in answers]
    engine.step()
    for answer in answers:
        engine.cancel(answer)
    gc.collect()
    assert [constraint() for constraint in constraints] == [None, None] and not engine.under_way
    with pytest.raises(InputError, match="--logit_bias is -inf"):
        engine.add(replace(requests[0], sampling=Sampling(logit_bias={5: -torch.inf})))


# ---- schemas that cannot be used


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, 'Unimplemented keys: ."uniqueItems"'),
        ({"oneOf": [SHORT, {"type": "string"}]}, "oneOf constraints are not supported. Change it"),
        ({"$ref": "#/$defs/x"}, "'/.defs/x' does not exist"),
        ({"$ref": "http://127.0.0.1/a"}, "does not fetch"),
        ({"type": "string", "pattern": "["}, "unclosed character class"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no JSON is valid by it|[Rr]ef"),
        ({"x-guidance": {"lenient": True}, "not": {}}, 'Unimplemented keys: ."not"'),
    ],
)
def test_what_cannot_be_read_is_named(schema: dict, said: str, tokenizers: dict[str, Tokenizer]) -> None:
    schemas = JsonSchemas(tokenizers["byte-level"])
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InputError, match=said) as caught:
            schemas.grammar(schema)
        assert "\n" not in str(caught.value)


def nested(n: int) -> dict:
    return {"type": "array", "items": nested(n - 1)} if n else SHORT


HOSTILE = {
    "long": {"enum": [f"value {i}" for i in range(100_000)]},
    "deep": nested(300),
    "doubling": {"allOf": [{"type": "string", "pattern": f"^.*[a-f]{{{i}}}.*x$"} for i in range(1, 40)]},
    "product": {"allOf": [{"anyOf": [an_object(**{f"a{i}{j}": SHORT}) for j in range(4)]} for i in range(12)]},
    "digits": {"type": "integer", "minimum": -(10**18), "maximum": 10**18, "multipleOf": 999_983},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused(name: str, tokenizers: dict[str, Tokenizer], monkeypatch) -> None:
    monkeypatch.setattr(json_schema, "MAX_SECONDS", 2)
    with pytest.raises(InputError, match="The JSON schema cannot be used"):
        JsonSchemas(tokenizers["byte-level"]).grammar(HOSTILE[name])


GROWING = {"type": "string", "pattern": "^.*a.{200}$"}  # what it has to remember doubles with each character


def test_an_answer_that_becomes_too_complex_ends(tokenizers: dict[str, Tokenizer]) -> None:
    """It says so, and others go on."""
    tokenizer = tokenizers["sample"]
    engine = Engine(random_model(tokenizer), tokenizer)
    schemas = JsonSchemas(tokenizer)
    requests = [
        Request([1, 2], 150, Sampling(1.0, seed=0), tokenizer.stop_ids, grammar=schemas.grammar(GROWING)),
        Request([1, 2], 150, stop_ids=tokenizer.stop_ids, grammar=schemas.grammar(BOUNDED["pattern"])),
    ]
    too_complex, other = engine.run(requests)
    assert too_complex.finish_reason == "error" and too_complex.text.startswith('"')
    assert other.finish_reason == "stop"
    check(other, BOUNDED["pattern"])


# ---- from the shell


def test_a_prompt_and_a_file_of_prompts(tiny_dir: Path, tmp_path: Path, capsys) -> None:
    schema = an_object(answer={"enum": ["yes", "no"]}, certainty={"type": "integer", "minimum": 0, "maximum": 10})
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    script("generate/base.py").main("Who?", json_schema=str(file), checkpoint_dir=tiny_dir)
    said = json.loads(capsys.readouterr().out)
    jsonschema.validate(said, schema)
    (tmp_path / "prompts.txt").write_text("Who?\nWhere?\n")
    out = tmp_path / "answers.jsonl"
    flags = dict(json_schema=json.dumps(schema), temperature=1.5, num_samples=3, checkpoint_dir=tiny_dir)
    script("generate/file.py").main(tmp_path / "prompts.txt", out, **flags)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 6
    for answer in answers:
        assert answer["finish_reason"] == "stop"
        jsonschema.validate(json.loads(answer["answer"]), schema)
    # what was not to be found out is said
    flags |= dict(json_schema=json.dumps(GROWING), num_samples=1, max_new_tokens=150)
    script("generate/file.py").main(tmp_path / "prompts.txt", tmp_path / "others.jsonl", **flags)
    reasons = [json.loads(line)["finish_reason"] for line in (tmp_path / "others.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["error", "length"]
    said = capsys.readouterr().err
    assert "1 answer cut at --max_new_tokens 150.\n1 answer cut: what --json_schema allows has become too" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json_schema", '{"type": "objekt"}'], "The JSON schema cannot be used: Invalid type: objekt. Change it."),
        (["--json_schema", '{"type"'], "--json_schema is no JSON: "),
        (["--json_schema", "there_is_no.json"], "there_is_no.json is not there"),
        (["--json_schema", "pyproject.toml"], "pyproject.toml is no JSON: "),
        (["--json_schema", "{}", "--choices", '["a", "b"]'], "--choices and --json_schema both say"),
    ],
)
def test_a_bad_schema_is_one_line(flags: list[str], said: str, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Who?\n")
    of_file = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl"]
    for words in (["generate/base.py", "--prompt", "Who?"], ["generate/file.py", *of_file]):
        result = python(*words, *flags, "--checkpoint_dir", tiny_dir, cwd=ROOT)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


def test_without_the_library(tiny_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("lit_gpt.packages.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs llguidance: pip install -e '\.\[json\]'"):
        script("generate/base.py").main("Who?", json_schema="{}", checkpoint_dir=tiny_dir)
