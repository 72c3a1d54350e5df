"""Blocks that replay what they recorded: the same bits, and whatever changes is noticed."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from support import threads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dico_kernels as dk
from dico_kernels import native
from dico_kernels._recording import Recording
from dico_kernels.nn import _state
from dico_kernels.nn.block import FusedDiCoBlock
from dico_kernels.ops import _recorded
from dico_kernels.reference.weights import fill_

if not (native.available() and native.multiplies(torch.empty(0))):
    pytest.skip("recordings need a CPU whose products are ours (AVX-512)", allow_module_level=True)

BLOCKS = {"DiCo": dk.nn.DiCoBlock, "FCDM": dk.nn.FCDMBlock}


def block(name, dtype=torch.float32):
    torch.manual_seed(0)
    return fill_(BLOCKS[name](16)).to(dtype).eval()


def given(n=2, dtype=torch.float32, size=8):
    x = torch.randn(n, 16, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(n, 16).to(dtype)


def recordings(module):
    epochs = [s.epoch for m in module.modules() if (s := _state._STATES.get(m)) is not None and s.epoch is not None]
    return [r for e in epochs for r in e.kinds.values() if isinstance(r, Recording)]


def warm(module, args, calls=2):
    """Call it until it has recorded."""
    with torch.inference_mode():
        for _ in range(calls):
            module(*args)
    assert recordings(module)
    return module


def unrecorded(module, args):
    """What it makes of the same without recordings."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(_recorded, "_ENABLED", False)
        return module(*args)


def unfused(module, *args):
    """What the layers of a DiCo block make of it, called one by one."""
    return dk.reference.dico.DiCoBlock.forward(module, *args)


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_same_bits(name, dtype, packed):
    if not native.multiplies(torch.empty(0, dtype=dtype)):
        pytest.skip("this CPU's bfloat16 products are not ours")
    module = block(name, dtype)
    if packed:
        dk.pack(module)
    for n in (1, 3, 12):  # 12: more than channel attention has a kernel for
        warm(module, given(n, dtype))
        for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            args = given(n, dtype)
            with context():
                assert torch.equal(module(*args), unrecorded(module, args))
    assert len(recordings(module)) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_whole_models(context):
    torch.manual_seed(0)
    model = dk.pack(dk.fuse(fill_(dk.create_model("DiCo-S", hidden_size=16, num_classes=3)).eval()))
    args = [(torch.randn(2, 4, 16, 16), torch.tensor([1, 900]), torch.tensor([i, 2])) for i in range(2)]
    with context():
        for _ in range(3):
            outs = [model(*a) for a in args]
        assert len(recordings(model)) == sum(isinstance(m, FusedDiCoBlock) for m in model.modules()) == 21
        for a, out in zip(args, outs, strict=True):
            assert torch.equal(out, unrecorded(model, a))


def swap_weight(m):
    m.conv1.weight = nn.Parameter(m.conv1.weight.detach() * 2)


def transposed(m):
    m.conv1.weight.data = m.conv1.weight.data.transpose(0, 1)


def evicted(m):
    kept = m.conv5.weight.data * 2
    m.conv5.weight.data = torch.empty(0)
    m.conv5.weight.data = kept.clone()  # where the first lay, if that memory was freed


def pruned(m):
    m.conv4.weight = nn.Parameter(m.conv4.weight[:8])
    m.conv4.bias = nn.Parameter(m.conv4.bias[:8])
    m.conv5.weight = nn.Parameter(m.conv5.weight[:, :8])


def pruned_data(m):
    for p in (m.conv4.weight, m.conv4.bias):
        p.data = p.data[:8]
    m.conv5.weight.data = m.conv5.weight.data[:, :8]


def set_data(m):
    m.conv5.weight.data = m.conv5.weight.data * 2


def in_place(m):
    with torch.no_grad():
        m.conv2.weight.mul_(2)


def assigned(m):
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True)


def no_bias(m):
    m.conv4.bias = None


def replaced(m):
    m.conv3 = nn.Sequential(nn.Conv2d(16, 16, 1))


def dilated(m):
    m.conv2.dilation, m.conv2.padding = (2, 2), (2, 2)


def hooked(m):
    m.conv1.register_forward_hook(lambda module, args, out: out * 2)


