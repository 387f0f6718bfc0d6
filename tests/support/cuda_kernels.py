"""CUDA kernels of ONNX Runtime for the operators of our files: what docs/OperatorKernels.md of its repository lists.

The wheel does not tell without a GPU: get_all_opkernel_def() opens a device. tests/gpu/test_export_gpu.py measures it.
Resize 19 is not here: it has no CUDA kernel in the pinned 1.26.0.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, defs, shape_inference

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
FLOATS_INT64 = {*FLOATS, TensorProto.INT64}
# Operator and the opset version that defines it -> types of the first input that have a kernel.
KERNELS = {
    ("Add", 14): FLOATS_INT64, ("BatchNormalization", 15): FLOATS, ("Cast", 13): FLOATS_INT64,
    ("Clip", 13): {*FLOATS_INT64, TensorProto.INT8}, ("Concat", 13): FLOATS_INT64, ("Conv", 11): FLOATS,
    ("DequantizeLinear", 13): {TensorProto.INT8}, ("Div", 14): FLOATS_INT64, ("Expand", 13): FLOATS_INT64,
    ("Flatten", 13): FLOATS_INT64, ("GatherElements", 13): FLOATS_INT64, ("MatMul", 13): FLOATS,
    ("MaxPool", 12): FLOATS, ("Mod", 13): FLOATS_INT64, ("Mul", 14): FLOATS_INT64, ("ReduceMax", 13): FLOATS_INT64,
    ("Reshape", 14): FLOATS_INT64, ("Resize", 13): FLOATS, ("Sigmoid", 13): FLOATS, ("Slice", 13): FLOATS_INT64,
    ("Softmax", 13): FLOATS, ("Split", 13): FLOATS_INT64, ("Sub", 14): FLOATS_INT64, ("TopK", 11): FLOATS_INT64,
    ("Transpose", 13): FLOATS_INT64, ("Unsqueeze", 13): FLOATS_INT64,
}  # fmt: skip


def without_kernel(model: ModelProto) -> set[str]:
    """Nodes that CUDA would leave to the CPU, as 'operator-version of type'."""
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    opset = model.opset_import[0].version
    found = set()
    for node in (node for node in inferred.node if node.op_type != "Constant"):  # folded when the file is loaded
        key = (node.op_type, defs.get_schema(node.op_type, opset, node.domain).since_version)
        kind = types[node.input[0]]
        if kind not in KERNELS.get(key, set()):
            found.add(f"{key[0]}-{key[1]} of {TensorProto.DataType.Name(kind)}")
    return found
