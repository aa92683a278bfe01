"""From what a server was seen to do to what is wrong with it. A pure function: it asks nobody and reads no file.

The weights are judged by log-probabilities of given tokens. The server's are compared with those of several models
here, each of which is one way to be wrong:

    as trained          0.846      the mean absolute difference from the server's, in nats; this one has alpha halved
    adapter x 0.5       0.0000008  what is nearest
    in bfloat16                    a right way to differ: what this costs is measured on this very model

What is nearest, if it is near enough, is what the server has. If that is the trained model, or a rounded one, it is
right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_gpt.display.words import counted, shortened

TRAINED = "as trained"
NO_ADAPTER = "without adapter"
SECOND_BOS = "with a BOS before it"
NO_BOS = "without its BOS"
ROUNDED = ("in bfloat16", "in cpu.int8", "in cpu.int4", "in bnb.nf4")
"""The trained model with its weights rounded, from the least to the most."""
EXACT = 2e-3
"""Nats. Two programs that compute in float32 differ by 1e-5 to 1e-4, and some write four digits."""
OTHER_WAY = 2.0
"""How many times as far as here a program may be off that rounds to as many bits in another way. Of a tiny random model
cpu.int4 was off by 0.39 nats and nf4 by 0.50."""
NEARER = 0.5
"""A model that is to explain a server has to be nearer to it than the trained one, at least by this factor."""
CLEARLY = 0.1
"""A model that is nearer by this factor explains a server, though both are further off than rounding."""
CHAT_NORMAL = 0.02
"""Nats. The log-probabilities of one short answer are a few: they may be so far off by chance."""


@dataclass(frozen=True)
class Weighed:
    """Log-probabilities of the same tokens in the same places, by the server and by models here."""

    server: Sequence[float]
    """In nats, (n,)."""
    positions: Sequence[int]
    """How many tokens come before each, (n,)."""
    models: Mapping[str, Sequence[float]]
    """The same by models here, (n,) each: TRAINED, NO_ADAPTER, ROUNDED, "adapter x 2", "rope base 10000" ..."""

    def distances(self) -> dict[str, float]:
        """The mean absolute difference of each model from the server, in nats."""
        return {name: mean_difference(self.server, values) for name, values in self.models.items()}

    def nearest(self) -> tuple[str, float]:
        """The model that is nearest to the server, and how far off its log-probabilities may be elsewhere, in nats.

        Programs with rounded weights compute with them in several ways, for one row and for many: what rounding costs
        is what they may be off.
        """
        distances = self.distances()
        name = min(distances, key=distances.__getitem__)
        return name, distances[TRAINED if name in ROUNDED else name]


@dataclass(frozen=True)
class TextPrompt:
    """A prompt that was sent as text, and what the server read."""

    tokens: Sequence[str]
    """The tokens of training, each as its text."""
    n_server: int | None
    """How many tokens the server read. None if it does not say."""
    server_tokens: Sequence[str] | None = None
    """Their texts, if it shows them."""
    bos: str | None = None
    """The text of the tokenizer's BOS, if there is one."""


@dataclass(frozen=True)
class Chat:
    """A conversation that was sent as messages."""

    has_system: bool
    """Whether a system message was sent."""
    n_here: Mapping[str, int]
    """Its tokens by the template of training, TRAINED, and by others, each named by what it does otherwise."""
    n_server: int | None
    """How many tokens the server read. None if it does not say."""
    server: Sequence[float] | None = None
    """The log-probabilities of the tokens that the server answered, in nats."""
    here: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The same by the model here that is nearest to the server's, behind each of the prompts of `n_here`."""
    normal: float = 0.0
    """How far that model may be off anyway, in nats: see `Weighed.nearest`."""
    text: str = ""
    """The prompt of training."""
    server_text: str | None = None
    """The prompt of the server, if it shows it."""


