"""A conversation as tokens: the same ones in training and in generation.

Generation asks with the tokens of the prompt alone. Training has the answer behind it, and a tokenizer that reads both
as one text may join the last characters of the prompt and the first of the answer:

    the prompt      ... ASSISTANT  :  ␣             generation asks with a space at the end
    the text        ... ASSISTANT  :  ␣The  ␣Ebro   the first word belongs to the prompt, and would not be trained
    the tokens      ... ASSISTANT  :  ␣  The  ␣Ebro

So the text is encoded as a whole, as transformers does, and where an answer begins it is looked at twice: if the prompt
alone has other tokens than here, the text is split there, and its two sides are encoded by themselves. Nothing changes
where nothing joins, which is nearly everywhere: behind a special token, and behind a line break if the answer begins
with a letter. Earlier answers of a question are split as well, so that a later one is asked as it was trained.

The other way would be to change what generation asks with: to take the last characters of the prompt away, and have the
model say them ("token healing"). No other program asks so, and a model would be asked otherwise wherever else it is
used.

Some tokenizers cannot encode the rest of a text: sentencepiece puts a space before it. It is then encoded behind a line
break, which is taken away; if the tokens say another text even so, it stays as it was, and is counted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lit_gpt.data.loss_mask import first_token_at
from lit_gpt.data.prompts import Rendered
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.tokenizer_backends import Encoded

# by these words records are counted
SPLIT = "stored with a token split where an answer begins, as generation asks"
JOINED = "asked with other tokens than trained: the tokenizer joins a prompt and its answer"
MAX_REMEMBERED = 1000  # ends of prompts


class Encoding(NamedTuple):
    """The tokens of a conversation."""

    encoded: Encoded
    remarks: Sequence[str]
    """SPLIT and JOINED, if they are so."""


class ConversationEncoder:
    """Encodes conversations, and remembers the ends of prompts, which are few: `<|im_start|>assistant\\n`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end_ids: dict[str, list[int]] = {}

    def encode_batch(self, conversations: Sequence[Rendered]) -> list[Encoding]:
        """Many conversations at once, on all cores."""
        texts = [rendered.text for rendered in conversations]
        encoded = self.tokenizer.encode_batch(texts, [rendered.bos for rendered in conversations])
        return [self.split_at_answers(rendered, whole) for rendered, whole in zip(conversations, encoded, strict=True)]

    def split_at_answers(self, rendered: Rendered, whole: Encoded) -> Encoding:
        """The tokens of a conversation from those of its text, in which no token lies across the begin of an answer."""
        encoded = whole
        start = 0  # of what is encoded by itself
        is_joined = False
        for begin in rendered.answer_begins:
            if begin <= start or begin >= len(rendered.text) or self.has_prompt(rendered.text, encoded, start, begin):
                continue
            prompt = self.encode_part(rendered, start, begin)
            n_before = first_token_at(encoded, start, after=0, trimmed=False) if start > 0 else 0
            n_prompt = first_token_at(encoded, begin, after=n_before, trimmed=True)
            if prompt.ids == encoded.ids[n_before:n_prompt] and not lies_across(encoded, n_prompt, begin):
                continue
            # they differ
            answer = self.encode_part(rendered, begin, len(rendered.text))
            ids = [*encoded.ids[:n_before], *prompt.ids, *answer.ids]
            if self.tokenizer.decode_with_special(ids) != self.tokenizer.decode_with_special(encoded.ids):
                is_joined = True
                continue
            # the prompt ends here, also where its last spaces are in no token of it
            if prompt.offsets:
                prompt.offsets[-1] = (prompt.offsets[-1][0], begin)
            encoded = Encoded(ids, [*encoded.offsets[:n_before], *prompt.offsets, *answer.offsets])
            start = begin
        remarks = [SPLIT] if encoded.ids != whole.ids else []
        if is_joined:
            remarks.append(JOINED)
        return Encoding(encoded, remarks)

    def has_prompt(self, text: str, encoded: Encoded, start: int, begin: int) -> bool:
        """Whether the tokens before an answer are surely those of its prompt.

        Only the end of the prompt is encoded for this, from its last line or special token on. No token reaches over
        the beginning of a line, and if the tokens from there on are the same, so are those before it.
        """
        offsets = encoded.offsets
        n_prompt = bisect_left(offsets, (begin,))
        # a token reaches over the beginning; or, if the offsets leave spaces out, it may
        if offsets[n_prompt - 1][1] != begin:
            return False
        end_of_words = begin
        while text[end_of_words - 1].isspace() and end_of_words > start:
            end_of_words -= 1
        last_line = max(start, text.rfind("\n", start, end_of_words) + 1)
        first = n_prompt
        while first > 0 and offsets[first - 1][0] >= last_line:
            first -= 1
            if encoded.ids[first] in self.tokenizer.special_ids:
                break
        if first == n_prompt:
            return False
        end = text[offsets[first][0] : begin]
        ids = self.end_ids.get(end)
        if ids is None:
            ids = self.tokenizer.encode_batch([end], False)[0].ids
            if len(self.end_ids) < MAX_REMEMBERED:
                self.end_ids[end] = ids
        return ids == encoded.ids[first:n_prompt]

    def encode_part(self, rendered: Rendered, begin: int, end: int) -> Encoded:
        """The tokens of a part of a conversation, as they follow on those before it."""
        part = rendered.text[begin:end]
        if begin == 0:
            return self.tokenizer.encode_batch([part], rendered.bos)[0]
        # behind a line break: some tokenizers put a space before a text
        (line_break,), (behind,) = (self.tokenizer.encode_batch([text], False) for text in ("\n", f"\n{part}"))
        n = len(line_break.ids)
        if behind.ids[:n] == line_break.ids and (len(behind.ids) == n or behind.offsets[n][0] >= 1):
            shifted = [(begin + first - 1, begin + last - 1) for first, last in behind.offsets[n:]]
            return Encoded(behind.ids[n:], shifted)
        alone = self.tokenizer.encode_batch([part], False)[0]
        return Encoded(alone.ids, [(begin + first, begin + last) for first, last in alone.offsets])


def lies_across(encoded: Encoded, n_before: int, begin: int) -> bool:
    """Whether the token before the first one of an answer reaches into it."""
    return n_before > 0 and encoded.offsets[n_before - 1][1] > begin


def encode_question(rendered: Rendered, tokenizer: Tokenizer, device: torch.device | None = None) -> torch.Tensor:
    """The tokens (T,) with which a model is asked; where there are earlier answers, as training shows them."""
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    return torch.tensor(encoding.encoded.ids, dtype=torch.int64, device=device)
