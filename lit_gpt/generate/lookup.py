"""Drafts by looking up: what followed the last time that the text ended as it does now.

An answer often repeats its prompt: a summary, an edit, code, a quotation. If its last tokens stood there before, those
that followed then may follow now. The model reads such a draft together with the last token, which costs little more
than that token alone, since the weights are read once; tokens up to the first that it would have chosen otherwise are
kept. Whatever the draft is, the answer is the same.

Saxena, Prompt Lookup Decoding, 2023: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from collections.abc import Sequence

N_GRAM = 3
"""So many tokens at the end have to be the same."""


class Lookup:
    """Remembers where each few tokens of a growing text stood last."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, ...], int] = {}  # some tokens -> the position of what follows them
        self.n_seen = N_GRAM

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow; none if the last ones were not there before.

        `tokens` are those of the last call, and perhaps more of them.
        """
        # the last tokens themselves are not remembered yet: nothing follows them
        for end in range(self.n_seen, len(tokens)):
            self.last[tuple(tokens[end - N_GRAM : end])] = end
        self.n_seen = max(self.n_seen, len(tokens))
        begin = self.last.get(tuple(tokens[-N_GRAM:]))
        if begin is None:
            return []
        # a text that repeats itself every few tokens goes on so: what is copied grows with the copy
        draft: list[int] = []
        for i in range(begin, begin + n):
            draft.append(tokens[i] if i < len(tokens) else draft[i - len(tokens)])
        return draft