@dataclass(frozen=True)
class Answered:
    """What the server answered when asked for the likeliest token each time, and what was expected."""

    asked_as: str
    """prompt, chat, or repeats for a text of which nothing is expected but that it repeats itself."""
    expected: str
    expected_finish: str
    """stop or length."""
    server: str
    finish: str
    again: str
    """The second answer to the same question."""
    n_asked: int
    """How many tokens the answer might have."""
    n_server: int | None
    """How many it had."""
    base: str | None = None
    """What the base model would have answered."""
    unlikely: Sequence[tuple[str, str, bool]] = ()
    """Tokens that were not the likeliest by the server's own log-probabilities: the token, the likeliest one, and
    whether that was in the text before."""


@dataclass(frozen=True)
class Evidence:
    """All that was seen of a server. What it does not show is None or empty, and then unknown."""

    weighed: Weighed | None = None
    texts: Sequence[TextPrompt] = ()
    chats: Sequence[Chat] = ()
    answers: Sequence[Answered] = ()
    refused: str | None = None
    """What the server said when it was asked for as many new tokens as answers may have."""
    n_context: int | None = None
    """How many tokens the server reads in all, if it says so."""
    longest: int = 0
    """The longest record of the training data, in tokens."""
    unknown: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """Something that was found out."""

    what: str
    """A short name, such as "adapter not applied"."""
    text: str
    """A sentence with the evidence."""
    is_wrong: bool = True


UNEXPLAINED = ("positions", "other weights")
"""Findings for log-probabilities that fit none of the models here, or one of many."""

# what each way to differ is called, and what to do about it
ADVICE = {
    NO_ADAPTER: (
        "adapter not applied",
        "The server has the base model. Serve what was trained: the merged adapter (scripts/merge_lora.py), the adapter"
        " by its name, or the folder of a full fine-tuning.",
    ),
    SECOND_BOS: (
        "second BOS",
        "The server puts a BOS before a text that was trained without another one. Send tokens, or turn it off there.",
    ),
    NO_BOS: ("missing BOS", "The server leaves the BOS out that training had. Turn it on there, or send tokens."),
}


def judge(evidence: Evidence) -> list[Finding]:
    """What is wrong, the most certain first, and then what is normal and worth to know."""
    findings = judge_weights(evidence.weighed)
    weights_are_right = not any(finding.is_wrong for finding in findings)
    findings += judge_texts(evidence.texts)
    chats = judge_chats(evidence.chats)
    findings += chats
    if evidence.refused is not None:
        findings.append(Finding("answers are cut", f"It refuses as many new tokens as asked for: {evidence.refused}"))
    cut = judge_room(evidence.texts)
    if cut:  # behind a text that is cut the trained model would say something else, too
        findings = [finding for finding in findings if finding.what not in UNEXPLAINED]
    if evidence.n_context is not None and evidence.n_context < evidence.longest:
        text = f"It reads {evidence.n_context:,} tokens in all, and the longest record of the training has"
        findings.append(Finding("context cut", f"{text} {evidence.longest:,}."))
    findings += cut

    # answers: those to a prompt that the server reads otherwise differ anyway
    findings += judge_sampling(evidence.answers)
    for asked_as in ("prompt", "chat"):
        answers = [answer for answer in evidence.answers if answer.asked_as == asked_as]
        other_prompts = findings_named(findings, "second BOS", "missing BOS", "other tokens")
        prompt_is_right = not cut and not (chats if asked_as == "chat" else other_prompts)
        knows_why = bool(findings_named(findings, "sampling is on", "repetition penalty", "not the likeliest"))
        is_known = bool(findings_named(findings, "adapter not applied"))
        if weights_are_right and prompt_is_right and not knows_why and not is_known:
            findings += judge_answers(answers, evidence.weighed is not None)

    findings = without_repeats(findings)
    return sorted(findings, key=lambda finding: not finding.is_wrong)  # stable: the certain ones stay first


def findings_named(findings: Sequence[Finding], *names: str) -> list[Finding]:
    return [finding for finding in findings if finding.what in names]


