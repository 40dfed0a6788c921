"""linear_attention against a float64 loop over tokens: every mode, option and gradient, on every backend."""

import pytest
import torch
from linear_attention_oracle import BF16, F16, F32, F64, check

BACKENDS = ("cpu", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def inputs(length=70, dtype=F32, batch=2, heads=4, heads_kv=2, width=16, value_width=24, keys=None):
    keys = length if keys is None else keys
    q = torch.randn(batch, length, heads, width)
    k = torch.randn(batch, keys, heads_kv, width)
    v = torch.randn(batch, keys, heads_kv, value_width)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def state(states=2, heads=4, width=16, value_width=24, dtype=F32):
    return torch.randn(states, heads, width, value_width, dtype=dtype), torch.rand(states, heads, width, dtype=dtype)


def log_gates(*shape, divide=1.0):
    return torch.nn.functional.logsigmoid(torch.randn(*shape)) / divide


MODES = {
    "causal": {},
    "reverse": {"reverse": True},
    "full": {"causal": False},
}


@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalize"))
@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16), ids=str)
@pytest.mark.parametrize("mode", MODES)
@on_backends
def test_modes(backend, place, mode, dtype, normalize):
    """GQA, D != M, masked keys, token scales, states in and out."""
    options = {"normalize": True, "feature_map": "sigmoid"} if normalize else {}
    wide = F64 if dtype == F64 else F32
    check(
        *inputs(dtype=dtype),
        place=place,
        key_mask=torch.rand(2, 70) > 0.2,
        token_scale=torch.rand(2, 70, dtype=wide) + 0.5,
        initial_state=state(dtype=wide),
        learn=("token_scale",),
        **MODES[mode],
        **options,
    )


@pytest.mark.parametrize("gate", ("head", "token"))
@pytest.mark.parametrize("normalize", (False, True), ids=("plain", "normalize"))
@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16), ids=str)
@pytest.mark.parametrize("mode", ("causal", "reverse", "both"))
@on_backends
def test_decays(backend, place, mode, dtype, normalize, gate):
    wide = F64 if dtype == F64 else F32
    options = {"both": {"causal": False}} | MODES
    options = dict(options[mode])
    options |= {"normalize": True, "feature_map": "elu1"} if normalize else {}
    if mode != "both":
        options["initial_state"] = state(dtype=wide)
    decay = (log_gates(4) if gate == "head" else log_gates(2, 70, 4)).to(wide)
    check(*inputs(dtype=dtype), place=place, decay=decay, learn=("decay",), **options)
