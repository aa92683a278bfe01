"""The text of an answer while its tokens come, up to a stop string."""

from collections.abc import Sequence

from lit_gpt.data.tokenizer import StreamDecoder, Tokenizer
from lit_gpt.errors import InputError


class TextStream:
    """Text from tokens that come one by one, as it becomes certain, until a stop string is complete.

    The text ends before the stop string that is complete first, and before the longest one if several end there. Where
    the tokens begin and end does not matter. What may be the beginning of a stop string is held back until the next
    characters decide:

        stop "END."      tokens   The  E  agle  E  ND.x
                         pushed   The  ␣  Eagle ␣  (stopped)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Raises InputError if a stop string is empty."""
        if "" in stop:
            raise InputError("A stop string is empty, expected a character or more. Leave it out.")
        self.decoder = StreamDecoder(tokenizer)
        self.stop = list(stop)
        self.held = ""  # certain text that may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string is complete. Nothing is said any more."""

    def push(self, token: int) -> str:
        """The text that has become certain with one more token, which may be none."""
        return "" if self.stopped else self.release(self.decoder.push(token))

    def end(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self.release(self.decoder.end()) + self.held
        self.held = ""
        return rest

    def release(self, new: str) -> str:
        """The text before a stop string, or else all that cannot be the beginning of one."""
        text = self.held + new
        complete = []
        for stop in self.stop:
            begin = text.find(stop)
            if begin >= 0:
                complete.append((begin + len(stop), begin))
        if complete:
            self.stopped = True
            self.held = ""
            _, begin = min(complete)
            return text[:begin]
        n_held = self.longest_beginning(text)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def longest_beginning(self, text: str) -> int:
        """How many characters at the end of a text are the beginning of a stop string: as many as any has there."""
        longest = max(map(len, self.stop), default=0) - 1
        for n in range(min(longest, len(text)), 0, -1):
            end = text[-n:]
            if any(stop.startswith(end) for stop in self.stop):
                return n
        return 0
