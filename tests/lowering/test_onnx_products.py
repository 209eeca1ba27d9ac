"""Attention that is written out, with a cap on the scores or with sinks, as GroupQueryAttention."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

import recast
from recast.lowering.onnx.products import products_of
from tests.helpers import assert_close
from tests.lowering.test_onnx_decoder import GROUPED, greedy, ids

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")


@functools.cache
def made(kind: str) -> Any:
    common = {**GROUPED, "head_dim": 16, "sliding_window": 7}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    configs = {
        "Gemma2": {"query_pre_attn_scalar": 25, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": plain},
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**common, **configs[kind]})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
    return model


@functools.cache
def program_of(kind: str) -> Any:
    return recast.capture(made(kind), (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)


@pytest.mark.parametrize("kind", ["Gemma2", "GptOss"])
def test_tokens_are_those_of_pytorch(kind: str) -> None:
    artifact = recast.lower(program_of(kind), target="onnx", attention="grouped")
    nodes = [n for n in artifact.lowering._model.graph.all_nodes() if n.op_type == "GroupQueryAttention"]  # type: ignore[attr-defined]
    windows = [node.attributes["local_window_size"].as_int() for node in nodes]
    assert sorted(windows) == [-1, 7]
    if kind == "Gemma2":
        assert [node.attributes["softcap"].as_float() for node in nodes] == [2.0, 2.0]
    else:
        assert all(len(node.inputs) == 12 and node.inputs[11] is not None for node in nodes)
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    found = recast.Generator(artifact).generate(prompts, 24).ids
    assert found == [greedy(made(kind), prompt, 24) for prompt in prompts]


def test_scale_cap_and_sinks_are_read() -> None:
    gemma, oss = products_of(program_of("Gemma2")), products_of(program_of("GptOss"))
    assert [(p.scale, p.cap, p.sinks) for p in gemma] == [(pytest.approx(0.2), 2.0, None)] * 2
    assert [(p.scale, p.cap) for p in oss] == [(pytest.approx(0.25), 0.0)] * 2
    assert [str(p.sinks.target) for p in oss if p.sinks] == [f"model.layers.{i}.self_attn.sinks" for i in range(2)]


@pytest.mark.parametrize("change", ["twice", "axis", "power"])
def test_what_computes_something_else_is_not_read(change: str) -> None:
    program = program_of("Gemma2").copy()
    aten = torch.ops.aten
    node = next(n for n in program.graph.nodes if n.target is aten.softmax.int)
    if change == "axis":
        node.args = (node.args[0], 2, *node.args[2:])
    else:
        (tanh,) = [n for n in program.graph.nodes if n.target is aten.tanh.default][:1]
        with program.graph.inserting_after(tanh):
            new = program.graph.call_function(aten.tanh.default if change == "twice" else aten.square.default, (tanh,))
        new.meta = dict(tanh.meta)
        tanh.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    assert len(products_of(program)) == 1


def attention(q: Any, k: Any, v: Any, past: int, window: int, cap: float, sinks: Any, scale: float) -> torch.Tensor:
    """In float64, (batch, heads, sequence, features)."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    far = (torch.arange(q.shape[2])[:, None] + past) - torch.arange(k.shape[2])
    scores = scores.masked_fill((far < 0) | (far >= (window if window > 0 else 1 << 30)), float("-inf"))
    rest = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1) if sinks is not None else scores[..., :0]
    return torch.softmax(torch.cat([scores, rest], -1), -1)[..., : k.shape[2]] @ v


@pytest.mark.parametrize(("batch", "new", "past"), [(2, 9, 0), (2, 1, 17), (1, 5, 12)])
@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_the_operator_computes_it(batch: int, new: int, past: int, window: int, cap: float, sunk: bool) -> None:
    import onnxruntime

    heads, held, size, scale = 4, 2, 16, 0.3
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(batch, heads, new, size, generator=generator)
    k, v = (torch.randn(batch, held, past + new, size, generator=generator) for _ in range(2))
    sinks = 2 * torch.randn(heads, generator=generator) if sunk else None
    feeds = {"q": q, "k": k[:, :, past:], "v": v[:, :, past:]}
    feeds = {name: t.transpose(1, 2).reshape(batch, new, -1) for name, t in feeds.items()}
    feeds |= {"pk": k[:, :, :past], "pv": v[:, :, :past]}
    feeds |= {"last": torch.full((batch,), past + new - 1).int(), "total": torch.tensor([past + new]).int()}
    feeds |= {} if sinks is None else {"sinks": sinks}
    names = ["q", "k", "v", "pk", "pv", "last", "total", *([] if sinks is None else ["", "", "", "", "sinks"])]
    helper = onnx.helper
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "nk", "nv"], domain="com.microsoft", num_heads=heads, kv_num_heads=held,
        scale=scale, local_window_size=window, softcap=cap,
    )  # fmt: skip
    types = {name: 6 if t.dtype == torch.int32 else 1 for name, t in feeds.items()}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, list(feeds[name].shape)) for name, kind in types.items()],
        [helper.make_tensor_value_info(name, 1, None) for name in ("y", "nk", "nv")],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["y"], {name: np.ascontiguousarray(t.numpy()) for name, t in feeds.items()})[0]
    y = torch.from_numpy(found).reshape(batch, new, heads, size).transpose(1, 2)
    assert_close(y, attention(q, k, v, past, window, cap, sinks, scale).float(), terms=64)