def without_repeats(findings: Sequence[Finding]) -> list[Finding]:
    """The first finding of each name."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.what, finding)
    return list(first.values())


def mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The mean absolute difference, in the unit of both."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


# ---- the weights


def judge_weights(weighed: Weighed | None) -> list[Finding]:
    """Whether the server's log-probabilities are those of the trained model, or of which other one."""
    if weighed is None:
        return []
    distances = weighed.distances()
    off = distances[TRAINED]
    if off <= EXACT:
        return []
    n = counted(len(weighed.server), "token")
    seen = f"Over {n} its log-probabilities differ by {off:.3g} nats from the trained model's"

    # the model that is nearest
    faults = {name: value for name, value in distances.items() if name not in (TRAINED, *ROUNDED)}
    nearest = min(faults, key=faults.__getitem__, default=None)
    rounded = min((name for name in ROUNDED if name in distances), key=distances.__getitem__, default=None)
    drifts = [mean_difference(weighed.models[TRAINED], weighed.models[name]) for name in ROUNDED if name in distances]
    near = max(OTHER_WAY * max(drifts, default=0.0), CLEARLY * off)
    if nearest is not None and faults[nearest] < min(near, NEARER * off):
        is_rounding = rounded is not None and distances[rounded] <= faults[nearest]
        if not is_rounding:
            return [name_fault(nearest, f"{seen}, and by {faults[nearest]:.3g} {from_what(nearest)}.")]

    # one of the rounded models, or no further off than such a one is
    if rounded is not None and distances[rounded] <= EXACT:
        text = f"{seen}, and by {distances[rounded]:.3g} from it {rounded}: this is what it has."
        return [Finding(f"weights {rounded}", text, is_wrong=False)]
    for name in ROUNDED:
        if name not in distances:
            continue
        own = mean_difference(weighed.models[TRAINED], weighed.models[name])
        if off <= OTHER_WAY * own:
            text = f"{seen}, which is normal for rounded weights: {name} it differs by {own:.3g} here."
            return [Finding("weights are rounded", text, is_wrong=False)]

    # farther on it is worse, and not because answers stand there, where the adapter does most: positions
    early, late = by_position(weighed, weighed.server)
    base_early, base_late = by_position(weighed, weighed.models.get(NO_ADAPTER, weighed.server))
    if late * max(base_early, EXACT) > 3 * early * max(base_late, EXACT):
        text = f"{seen}: by {early:.3g} in the first half of the positions, and by {late:.3g} in the second."
        return [Finding("positions", f"{text} Look at the rope base and its scaling.")]
    others = ", ".join(f"{value:.3g} {from_what(name)}" for name, value in sorted(faults.items(), key=second)[:3])
    text = f"{seen} and fit no other model here ({others}). It serves another base, or another adapter."
    return [Finding("other weights", text)]


def second(pair: tuple[str, float]) -> float:
    return pair[1]


