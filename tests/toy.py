"""The toy network of the golden files as a writer sees it: x [N, 3, 8, 8] -> Conv conv0 -> c0 -> Relu relu0 -> r0.

Ranges: x in [-1, 1], r0 in [0, 2.54], weight channel maxima 0.5 and 0.25, bias in [-0.5, 0.25]. Scales follow from them by the plain
formulas below, which are the tests' own: no rounding-tie margin is added, so that the golden files can be worked by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qdeploy.core.backend import Backend, Emitted, Node
from qdeploy.core.spec import Encoding, QuantSpec, Role

RANGES: dict[str, list[tuple[float, float]]] = {
    "x": [(-1.0, 1.0)],
    "r0": [(0.0, 2.54)],
    "conv0.weight": [(-0.5, 0.5), (-0.25, 0.25)],
    "conv0.bias": [(-0.5, 0.25)],
}
NODES = (
    Node(
        name="conv0",
        op="Conv",
        inputs=("x", "conv0.weight", "conv0.bias"),
        outputs=("c0",),
        attributes={"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "group": 1},
    ),
    Node(name="relu0", op="Relu", inputs=("c0",), outputs=("r0",)),
)
SHAPES: dict[str, tuple[int | None, ...]] = {
    "x": (None, 3, 8, 8),
    "conv0.weight": (2, 3, 3, 3),
    "conv0.bias": (2,),
    "c0": (None, 2, 8, 8),
    "r0": (None, 2, 8, 8),
}


def encoding(tensor: str, role: Role, spec: QuantSpec) -> Encoding:
    """The encoding of one of the toy's tensors: one scale for all its channels, or one each."""
    ranges = RANGES[tensor]
    if spec.axis is None:
        ranges = [(min(low for low, _ in ranges), max(high for _, high in ranges))]
    numbers = [numbers_of(low, high, spec) for low, high in ranges]
    return Encoding(tensor=tensor, role=role, spec=spec, scale=[s for s, _ in numbers], zero_point=[z for _, z in numbers])


def numbers_of(low: float, high: float, spec: QuantSpec) -> tuple[float, int]:
    """Scale and zero_point of a range."""
    largest = max(-low, high)
    if spec.grid == "log":
        return 2.0 ** ((math.ceil(16 * math.log2(largest)) - 127) / 16), 0
    if not spec.linear:
        return 1.0, 0
    if spec.symmetric:
        scale = largest / spec.qmax
        return (2.0 ** math.ceil(math.log2(scale)) if spec.grid == "power_of_two" else scale), 0
    scale = (high - low) / (spec.qmax - spec.qmin)
    return scale, spec.qmin - round(low / scale)


def toy(backend: Backend) -> Emitted:
    """What the writers of `backend` get for the toy network."""
    weight = encoding("conv0.weight", "weight", backend.weight)
    x = encoding("x", "activation", backend.activation)
    encodings = [x, weight, encoding("r0", "activation", backend.activation)]
    if isinstance(backend.bias, QuantSpec):
        encodings.insert(2, encoding("conv0.bias", "bias", backend.bias))
    elif backend.bias == "int32":
        spec = replace(QuantSpec(bits=32, signed=True, symmetric=True), axis=None if backend.weight.axis is None else 0)
        product = weight.scale.astype(float) * float(x.scale[0])
        encodings.insert(2, Encoding(tensor="conv0.bias", role="bias", spec=spec, scale=product, zero_point=[0] * len(product)))
    return Emitted(encodings=tuple(encodings), nodes=NODES, shapes=SHAPES, inputs=("x",), outputs=("r0",))
