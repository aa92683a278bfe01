"""Classification: the last hidden state of a record goes to a small head of classes instead of tokens.

    tokens        a0 a1 a2 y          a record ends with its label y, the only token that is trained
    trained                x
    layout        target_index 2, target y

So a record of text and label is a record like any other: it is read, dealt out and computed by the same code. What
stands at y is never looked at by anything, since attention looks back.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.checkpoint import read_metadata, read_tensors, save_tensors
from lit_gpt.dataset import Dataset
from lit_gpt.device import is_first
from lit_gpt.errors import InputError
from lit_gpt.layout import Layout
from lit_gpt.model import GPT
from lit_gpt.records import as_text, read_records, read_split
from lit_gpt.report import write_report
from lit_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Method = Literal["features", "head", "last_k", "lora", "qlora", "full"]
Pooling = Literal["last", "mean", "first"]


@dataclass(frozen=True)
class TextArgs:
    """Where the texts and labels are."""

    data_path: Path
    """Texts and labels: a .csv, .json, .jsonl or .parquet file, or org/name of the hub. A column `split` may say train
    or val; records that say test are left out."""
    text_key: str = "text"
    """The column of the texts."""
    label_key: str = "label"
    """The column of the labels."""
    max_seq_length: int = 512
    """Longer texts are cut to their first tokens."""
    val_fraction: float = 0.2
    """Share of the distinct texts that is set aside for validation, where no record says val. The scores are of
    these texts; since the first eval_records of them also choose `best`, they are a little optimistic."""

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise InputError(f"--max_seq_length is {self.max_seq_length}, expected 1 or more.")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val_fraction is {self.val_fraction}, expected more than 0 and less than 1.")


@dataclass(frozen=True)
class ClassifierArgs:
    """What is trained of a classifier."""

    method: Method = "last_k"
    """features: a logistic regression on hidden states that are computed once. head: the output layer alone. last_k:
    also the last k blocks and the final norm. lora: the output layer, and LoRA in the blocks. qlora: the same over a
    quantized base. full: all weights."""
    k: int = 1
    """For last_k: how many blocks."""
    head_layers: int = 0
    """Hidden layers in the output layer."""
    pooling: Pooling = "last"
    """Which hidden state stands for a text: of its last token, the mean of all, or of its first. In a causal model the
    first token knows nothing of the others."""
    balanced: bool = False
    """Weigh each class by the inverse of how often it occurs, so that rare classes count as much."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.head_layers < 0:
            raise InputError(
                f"--k is {self.k}, expected 1 or more; --head_layers {self.head_layers}, expected 0 or more."
            )
        if self.method == "features" and self.head_layers:
            raise InputError("A logistic regression on features has no hidden layers: use --method head.")

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "qlora")

    def first_trained_block(self, n_layer: int) -> int:
        """Below it nothing changes, so that its input can be computed once."""
        if self.k > n_layer:
            raise InputError(f"--k is {self.k}, but the model has {n_layer} blocks.")
        return {"features": n_layer, "head": n_layer, "last_k": n_layer - self.k}.get(self.method, 0)


@dataclass(frozen=True)
class TrainedClassifier:
    """What stands in the header of a trained classifier."""

    args: dict[str, Any]
    """Of ClassifierArgs."""
    lora: dict[str, Any] | None
    names: list[str]
    """Of the classes, in the order of the head's outputs."""
    max_seq_length: int
    """Longer texts were cut to their first tokens."""