def by_position(weighed: Weighed, values: Sequence[float]) -> tuple[float, float]:
    """The mean absolute differences of `values` (n,) from the trained model's, in the first and the second half of the
    positions."""
    middle = sorted(weighed.positions)[len(weighed.positions) // 2]
    early: list[float] = []
    late: list[float] = []
    for position, value, trained in zip(weighed.positions, values, weighed.models[TRAINED], strict=True):
        side = early if position < middle else late
        side.append(abs(value - trained))
    return sum(early) / max(1, len(early)), sum(late) / max(1, len(late))


def from_what(name: str) -> str:
    """A model of `Weighed.models`, to stand behind "differ by 0.3"."""
    return "from the base's" if name == NO_ADAPTER else f"from those {name if name in ADVICE else f'with {name}'}"


def name_fault(name: str, seen: str) -> Finding:
    """The finding for the model that the server is nearest to."""
    if name in ADVICE:
        what, advice = ADVICE[name]
        return Finding(what, f"{seen} {advice}")
    if name.startswith("adapter x "):
        factor = name.removeprefix("adapter x ")
        advice = f"The adapter has about {factor} times its weight: compare alpha and r there, or it is there twice."
        return Finding("adapter scaled", f"{seen} {advice}")
    return Finding("positions", f"{seen} Set the rope base and its scaling as in config.json.")


# ---- prompts


def judge_texts(texts: Sequence[TextPrompt]) -> list[Finding]:
    """Whether a prompt that is sent as text has the tokens of training."""
    findings = []
    for prompt in texts:
        here = list(prompt.tokens)
        has_bos = prompt.bos is not None and here[:1] == [prompt.bos]
        if prompt.server_tokens is not None:
            there = list(prompt.server_tokens)
            if there == here or "".join(there) == "".join(here) and len(there) == len(here):
                continue
            if there[1:] == here:
                findings.append(bos_finding(SECOND_BOS, f"It reads {there[:3]} where training had {here[:2]}."))
            elif has_bos and here[1:] == there:
                findings.append(bos_finding(NO_BOS, f"It reads {there[:2]} where training had {here[:3]}."))
            else:
                same = first_difference(here, there)
                text = f"From token {same} on it reads {there[same : same + 4]}, training had {here[same : same + 4]}."
                findings.append(Finding("other tokens", f"The same text has other tokens there. {text}"))
        elif prompt.n_server is not None and prompt.n_server - len(here) == 1:
            findings.append(bos_finding(SECOND_BOS, f"It reads {prompt.n_server} tokens, and training {len(here)}."))
        elif prompt.n_server is not None and prompt.n_server - len(here) == -1 and has_bos:
            findings.append(bos_finding(NO_BOS, f"It reads {prompt.n_server} tokens, and training {len(here)}."))
    return findings


def judge_room(texts: Sequence[TextPrompt]) -> list[Finding]:
    """Whether a prompt that is sent as text is cut: the server reads far fewer tokens than it has."""
    for prompt in texts:
        if prompt.n_server is not None and prompt.n_server < len(prompt.tokens) - 1:
            text = f"A prompt of {len(prompt.tokens)} tokens is read as {prompt.n_server} there."
            return [Finding("context cut", text)]
    return []


def bos_finding(name: str, seen: str) -> Finding:
    what, advice = ADVICE[name]
    return Finding(what, f"{seen} {advice}")


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """The first place where two sequences differ; the length of the shorter one if it is the beginning of the other."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def judge_chats(chats: Sequence[Chat]) -> list[Finding]:
    """Whether messages become the prompt of training."""
    return [finding for chat in chats if (finding := judge_chat(chat)) is not None]


def judge_chat(chat: Chat) -> Finding | None:
    """What is wrong with the prompt that a conversation has become; None if nothing is, or nothing can be seen."""
    # the text itself
    n_trained = chat.n_here[TRAINED]
    lead = f"Messages {'with a system message ' if chat.has_system else ''}become another prompt than in training"
    others = [name for name in chat.n_here if name != TRAINED]
    if chat.server_text is not None:
        if chat.server_text == chat.text and chat.n_server in (None, n_trained):
            return None
        if chat.server_text != chat.text:
            at = max(0, first_difference(chat.text, chat.server_text))
            start = max(0, at - 20)
            there, here = chat.server_text[start : at + 60], chat.text[start : at + 60]
            return Finding("chat template", f"{lead}, from character {at} on: {there!r} there, {here!r} in training.")

    # as long as which prompt, and of those the one that makes the answer as likely as the server says
    lengths_fit = [name for name in chat.n_here if chat.n_server in (None, chat.n_here[name])]
    off = {name: mean_difference(chat.server, chat.here[name]) for name in chat.here} if chat.server else {}
    fits_length = TRAINED in lengths_fit
    if not off:
        if fits_length:
            return None
        text = f"{lead}: it has {chat.n_server} tokens there, and {n_trained} in training."
        like = [name for name in lengths_fit if name != TRAINED]
        if like:
            return Finding(name_template(like[0]), f"{text} As many it has {' or '.join(like)}.")
        return Finding("chat template", text)
    nearest = min((name for name in others if name in lengths_fit and name in off), key=off.__getitem__, default=None)
    is_off = off[TRAINED] > CHAT_NORMAL + 3 * chat.normal
    is_nearer = nearest is not None and off[nearest] < NEARER * off[TRAINED] and is_off
    if fits_length and not is_off:
        return None
    counts = f"{chat.n_server} tokens there, and {n_trained} in training"
    if nearest is not None and (is_nearer or not fits_length):
        figures = f"the answer's log-probabilities fit it to {off[nearest]:.3g} nats, and that of training to"
        return Finding(name_template(nearest), f"{lead} ({counts}). It is as {nearest}: {figures} {off[TRAINED]:.3g}.")
    behind = f"behind that of training the answer's log-probabilities are {off[TRAINED]:.3g} nats off"
    return Finding("chat template", f"{lead}: it has {counts}, and {behind}.")


def name_template(candidate: str) -> str:
    """The finding for a prompt of `Chat.n_here`."""
    if candidate == SECOND_BOS:
        return "second BOS in chat"
    if candidate == NO_BOS:
        return "missing BOS in chat"
    if "system" in candidate:
        return "system message"
    return "prompt style" if candidate.startswith("in the style") else "chat template"


# ---- answers


def judge_sampling(answers: Sequence[Answered]) -> list[Finding]:
    """Whether the likeliest token was taken each time, as was asked for."""
    unlikely = [entry for answer in answers for entry in answer.unlikely]
    n_other = sum(answer.again != answer.server for answer in answers)
    if n_other and (unlikely or n_other > 1):
        text = f"Asked twice with temperature 0, {n_other} of {counted(len(answers), 'answer')} came out otherwise."
        return [Finding("sampling is on", f"{text} The server has a temperature of its own.")]
    if not unlikely:
        return []
    chosen, likeliest, _ = unlikely[0]
    text = f"With temperature 0 it says {chosen!r} where {likeliest!r} is likelier by its own log-probabilities"
    if all(was_before for _, _, was_before in unlikely):
        return [
            Finding(
                "repetition penalty",
                f"{text}; the likelier token has always been in the text before ({counted(len(unlikely), 'time')}). The"
                " server has a repetition penalty.",
            )
        ]
    return [Finding("not the likeliest", f"{text}. The server has settings of sampling of its own.")]


def judge_answers(answers: Sequence[Answered], has_logprobs: bool) -> list[Finding]:
    """Whether answers end as they should, and say what they should, of a server that is otherwise right."""
    if not answers:
        return []
    runs_on, ends_early, cut, as_base, same = [], [], [], [], []
    for answer in answers:
        expected = answer.expected.strip()
        server = answer.server.strip()
        if server == expected and answer.finish == answer.expected_finish:
            same.append(answer)
        elif answer.finish == "length" and answer.n_server is not None and answer.n_server < answer.n_asked:
            cut.append(answer)
        elif answer.expected_finish == "stop" and server.startswith(expected) and answer.finish == "length":
            runs_on.append(answer)
        elif answer.finish == "stop" and len(server) < len(expected) and expected.startswith(server):
            ends_early.append(answer)
        elif answer.base is not None and server == answer.base.strip() != expected:
            as_base.append(answer)
    n = counted(len(answers), "answer")
    if cut:
        text = f"{len(cut)} of {n} end after {cut[0].n_server} tokens, and {cut[0].n_asked} were asked for."
        return [Finding("answers are cut", text)]
    if runs_on:
        text = f"{len(runs_on)} of {n} go on where the trained model ends: {shortened(runs_on[0].server)!r}."
        return [Finding("stop token", f"{text} The server does not know the stop token of the training.")]
    if ends_early:
        early = ends_early[0]
        text = f"{len(ends_early)} of {n} end early: {shortened(early.server)!r} of {shortened(early.expected)!r}."
        return [Finding("stop token", f"{text} The server stops at something else, too.")]
    if not has_logprobs and len(as_base) > len(same):
        return [Finding("adapter not applied", f"{len(as_base)} of {n} are the base's, and {len(same)} the trained's.")]
    if len(same) >= len(answers) / 2:
        return []
    other = next(answer for answer in answers if answer not in same)
    text = f"{len(same)} of {n} are as here. One that is not: {shortened(other.server)!r}, expected"
    return [Finding("other answers", f"{text} {shortened(other.expected)!r}.", is_wrong=not has_logprobs)]
