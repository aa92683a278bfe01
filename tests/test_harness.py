"""lm-evaluation-harness hears of us what its own backend says: `pytest tests/test_harness.py`, about 25 s"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_tiny
from helpers.harness_tasks import write_tasks
from helpers.tiny_tokenizers import SPECIAL, byte_level, write

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.evaluation.kept import Kept
from lit_gpt.harness import tasks as harness
from lit_gpt.harness.tasks import LoadedTasks, TaskArgs, load_tasks, run_tasks, shown
from lit_gpt.lora import LoRA, LoRALinear, apply_lora
from lit_gpt.scores.paired import paired_difference

N_DOCUMENTS = 5
ALL_TASKS = ["docstrings", "docstring_answers", "docstring_texts"]
CONTEXT = "Question: What does the function `abc.f` do?\nAnswer:"
LONG = "The sun is hot and the moon is not. " * 60  # more than 256 tokens


@pytest.fixture(scope="module", autouse=True)
def cache_of_data(tmp_path_factory) -> Iterator[None]:
    """The library keeps a copy of every file that it reads, by default in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), N_DOCUMENTS)


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedTasks:
    return load_tasks(TaskArgs(ALL_TASKS, include_path=folder, n_shots=2))


@pytest.fixture(scope="module")
def bos_dir(tmp_path_factory, sample_dir) -> Path:
    """A checkpoint whose tokenizer puts <s> before every text."""
    settings = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoint = make_tiny(tmp_path_factory.mktemp("bos") / "checkpoint", sample_dir, bos_token_id=0, eos_token_id=1)
    return write(checkpoint, tokenizer_json=byte_level(post_bos=True), tokenizer_config_json=settings)


@pytest.fixture(scope="module", params=["tiny_dir", "bos_dir"])
def checkpoint(request) -> Path:
    return request.getfixturevalue(request.param)


def ours(checkpoint: Path):
    from lit_gpt.harness.harness_model import HarnessModel

    return HarnessModel(
        load_model(checkpoint, torch.float32), Tokenizer(checkpoint), Kept(None), partial(shown, "model")
    )


def theirs(checkpoint: Path):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1)


def asked(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    metadata = ("a_task", 0, 1)
    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=metadata) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_transformers(checkpoint: Path) -> None:
    requests = asked(
        "loglikelihood",
        *[(CONTEXT, f" {choice}") for choice in ("It adds.", "It adds numbers.", "Nothing", "Nothing", "A", "B")],
        (CONTEXT + "  ", "two spaces before"),
        ("", "a text of its own"),
        ("", "<s>one that begins with a BOS"),
        ("<s>" + CONTEXT, " a BOS in the text"),
        (LONG + CONTEXT, " It adds."),
    )
    model = ours(checkpoint)
    found = model.loglikelihood(requests)
    expected = theirs(checkpoint).loglikelihood(requests, disable_tqdm=True)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], rel=0, abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    # a context of space alone, which the harness' backend cannot read
    assert len(set(model.loglikelihood(asked("loglikelihood", ("\n", "a line"), ("", "\na line"))))) == 1


def test_texts_are_read_in_the_windows_of_transformers(checkpoint: Path) -> None:
    requests = asked("loglikelihood_rolling", ("A short text.",), (LONG,), ("",), (LONG + LONG + "x",))
    found = ours(checkpoint).loglikelihood_rolling(requests)
    expected = theirs(checkpoint).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-6)


def test_answers_are_those_of_transformers(checkpoint: Path) -> None:
    requests = asked(
        "generate_until",
        (CONTEXT, {"until": ["\n"], "max_gen_toks": 20}),
        (CONTEXT + " It", {"until": [], "max_new_tokens": 7}),
        ("Once upon a time", {"until": [], "max_gen_toks": 30}),
        (LONG, {"until": "Question:", "max_gen_toks": 30, "do_sample": False, "temperature": 0.7}),
    )
    expected = theirs(checkpoint).generate_until(requests, disable_tqdm=True)
    assert ours(checkpoint).generate_until(requests) == expected and any(expected)


def test_an_answer_ends_before_a_stop_string(tiny_dir: Path) -> None:
    """It may begin and end in the midst of a token."""
    model, their_model = ours(tiny_dir), theirs(tiny_dir)
    (whole,) = model.generate_until(asked("generate_until", (CONTEXT, {"max_gen_toks": 20})))
    stops = [["nowhere", whole[n : n + 2]] for n in (5, 8, 11)]
    requests = asked("generate_until", *[(CONTEXT, {"until": stop, "max_gen_toks": 20}) for stop in stops])
    found = model.generate_until(requests)
    assert found == their_model.generate_until(requests, disable_tqdm=True)
    assert all(len(text) < len(whole) and whole.startswith(text) for text in found)


def test_a_special_token_is_a_stop_string_too(tiny_dir: Path) -> None:
    """Tasks name those of many models; an answer never spells them out."""
    model = ours(tiny_dir)
    request, until = model.request(
        *asked("generate_until", (CONTEXT, {"until": ["<|im_end|>", "</s>"], "max_gen_toks": 9})), 0
    )
    assert model.tokenizer.token_to_id("<|im_end|>") in request.stop_ids and request.stop == ["</s>"]
    assert until[:2] == ["<|im_end|>", "</s>"] and request.max_new_tokens == 9


def test_a_conversation_is_that_of_transformers(sample_dir: Path, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(sample_dir)
    model = ours(tiny_dir)  # it has the sample's template
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is "}]
    for chat, prompts in ((messages[:1], True), (messages, False)):
        expected = reference.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompts, continue_final_message=not prompts
        )
        assert model.apply_chat_template(chat, prompts) == expected
    assert expected.endswith("The answer is ")


def test_tasks_have_the_figures_of_transformers(tiny_dir: Path, loaded: LoadedTasks) -> None:
    """Also those of a group, and of two filters of one task; and the documents' own values have the same means."""
    from lm_eval.evaluator import evaluate

    model = load_model(tiny_dir, torch.float32)
    results = run_tasks({"base": model}, Tokenizer(tiny_dir), loaded)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(loaded.args.shots_seed)
    with harness.quiet(), harness.silent():
        expected = evaluate(theirs(tiny_dir), {"tasks": loaded.tasks, "groups": loaded.groups}, bootstrap_iters=0)
    totals = {(total.name, f"{total.metric},{total.filter}"): total for total in results.totals["base"]}
    for (name, key), total in totals.items():
        assert total.value == pytest.approx(expected["results"][name][key], rel=1e-5), key
    assert {name for name, _ in totals} == {*loaded.tasks, "docstrings"}
    assert ("docstring_answers", "exact_match,first_word") in totals
    assert totals["docstring_choices", "acc,none"].n_shots == 2

    scores = {one.measure: one for one in results.scores["base"]}
    for measure, figure in {
        "docstring_choices: acc_norm": totals["docstring_choices", "acc_norm,none"].value,
        "docstring_answers: exact_match (whole)": totals["docstring_answers", "exact_match,whole"].value,
        "docstring_texts: bits per byte": totals["docstring_texts", "bits_per_byte,none"].value,
        "docstring_texts: loss per word": np.log(totals["docstring_texts", "word_perplexity,none"].value),
        "docstrings: acc": totals["docstrings", "acc,none"].value,
    }.items():
        assert scores[measure].mean == pytest.approx(figure, rel=1e-5), measure
    assert scores["docstring_texts: bits per byte"].lower_is_better
    assert len(scores["docstrings: acc"]) == 2 * N_DOCUMENTS
    total = totals["docstring_choices", "acc_norm,none"]
    values = scores["docstring_choices: acc_norm"].values
    assert total.stderr == pytest.approx(values.std(ddof=1) / N_DOCUMENTS**0.5)
    assert "docstring_letters: mcc" not in scores  # all documents have it together
    assert totals["docstring_letters", "mcc,none"].stderr is not None


def test_base_and_tuned_are_paired(tiny_dir: Path, folder: Path, capfd) -> None:
    """A quantized model and one with an adapter are asked the same questions; the terminal gets a line for each."""
    base = load_model(tiny_dir, torch.float32)
    quantized = load_model(tiny_dir, torch.float32, quantize="bnb.nf4")
    tuned = with_lora(tiny_dir)
    tasks = load_tasks(TaskArgs(["docstring_choices", "docstring_texts"], folder, n_shots=3))
    capfd.readouterr()
    models = {"base": base, "quantized": quantized, "tuned": tuned}
    results = run_tasks(models, Tokenizer(tiny_dir), tasks, limit=4)
    assert len(results.scores["base"]) == 4
    for name in ("quantized", "tuned"):
        for one, other in zip(results.scores["base"], results.scores[name], strict=True):
            assert one.measure == other.measure and one.ids == other.ids and len(one) == 4
        assert paired_difference(results.scores["base"][-1], results.scores[name][-1]).mean != 0
    output = capfd.readouterr()
    assert output.out == "" and output.err.count("\n") == 3 * 2 and "tuned: 16 log-likelihoods to compute" in output.err


def with_lora(tiny_dir: Path, alpha: int = 16) -> GPT:
    model = load_model(tiny_dir, torch.float32)
    apply_lora(model, LoRA(r=4, alpha=alpha))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    return model


# ---- an evaluation that is interrupted


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_asks_what_is_missing(tiny_dir: Path, tmp_path: Path) -> None:
    from lit_gpt.harness.harness_model import HarnessModel

    n_asked = []

    def interrupted_by(n_most: int | None):
        class Progress:
            """Stops after so many answers."""

            def __init__(self, what: str, n: int) -> None:
                self.n_done = 0

            def __enter__(self):
                return self

            def __call__(self, n: int) -> None:
                n_asked.append(n)
                self.n_done += n
                if n_most is not None and self.n_done >= n_most:
                    raise Stopped

            def __exit__(self, *_) -> None:
                pass

        return Progress

    path = tmp_path / "new/answers.jsonl"
    likelihoods = asked("loglikelihood", *[(CONTEXT + str(i), f" {i % 3}") for i in range(12)])
    texts = asked("generate_until", *[(CONTEXT + str(i), {"until": ["\n"], "max_gen_toks": 4}) for i in range(4)])

    def ask(n_most: int | None, model: GPT | None = None) -> tuple[list, list]:
        model = model or load_model(tiny_dir, torch.float32)
        progress = interrupted_by(n_most)
        it = HarnessModel(model, Tokenizer(tiny_dir), Kept(path), progress, batch_tokens=1)
        return it.loglikelihood(likelihoods), it.generate_until(texts)

    with pytest.raises(Stopped):
        ask(3)
    n_kept = sum(n_asked)
    assert 3 <= n_kept < 12 and len(path.read_text().splitlines()) == n_kept
    with path.open("a") as file:
        file.write('{"key": "half a li')  # killed while writing
    n_asked.clear()
    found = ask(None)
    assert sum(n_asked) == 12 - n_kept + 4
    n_asked.clear()
    assert ask(None) == found and n_asked == []
    assert all(json.loads(line) for line in path.read_text().splitlines())

    fresh = ours(tiny_dir)
    assert fresh.loglikelihood(likelihoods) == [(pytest.approx(one, abs=1e-5), greedy) for one, greedy in found[0]]
    # another model is asked anew
    ask(None, with_lora(tiny_dir))
    assert sum(n_asked) == 12 + 4


def test_a_model_is_known_by_what_it_says(tiny_dir: Path) -> None:
    models = [
        load_model(tiny_dir, torch.float32),
        load_model(tiny_dir, torch.bfloat16),
        load_model(tiny_dir, torch.float32, quantize="bnb.nf4"),
        with_lora(tiny_dir, alpha=16),
        with_lora(tiny_dir, alpha=8),
    ]
    from lit_gpt.harness.harness_model import probe_fingerprint

    assert len({probe_fingerprint(model) for model in models}) == len(models)
    assert probe_fingerprint(load_model(tiny_dir, torch.float32)) == probe_fingerprint(models[0])


# ---- what users get wrong


def edited(folder: Path, target: Path, name: str, changes: dict) -> Path:
    """A folder with a copy of one task, changed."""
    task = yaml.safe_load((folder / f"{name}.yaml").read_text()) | changes
    target.mkdir()
    (target / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "docstring_choices cannot be used.*none.jsonl"),
        ({"dataset_path": "nobody/nothing"}, "docstring_choices cannot be used.*nobody/nothing.*HF_HUB_OFFLINE"),
        ({"test_split": "exam"}, "docstring_choices cannot be used: KeyError: 'exam'. Correct .*choices.yaml"),
        ({"doc_to_text": "{{question"}, "docstring_choices cannot be used: TemplateSyntaxError.*choices.yaml"),
        ({"metric_list": [{"metric": "accuracy"}]}, "docstring_choices cannot be used.*choices.yaml"),
        ({"unsafe_code": True}, "docstring_choices runs programs that the model writes"),
    ],
)
def test_a_task_that_cannot_be_used(changes, message, folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path / "edited", "choices", changes)
    with pytest.raises(InputError, match=message) as error:
        load_tasks(TaskArgs("docstring_choices", path))
    assert "\n" not in str(error.value)


def test_names_that_are_wrong(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from lm_eval.tasks import TaskManager

    # the harness' own tasks take seconds to be read; those of the folder stand for them
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_path=folder, include_defaults=False)
    )
    with pytest.raises(InputError, match="There is no task docstring_choice. Did you mean docstring_choices"):
        load_tasks(TaskArgs("docstring_choice", folder))
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: [")
    with pytest.raises(InputError, match="There is no task mine. .*mine.yaml cannot be read: ParserError"):
        load_tasks(TaskArgs("mine", tmp_path))
    with pytest.raises(InputError, match="missing is not there"):
        load_tasks(TaskArgs("mine", tmp_path / "missing"))
    with pytest.raises(InputError, match="No task is named"):
        load_tasks(TaskArgs())
    with pytest.raises(InputError, match="docstring_choices is named twice, the second time by docstrings"):
        load_tasks(TaskArgs(["docstring_choices", "docstrings"], folder))
    with pytest.raises(InputError, match="docstring_choices has 16 examples, fewer than 17 shots"):
        load_tasks(TaskArgs("docstring_choices", folder, n_shots=17))
    by_tag = load_tasks(TaskArgs(["with_letters", str(folder / "texts.yaml")], folder))
    assert list(by_tag.tasks) == ["docstring_letters", "docstring_texts"]


def test_questions_that_a_model_cannot_be_asked(folder: Path, tiny_dir: Path, bos_dir: Path, tmp_path: Path) -> None:
    long_answers = edited(folder, tmp_path / "long", "answers", {"generation_kwargs": {"max_gen_toks": 256}})
    tasks = load_tasks(TaskArgs("docstring_answers", long_answers))
    with pytest.raises(InputError, match=re.escape("answers of up to 256 tokens, but the model reads 256")):
        tasks.check_model(Tokenizer(tiny_dir), 256)
    with pytest.raises(InputError, match="no chat template"):
        replace(tasks, args=TaskArgs(chat=True)).check_model(Tokenizer(bos_dir), 1024)
    model = ours(tiny_dir)
    with pytest.raises(InputError, match="a_task asks how likely '' is, which is 0 tokens behind its prompt"):
        model.loglikelihood(asked("loglikelihood", (CONTEXT, "")))
    for settings, message in {
        "num_beams": ({"num_beams": 4}, "num_beams is 4, expected 1"),
        "unknown": ({"typical_p": 0.2}, "typical_p, expected none but do_sample"),
        "range": ({"do_sample": True, "temperature": 0.7, "top_p": 3.0}, "--top_p is 3.0"),
        "type": ({"temperature": "warm"}, "wrong type"),
    }.values():
        with pytest.raises(InputError, match=f"a_task has generation_kwargs .*{message}"):
            model.generate_until(asked("generate_until", (CONTEXT, settings)))


def test_a_document_that_lacks_a_field(folder: Path, tiny_dir: Path, tmp_path: Path) -> None:
    lines = (folder / "test.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"question": None})
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    data = {"test": str(tmp_path / "test.jsonl"), "shots": str(tmp_path / "test.jsonl")}
    changes = {"dataset_kwargs": {"data_files": data}, "doc_to_text": "{{question.upper()}}"}
    tasks = load_tasks(TaskArgs("docstring_choices", edited(folder, tmp_path / "edited", "choices", changes)))
    with pytest.raises(InputError, match="A document does not fit the templates of its task: UndefinedError"):
        run_tasks({"base": load_model(tiny_dir, torch.float32)}, Tokenizer(tiny_dir), tasks)


def test_drawn_answers_differ_by_seed_alone(tiny_dir: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = asked("generate_until", (CONTEXT, settings), (CONTEXT, settings))
    first = ours(tiny_dir).generate_until(requests)
    assert first[0] != first[1] and ours(tiny_dir).generate_until(requests) == first


def test_chat_changes_what_is_asked(tiny_dir: Path, folder: Path) -> None:
    model = load_model(tiny_dir, torch.float32)
    values = []
    for chat in (False, True):
        tasks = load_tasks(TaskArgs("docstring_choices", folder, n_shots=1, chat=chat))
        run_tasks({"base": model}, Tokenizer(tiny_dir), tasks, limit=3)
        prompt = tasks.tasks["docstring_choices"].instances[0].args[0]
        values.append(prompt)
        assert prompt.count("<|im_start|>user") == (2 if chat else 0)
    assert values[1].endswith("<|im_start|>assistant\n")