class Classifier(nn.Module):
    """A GPT without its language model head, and a head of classes in float32."""

    def __init__(
        self, gpt: GPT, n_classes: int, args: ClassifierArgs, class_weights: torch.Tensor | None = None
    ) -> None:
        """`class_weights` (n_classes,) float32."""
        super().__init__()
        gpt.lm_head = None
        self.gpt, self.pool = gpt, POOLINGS[args.pooling]
        n_embd, device = gpt.config.n_embd, gpt.transformer.wte.weight.device
        with torch.device(device):
            hidden = [layer for _ in range(args.head_layers) for layer in (nn.Linear(n_embd, n_embd), nn.GELU())]
            self.head = nn.Sequential(*hidden, nn.Linear(n_embd, n_classes))
        self.register_buffer("class_weights", class_weights, persistent=False)

    def features(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A hidden state (N, C) per record of idx (1, T)."""
        return self.pool(self.gpt.transformer.ln_f(self.gpt.hidden(idx, layout=layout))[0], layout)

    def logits(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(N, n_classes), in the order of the layout's targets."""
        return self.head(self.features(idx, layout).to(self.head[-1].weight.dtype))

    def forward(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The summed loss of the records, a scalar; weighted where there are class weights."""
        return F.cross_entropy(self.logits(idx, layout), layout.target, self.class_weights, reduction="sum")


def pool_last(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(T, C) -> (N, C)"""
    return x.index_select(0, layout.target_index)


def pool_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    return x[[parts[0][0] for parts in spans(layout)]]


def pool_mean(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = [torch.cat([x[start:end] for start, end in parts]).mean(0, dtype=wide) for parts in spans(layout)]
    return torch.stack(rows) if rows else x[:0]


def spans(layout: Layout) -> list[list[tuple[int, int]]]:
    """Where the tokens of each record are, without its label: in a shared prefix, where it has one, and in its own."""
    if layout.n_targets == 0:  # a device's turn without records
        return []
    prefixes = {segment.prefix_start for segment in layout.segments if segment.prefix_length}
    own = [s for s in layout.segments if s.prefix_length or s.start not in prefixes]
    parts = [[(s.prefix_start, s.prefix_start + s.prefix_length), (s.start, s.start + s.length - 1)] for s in own]
    return [[(start, end) for start, end in part if end > start] for part in parts]


POOLINGS: dict[str, Callable[[torch.Tensor, Layout], torch.Tensor]] = {
    "last": pool_last,
    "first": pool_first,
    "mean": pool_mean,
}


def mark_trainable(model: Classifier, args: ClassifierArgs, is_lora: Callable[[str], bool]) -> None:
    """Says which parameters train: of last_k the blocks from `first_trained_block` on, and the final norm."""
    first = args.first_trained_block(model.gpt.config.n_layer)
    for name, param in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "head":
            param.requires_grad = True
        elif args.uses_lora:
            param.requires_grad = is_lora(name)
        elif args.method == "full":
            param.requires_grad = True
        else:
            in_block = parts[2] == "h" and int(parts[3]) >= first
            param.requires_grad = args.method == "last_k" and (in_block or parts[2] == "ln_f")


def class_weights(labels: Sequence[int], balanced: bool) -> torch.Tensor | None:
    """The inverse of each class's share, such that the mean over these texts is 1; None where all count alike."""
    counts = np.bincount(labels)
    return torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32) if balanced else None


class Texts(Dataset):
    """Texts and labels as tokens in memory, with all that `train.fit` asks of a dataset."""

    def __init__(self, records: Sequence[np.ndarray], labels: Sequence[int], chosen: np.ndarray) -> None:
        self.meta = {"prompt_style": "none"}
        self.tokens = np.concatenate([np.append(ids, label) for ids, label in zip(records, labels, strict=True)])
        self.ends = np.cumsum([len(ids) + 1 for ids in records])
        self.trained = np.zeros(len(self.tokens), np.uint8)
        self.trained[self.ends - 1] = 1
        self.records = chosen

    def choose(self, chosen: np.ndarray) -> "Texts":
        """Others of the same records."""
        other = object.__new__(Texts)
        vars(other).update(vars(self) | {"records": chosen})
        return other

    def as_places(self, pooled: bool) -> "Texts":
        """With the number of each token, or of each whole record, in place of the token; labels stay."""
        if pooled:
            labels = self.tokens[self.ends - 1]
            return Texts([np.array([i]) for i in range(len(labels))], labels, self.records)
        other = self.choose(self.records)
        other.tokens = np.where(self.trained, self.tokens, np.arange(len(self.tokens)))
        return other

    @property
    def labels(self) -> np.ndarray:
        return self.tokens[self.ends[self.records] - 1]


class Labelled(NamedTuple):
    texts: list[str]
    labels: list[int]
    names: list[str]
    """Of the classes; a label is its index here."""
    splits: list[str | None]


def read_labelled(path: Path, text_key: str, label_key: str) -> Labelled:
    """Texts and labels of a file or data set; a column `split` may say train or val.

    Left out are records that say test, and training texts that are validation texts too.

    Raises:
        InputError: unreadable, a record without these keys or without text, or fewer than two classes.
    """
    rows, n_test = [], 0
    for number, record in enumerate(read_records(path), 1):
        side = read_split(record.get("split"), f"{path}, record {number}")
        if side == "other":
            n_test += 1
            continue
        missing = [key for key in (text_key, label_key) if record.get(key) in (None, "")]
        if missing:
            raise InputError(
                f"{path}, record {number} has no {' and no '.join(missing)}; it has {', '.join(map(str, record))}."
                " Name the columns with --text_key and --label_key."
            )
        rows.append((str(record[text_key]), str(record[label_key]), side))
    val_texts = {text for text, _, side in rows if side == "val"}
    kept = [row for row in rows if row[2] == "val" or row[0] not in val_texts]
    if n_test or len(kept) < len(rows):
        twice = f"{len(rows) - len(kept):,} training texts that are validation texts too"
        say(f"Left out: {twice}; {n_test:,} records of split test.")
    names = sorted({label for _, label, _ in kept})
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} kinds of {label_key}, expected two or more.")
    index = {name: i for i, name in enumerate(names)}
    texts, labels, splits = zip(*kept)
    return Labelled(list(texts), [index[label] for label in labels], names, list(splits))


def encode(texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[np.ndarray]:
    """The first `limit` tokens of each text. Raises InputError for a text without any."""
    encoded = [tokens.ids for tokens in tokenizer.encode_batch([as_text(text, "A text") for text in texts])]
    empty = [number for number, ids in enumerate(encoded, 1) if not ids]
    if empty:
        raise InputError(f"Text {empty[0]} has no tokens: nothing to classify. Leave it out.")
    if cut := sum(len(ids) > limit for ids in encoded):
        say(f"{cut:,} of {len(texts):,} texts have more than {limit:,} tokens: they are cut to their first {limit:,}.")
    return [np.asarray(ids[:limit], np.int64) for ids in encoded]


def say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr)


def split(data: Labelled, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) records: by their column, else at random; a text is never on both sides.

    Raises:
        InputError: a side is empty, or there is nothing to learn a class from.
    """
    if "val" in data.splits:
        val = np.array([name == "val" for name in data.splits])
    else:
        _, group = np.unique(np.array(data.texts, dtype=object).astype(str), return_inverse=True)
        n_groups = group.max() + 1
        chosen = np.random.default_rng(seed).permutation(n_groups)[: max(1, round(val_fraction * n_groups))]
        val = np.isin(group, chosen)
    if val.all() or not val.any():
        raise InputError("All texts are on one side of the split. Change --val_fraction or the column split.")
    train = np.flatnonzero(~val)
    if unseen := set(data.labels) - {data.labels[i] for i in train}:
        raise InputError(
            f"All texts labelled {data.names[min(unseen)]!r} are set aside for validation. Change --val_fraction,"
            " --seed or the column split, or leave them out."
        )
    return train, np.flatnonzero(val)


def in_batches(dataset: Dataset, size: int) -> Iterator[tuple[np.ndarray, torch.Tensor, Layout]]:
    """(which records, their tokens, their layout): each record once, like lengths together."""
    order = np.argsort([dataset.length(i) for i in range(len(dataset))], kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, *Layout.end_to_end([dataset[i] for i in chosen])


@torch.inference_mode()
def compute(of: Callable[[torch.Tensor, Layout], torch.Tensor], dataset: Dataset, size: int) -> np.ndarray:
    """What `of` (a classifier's `logits` or `features`) gives for each record, (len(dataset), ...) float32."""
    device = of.__self__.head[-1].weight.device
    rows: list[np.ndarray] = [None] * len(dataset)
    for chosen, idx, layout in in_batches(dataset, size):
        for i, row in zip(chosen, of(idx.to(device), layout.to(device)).float().cpu().numpy(), strict=True):
            rows[i] = row
    return np.stack(rows)


# ---- what lies below the first trained block is computed once


class Places(nn.Module):
    """Stands for the embedding: its tokens are rows of what was computed, and it only remembers which."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight[:1] * 0, persistent=False)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        self.idx = idx
        return self.weight[idx * 0]


class Rows(nn.Module):
    """Stands for the last of the frozen blocks: gives what it gave, (rows, C), for the tokens that are asked for."""

    def __init__(self, block: nn.Module, rows: torch.Tensor, places: Places) -> None:
        super().__init__()
        self.rope, self.window = block.rope, block.window
        self.register_buffer("rows", rows, persistent=False)
        self.places = (places,)  # a tuple, since it is no part of this module

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return self.rows[self.places[0].idx]


class Passed(nn.Module):
    """A frozen block before that one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.rope, self.window = block.rope, block.window

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return x


@torch.no_grad()
def hidden_rows(model: Classifier, texts: Texts, depths: Collection[int], size: int) -> dict[int, torch.Tensor]:
    """What reaches some of the blocks, in one pass over all records.

    A depth below n_layer gives the input of that block for every token of the data, (n_tokens, C); n_layer gives the
    pooled feature of every record, (n_records, C).
    """
    blocks, weight = model.gpt.transformer.h, model.gpt.transformer.wte.weight
    like = dict(dtype=weight.dtype, device=weight.device)
    rows = {
        d: torch.empty(len(texts.tokens if d < len(blocks) else texts.ends), weight.size(1), **like) for d in depths
    }
    places = torch.empty(0)

    def keep(depth: int) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, inputs: tuple) -> None:
            rows[depth][places] = inputs[0][0]

        return hook

    hooks = [blocks[depth].register_forward_pre_hook(keep(depth)) for depth in rows if depth < len(blocks)]
    everything = texts.choose(np.arange(len(texts.ends)))
    for chosen, idx, layout in in_batches(everything, size):
        places = torch.from_numpy(np.concatenate([np.arange(*everything.span(i)) for i in chosen])).to(weight.device)
        features = model.features(idx.to(weight.device), layout.to(weight.device))
        if len(blocks) in rows:
            rows[len(blocks)][torch.from_numpy(chosen).to(weight.device)] = features
    for hook in hooks:
        hook.remove()
    return rows


def start_at(model: Classifier, depth: int, rows: torch.Tensor) -> None:
    """Makes a model begin at block `depth`, in place, on the tokens of `Texts.as_places(depth == n_layer)`."""
    transformer = model.gpt.transformer
    transformer.wte = Places(transformer.wte.weight)
    for i in range(depth):
        block = transformer.h[i]
        transformer.h[i] = Passed(block) if i < depth - 1 else Rows(block, rows, transformer.wte)
    if depth == len(transformer.h):  # the rows are features
        transformer.ln_f, model.pool = nn.Identity(), pool_last


def cached_rows(
    file: Path, base: str, model: Classifier, texts: Texts, depths: Collection[int], depth: int, size: int
) -> tuple[torch.Tensor, float]:
    """`hidden_rows` at `depth`, and the seconds they took to compute; `file` keeps those of all `depths`.

    `base` is the fingerprint of the model's weights.
    """
    what = (base, model.pool.__name__, model.gpt.config.name, str(model.gpt.transformer.wte.weight.dtype))
    key = hashlib.sha256("\n".join(what).encode() + texts.tokens.tobytes()).hexdigest()
    header = read_metadata(file) if file.is_file() else {}
    if header.get("key") != key or str(depth) not in header["depths"].split():
        started = time.perf_counter()
        rows = hidden_rows(model, texts, depths, size)
        seconds = time.perf_counter() - started
        header = {"key": key, "depths": " ".join(map(str, depths)), "seconds": str(seconds)}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({str(at): values for at, values in rows.items()}, file.with_suffix(".tmp"), header)
        file.with_suffix(".tmp").replace(file)
    (rows,) = (values for name, values in read_tensors([file]) if name == str(depth))
    weight = model.gpt.transformer.wte.weight
    share = depth / model.gpt.config.n_layer  # of the blocks that the one pass went through
    return rows.to(weight.device), float(header["seconds"]) * share


# ---- how good it is


class Scores(NamedTuple):
    confusion: np.ndarray
    """(true, predicted) counts."""
    f1: np.ndarray
    """Of each class; their mean is macro F1."""
    accuracy: float
    trained: int
    """Parameters."""
    minutes: float
    """All the work from the base model's weights to the classifier."""


def evaluate(model: Classifier, dataset: Texts, size: int, seconds: float) -> Scores:
    """How good a classifier is on these texts."""
    model.eval()
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    predicted = compute(model.logits, dataset, size).argmax(1)
    return score(dataset.labels, predicted, model.head[-1].out_features, trained, seconds)


def score(labels: np.ndarray, predicted: np.ndarray, n_classes: int, trained: int = 0, seconds: float = 0.0) -> Scores:
    """A class that neither occurs nor is predicted has an F1 of 0."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, both = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)  # F1 = 2 TP / (2 TP + FP + FN)
    f1 = np.divide(2 * hits, both, out=np.zeros(n_classes), where=both > 0)
    return Scores(confusion, f1, float(hits.sum() / confusion.sum()), trained, seconds / 60)


def report(scores: Scores, names: Sequence[str], out_dir: Path, command: str, settings: dict[str, Any]) -> None:
    """Prints the scores and writes them to report.md, with confusion.png."""
    facts = {"Accuracy": f"{100 * scores.accuracy:.2f} %", "F1 (macro)": f"{scores.f1.mean():.4f}"}
    facts |= {f"F1 of {name}": f"{value:.4f}" for name, value in zip(names, scores.f1, strict=True)}
    facts |= {"Trained parameters": f"{scores.trained:,}", "Minutes": f"{scores.minutes:.2f}"}
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    try:
        confusion_figure(scores.confusion, names).savefig(out_dir / "confusion.png")
    except ModuleNotFoundError:
        print("No plot, as matplotlib is missing: pip install -e '.[report]'")
    write_report(out_dir, title="Classifier", command=command, settings=settings, facts=facts, answers=[])


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    """Rows are the true classes, columns the predicted ones; the colour is the share of the row."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = 2.2 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def check_scikit_learn() -> None:
    """Raises InputError where it is not installed."""
    if find_spec("sklearn") is None:
        raise InputError("--method features and --sweep need scikit-learn: pip install -e '.[classify]'")


@torch.no_grad()
def fit_logistic_regression(model: Classifier, train_data: Texts, size: int) -> None:
    """Sets the head to a logistic regression on the standardized features of these texts."""
    from sklearn.linear_model import LogisticRegression

    features = compute(model.features, train_data, size).astype(np.float64)
    mean, std = features.mean(0), features.std(0) + 1e-6
    found = LogisticRegression(max_iter=2000, class_weight="balanced" if model.class_weights is not None else None)
    found.fit((features - mean) / std, train_data.labels)
    weight, bias = found.coef_ / std, found.intercept_ - found.coef_ @ (mean / std)
    if len(weight) == 1:  # two classes have one row: the logit of the second
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    model.head[-1].weight.copy_(torch.from_numpy(weight))
    model.head[-1].bias.copy_(torch.from_numpy(bias))
