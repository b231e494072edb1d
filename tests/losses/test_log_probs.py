"""The log-prob kernel against values worked out by hand, gradcheck, and a naive path that holds all logits."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lf_lightning.losses.log_probs import (
    cross_entropy_sums,
    front_sums,
    length_desensitized,
    sequence_lengths,
    sequence_sums,
    token_log_probs,
    token_statistics,
)
from lf_lightning.types import IGNORE, OutputLayer

B, T, H, V = 2, 9, 4, 11
WITH_ENTROPY = functools.partial(token_statistics, with_entropy=True)
LOG2, LOG5 = math.log(2), math.log(5)


class Case(NamedTuple):
    """Which parts an output layer has, and which of them are trained."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    trained: tuple[str, ...] = ("hidden", "weight", "bias")


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "scale": Case(scale=0.3),
    "softcap": Case(softcap=1.5),
    "all of them": Case(bias=True, scale=2.5, softcap=2.0),
    "frozen head": Case(bias=True, scale=2.5, softcap=2.0, trained=("hidden",)),
    "frozen weight": Case(bias=True, scale=2.5, trained=("hidden", "bias")),
    "frozen hidden": Case(bias=True, softcap=2.0, trained=("weight", "bias")),
    "frozen bias": Case(bias=True, scale=0.3, trained=("hidden", "weight")),
}


