"""Many answers at once are those of one alone: `pytest tests/test_engine.py`, about 10 s"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import small_gpt

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.adapter import Adapter, apply_adapter
from lit_gpt.checkpoint.load import load_model
from lit_gpt.generate.batch import WORTH_WAITING
from lit_gpt.generate.engine import Answer, Engine, Request
from lit_gpt.generate.sampling import Sampling
from lit_gpt.lora import LoRA, apply_lora

KINDS = {
    "llama": {},
    "window": dict(sliding_window=20, sliding_layers=[0]),
    "learned positions": dict(embedding="positions", rotary_percentage=0.0),
    "softcap": dict(attn_softcap=30.0),
    "longrope": dict(
        rope_scaling=dict(
            rope_type="longrope", original_max_position_embeddings=40, long_factor=[3.0] * 4, short_factor=[1.1] * 4
        )
    ),
}


def model_of(kind: str) -> GPT:
    model = small_gpt(**KINDS[kind]).eval().requires_grad_(False)
    if kind == "llama":  # what a method adds to attention and to linears takes part
        torch.manual_seed(1)
        apply_adapter(model, Adapter(prompt_length=3, start_layer=1))
        apply_lora(model, LoRA(r=2))
        for name, param in model.named_parameters():
            if "lora_B" in name or "gate" in name:
                torch.nn.init.normal_(param, std=0.2)
    return model


def greedy(model: GPT, prompt: Sequence[int], n: int) -> list[int]:
    """By the book: all of the text is read anew for each token, without a cache."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def random_requests(n: int, seed: int = 0) -> list[Request]:
    """Prompts of many lengths, most of which begin like another one."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(n):
        beginning = rng.choice(prompts)[: rng.randint(1, 60)] if prompts and rng.random() < 0.7 else []
        prompts.append(beginning + [rng.randrange(50) for _ in range(rng.randint(1, 50))])
    return [Request(prompt, max_new_tokens=rng.randint(1, 25)) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_any_company_are_those_of_one_alone(kind: str) -> None:
    """Requests come at any time, wait, leave, and share what they begin with; long prompts are read piece by piece."""
    model = model_of(kind)
    requests = random_requests(24)
    expected = [greedy(model, request.prompt, request.max_new_tokens) for request in requests]
    for max_batch, prefill_tokens, draft_tokens in ((1, 1000, 5), (3, 17, 0), (8, 60, 24), (24, 1000, 0)):
        engine = Engine(model, max_batch=max_batch, prefill_tokens=prefill_tokens, draft_tokens=draft_tokens)
        rng = random.Random(max_batch)
        answers: list[Answer] = []
        while len(answers) < len(requests) or engine.under_way:
            for _ in range(rng.randint(0, 3)):
                if len(answers) < len(requests):
                    answers.append(engine.add(requests[len(answers)]))
            engine.step()
            assert engine.n_running <= max_batch
        assert [answer.tokens for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"length"}
        if max_batch > 1:
            assert sum(answer.n_reused for answer in answers) >= 40


@pytest.mark.parametrize("kind", ["llama", "window", "softcap"])
def test_a_recorded_pass_says_the_same(kind: str) -> None:
    """As on a GPU, but that nothing is recorded on a CPU: rows and positions are rounded up, tensors are used again."""
    model = model_of(kind)
    requests = random_requests(20, seed=5)
    engine = Engine(model, max_batch=5, draft_tokens=10)
    (batch,) = engine.batches.values()
    batch.is_recorded = True
    for _ in range(2):  # free rows remember what they had, and it is still right
        answers = list(engine.run(requests))
        for answer in answers:
            assert answer.tokens == greedy(model, answer.request.prompt, answer.request.max_new_tokens)
    assert sum(answer.n_reused for answer in answers) >= 300
    assert {rows for rows, _, _ in batch.recordings} == {1, 2, 4, 5}


def test_the_order_of_answers_is_that_of_the_requests() -> None:
    model = model_of("llama")
    requests = random_requests(15, seed=3)
    taken = []

    def coming() -> list[Request]:
        for request in requests:
            taken.append(request)
            yield request

    engine = Engine(model, max_batch=4)
    answers = engine.run(coming())
    first = next(answers)
    assert len(taken) < len(requests)  # a long file is not read before there is a place
    assert [answer.request for answer in (first, *answers)] == requests
    # whoever stops listening leaves nothing behind
    answers = engine.run(requests)
    next(answers)
    answers.close()
    assert engine.n_waiting == engine.n_running == 0


def test_a_beginning_is_read_once() -> None:
    """By how many tokens the model sees: of several answers to one prompt, and of a conversation that goes on."""
    model = model_of("llama")
    seen: list[int] = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    prompt = [random.Random(0).randrange(50) for _ in range(100)]
    sampled = [Request(prompt, 5, Sampling(temperature=1.0, seed=seed)) for seed in range(6)]
    engine = Engine(model, max_batch=6)
    answers = list(engine.run(sampled))
    assert len({tuple(answer.tokens) for answer in answers}) > 3
    assert [answer.n_reused for answer in answers] == [0, 99, 99, 99, 99, 99]
    assert sum(seen) < 100 + 6 * 8

    # the next turn, while another conversation comes and goes
    other = Request([random.Random(1).randrange(50) for _ in range(90)], 4)
    list(engine.run([other]))
    turn = [*prompt, *answers[2].tokens, 7, 8, 9]
    seen.clear()
    (answer,) = engine.run([Request(turn, 1)])
    assert answer.n_reused == 104 and seen == [4]  # the last token of an answer was not read
    assert answer.tokens == greedy(model, turn, 1)

    # what another text is about to read is worth waiting for, if it is long enough
    fresh = [random.Random(2).randrange(50) for _ in range(WORTH_WAITING + 2)]
    both = [engine.add(Request([*fresh, end], 1)) for end in (1, 2)]
    engine.step()
    assert [answer.n_reused for answer in both] == [0, 0] and engine.n_waiting == 1
    engine.step()
    assert both[1].n_reused == len(fresh)


def test_a_seed_draws_the_same_in_any_company() -> None:
    model = model_of("llama")
    settings = Sampling(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    request = Request([4, 5, 6], 20, settings)
    (alone,) = Engine(model).run([request])
    others = [replace(other, sampling=Sampling(temperature=1.0)) for other in random_requests(10)]
    among = list(Engine(model, max_batch=7).run([*others[:5], request, *others[5:]]))[5]
    assert among.tokens == alone.tokens
    (another,) = Engine(model).run([replace(request, sampling=replace(settings, seed=6))])
    assert another.tokens != alone.tokens
    unseeded = replace(request, sampling=replace(settings, seed=None))
    assert len({tuple(answer.tokens) for answer in Engine(model).run([unseeded] * 4)}) > 1


def test_what_is_looked_up_changes_no_answer() -> None:
    """A text that repeats itself takes fewer passes; greedy or sampled, cut or stopped, it says the same."""
    model = model_of("llama")
    passes: list[int] = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: passes.append(args[0].numel()))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    bias = {token: 40.0 for token in prompt}
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=2, logit_bias=bias, repetition_penalty=1.05)):
        for request in (
            Request(prompt, 60, sampling, logprobs=1),
            Request(prompt, 61, sampling, stop_ids=[4]),
        ):
            (plain,) = Engine(model).run([request])
            (drafted,) = Engine(model, draft_tokens=6).run([request])
            assert drafted.tokens == plain.tokens and drafted.finish_reason == plain.finish_reason
            assert [entry.token for entry in drafted.logprobs] == [entry.token for entry in plain.logprobs]
            drafted_logprobs = [entry.logprob for entry in drafted.logprobs]
            assert drafted_logprobs == pytest.approx([entry.logprob for entry in plain.logprobs], abs=1e-9)
            passes.clear()
    # one that says 7 again and again: seven tokens a pass
    (answer,) = Engine(model, draft_tokens=6).run([Request([7, *prompt], 50, Sampling(logit_bias={7: 1e6}))])
    assert answer.tokens == [7] * 50 and len(passes) <= 5 + 50 / 7


@pytest.mark.parametrize("prefill_tokens", [1000, 7])
def test_log_probabilities_are_the_model_s_own(prefill_tokens: int) -> None:
    """Before bias and temperature; of the prompt, too, and of an end of it that shares its beginning with others."""
    model = model_of("llama")
    prompt = [random.Random(0).randrange(50) for _ in range(60)]
    settings = Sampling(temperature=2.0, logit_bias={3: 5.0}, seed=1)
    whole = Request(prompt, 6, settings, logprobs=2, prompt_logprobs=True)
    judged = Request([*prompt[:50], 1, 2, 3], 0, prompt_logprobs=True, logprobs_from=50)
    engine = Engine(model, prefill_tokens=prefill_tokens)
    answers = list(engine.run([whole, judged, replace(judged, prompt=[*prompt[:50], 4, 5])]))
    for answer in answers:
        text = [*answer.request.prompt, *answer.tokens]
        book = model(torch.tensor([text]))[0].log_softmax(-1)
        first = answer.request.logprobs_from
        found = [*answer.prompt_logprobs, *answer.logprobs]
        assert [entry.token for entry in found] == text[first:]
        expected = [book[i - 1, text[i]].item() for i in range(first, len(text))]
        assert [entry.logprob for entry in found] == pytest.approx(expected, abs=1e-9)
        for i, entry in enumerate(found):
            n = answer.request.logprobs or 0
            best = book[first - 1 + i].topk(n)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert [answer.finish_reason for answer in answers] == ["length"] * 3
    # what the second is about to read, or what it has read when the rest is not worth waiting for
    assert answers[2].n_reused == (49 if prefill_tokens == 1000 else 28)


def test_how_answers_end(tiny_dir: Path) -> None:
    model, tokenizer = load_model(tiny_dir), Tokenizer(tiny_dir)
    engine = Engine(model, tokenizer)
    prompt = tokenizer.encode("Once upon a time").tolist()
    (whole,) = engine.run([Request(prompt, 30)])
    assert whole.text == tokenizer.decode(whole.tokens) and whole.finish_reason == "length"

    # by a token, which is no part of the text
    stop_id = whole.tokens[11]
    n = whole.tokens.index(stop_id)
    (answer,) = engine.run([Request(prompt, 30, stop_ids=[stop_id])])
    assert (answer.tokens, answer.finish_reason) == (whole.tokens[: n + 1], "stop")
    assert answer.text == tokenizer.decode(whole.tokens[:n])
    # by a string, which begins in one token and ends in another
    middle = len(tokenizer.decode(whole.tokens[:9]))
    stop = whole.text[middle - 2 : middle + 2]
    (answer,) = engine.run([Request(prompt, 30, stop=["never there", stop])])
    assert answer.finish_reason == "stop" and len(answer.tokens) < 30
    assert answer.text == whole.text[: whole.text.index(stop)]

    # by somebody who has enough, whether it has begun or not
    crowd = [engine.add(Request(prompt, 30)) for _ in range(20)]
    engine.step()
    engine.step()
    assert engine.n_waiting == 4 and engine.n_running == 16
    for answer in (crowd[3], crowd[19]):
        engine.cancel(answer)
        assert answer.finish_reason == "cancelled"
    while engine.under_way:
        engine.step()
    engine.cancel(crowd[0])
    assert [answer.tokens == whole.tokens for answer in crowd] == [i not in (3, 19) for i in range(20)]
    assert crowd[0].finish_reason == "length"


def test_models_side_by_side() -> None:
    models = {"base": small_gpt().eval(), "tuned": model_of("llama")}
    engine = Engine(models)
    requests = [replace(request, model=("base", "tuned", "")[i % 3]) for i, request in enumerate(random_requests(9))]
    for answer in engine.run(requests):
        model = models[answer.request.model or "base"]
        assert answer.tokens == greedy(model, answer.request.prompt, answer.request.max_new_tokens)
    with pytest.raises(InputError, match="There is no model other, expected one of base, tuned"):
        engine.add(Request([1], 1, model="other"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "The prompt has 0 tokens"),
        (Request([1] * 299, 2), "The prompt's 299 tokens and 2 new ones exceed what the model can read, 300"),
        (Request([1], -1), "-1 new tokens are asked for"),
        (Request([1, 2], 0), "No new tokens are asked for, and no log-probabilities"),
        (Request([1], 0, prompt_logprobs=True), "No new tokens are asked for, and no log-probabilities"),
        (Request([1, 2], 1, prompt_logprobs=True, logprobs_from=2), "from token 2 of the prompt on, expected 1 to 1"),
        (Request([1, 50], 1), "expected 0 to 49"),
        (Request([-1], 1), "expected 0 to 49"),
        (Request([1], 1, Sampling(logit_bias={50: 1.0})), "--logit_bias has token 50, expected 0 to 49"),
        (Request([1], 1, Sampling(temperature=-1.0)), "--temperature is -1.0"),
        (Request([1], 1, logprobs=51), "51 log-probabilities are asked for"),
        (Request([1], 1, stop=["x"]), "Stop strings need an engine with a tokenizer"),
    ],
)
def test_what_can_never_be_answered(request_: Request, message: str) -> None:
    engine = Engine(small_gpt().eval())
    with pytest.raises(InputError, match=message):
        engine.add(request_)
    assert engine.n_waiting == 0


def test_the_cache_grows_with_what_is_in_it() -> None:
    model = model_of("llama")
    engine = Engine(model, max_batch=8)
    (batch,) = engine.batches.values()
    assert (batch.cache.batch_size, batch.cache.max_seq_length) == (1, 64)
    list(engine.run([Request([1, 2, 3], 5)]))
    assert (batch.cache.batch_size, batch.cache.max_seq_length) == (1, 64)
    list(engine.run([Request([i] * 150, 140) for i in range(3)]))
    assert (batch.cache.batch_size, batch.cache.max_seq_length) == (4, 300)  # the model reads no more
    list(engine.run(random_requests(30)))
    assert (batch.cache.batch_size, batch.cache.max_seq_length) == (8, 300)
