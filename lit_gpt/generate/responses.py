"""From answers of the engine to what the server says: in OpenAI's form, and in that of the NeurIPS challenge."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence

from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.generate.engine import Answer, Logprob
from lit_gpt.generate.engine_thread import Call
from lit_gpt.generate.protocol import ChatBody, CompletionBody, ProcessBody
from lit_gpt.generate.response_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatToken,
    ChosenChatToken,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    Head,
    Processed,
    ProcessedToken,
    Sample,
    Usage,
)
from lit_gpt.generate.token_texts import TokenOffsets, TokenTexts


class Responses:
    """Writes answers down."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)

    # ---- /v1/completions

    def completion(self, answers: Sequence[Answer], body: CompletionBody, model: str) -> Completion:
        """The whole response."""
        choices = []
        for index, answer in enumerate(answers):
            request = answer.request
            text = self.continuation(answer)
            prompt_text = self.prompt_text(index, request.prompt, body) if body.echo else ""
            logprobs = None
            if body.logprobs is not None:
                shown = self.shown(answer, text)
                echoed = request.prompt[:1] if body.echo else []
                logprobs = self.logprob_lists(echoed, [*answer.prompt_logprobs, *shown], TokenOffsets(self.texts))
            choices.append(completion_choice(index, prompt_text + text, logprobs, answer.finish_reason))
        head = head_of("cmpl", model)
        return {**head, "object": "text_completion", "choices": choices, "usage": usage(answers, body.n)}

    async def completion_chunks(self, call: Call, body: CompletionBody, model: str) -> AsyncIterator[CompletionChunk]:
        """The response in parts, as the answers come."""
        head = head_of("cmpl", model)

        def chunk(choices: list[CompletionChoice], used: Usage | None = None) -> CompletionChunk:
            part: CompletionChunk = {**head, "object": "text_completion", "choices": choices}
            if body.stream_options.include_usage:
                part["usage"] = used
            return part

        if body.echo:
            for index, request in enumerate(call.requests):
                yield chunk([completion_choice(index, self.prompt_text(index, request.prompt, body))])

        answers: dict[int, Answer] = {}
        has_begun = [False for _ in call.requests]
        offsets = [TokenOffsets(self.texts) for _ in call.requests]
        async for progress in call.progress():
            index = progress.index
            request = call.requests[index]
            text = progress.text
            if not has_begun[index] and progress.tokens:
                has_begun[index] = True
                text = self.texts.opening_space(request.prompt, progress.tokens) + text
            logprobs = None
            if body.logprobs is not None:
                shown = [logprob for logprob in progress.logprobs if logprob.token not in request.stop_ids]
                logprobs = self.logprob_lists([], shown, offsets[index])
            reason = None
            if progress.whole is not None:
                answers[index] = progress.whole
                reason = progress.whole.finish_reason
            yield chunk([completion_choice(index, text, logprobs, reason)])
        if body.stream_options.include_usage:
            yield chunk([], usage([answers[i] for i in sorted(answers)], body.n))

    def prompt_text(self, index: int, prompt: Sequence[int], body: CompletionBody) -> str:
        """The prompt of a choice, as it was given."""
        given = body.prompt[index // body.n]
        return given if isinstance(given, str) else self.tokenizer.decode(prompt)

    def continuation(self, answer: Answer) -> str:
        """The text of an answer as it follows on its prompt."""
        return self.texts.opening_space(answer.request.prompt, answer.tokens) + answer.text

    def shown(self, answer: Answer, text: str) -> list[Logprob]:
        """The log-probabilities of the tokens of an answer's text, without a stop token, or what a stop string cut."""
        offsets = TokenOffsets(self.texts)
        is_cut = len(answer.request.stop) > 0 and answer.finish_reason == "stop"
        shown = []
        for logprob in answer.logprobs:
            is_behind = is_cut and offsets.push(logprob.token) >= len(text)
            if not is_behind and logprob.token not in answer.request.stop_ids:
                shown.append(logprob)
        return shown

    def logprob_lists(
        self, first: Sequence[int], logprobs: Sequence[Logprob], offsets: TokenOffsets
    ) -> CompletionLogprobs:
        """Log-probabilities as four lists. `first` may be a token that has none, which comes before the others."""
        tokens = [*first, *(logprob.token for logprob in logprobs)]
        without = [None for _ in first]
        return {
            "tokens": [self.texts.text_of(token) for token in tokens],
            "token_logprobs": [*without, *(logprob.logprob for logprob in logprobs)],
            "top_logprobs": [*without, *(self.by_text(logprob) for logprob in logprobs)],
            "text_offset": [offsets.push(token) for token in tokens],
        }

    def by_text(self, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens and their log-probabilities. Of two tokens that look alike, the likelier is there."""
        likeliest: dict[str, float] = {}
        for token, value in logprob.top:
            likeliest.setdefault(self.texts.text_of(token), value)
        return likeliest

    # ---- /v1/chat/completions

    def chat(self, answers: Sequence[Answer], body: ChatBody, model: str) -> ChatCompletion:
        """The whole response."""
        choices: list[ChatChoice] = []
        for index, answer in enumerate(answers):
            shown = self.shown(answer, answer.text)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self.chat_logprobs(shown) if body.logprobs else None,
                    "finish_reason": answer.finish_reason,
                }
            )
        head = head_of("chatcmpl", model)
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage(answers, body.n)}

    async def chat_chunks(self, call: Call, body: ChatBody, model: str) -> AsyncIterator[ChatChunk]:
        """The response in parts, as the answers come."""
        head = head_of("chatcmpl", model)

        def chunk(choices: list[ChatChunkChoice], used: Usage | None = None) -> ChatChunk:
            part: ChatChunk = {**head, "object": "chat.completion.chunk", "choices": choices}
            if body.stream_options.include_usage:
                part["usage"] = used
            return part

        for index in range(len(call.requests)):
            yield chunk([chat_choice(index, {"role": "assistant", "content": ""})])

        answers: dict[int, Answer] = {}
        async for progress in call.progress():
            logprobs = None
            if body.logprobs:
                stop_ids = call.requests[progress.index].stop_ids
                shown = [logprob for logprob in progress.logprobs if logprob.token not in stop_ids]
                logprobs = self.chat_logprobs(shown)
            if progress.text or logprobs is not None:
                yield chunk([chat_choice(progress.index, {"content": progress.text}, logprobs)])
            if progress.whole is not None:
                answers[progress.index] = progress.whole
                yield chunk([chat_choice(progress.index, {}, None, progress.whole.finish_reason)])
        if body.stream_options.include_usage:
            yield chunk([], usage([answers[i] for i in sorted(answers)], body.n))

    def chat_logprobs(self, logprobs: Sequence[Logprob]) -> ChatLogprobs:
        """Log-probabilities as a list of tokens."""
        content: list[ChosenChatToken] = []
        for logprob in logprobs:
            top = [self.chat_token(token, value) for token, value in logprob.top]
            content.append({**self.chat_token(logprob.token, logprob.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def chat_token(self, token: int, logprob: float) -> ChatToken:
        spelled = list(self.texts.bytes_of(token))
        return {"token": self.texts.text_of(token), "logprob": logprob, "bytes": spelled}

    # ---- /process

    def processed(self, answers: Sequence[Answer], body: ProcessBody, seconds: float) -> Processed:
        """The response of the challenge: the first sample, and if there are several all of them as `samples`."""
        samples = [self.sample(answer, body) for answer in answers]
        response: Processed = {**samples[0], "request_time": seconds}
        if len(samples) > 1:
            response["samples"] = samples
        return response

    def sample(self, answer: Answer, body: ProcessBody) -> Sample:
        """An answer with its tokens; with echo_prompt those of the prompt before them. The first of these has no
        log-probability, since nothing stands before it: it counts as 0."""
        text = self.continuation(answer)
        tokens: list[ProcessedToken] = []
        logprobs = self.shown(answer, text)
        if body.echo_prompt:
            tokens.append({"text": self.texts.text_of(answer.request.prompt[0]), "logprob": 0.0, "top_logprob": {}})
            logprobs = [*answer.prompt_logprobs, *logprobs]
            text = body.prompt + text
        for logprob in logprobs:
            token: ProcessedToken = {
                "text": self.texts.text_of(logprob.token),
                "logprob": logprob.logprob,
                "top_logprob": self.by_text(logprob),
            }
            tokens.append(token)
        return {"text": text, "tokens": tokens, "logprob": sum(token["logprob"] for token in tokens)}


def head_of(prefix: str, model: str) -> Head:
    """The beginning of each of OpenAI's responses."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def completion_choice(
    index: int, text: str, logprobs: CompletionLogprobs | None = None, finish_reason: str | None = None
) -> CompletionChoice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_choice(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish_reason: str | None = None
) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(answers: Sequence[Answer], n: int) -> Usage:
    """How many tokens were read and made. A prompt that has n choices counts once: the others reuse what is read."""
    n_prompt = sum(len(answer.request.prompt) for answer in answers[::n])
    n_reused = sum(answer.n_reused for answer in answers[::n])
    n_new = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }
