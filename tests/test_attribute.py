"""Which training records did what: `pytest tests/test_attribute.py`, about 10 s"""

from collections.abc import Callable

import pytest
import torch
from helpers.models import make_record, small_gpt
from torch import nn

from lit_gpt import GPT, InputError
from lit_gpt.attribution.gradients import Record, RecordGradients, Sketch, first_target
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.packing import Layout


def model_with_lora(**changes) -> GPT:
    """A float64 model with LoRA everywhere, B as after many steps."""
    model = small_gpt(**changes)
    apply_lora(model, LoRA(r=3, head=False))
    model.double()
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(param, std=0.3)
    return model


def records() -> list[Record]:
    """Prompts that begin alike, one that is all that they have in common, one with two answers, and a text."""
    torch.manual_seed(1)
    start = (1, 2, 3, 4)
    several = [make_record(9 + 4 * i, 3 + i, start) for i in range(4)]
    only_start = make_record(9, 5, start)
    ids, trained = make_record(20, 4, start)
    trained[8:11] = True
    return [*several, only_start, (ids, trained), (torch.randint(0, 50, (7,)), torch.ones(7, dtype=torch.bool))]


def gradient_alone(model: GPT, record: Record) -> tuple[torch.Tensor, float]:
    """The gradient of one record's loss, by autograd, all factors end to end; its prompt's keys and values are held."""
    n_prompt = first_target(record[1]) - 1

    def hold(linear: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((output[:, :n_prompt].detach(), output[:, n_prompt:]), dim=1)

    mark_only_lora_as_trainable(model)
    model.zero_grad()
    handles = [m.register_forward_hook(hold) for block in model.transformer.h for m in (block.attn.k, block.attn.v)]
    idx, layout = Layout.end_to_end([record])
    loss = model(idx, layout=layout)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = [param.grad.flatten() for name, param in model.named_parameters() if "lora_" in name]
    return torch.cat(gradients), loss.item()


def without_signs(sketch: Sketch, vector: torch.Tensor) -> torch.Tensor:
    """The vector that was sketched, if the sketch has room for all of its numbers."""
    signs = torch.cat(list(sketch.signs.values()))
    return vector[: len(signs)] * signs


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}], ids=["plain", "window"])
def test_gradients_of_a_micro_batch_are_those_of_its_records_alone(changes) -> None:
    model = model_with_lora(**changes)
    sketch = Sketch(size=50_000)
    source = RecordGradients(model, sketch)
    sketches, losses = source.of(records())
    for i, record in enumerate(records()):
        expected, loss = gradient_alone(model, record)
        difference = without_signs(sketch, sketches[i]) - expected
        assert difference.abs().max() < 1e-10 * expected.abs().max()
        assert losses[i].item() == pytest.approx(loss, rel=1e-10)


def test_who_else_is_in_the_micro_batch_changes_nothing() -> None:
    source = RecordGradients(model_with_lora(), Sketch(size=256))
    together, _ = source.of(records())
    for i, record in enumerate(records()):
        alone, _ = source.of([record])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


def test_products_of_sketches_are_those_of_the_vectors() -> None:
    """Within five standard deviations; and without bias, over many seeds."""
    torch.manual_seed(0)
    u, v = torch.randn(2, 10_007, dtype=torch.float64)
    v += 0.3 * u
    vectors = torch.stack((u, v))

    def product(seed: int, size: int) -> float:
        sketch = Sketch(size, seed)
        sketches = torch.zeros(2, size, dtype=torch.float64)
        sketch.add(sketches, "first", vectors[:, :4000], 0)
        sketch.add(sketches, "second", vectors[:, 4000:], 4000)
        return float(sketches[0] @ sketches[1])

    deviation = float(u.norm() * v.norm()) / 1000**0.5
    errors = torch.tensor([product(seed, 1000) - float(u @ v) for seed in range(100)])
    assert errors.abs().max() < 5 * deviation
    assert errors.mean().abs() < 5 * deviation / 10
    assert errors.std() > deviation / 2  # a sketch that kept everything would prove nothing


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda model: None, "carries LoRA"),
        (lambda model: apply_lora(model, LoRA(dora=True)), "dora"),
    ],
)
def test_a_model_whose_gradients_are_not_known(prepare: Callable[[GPT], None], what: str) -> None:
    model = small_gpt()
    prepare(model)
    with pytest.raises(InputError, match=what):
        RecordGradients(model, Sketch(16))