def pre_hooked(m):
    m.ca[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward(m):
    m.conv4.forward = lambda x: nn.functional.conv2d(x, m.conv4.weight)


def other_class(m):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    m.conv5.__class__ = Doubled


def gate_replaced(m):
    m.ca[2] = nn.Tanh()


def gate_extended(m):
    m.ca.append(nn.Hardtanh(0.4, 0.6))


CHANGES = [
    *(swap_weight, set_data, in_place, assigned, no_bias, replaced, dilated, hooked, pre_hooked, own_forward),
    *(other_class, gate_replaced, gate_extended, transposed, evicted, pruned, pruned_data),
]


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_change_is_noticed(change, packed):
    module, args = block("DiCo"), given()
    if packed:
        dk.pack(module)
    with torch.inference_mode():
        before = warm(module, args)(*args).clone()
    torch.manual_seed(1)
    change(module)
    with torch.inference_mode():
        for _ in range(4):
            after = module(*args)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, unfused(module, *args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_another_eps_is_noticed(name):
    module, args = block(name), given()
    with torch.inference_mode():
        before = warm(module, args)(*args)
        module.fused_eps = (0.5, 0.5)
        for _ in range(3):
            after = module(*args)
            assert torch.equal(after, unrecorded(module, args))
            assert not torch.equal(after, before)


def test_parameters_of_inner_modules_are_noticed():
    module, args = block("FCDM"), given()
    with torch.inference_mode():
        before = warm(module, args)(*args)
    module.grn.gamma = nn.Parameter(module.grn.gamma.detach() + 1)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(module(*args), unrecorded(module, args))
            assert not torch.equal(module(*args), before)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_compute_of_the_users_own_runs(name):
    class Doubled(BLOCKS[name]):
        def compute(self, library, *inputs):
            return 2 * super().compute(library, *inputs)

    module, args = block(name), given()
    with torch.inference_mode():
        expected = 2 * module(*args)
        module.__class__ = Doubled
        for _ in range(3):
            assert torch.equal(module(*args), expected)
        module.compute = lambda library, x, c: 3 * x
        assert torch.equal(module(*args), 3 * args[0])


def test_weights_packed_anew_are_used():
    module, args = dk.pack(block("DiCo")), given()
    before = warm(module, args)(*args).detach()
    module.conv5.weight.data.mul_(2)  # which PyTorch does not count as a change
    dk.pack(module)
    with torch.inference_mode():
        assert not torch.equal(module(*args), before)
        torch.testing.assert_close(module(*args), unfused(module, *args), rtol=1e-4, atol=1e-4)


def test_settings_are_noticed():
    module, args = block("FCDM"), given()
    warm(module, args)
    with torch.inference_mode():
        with dk.backend("reference"):
            torch.testing.assert_close(module(*args), unrecorded(module, args), rtol=0, atol=0)
        with dk.backend("auto", products="library"):
            torch.testing.assert_close(module(*args), unrecorded(module, args), rtol=0, atol=0)
        for isa in native.isas():
            with native.isa(isa):
                for _ in range(3):
                    assert torch.equal(module(*args), unrecorded(module, args))
        count = len(recordings(warm(module, args)))
        with threads(torch.get_num_threads() + 1):
            assert torch.equal(module(*args), unrecorded(module, args))
            assert len(recordings(warm(module, args))) == count + 1
    assert "depthwise" in str(dk.explain(module, *args))


class Spy(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_ops():
    module, args = block("DiCo"), given()
    warm(module, args)
    with torch.inference_mode(), Spy() as spy:
        module(*args)
    assert any("conv_half" in s for s in spy.seen)
    with torch.autograd.profiler.profile() as profile, torch.inference_mode():
        module(*args)
    assert any("recorded DiCoBlock" in e.name for e in profile.function_events)
    out = module(*args)
    out.sum().backward()
    assert module.conv1.weight.grad.norm() > 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(*args), unrecorded(module, args))


def test_a_head_may_do_as_it_likes():
    class Table(nn.Module):
        step = 0

        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, 96))

        def forward(self, c):
            return self.rows[self.step : self.step + 1]

    module, (x, c) = block("DiCo"), given()
    module.adaLN_modulation = Table()
    with torch.inference_mode():
        for step in (0, 0, 0, 1, 2, 1):
            module.adaLN_modulation.step = step
            torch.testing.assert_close(module(x, c), unfused(module, x, c), rtol=1e-4, atol=1e-4)
    assert recordings(module)


def test_other_inputs():
    module, (x, c) = block("DiCo"), given(3)
    warm(module, (x, c))
    with torch.inference_mode():
        for args in [
            (x, c[:1]),
            (x.contiguous(), c),
            (x[:, :, ::2], c),
            (x, c.repeat(1, 2)[:, ::2]),
            (x[:1], c[:1]),
            (torch.empty(0, 16, 8, 8), c[:0]),
            (x.double(), c),
        ]:
            if args[0].dtype != torch.float32:
                module = module.double()
                args = args[0], c.double()
            for _ in range(3):
                out = module(*args)
                assert torch.equal(out, unrecorded(module, args))
    assert len(recordings(module)) <= _state._MOST


def test_no_more_than_a_few_kinds_of_inputs_are_kept():
    module = block("FCDM")
    for size in range(1, 2 * _state._MOST):
        warm(module, given(1, size=size))
    assert len(recordings(module)) <= _state._MOST
    args = given(1, size=3)
    with torch.inference_mode():
        assert torch.equal(warm(module, args)(*args), unrecorded(module, args))


def test_off_by_request(monkeypatch):
    monkeypatch.setattr(_recorded, "_ENABLED", False)
    module, args = block("DiCo"), given()
    with torch.inference_mode():
        for _ in range(3):
            module(*args)
    assert not recordings(module)


def test_copies_and_files_know_nothing():
    module, args = block("DiCo"), given()
    attributes, keys = set(vars(module)), set(module.state_dict())
    warm(module, args)
    assert set(vars(module)) == attributes
    for twin in (copy.deepcopy(module), copy.copy(module), torch.load(saved(module), weights_only=False)):
        assert not recordings(twin)
        with torch.inference_mode():
            assert torch.equal(twin(*args), module(*args))
        assert set(twin.state_dict()) == keys
    twin = copy.copy(module)
    twin._parameters, twin._modules = {}, copy.deepcopy(module._modules)
    in_place(twin)
    with torch.inference_mode():
        for _ in range(3):
            assert not torch.equal(twin(*args), module(*args))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def freed(call):
    """What a call returns references to is gone with them, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        return [r() for r in call()] == [None, None]
    finally:
        gc.enable()


def test_nothing_is_held_longer_than_its_module():
    args = given()

    def run():
        module = warm(dk.fuse(fill_(dk.reference.DiCoBlock(16)).eval()), args)
        return weakref.ref(module), weakref.ref(module.conv1.weight)

    assert freed(run)


@pytest.mark.parametrize("undo", [dk.unpack, dk.unfuse, nn.Module.double], ids=["unpack", "unfuse", "double"])
def test_nothing_is_held_longer_than_it_is_of_use(undo):
    module, args = dk.pack(dk.fuse(fill_(dk.reference.DiCoBlock(16)).eval())), given()
    warm(module, args)
    undo(module)
    assert not recordings(module)
    assert _state._STATES.get(module) is None


def test_nothing_is_held_of_a_module_that_cannot_run_fused():
    module, args = block("DiCo"), given()
    warm(module, args)
    hooked(module)
    with torch.inference_mode():
        module(*args)
    assert _state._STATES.get(module) is None


@pytest.mark.parametrize("products", ["auto", "library"])
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_for_any_product(dtype, isa, products):
    """oneDNN's packed weights have no memory that could be looked at."""
    for name in BLOCKS:
        module, args = block(name, dtype), given(dtype=dtype)
        with native.isa(isa):
            with dk.backend("auto", products=products):
                dk.pack(module)
                with torch.inference_mode():
                    for _ in range(4):
                        assert torch.equal(module(*args), unrecorded(module, args))
            with torch.inference_mode():
                for _ in range(4):
                    assert torch.equal(module(*args), unrecorded(module, args))


def test_on_no_device_at_all():
    model = dk.pack(dk.create_model("DiCo-S", hidden_size=16, num_classes=3).eval()).to("meta")
    args = torch.randn(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(3):
            assert model(*(a.to("meta") for a in args)).device.type == "meta"


def test_threads_have_memory_of_their_own():
    module = block("DiCo")
    sets = [given(1) for _ in range(4)]
    expected = [unrecorded(module, args) for args in sets]
    wrong = []

    def run(i):
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(module(*sets[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_compile_sees_none_of_it():
    module, args = block("FCDM"), given()
    warm(module, args)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), unrecorded(module, args))
