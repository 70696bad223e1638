"""A model with its quantizers in place: call it to run the simulation, train it for QAT, convert it when calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qdeploy.capture.capture import Captured
from qdeploy.capture.inputs import Batch, checked, ordered
from qdeploy.core.backend import Backend
from qdeploy.core.errors import InputError
from qdeploy.core.recipe import Recipe
from qdeploy.core.spec import Encoding
from qdeploy.graph import edit, query
from qdeploy.numerics.observer import Observer
from qdeploy.numerics.quantizer import Mode, Quantizer
from qdeploy.simulation.insert import MakeObserver, Numbers, freeze, insert_quantizers, make_consistent
from qdeploy.simulation.plan import Plan

BATCH = 64
"""Samples at once, where the batch may vary."""
REFERENCE_SAMPLES = 64
REFERENCE_BYTES = 16 * 2**20
"""How much of the calibration data is kept to be written with the artifact, as the proof's own inputs."""


class Prepared(nn.Module):
    """The captured graph of one model for one backend, with one `Quantizer` per encoding.

    Before calibration a call computes in float; afterwards it computes the simulation. The output has the structure of the user's
    model. `print(prepared.plan)` explains every tensor.
    """

    def __init__(
        self,
        captured: Captured,
        module: fx.GraphModule,
        plan: Plan,
        backend: Backend,
        recipe: Recipe,
        seed: int,
        quantizers: dict[str, Quantizer],
        alternative: Plan | None = None,
    ):
        super().__init__()
        self.module = module
        self.captured = captured
        self.plan = plan
        self.backend = backend
        self.recipe = recipe
        self.seed = seed
        self.quantizers = quantizers
        self.observers: Mapping[str, Observer] = {}
        """What was seen of each group of activations, while the steps run."""
        self.following = plan.following
        self.alternative = alternative
        """Another plan, to take where calibration shows that this one loses a part of a concat behind the last layers."""
        self.notes: list[str] = []
        """What the user should know of what calibration has found."""
        self._floating = [captured.module]  # in a list, it is no part of the simulation
        self.chosen: dict[Quantizer, Numbers] = {}
        self.biases: dict[str, Tensor] = {}
        """Scales as they were chosen, and float biases: what `insert.make_consistent` makes all numbers from."""
        self.log: list[dict[str, Any]] = []
        """What the steps of the recipe did, in their order."""
        self.calibrated = False
        self.samples_seen = 0
        self.reference: list[tuple[Tensor, ...]] = []

    @property
    def floating(self) -> fx.GraphModule:
        """The float graph with the parameters that are quantized; steps such as equalization change them, not what it computes."""
        return self._floating[0]

    def set_floating(self, module: fx.GraphModule) -> None:
        """Take `module` for the float graph."""
        self._floating = [module]

    def take_plan(self, plan: Plan) -> None:
        """Go by another plan, with new quantizers, before they have any numbers."""
        self.plan, self.following = plan, plan.following
        self.module = edit.copy(self.captured.module, own_parameters=True)
        self.quantizers = insert_quantizers(self.module, plan)

    def take_parameters(self) -> None:
        """Give the simulation the parameters of its float graph."""
        with torch.no_grad():
            for node in self.floating.graph.find_nodes(op="get_attr"):
                path = str(node.target)
                query.parameter(self.module, path).copy_(query.parameter(self.floating, path))

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        """The simulation on a batch of inputs, by place or by name, or the float model before calibration."""
        if named:
            names = [spec.name for spec in self.captured.inputs]
            inputs = ordered(dict(zip(names, inputs, strict=False)) | named, names)
        return self.module(*inputs)

    def train(self, mode: bool = True) -> Prepared:
        """Set the flag only: the captured graph is that of inference, and computes the same in both modes."""
        self.training = mode
        return self

    def flat(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """All output tensors in the order of the emitted ONNX, without gradients."""
        with torch.no_grad():
            return [t for t in pytree.tree_leaves(self(*inputs)) if isinstance(t, Tensor)]

    def warnings(self, reference: Mapping[str, NDArray[Any]]) -> list[str]:
        """What the user should know of the outputs in `reference`: where inf or NaN begin in the simulation."""
        if all(np.isfinite(array).all() for name, array in reference.items() if name.startswith("simulated.")):
            return []
        watched = _Watched(self.module)
        for batch in self.reference:
            with torch.no_grad(), suppress(FloatingPointError):
                watched.run(*batch)
        return [f"the simulation makes inf or NaN, first in {watched.found}; a divisor may have been rounded to zero"]

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """Run all quantizers in `mode` within the block."""
        before = {quantizer: quantizer.mode for quantizer in self.quantizers.values()}
        self.set_mode(mode)
        try:
            yield
        finally:
            for quantizer, old in before.items():
                quantizer.mode = old

    def freeze(self, seen: Mapping[str, Observer], make_observer: MakeObserver) -> None:
        """Fix all numbers by what was `seen` of each group, and run the simulation from now on."""
        self.chosen, self.biases = freeze(self.module, self.plan, self.quantizers, seen, make_observer)
        self.make_consistent()
        self.set_mode("quantize")

    def make_consistent(self) -> None:
        """Make all numbers fit each other again, after chosen scales or biases have changed."""
        make_consistent(self.module, self.plan, self.quantizers, self.chosen, self.biases)

    def check_scales(self) -> None:
        """`InputError` for a tensor whose numbers are so large or so small that float32 has no scale for them."""
        for tensor in self.plan.quantized:
            scale = self.quantizers[tensor.tensor].scale
            if not bool((scale.isfinite() & (scale > 0)).all()):
                action = "check the model in float: its weights, biases and batch norms"
                raise InputError(f"no scale in float32 fits the numbers of tensor '{tensor.tensor}'", action=action)

    @property
    def batch_size(self) -> int:
        """How many samples are computed at once."""
        return BATCH if self.captured.dynamic_batch else self.captured.inputs[0].shape[0] or BATCH

    def set_mode(self, mode: Mode) -> None:
        """Run all quantizers in `mode` from now on."""
        for quantizer in self.quantizers.values():
            quantizer.mode = mode

    def encodings(self) -> tuple[Encoding, ...]:
        """One per planned tensor, in the order of the plan."""
        assert self.calibrated
        return tuple(self.quantizers[planned.tensor].encoding(planned.tensor) for planned in self.plan.quantized)

    def batch(self, item: Batch) -> tuple[Tensor, ...]:
        """The tensors of a batch in the order of the model's inputs; `InputError` unless they fit these."""
        return checked(item, self.captured.inputs)

    def remember(self, batch: Sequence[Tensor]) -> None:
        """Keep samples of `batch` for the artifact, up to the limits, and all of one size."""
        if self.reference and any(t.shape[1:] != kept.shape[1:] for t, kept in zip(batch, self.reference[0], strict=True)):
            return
        have = sum(len(kept[0]) for kept in self.reference)
        size = max(1, sum(t[:1].numel() * t.element_size() for t in batch))
        unit = 1 if self.captured.dynamic_batch else self.batch_size
        room = min(REFERENCE_SAMPLES, max(1, REFERENCE_BYTES // size)) - have
        room = max(room // unit, 0 if have else 1) * unit
        if room > 0:
            self.reference.append(tuple(t[:room].detach().clone() for t in batch))


class _Watched(fx.Interpreter):
    """Runs a graph up to the first floating-point tensor that holds inf or NaN; `FloatingPointError` there."""

    found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor) and made.is_floating_point() and not bool(made.isfinite().all()):
            self.found = f"'{query.tensor_name(n)}' ({query.op_of(n).name})"
            raise FloatingPointError
        return made
