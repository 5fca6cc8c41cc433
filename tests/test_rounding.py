"""Stochastic rounding: the published generator, right on average, and the same bits under every layout."""

import math
from typing import Any

import pytest
import test_flat
import torch
import torch.distributed as dist
from against_reference import EVERYTHING, compare_with_reference
from harness import Pool
from layouts import cases
from sampling import crossed
from test_maths import gradients, trained
from torch import Tensor, nn

from sm3_dist import SM3
from sm3_dist.checkpoint import get_optimizer_state_dict, set_optimizer_state_dict
from sm3_dist.layout.box import Box
from sm3_dist.maths.reference import ReferenceState, reference_step
from sm3_dist.maths.rounding import MOMENTUM, WEIGHT, Rounding, philox, round_to_bfloat16

# Counter, key and output of philox4x32 with 7 rounds, from kat_vectors of the authors' library Random123.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]
SEED = (1 << 63) + 12345
NARROW: list[dict[str, Any]] = [
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    {"momentum": 0.9, "beta": 0.95, "momentum_dtype": torch.int8},
    {"weight_decay": 0.1, "maximize": True},
    EVERYTHING | {"momentum_dtype": torch.bfloat16},
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_the_generator_is_the_published_one(counter: str, key: str, output: str) -> None:
    k0, k1 = words(key)
    assert list(philox(words(counter), (k0, k1))) == words(output)
    tensors = [torch.tensor([0, word]) for word in words(counter)]  # 64-bit products wrap round
    assert [word[1].item() for word in philox(tensors, (k0, k1))] == words(output)


def test_noise_is_uniform_and_that_of_others_independent() -> None:
    """Each bit is set half of the time, and agrees with others' half of the time: to 5 standard deviations."""
    box = Box.whole((512, 2048))
    keys = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1)]
    streams = [Rounding(*key, (512, 2048)).noise(box)[WEIGHT] for key in keys]
    # An element against its neighbours within a call of the generator, across two calls, and in the next row.
    first = streams[0]
    streams += [first.roll(1, 1), first.roll(2, 1), first.roll(8, 1), first.roll(1, 0)]
    bound = 5 * 0.5 / math.sqrt(first.numel())
    for bits in [first, *(first ^ other for other in streams[1:])]:
        assert bits.min() >= 0
        assert bits.max() < 1 << 16
        for place in range(16):
            assert abs((bits >> place & 1).double().mean().item() - 0.5) < bound


def test_weight_and_momentum_of_an_element_are_rounded_independently() -> None:
    """To 5 standard deviations: no two bits go together, nor the numbers, and the pairs fill their square evenly."""
    noise = Rounding(SEED, 3, 1, (512, 2048)).noise(Box.whole((512, 2048)))
    one, other = (noise[what].flatten() for what in (WEIGHT, MOMENTUM))
    sigma = 1 / math.sqrt(one.numel())
    first, second = ((n[:, None] >> torch.arange(16) & 1).double() * 2 - 1 for n in (one, other))
    assert (first.T @ second / one.numel()).abs().max() < 5 * sigma
    centred = [n.double() - (2**16 - 1) / 2 for n in (one, other)]
    variance = (2**32 - 1) / 12
    assert abs((centred[0] * centred[1]).mean() / variance) < 5 * sigma
    # Of sixteen by sixteen cells each has its share: chi-squared of 255 degrees of freedom.
    counts = torch.bincount((one >> 12) * 16 + (other >> 12), minlength=256).double()
    share = one.numel() / 256
    assert abs(((counts - share) ** 2).sum() / share - 255) < 5 * math.sqrt(2 * 255)