class Inputs(NamedTuple):
    """What a call takes."""

    hidden: Tensor
    layer: OutputLayer
    targets: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that could have a gradient."""
        named = {"hidden": self.hidden, "weight": self.layer.weight, "bias": self.layer.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def grads(self) -> dict[str, Tensor | None]:
        """Take their gradients away from them."""
        taken = {name: leaf.grad for name, leaf in self.leaves().items()}
        for leaf in self.leaves().values():
            leaf.grad = None
        return taken


def make_inputs(case: Case, *, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (B, T, H, V)) -> Inputs:
    rows, length, width, words = sizes
    generator = torch.Generator().manual_seed(7)

    def leaf(name: str, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(name in case.trained)

    hidden, weight = leaf("hidden", rows, length, width), leaf("weight", words, width)
    layer = OutputLayer(weight, leaf("bias", words) if case.bias else None, case.scale, case.softcap)
    targets = torch.randint(words, (rows, length), generator=generator)
    targets[:, ::3] = IGNORE
    return Inputs(hidden, layer, targets)


def naive_logits(hidden: Tensor, layer: OutputLayer) -> Tensor:
    logits = layer.scale * F.linear(hidden, layer.weight, layer.bias).to(
        torch.promote_types(hidden.dtype, torch.float32)
    )
    return logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)


def naive_log_probs(hidden: Tensor, layer: OutputLayer, targets: Tensor) -> Tensor:
    all_words = naive_logits(hidden, layer).log_softmax(-1)
    picked = all_words.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == IGNORE, torch.zeros_like(picked), picked)


def naive_entropy(hidden: Tensor, layer: OutputLayer, targets: Tensor) -> Tensor:
    entropy = torch.distributions.Categorical(logits=naive_logits(hidden, layer)).entropy()
    return torch.where(targets == IGNORE, torch.zeros_like(entropy), entropy)


def upstream(log_probs: Tensor) -> Tensor:
    """A gradient that is different, and of either sign, at each position."""
    return torch.arange(log_probs.numel(), dtype=log_probs.dtype).sub(7.5).div(5).view_as(log_probs)


def one_word_per_logarithm(scale: float = 1.0, bias: Tensor | None = None) -> OutputLayer:
    """Hidden state 1 gives logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8."""
    weight = torch.tensor([[0.0], [LOG2], [LOG5]], dtype=torch.float64, requires_grad=True)
    return OutputLayer(weight, bias, scale)


def ones() -> Tensor:
    return torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)


def test_the_sums_of_three_words_are_those_worked_out_by_hand():
    hidden, layer = ones(), one_word_per_logarithm()
    sums = cross_entropy_sums(hidden, layer, torch.tensor([[1, IGNORE, 2]]))
    assert sums.nll.item() == pytest.approx(1.8562979903656263, abs=1e-14)  # log 4 + log 8/5
    assert (sums.num_correct.item(), sums.num_correct.dtype) == (1, torch.int64)
    sums.nll.backward()
    # sum_v p_v w_v - w_target, with sum_v p_v w_v = log(2)/4 + 5 log(5)/8
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([0.4860383098513537, 0.0, -0.4302524220228014], abs=1e-14)
    assert layer.weight.grad is not None
    assert layer.weight.grad.flatten().tolist() == pytest.approx([0.25, -0.5, 0.25], abs=1e-14)


def test_the_log_probs_of_three_words_are_those_worked_out_by_hand():
    hidden, layer = ones(), one_word_per_logarithm()
    log_probs = token_log_probs(hidden, layer, torch.tensor([[0, IGNORE, 2]]))
    assert log_probs.tolist()[0] == pytest.approx([-2.0794415416798357, 0.0, -0.4700036292457356], abs=1e-14)
    (log_probs * torch.tensor([[2.0, 9.0, -1.0]])).sum().backward()
    assert layer.weight.grad is not None  # 2 (1 - 1/8) + 1/8, -2/4 + 1/4, -2 5/8 - (1 - 5/8)
    assert layer.weight.grad.flatten().tolist() == pytest.approx([1.875, -0.25, -1.625], abs=1e-14)


def test_the_statistics_of_three_words_are_those_worked_out_by_hand():
    hidden, layer = ones(), one_word_per_logarithm()
    statistics = token_statistics(hidden, layer, torch.tensor([[0, IGNORE, 2]]), with_entropy=True)
    assert statistics.log_probs.tolist()[0] == pytest.approx([-2.0794415416798357, 0.0, -0.4700036292457356], abs=1e-14)
    assert statistics.is_correct.tolist() == [[False, False, True]]
    assert statistics.entropy is not None  # log 8 - log(2) / 4 - 5 log(5) / 8
    assert statistics.entropy.tolist()[0] == pytest.approx([0.9002560512685367, 0.0, 0.9002560512685367], abs=1e-14)
    assert statistics.log_probs.requires_grad
    assert not statistics.is_correct.requires_grad
    assert not statistics.entropy.requires_grad


def test_the_entropy_is_made_only_where_it_is_asked_for_and_lies_between_none_and_all():
    hidden = torch.ones(1, 1, 1)
    targets = torch.tensor([[0]])
    assert token_statistics(hidden, OutputLayer(torch.zeros(3, 1)), targets).entropy is None

    def entropy(*weight: float, bias: Tensor | None = None) -> float:
        layer = OutputLayer(torch.tensor(weight).unsqueeze(1), bias)
        found = token_statistics(hidden, layer, targets, with_entropy=True).entropy
        assert found is not None
        return found.item()

    assert entropy(0.0, 0.0, 0.0, 0.0) == pytest.approx(1.3862943611198906, abs=1e-6)  # log 4
    assert entropy(3e4, -3e4, 0.0) == 0.0
    forbidden = torch.tensor([0.0, 0.0, -torch.inf])
    assert entropy(0.0, 0.0, 0.0, bias=forbidden) == pytest.approx(0.6931471805599453, abs=1e-6)  # log 2


def test_the_scale_multiplies_the_logits_and_the_bias():
    hidden, targets = ones()[:, :1], torch.tensor([[1]])
    sums = cross_entropy_sums(hidden, one_word_per_logarithm(scale=2.0), targets)
    assert sums.nll.item() == pytest.approx(2.0149030205422647, abs=1e-14)  # 1 : 4 : 25, so log(30/4)
    bias = torch.tensor([math.log(3), 0.0, 0.0], dtype=torch.float64)
    sums = cross_entropy_sums(hidden, one_word_per_logarithm(scale=2.0, bias=bias), targets)
    assert sums.nll.item() == pytest.approx(2.2512917986064953, abs=1e-14)  # 9 : 4 : 25, so log(38/4)


def test_the_softcap_bends_the_logits_by_its_hyperbolic_tangent():
    hidden = torch.ones(1, 1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [0.5493061443340549]], dtype=torch.float64)  # artanh(1/2)
    sums = cross_entropy_sums(hidden, OutputLayer(weight, softcap=1.0), torch.tensor([[0]]))
    assert sums.nll.item() == pytest.approx(0.9740769841801067, abs=1e-14)  # log(1 + e^(1/2))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_sums_agree_with_all_logits_in_value_and_gradient(case: Case):
    inputs = make_inputs(case)
    expected = -naive_log_probs(*inputs).sum()
    (3.7 * expected).backward()
    expected_grads = inputs.grads()
    sums = cross_entropy_sums(*inputs, chunk_size=5)
    (3.7 * sums.nll).backward()
    torch.testing.assert_close(sums.nll, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs.grads(), expected_grads, rtol=1e-10, atol=1e-10)
    correct = (naive_logits(inputs.hidden, inputs.layer).argmax(-1) == inputs.targets).sum()
    assert sums.num_correct.item() == correct.item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_log_probs_agree_with_all_logits_in_value_and_gradient(case: Case):
    inputs = make_inputs(case)
    expected = naive_log_probs(*inputs)
    expected.backward(upstream(expected))
    expected_grads = inputs.grads()
    log_probs = token_log_probs(*inputs, chunk_size=5)
    log_probs.backward(upstream(log_probs))
    torch.testing.assert_close(log_probs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs.grads(), expected_grads, rtol=1e-10, atol=1e-10)
    assert (log_probs[inputs.targets == IGNORE] == 0).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_statistics_agree_with_all_logits_and_the_entropy_leaves_the_gradient_alone(case: Case):
    inputs = make_inputs(case)
    inputs.targets[:, 4] = naive_logits(inputs.hidden, inputs.layer)[:, 4].argmax(-1)
    expected = naive_log_probs(*inputs)
    expected.backward(upstream(expected))
    expected_grads = inputs.grads()
    statistics = token_statistics(*inputs, chunk_size=5, with_entropy=True)
    statistics.log_probs.backward(upstream(expected))
    torch.testing.assert_close(inputs.grads(), expected_grads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(statistics.log_probs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(statistics.entropy, naive_entropy(*inputs).detach(), rtol=1e-10, atol=1e-10)
    is_correct = naive_logits(inputs.hidden, inputs.layer).argmax(-1) == inputs.targets
    assert torch.equal(statistics.is_correct, is_correct)
    assert 0 < is_correct.sum() < is_correct.numel()
    with torch.no_grad():
        again = token_statistics(*inputs, chunk_size=5, with_entropy=True)
    assert not again.log_probs.requires_grad
    torch.testing.assert_close(tuple(again), tuple(field.detach() for field in statistics if field is not None))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck_passes(case: Case):
    inputs = make_inputs(case, sizes=(1, 5, 3, 6))
    trained = {name: leaf for name, leaf in inputs.leaves().items() if leaf.requires_grad}

    def call(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def with_leaves(*leaves: Tensor) -> Any:
            now = {**inputs.leaves(), **dict(zip(trained, leaves, strict=True))}
            layer = inputs.layer._replace(weight=now["weight"], bias=now.get("bias"))
            return kernel(now["hidden"], layer, inputs.targets, chunk_size=2)

        return with_leaves

    assert torch.autograd.gradcheck(call(lambda *a, **k: cross_entropy_sums(*a, **k).nll), tuple(trained.values()))
    assert torch.autograd.gradcheck(call(token_log_probs), tuple(trained.values()))
    assert torch.autograd.gradcheck(call(lambda *a, **k: WITH_ENTROPY(*a, **k).log_probs), tuple(trained.values()))


@pytest.mark.parametrize("kernel", [lambda *a: cross_entropy_sums(*a, chunk_size=2).nll, token_log_probs])
def test_gradcheck_passes_where_the_embedding_is_the_output_layer(kernel: Callable[..., Tensor]):
    table = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, targets = torch.tensor([[1, 4, 1, 5]]), torch.tensor([[4, 1, IGNORE, 0]])
    assert torch.autograd.gradcheck(lambda tied: kernel(F.embedding(ids, tied), OutputLayer(tied), targets), (table,))


@pytest.mark.parametrize("chunk_size", [1, 3, 12, 1000])
def test_the_chunk_size_changes_nothing(chunk_size: int):
    def results(size: int | None) -> list[Any]:
        inputs = make_inputs(CASES["all of them"])
        sums = cross_entropy_sums(*inputs, chunk_size=size)
        sums.nll.backward()
        found = [sums.nll, sums.num_correct, inputs.grads()]
        statistics = WITH_ENTROPY(*inputs, chunk_size=size)
        statistics.log_probs.backward(upstream(statistics.log_probs))
        return [*found, *statistics, inputs.grads()]

    torch.testing.assert_close(results(chunk_size), results(None), rtol=1e-12, atol=1e-12)


class SizeWatcher(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.outputs: list[Tensor] = []  # kept, so that no two have one address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.outputs += [output for output in outputs if isinstance(output, Tensor)]
        self.shapes += [output.shape for output in outputs if isinstance(output, Tensor)]
        return result

    def memories(self, size: int) -> set[int]:
        """Addresses of all tensors of so many elements."""
        return {output.untyped_storage().data_ptr() for output in self.outputs if output.numel() == size}

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.shapes)


def watched(kernel: Callable[..., Any], inputs: Inputs, **options: Any) -> SizeWatcher:
    with SizeWatcher() as watcher:
        result = kernel(*inputs, **options)
        values = result if isinstance(result, Tensor) else result[0]
        if values.requires_grad:
            values.sum().backward()
    return watcher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
@pytest.mark.parametrize("kernel", [cross_entropy_sums, token_log_probs, WITH_ENTROPY])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(
    kernel: Callable[..., Any], trained: tuple[str, ...], dtype: torch.dtype
):
    case = Case(bias=True, scale=2.0, softcap=3.0, trained=trained)
    inputs = make_inputs(case, dtype=dtype, sizes=(2, 48, 8, 500))
    num_counted = int((inputs.targets != IGNORE).sum())
    assert num_counted == 64
    assert watched(kernel, inputs, chunk_size=16).largest <= 16 * 500
    assert inputs.hidden.grad is not None


@pytest.mark.parametrize("kernel", [cross_entropy_sums, token_log_probs])
def test_a_frozen_head_gets_no_gradient_and_no_buffer(kernel: Callable[..., Any]):
    inputs = make_inputs(Case(bias=True, trained=("hidden",)), dtype=torch.float32, sizes=(2, 48, 8, 500))
    watcher = watched(kernel, inputs, chunk_size=4)
    assert inputs.layer.weight.grad is None
    assert inputs.layer.bias is not None
    assert inputs.layer.bias.grad is None
    assert [
        shape for shape in watcher.shapes if shape.numel() >= 8 * 500 and shape != (8, 500)
    ] == []  # that: weight.t()


@pytest.mark.parametrize("kernel", [cross_entropy_sums, token_log_probs])
def test_the_watcher_sees_the_buffer_of_a_trained_head_and_none_without_gradients(kernel: Callable[..., Any]):
    inputs = make_inputs(Case(), dtype=torch.float32, sizes=(2, 48, 8, 500))
    assert (500, 8) in watched(kernel, inputs, chunk_size=4).shapes
    with torch.no_grad():
        shapes = watched(kernel, inputs, chunk_size=4).shapes
    assert (500, 8) not in shapes
    assert (64, 8) in shapes  # the counted rows, and nothing else of their size
    assert sum(shape == (64, 8) for shape in shapes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_entropy_costs_one_buffer_of_a_chunk_and_nothing_where_it_is_not_asked_for(
    softcap: float | None, dtype: torch.dtype
):
    def num_buffers(**options: bool) -> int:
        inputs = make_inputs(Case(softcap=softcap), dtype=dtype, sizes=(2, 48, 8, 500))
        with SizeWatcher() as watcher:
            token_statistics(*inputs, chunk_size=64, **options).log_probs.sum().backward()  # one chunk
        assert watcher.largest == 64 * 500
        return len(watcher.memories(64 * 500))

    plain = num_buffers()
    assert num_buffers(with_entropy=False) == plain
    assert num_buffers(with_entropy=True) == plain + 1


def test_the_watcher_sees_all_logits_of_the_naive_path():
    inputs = make_inputs(Case(), dtype=torch.float32, sizes=(2, 48, 8, 500))
    assert watched(naive_log_probs, inputs).largest == 96 * 500


def test_without_gradients_the_values_are_the_same():
    inputs = make_inputs(CASES["all of them"])
    with torch.no_grad():
        sums, log_probs = cross_entropy_sums(*inputs), token_log_probs(*inputs)
    assert not sums.nll.requires_grad
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, naive_log_probs(*inputs).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums.nll, -log_probs.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [lambda *a: cross_entropy_sums(*a).nll, token_log_probs])
def test_with_nothing_counted_the_zero_is_still_connected(kernel: Callable[..., Tensor]):
    inputs = make_inputs(Case(bias=True))
    inputs.targets.fill_(IGNORE)
    result = kernel(*inputs)
    assert result.tolist() in (0.0, [[0.0] * T] * B)
    result.sum().backward()
    expected = {name: torch.zeros_like(leaf) for name, leaf in inputs.leaves().items()}
    torch.testing.assert_close(inputs.grads(), expected, rtol=0, atol=0)
    assert cross_entropy_sums(*inputs).num_correct.item() == 0
    statistics = token_statistics(*inputs, with_entropy=True)
    assert statistics.entropy is not None
    assert not statistics.entropy.any()
    assert not statistics.is_correct.any()


@pytest.mark.parametrize("case", [CASES["all of them"], CASES["frozen head"]])
@pytest.mark.parametrize("kernel", [lambda *a: cross_entropy_sums(*a).nll, token_log_probs])
def test_a_second_backward_through_a_retained_graph_gives_the_same_again(kernel: Callable[..., Tensor], case: Case):
    inputs = make_inputs(case)
    total = kernel(*inputs).sum()
    (2 * total).backward(retain_graph=True)
    first = inputs.grads()
    kept = {name: None if grad is None else grad.clone() for name, grad in first.items()}
    (6 * total).backward()
    tripled = {name: None if grad is None else 3 * grad for name, grad in kept.items()}
    torch.testing.assert_close(inputs.grads(), tripled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_two_calls_add_their_gradients_up():
    inputs = make_inputs(Case())
    sum(cross_entropy_sums(*inputs).nll * weight for weight in (1.0, 2.0)).backward()
    three = inputs.grads()
    (3.0 * cross_entropy_sums(*inputs).nll).backward()
    torch.testing.assert_close(inputs.grads(), three, rtol=1e-12, atol=1e-12)


def test_of_equal_logits_the_first_is_the_prediction():
    weight = torch.tensor([[1.0], [3.0], [3.0], [3.0]])
    hidden = torch.ones(1, 4, 1)
    assert cross_entropy_sums(hidden, OutputLayer(weight), torch.tensor([[0, 1, 2, 3]])).num_correct.item() == 1
    assert cross_entropy_sums(hidden, OutputLayer(weight), torch.tensor([[1, 1, 2, 0]])).num_correct.item() == 2
    assert cross_entropy_sums(hidden, OutputLayer(0 * weight), torch.tensor([[0, 0, 1, 3]])).num_correct.item() == 2
    is_correct = token_statistics(hidden, OutputLayer(weight), torch.tensor([[1, IGNORE, 2, 1]])).is_correct
    assert is_correct.tolist() == [[True, False, False, True]]


def test_large_logits_stay_finite():
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    sums = cross_entropy_sums(hidden, OutputLayer(weight), torch.tensor([[0, 1]]))
    sums.nll.backward()
    assert sums.nll.item() == 20000.0
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]


def test_under_bf16_autocast_the_entropy_is_close_to_float32():
    inputs = make_inputs(Case(bias=True, softcap=5.0), dtype=torch.float32, sizes=(2, 48, 16, 300))
    full = WITH_ENTROPY(*inputs).entropy
    with torch.autocast("cpu", torch.bfloat16):
        half = WITH_ENTROPY(*inputs, chunk_size=32).entropy
    assert half is not None
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("kernel", [lambda *a: cross_entropy_sums(*a, chunk_size=32).nll, token_log_probs])
def test_under_bf16_autocast_it_is_close_to_float32_and_gradients_keep_their_type(kernel: Callable[..., Tensor]):
    def results(*, enabled: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        inputs = make_inputs(Case(bias=True, softcap=5.0), dtype=torch.float32, sizes=(2, 48, 16, 300))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = kernel(*inputs)
        result.backward(upstream(result) if result.dim() else None)
        return result, inputs.grads()

    half, half_grads = results(enabled=True)
    full, full_grads = results(enabled=False)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=2e-2, atol=5e-2)
    for name, grad in full_grads.items():
        found = half_grads[name]
        assert grad is not None
        assert found is not None
        assert found.dtype == torch.float32
        assert (found - grad).norm() < 0.02 * grad.norm(), name


@pytest.mark.parametrize("block_rows", [2, 8192])
def test_half_precision_weights_get_gradients_of_their_type_summed_in_float32(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lf_lightning.losses.chunks.WEIGHT_BLOCK_ROWS", block_rows)
    inputs = make_inputs(Case(), dtype=torch.bfloat16, sizes=(1, 768, 4, 5))
    sums = cross_entropy_sums(*inputs, chunk_size=1)  # 512 additions: a sum kept in bfloat16 would lose most of them
    sums.nll.backward()
    found = inputs.grads()
    precise = Inputs(
        inputs.hidden.detach().double().requires_grad_(),
        OutputLayer(inputs.layer.weight.detach().double().requires_grad_()),
        inputs.targets,
    )
    (-naive_log_probs(*precise).sum()).backward()
    assert sums.nll.dtype == torch.float32
    for name, grad in precise.grads().items():
        half = found[name]
        assert grad is not None
        assert half is not None
        assert half.dtype == torch.bfloat16
        assert (half.double() - grad).norm() < 0.01 * grad.norm(), name


@pytest.mark.parametrize("seed", range(3))
def test_float32_at_a_real_vocabulary_is_as_exact_as_the_naive_path(seed: int):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 6, 8, generator=generator)
    weight = torch.randn(50_000, 8, generator=generator)
    targets = torch.randint(50_000, (1, 6), generator=generator)
    exact = naive_log_probs(hidden.double(), OutputLayer(weight.double()), targets)
    found = token_statistics(hidden, OutputLayer(weight), targets, chunk_size=4, with_entropy=True)
    torch.testing.assert_close(found.log_probs.double(), exact, rtol=2e-6, atol=0)
    exact_entropy = naive_entropy(hidden.double(), OutputLayer(weight.double()), targets)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy.double(), exact_entropy, rtol=2e-6, atol=2e-6)


def test_a_chunk_size_below_one_and_mixed_types_are_refused():
    inputs = make_inputs(Case(), dtype=torch.float32)
    with pytest.raises(AssertionError, match="chunk_size must be > 0, got 0"):
        token_log_probs(*inputs, chunk_size=0)
    with pytest.raises(AssertionError, match=r"hidden is torch\.bfloat16, the output layer torch\.float32"):
        cross_entropy_sums(inputs.hidden.bfloat16(), inputs.layer, inputs.targets)


VALUES = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], dtype=torch.float64)
SEQUENCES = torch.tensor([[2, 3, 0, 2], [0, 0, 3, 2]])  # three sequences, mixed; the second has no position


def test_the_sums_of_sequences_are_those_worked_out_by_hand():
    values = VALUES.clone().requires_grad_()
    sums = sequence_sums(values, SEQUENCES, 3)
    assert sums.tolist() == [52.0, 0.0, 137.0]  # 4 + 16 + 32, nothing, 1 + 8 + 128
    assert sequence_lengths(SEQUENCES, 3).tolist() == [3, 0, 3]
    assert sequence_lengths(SEQUENCES, 3).dtype == torch.int64
    (sums * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[7.0, 0.0, 3.0, 7.0], [3.0, 3.0, 0.0, 7.0]]


@pytest.mark.parametrize(
    ("front_lengths", "sums", "counted"),
    [
        ([2, 2, 2], [20.0, 0.0, 9.0], [[1, 0, 1, 1], [1, 0, 0, 0]]),
        ([1, 0, 3], [4.0, 0.0, 137.0], [[1, 0, 1, 1], [0, 0, 0, 1]]),
        ([0, 1, 9], [0.0, 0.0, 137.0], [[1, 0, 0, 1], [0, 0, 0, 1]]),
    ],
)
def test_the_sums_of_fronts_are_those_worked_out_by_hand(
    front_lengths: list[int], sums: list[float], counted: list[list[int]]
):
    values = VALUES.clone().requires_grad_()
    found = front_sums(values, SEQUENCES, torch.tensor(front_lengths))
    assert found.tolist() == sums
    found.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == counted


def test_of_no_sequence_there_are_empty_sums_that_are_still_connected():
    values = VALUES.clone().requires_grad_()
    nowhere = torch.zeros_like(SEQUENCES)
    sums = sequence_sums(values, nowhere, 0)
    fronts = front_sums(values, nowhere, torch.empty(0, dtype=torch.int64))
    assert sums.shape == fronts.shape == sequence_lengths(nowhere, 0).shape == (0,)
    (sums.sum() + fronts.sum()).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0] * 4] * 2


def test_sums_of_sequences_do_not_care_how_the_batch_is_laid_out():
    order = [2, 0, 4, 1, 3, 6, 5, 7]  # each sequence keeps its own order: 2 4 5 and 0 3 7
    values, sequences = VALUES.flatten()[order].view(1, 8), SEQUENCES.flatten()[order].view(1, 8)
    torch.testing.assert_close(sequence_sums(values, sequences, 3), sequence_sums(VALUES, SEQUENCES, 3))
    fronts = torch.tensor([2, 1, 1])
    torch.testing.assert_close(front_sums(values, sequences, fronts), front_sums(VALUES, SEQUENCES, fronts))


def test_a_long_sequence_is_summed_without_losing_its_small_terms():
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(1000)]).unsqueeze(0)  # 2^24 + 1 is no float32
    sums = sequence_sums(values, torch.zeros_like(values, dtype=torch.int64), 1)
    assert (sums.item(), sums.dtype) == (2.0**24 + 1000, torch.float32)


def test_gradcheck_passes_for_the_sums_of_sequences():
    values = VALUES.clone().requires_grad_()
    fronts = torch.tensor([1, 0, 2])

    def both(given: Tensor) -> Tensor:
        return length_desensitized(
            sequence_sums(given, SEQUENCES, 3), front_sums(given, SEQUENCES, fronts), ld_alpha=0.3
        )

    assert torch.autograd.gradcheck(both, (values,))


def test_tokens_beyond_the_front_weigh_ld_alpha():
    whole, front = torch.tensor([-10.0, -4.0]), torch.tensor([-4.0, -4.0])
    assert length_desensitized(whole, front, ld_alpha=0.25).tolist() == [-5.5, -4.0]
    assert length_desensitized(whole, front, ld_alpha=1.0).tolist() == [-10.0, -4.0]
    assert length_desensitized(whole, front, ld_alpha=0.0).tolist() == [-4.0, -4.0]
