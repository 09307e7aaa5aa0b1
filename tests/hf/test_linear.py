"""The twin's linear layers: right, the same bits for a row in any company, and only where they may."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.attention import choice
from chunkcache.hf import linear
from chunkcache.hf.linear import RowLinear, multiply, multiply_heads, serve
from chunkcache.native.library import libraries
from tests.models import DEVICE, FULL_ATTENTION, build, prompt, run, tiny, wrapped

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compiled for processors")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
LIBRARIES = libraries()[0]
PAIRS = pytest.mark.skipif(
    not any(library.pairs() for library in LIBRARIES.values()),
    reason="no pairs of bfloat16 on this processor, or a matrix unit that does them better",
)
CASES = [pytest.param(name, torch.float32) for name in LIBRARIES]
CASES += [pytest.param("avx512bf16", torch.bfloat16, marks=PAIRS)]


def numbers(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products_are_right_and_rows_do_not_see_each_other(name, dtype, data):
    library = LIBRARIES[name]
    rows, columns = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    depth = data.draw(st.integers(1, 700)) * (2 if dtype == torch.bfloat16 else 1)
    wide = numbers(rows, depth + 2 * data.draw(st.integers(0, 3)), dtype=dtype)
    x, weight = wide[:, :depth], numbers(columns, depth, dtype=dtype, seed=1)
    bias = numbers(columns, dtype=dtype, seed=2) if data.draw(st.booleans()) else None
    whole = multiply(library, x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().T + 1
    assert ((whole.double() - expected).abs() / scale).max() < TOLERANCE[dtype]
    order = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    assert torch.equal(multiply(library, x[order], weight, bias), whole[order])
    part = slice(
        *sorted(data.draw(st.tuples(st.integers(0, columns - 1), st.integers(0, columns))))
    )
    if part.stop > part.start:
        some = multiply(library, x, weight[part], None if bias is None else bias[part])
        assert torch.equal(some, whole[:, part])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products_per_head_are_those_of_each_head(name, dtype, data):
    """Weights either way round, cut out of others, between strange numbers that nobody may read."""
    library, even = LIBRARIES[name], 2 if dtype == torch.bfloat16 else 1
    rows, heads = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    depth, columns = data.draw(st.integers(1, 300)) * even, data.draw(st.integers(1, 90))
    margin = 2 * data.draw(st.integers(0, 2))
    x = numbers(rows, heads, depth + margin, dtype=dtype)
    whole = numbers(heads, depth + margin, columns + margin, dtype=dtype, seed=1)
    if data.draw(st.booleans()):
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    for tensor in (x[..., depth:], whole[:, depth:], whole[..., columns:]):
        tensor.fill_(torch.nan)
    x, weight = x[..., :depth], whole[:, :depth, :columns]
    out = torch.full((rows, heads, columns + margin), 7.0, dtype=dtype)
    multiply_heads(library, x, weight, out[..., :columns])
    for head in range(heads):
        alone = multiply(library, x[:, head], weight[head].T.contiguous(), None)
        assert torch.equal(out[:, head, :columns], alone)
    assert (out[..., columns:] == 7).all()


def test_products_per_head_of_other_tensors_are_refused():
    if not LIBRARIES:
        pytest.skip("no compiled module runs here")
    library = next(iter(LIBRARIES.values()))
    x, weight, out = (torch.zeros(2, 3, 4), torch.zeros(3, 4, 6), torch.zeros(2, 3, 6))
    multiply_heads(library, x, weight, out)
    wrong = [
        (x[:, :2], weight, out),
        (x, weight[:, :3], out),
        (x, weight[:, ::2, ::2], out),
        (x, weight, out[..., :4]),
        (x, weight, torch.zeros(2, 3, 12)[..., ::2]),
        (x.double(), weight.double(), out.double()),
        (x.half(), weight, out),
        (x[:0], weight, out[:0]),
        (x, weight, out[:1, :, :1].expand(2, 3, 6)),
        (x.bfloat16()[..., :3], weight.bfloat16()[:, :3], out.bfloat16()),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="no product"):
            multiply_heads(library, *arguments)
    for other in (one for one in LIBRARIES.values() if not one.pairs()):
        with pytest.raises(ValueError, match="no product"):
            multiply_heads(other, x.bfloat16(), weight.bfloat16(), out.bfloat16())
        with pytest.raises(ValueError, match="no product"):
            multiply(other, x[0].bfloat16(), weight[0].T.bfloat16().contiguous(), None)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_threads_and_large_products_do_not_show(name, dtype):
    """Enough rows and columns that threads take blocks of several sizes."""
    x, weight = numbers(1100, 530, dtype=dtype), numbers(700, 530, dtype=dtype, seed=1)
    whole, before = multiply(LIBRARIES[name], x, weight, None), torch.get_num_threads()
    try:
        for threads in (1, 3, 8, 40):
            torch.set_num_threads(threads)
            assert torch.equal(multiply(LIBRARIES[name], x, weight, None), whole)
            assert torch.equal(multiply(LIBRARIES[name], x[5:9], weight, None), whole[5:9])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_what_is_not_finite_stays_in_its_row(name, dtype):
    x, weight = numbers(20, 300, dtype=dtype), numbers(40, 300, dtype=dtype, seed=1)
    good = multiply(LIBRARIES[name], x, weight, None)
    x[3, 7], x[11, 299] = torch.nan, torch.inf
    bad = multiply(LIBRARIES[name], x, weight, None)
    assert not bad[3].isfinite().any() and not bad[11].isfinite().any()
    finite = [row for row in range(20) if row not in (3, 11)]
    assert torch.equal(bad[finite], good[finite])


def test_all_instruction_sets_agree_in_float32():
    x, weight = numbers(70, 900, dtype=torch.float32), numbers(90, 900, dtype=torch.float32, seed=1)
    results = [multiply(library, x, weight, None) for library in LIBRARIES.values()]
    assert all(torch.equal(result, results[0]) for result in results)


class Adapter(torch.nn.Linear):
    """Somebody else's layer."""


def layers(dtype=torch.float32):
    return torch.nn.ModuleDict(
        {
            "plain": torch.nn.Linear(64, 32),
            "odd": torch.nn.Linear(33, 5),
            "adapter": Adapter(64, 32),
            "own": torch.nn.Linear(64, 32),
        }
    ).to(dtype)


@pytest.mark.skipif(not LIBRARIES, reason="no compiled module runs here")
def test_only_plain_layers_are_served():
    modules = layers()
    modules["own"].forward = lambda x: x
    parameters = dict(modules.named_parameters())
    assert serve(modules).startswith("native")
    assert type(modules["plain"]) is RowLinear and modules["plain"].serving
    assert type(modules["odd"]) is RowLinear and modules["odd"].serving
    assert type(modules["adapter"]) is Adapter
    assert type(modules["own"]) is torch.nn.Linear
    assert all(tensor is parameters[name] for name, tensor in modules.named_parameters())
    assert serve(modules, compiled=False) == "torch" and modules["plain"].serving is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16], ids=str)
def test_types_without_code_stay_with_torch(dtype):
    modules = layers(dtype)
    found = serve(modules)
    assert modules["odd"].serving is None, "33 bfloat16 are no whole pairs; others have no code"
    if dtype != torch.bfloat16:
        assert found == "torch"
    x = numbers(3, 33, dtype=dtype)
    expected = torch.nn.functional.linear(x, modules["odd"].weight, modules["odd"].bias)
    assert torch.equal(modules["odd"](x), expected)


def test_hooks_of_a_layer_are_kept():
    modules, seen = layers(), []
    modules["plain"].register_forward_hook(lambda *_: seen.append(1))
    serve(modules)
    modules["plain"](torch.zeros(1, 64))
    assert seen == [1]


def test_wrong_inputs_are_torchs_errors():
    modules = layers()
    serve(modules)
    with pytest.raises(RuntimeError):
        modules["plain"](torch.zeros(2, 32))
    with pytest.raises(RuntimeError):
        modules["plain"](torch.zeros(2, 64, dtype=torch.float64))
    assert modules["plain"](torch.zeros(0, 64)).shape == (0, 32)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows_that_are_far_apart(name, dtype, tmp_path):
    """Strides beyond what 32 bits count, in a file that is nearly all hole."""
    apart = 2**31 * 4 // dtype.itemsize // 5 + 2
    far = torch.from_file(str(tmp_path / "hole"), shared=True, size=6 * apart, dtype=dtype)
    rows = far.view(6, apart)[:, :64]
    near = numbers(6, 64, dtype=dtype)
    rows.copy_(near)
    weight = numbers(40, 64, dtype=dtype, seed=1)
    expected = multiply(LIBRARIES[name], near, weight, None)
    assert torch.equal(multiply(LIBRARIES[name], rows, weight, None), expected)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows_that_begin_anywhere(name, dtype):
    near, weight = numbers(6, 64, dtype=dtype), numbers(40, 64, dtype=dtype, seed=1)
    shifted = torch.zeros(6, 66, dtype=dtype)
    shifted[:, 1:65] = near
    expected = multiply(LIBRARIES[name], near, weight, None)
    assert torch.equal(multiply(LIBRARIES[name], shifted[:, 1:65], weight, None), expected)


@pytest.mark.skipif(not LIBRARIES, reason="no compiled module runs here")
def test_changed_weights_are_not_read_wrongly():
    modules, x = layers(), numbers(3, 64, dtype=torch.float32)
    serve(modules)
    layer = modules["plain"]
    layer.weight.data = numbers(64, 32, dtype=torch.float32).t()  # the same shape, other strides
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        layer(x)
    with pytest.raises(ValueError, match="no product"):
        multiply(next(iter(LIBRARIES.values())), x, layer.weight, layer.bias)


def test_a_layer_may_be_served_anew_while_it_is_used(monkeypatch):
    """Another thread's request may prove the model again between any two lines."""
    modules, x, fits = layers(), numbers(3, 64, dtype=torch.float32), linear._fits
    serve(modules)
    expected = modules["plain"](x)

    def interrupted(*tensors):
        serve(modules, compiled=False)
        return fits(*tensors)

    monkeypatch.setattr(linear, "_fits", interrupted)
    assert torch.equal(modules["plain"](x), expected)
    assert modules["plain"].serving is None


@pytest.mark.skipif(not LIBRARIES, reason="no compiled module runs here")
def test_the_default_device_is_not_asked():
    linear.best.cache_clear()
    choice.best.cache_clear()
    choice.sound.cache_clear()
    with torch.device("meta"):
        assert linear.best(torch.float32)
        assert choice.best(torch.float32)[0]


def test_layers_can_be_copied():
    modules, x = layers(), numbers(3, 64, dtype=torch.float32)
    serve(modules)
    assert torch.equal(copy.deepcopy(modules)["plain"](x), modules["plain"](x))
    assert RowLinear(4, 3)(torch.zeros(2, 4)).shape == (2, 3)


def test_a_module_that_breaks_its_promise_is_not_used(monkeypatch):
    """Other code for few rows, as a library has it, or for heads."""

    class Broken:
        def __init__(self, breaks):
            self.breaks = breaks

        def linear(self, kind, heads, rows, depth, *rest):
            depth -= self.breaks(heads, rows)
            LIBRARIES["avx2"].linear(kind, heads, rows, depth, *rest)

    if "avx2" not in LIBRARIES:
        pytest.skip("no compiled module runs here")
    for breaks in (lambda heads, rows: rows < 8, lambda heads, rows: heads > 1):
        assert not linear._keeps_promise(Broken(breaks), torch.float32)
    assert linear._keeps_promise(LIBRARIES["avx2"], torch.float32)


def test_the_users_model_keeps_its_layers():
    model = build("llama", FULL_ATTENTION["llama"])
    before = [type(module) for module in model.modules()]
    cached = wrapped(model)
    plain = copy.deepcopy(model)
    run(cached, prompt(40))
    assert [type(module) for module in model.modules()] == before
    x = torch.tensor([prompt(12)])
    assert torch.equal(model(x).logits, plain(x).logits)


def test_lower_precision_is_left_to_the_library():
    """Who lets float32 products round their operands wants that speed."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        assert wrapped(tiny("llama")).proof.linear == "torch"
    finally:
        matmul.fp32_precision = before
    assert wrapped(tiny("llama"), kernel="torch").proof.linear == "torch"