def test_weight_and_momentum_share_words() -> None:
    """Each call serves eight elements, whose weights take its halves in order, and whose momentum those beside them."""
    shape = (3, 20)
    for box in (Box.whole(shape), Box((1, 3), (3, 18)), Box((0, 7), (1, 8))):
        noise = Rounding(SEED, 5, 9, shape).noise(box)
        for row in range(box.start[0], box.stop[0]):
            for column in range(box.start[1], box.stop[1]):
                words = philox((column // 8, row, 9, 5), (SEED % 2**32, SEED >> 32))
                halves = [half for word in words for half in (word % 2**16, word >> 16)]
                at = (row - box.start[0], column - box.start[1])
                assert noise[WEIGHT][at] == halves[column % 8]
                assert noise[MOMENTUM][at] == halves[column % 8 ^ 1]


def test_noise_of_a_part_is_part_of_the_noise() -> None:
    shape = (5, 3, 37)
    rounding, whole = Rounding(SEED, 7, 3, shape), Box.whole(shape)
    noise = rounding.noise(whole)
    for start in [(0, 0, 0), (1, 2, 5), (4, 0, 8), (2, 1, 36)]:
        for part in (Box(start, shape), Box(start, tuple(a + 1 for a in start))):
            for what in (WEIGHT, MOMENTUM):
                assert torch.equal(rounding.noise(part)[what], noise[what][part.within(whole)])


def test_a_step_that_is_counted_on_the_device_gives_the_same_noise() -> None:
    whole = Box.whole((4, 20))
    noise = [Rounding(3, step, 5, (4, 20)).noise(whole)[WEIGHT] for step in (2, torch.tensor(2), torch.tensor(3))]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_rounding_is_right_on_average() -> None:
    """To 5 standard deviations, of a million roundings each."""
    shape = (1 << 10, 1 << 10)
    noise = Rounding(0, 0, 0, shape).noise(Box.whole(shape))[WEIGHT]
    for value in (1.001, -1.001, 3e-39, 0.3, -77.77, 1e30, 1 + 2**-8, 1 + 2**-20):
        exact = torch.tensor(value)
        low = exact.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
        high = (low.view(torch.int32) + (1 << 16)).view(torch.float32)
        rounded = round_to_bfloat16(exact.expand(shape), noise)
        assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
        up = rounded == high
        assert bool((up | (rounded == low)).all())
        fraction = ((exact.double() - low) / (high.double() - low)).item()
        deviation = math.sqrt(fraction * (1 - fraction) / noise.numel())
        assert abs(up.double().mean().item() - fraction) < 5 * deviation + 2**-17


def test_what_bfloat16_can_represent_stays() -> None:
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([0.0, -0.0, 1.0, -3.0, largest, -largest, math.inf, -math.inf, math.nan, -math.nan, 1e-40])
    values = values.bfloat16().float()
    values[8:10] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN with all bits set
    for noise in (0, 1, 0xFFFF):
        rounded = round_to_bfloat16(values, torch.full(values.shape, noise, dtype=torch.int32))
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded.nan_to_num(nan=0.0), values.nan_to_num(nan=0.0))
        assert torch.equal(rounded.signbit(), values.signbit())


def test_updates_too_small_for_bfloat16_arrive_on_average() -> None:
    """lr is a thousandth of the distance to the next weight below 1."""
    grads = [torch.ones(300, 300, dtype=torch.bfloat16)] * 100
    options: dict[str, Any] = {"lr": 2**-8 / 1000, "beta": 0.9, "bias_correction": True}
    start = torch.ones(300, 300, dtype=torch.bfloat16)
    nearest, _ = trained(start, grads, **options)
    assert torch.equal(nearest, start)
    stochastic, _ = trained(start, grads, stochastic_rounding=True, **options)
    wide, _ = trained(start.float(), [grad.float() for grad in grads], **options)
    expected, moved = (1 - wide.double()).mean().item(), (1 - stochastic.double()).mean().item()
    assert moved == pytest.approx(expected, rel=5 * math.sqrt(10 / 90000))  # a tenth of the elements moves
    again, _ = trained(start, grads, stochastic_rounding=True, rounding_seed=1, **options)
    assert not torch.equal(again, stochastic)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (33, 17), (2, 3, 4), (5, 1, 3), (2, 2, 1, 2, 3), (0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equals_the_specification(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = gradients(shape, 4, dtype)
    weight = torch.ones(shape, dtype=dtype)
    state = ReferenceState.zeros(weight, momentum_dtype=torch.bfloat16)
    for grad in grads:
        reference_step(weight, grad, state, momentum=0.9, rounding=(SEED, 0))
    ours, held = trained(
        torch.ones(shape, dtype=dtype),
        grads,
        momentum=0.9,
        momentum_dtype=torch.bfloat16,
        stochastic_rounding=True,
        rounding_seed=SEED,
    )
    assert torch.equal(ours, weight)
    assert held["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(held["momentum_buffer"], state.momentum_buffer)


def test_chunks_do_not_show() -> None:
    """A tensor of many chunks: together they have the noise of the whole."""
    shape = (700, 900)
    ones = torch.ones(shape, dtype=torch.bfloat16)
    ours, _ = trained(ones, [ones], lr=2**-9, stochastic_rounding=True)
    noise = Rounding(0, 0, 0, shape).noise(Box.whole(shape))[WEIGHT]
    assert torch.equal(ours, round_to_bfloat16(torch.full(shape, 1 - 2**-9), noise).bfloat16())


def compare(name: str, options: dict[str, Any], dtype: torch.dtype, **keywords: Any) -> None:
    given = {key: value for key, value in options.items() if key != "momentum_dtype"}
    form = {"momentum_dtype": options.get("momentum_dtype")}
    compare_with_reference(name, given, dtype, SEED, **form, **keywords)


@pytest.mark.sampled("name, world_size", list(cases()))
def test_the_recipe_in_few_bytes_equals_one_process(workers: Pool, name: str, world_size: int) -> None:
    """In every layout, of which edges cut its blocks."""
    workers(world_size).run(compare, name, EVERYTHING | {"momentum_dtype": torch.int8}, torch.bfloat16)


TYPES = [torch.bfloat16, torch.float32]


@pytest.mark.sampled("name, world_size, options, dtype", crossed(cases(), range(len(NARROW)), TYPES), ids=str)
def test_equals_one_process(workers: Pool, name: str, world_size: int, options: int, dtype: torch.dtype) -> None:
    workers(world_size).run(compare, name, NARROW[options], dtype)


def compare_replicas(options: dict[str, Any], dtype: torch.dtype) -> None:
    compare("whole", options, dtype, shard_over=dist.group.WORLD)


@pytest.mark.sampled("options, dtype", crossed(range(len(NARROW)), TYPES), ids=str)
def test_equals_one_process_with_replicas(workers: Pool, options: int, dtype: torch.dtype) -> None:
    workers(3).run(compare_replicas, NARROW[options], dtype)


def compare_flat(name: str, dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    options = test_flat.RECIPE | {"weight_decay": 0.1}
    test_flat.compare_with_reference(name, options, dtype, SEED, momentum_dtype=momentum_dtype)


FLAT = [
    *[("fsdp1-nested", 3), ("fsdp1-flat-nested", 3), ("fsdp1-flat-full-shard", 2), ("fsdp1-flat-hybrid-shard", 4)],
    *[("fairscale-nested", 2), ("fairscale-separate-nested", 2)],
]


# fairscale wraps float32 and float16 weights alone, the momentum of which may be narrower.
FLAT_ROWS = [
    row
    for row in crossed(FLAT, TYPES, [torch.bfloat16, torch.int8])
    if row[2] == torch.float32 or not row[0].startswith("fairscale")
]


@pytest.mark.sampled("name, world_size, dtype, momentum_dtype", FLAT_ROWS, ids=str)
def test_equals_one_process_with_flattened_parameters(
    workers: Pool, name: str, world_size: int, dtype: torch.dtype, momentum_dtype: torch.dtype
) -> None:
    workers(world_size).run(compare_flat, name, dtype, momentum_dtype)


def test_numbers_are_places_in_the_model() -> None:
    """However the parameters are grouped; without a model they are places in the param groups."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    params = list(model.parameters())
    groups = [{"params": params[1::2]}, {"params": params[0::2]}]

    def numbers(optimizer: SM3) -> list[int]:
        of = {entry.param: entry.number for entry in optimizer._current_plan().entries}
        return [of[param] for param in params]

    assert numbers(SM3(groups, model=model)) == [0, 1, 2, 3]
    assert numbers(SM3(groups)) == [2, 0, 3, 1]
    apart = nn.Parameter(torch.ones(3))
    assert numbers(SM3([apart, *params], model=model)) == [0, 1, 2, 3]
    params[0].requires_grad_(False)
    assert [entry.number for entry in SM3(params)._current_plan().entries] == [1, 2, 3]


def test_a_loaded_state_goes_on_as_if_nothing_had_been() -> None:
    grads = gradients((7, 5), 8, torch.bfloat16)
    options: dict[str, Any] = {"momentum": 0.9, "stochastic_rounding": True, "rounding_seed": SEED}
    start = torch.ones(7, 5, dtype=torch.bfloat16)
    once, _ = trained(start, grads, momentum_dtype=torch.bfloat16, **options)
    param = nn.Parameter(start.clone())
    optimizer = SM3([param], momentum_dtype=torch.bfloat16, **options)
    for k, grad in enumerate(grads):
        if k == 4:
            saved = optimizer.state_dict()
            optimizer = SM3([param], momentum_dtype=torch.bfloat16)  # the other options come with the state
            optimizer.load_state_dict(saved)
        param.grad = grad
        optimizer.step()
    assert torch.equal(param.detach(), once)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_how_it_is_rounded_comes_with_a_loaded_state(backend: str) -> None:
    """Whoever takes the steps: the kernels were told when their plan was made."""

    def make(**options: Any) -> tuple[nn.Module, SM3]:
        torch.manual_seed(0)
        model = nn.Linear(40, 30, bias=False).bfloat16()
        return model, SM3(model.named_parameters(), lr=0.01, backend=backend, **options)

    def step(model: nn.Module, optimizer: SM3, number: int) -> None:
        model.weight.grad = torch.randn(30, 40, generator=torch.Generator().manual_seed(number)).bfloat16()
        optimizer.step()

    (model, optimizer), (other, loaded) = make(stochastic_rounding=True, rounding_seed=5), make()
    step(model, optimizer, 0)
    step(other, loaded, 1)  # it has a plan
    set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    for number in (2, 3):
        step(model, optimizer, number)
        step(other, loaded, number)
    assert torch.equal(model.weight, other.weight)


def test_momentum_is_loaded_in_the_type_of_the_optimizer() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    wide = SM3([param], momentum=0.9)
    param.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    wide.step()
    narrow = SM3([param], momentum=0.9, momentum_dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    expected: Tensor = wide.state[param]["momentum_buffer"]
    assert torch.equal(narrow.state[param]["momentum_buffer"], expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_dtype": torch.float16}, "momentum_dtype must be torch.float32, torch.bfloat16"),
        ({"rounding_seed": -1}, "rounding_seed must be an integer"),
        ({"rounding_seed": 1 << 64}, "rounding_seed must be an integer"),
        ({"rounding_seed": 0.5}, "rounding_seed must be an integer"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SM3([nn.Parameter(torch.ones(2))], **options)


def test_float16_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters of this group are float16"):
        SM3([nn.Parameter(torch.ones(2, dtype=torch.float16))], stochastic_rounding=True)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 4, sparse=True, dtype=torch.bfloat16)
    optimizer = SM3(embedding.parameters(), stochastic_rounding=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(NotImplementedError, match="stochastic_rounding=False"):
        optimizer.step()
