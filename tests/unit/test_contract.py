"""ONNX files from strangers: weights outside the folder of the file are refused wherever the file names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.core.config import UserError
from app.eval.contract import refuse_foreign_data


def external(location: str) -> TensorProto:
    """A tensor whose bytes lie in another file."""
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.GraphProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(nodes, "g", [], [out], initializers)


def as_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph([helper.make_node("Identity", ["w"], ["y"])], [tensor]))


def as_constant(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph([helper.make_node("Constant", [], ["y"], value=tensor)], []))


def inside_a_branch(tensor: TensorProto) -> onnx.ModelProto:
    branch = graph([helper.make_node("Identity", ["w"], ["y"])], [tensor])
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    return helper.make_model(
        graph([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], [condition])
    )


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    function = helper.make_function(
        "own", "F", [], ["y"], [helper.make_node("Constant", [], ["y"], value=tensor)], [helper.make_opsetid("", 17)]
    )
    return helper.make_model(graph([helper.make_node("F", [], ["y"], domain="own")], []), functions=[function])


@pytest.mark.parametrize("place", [as_initializer, as_constant, inside_a_branch, in_a_function])
@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "sub/../../w.bin", "link.bin"])
def test_weights_outside_the_folder_are_refused(
    tmp_path: Path, place: Callable[[TensorProto], onnx.ModelProto], location: str
) -> None:
    path = tmp_path / "models" / "m.onnx"
    path.parent.mkdir()
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    path.write_bytes(place(external(location)).SerializeToString())
    with pytest.raises(UserError, match=rf"weights of w lie outside its folder, in {location}: refused"):
        refuse_foreign_data(path)


@pytest.mark.parametrize("place", [as_initializer, as_constant, inside_a_branch, in_a_function])
def test_weights_beside_the_file_are_taken(tmp_path: Path, place: Callable[[TensorProto], onnx.ModelProto]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(place(external("sub/w.bin")).SerializeToString())
    refuse_foreign_data(path)
