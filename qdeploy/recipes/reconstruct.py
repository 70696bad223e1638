"""Block reconstruction: learn the rounding of a unit's weights, its steps and its biases, so that its outputs become the float ones.

One engine for AdaRound (Nagel et al. 2020), BRECQ (Li et al. 2021), QDrop (Wei et al. 2022) and Genie (Jeon et al. 2023): they differ
in the unit, a layer or a block, and in `Settings`. `learned_rounding` has the formulas of what is learned. The loss of a unit with
outputs z, computed with inputs from the quantized layers before it, and float outputs z*:

    mean over samples and places of the sum over channels of g (z - z*)^2,   + regularizer * power * R

g is the importance, such as the diagonal of the Fisher matrix, or 1. The power is the first term with z = 0, so that one regularizer
suits outputs of all sizes. R starts after the warm-up, and its beta falls linearly. Every element of an input is, with probability
1 - `keep`, the float network's; and every element at a quantizer is let through as it is with that probability: minima that are flat
in the noise of activations are found (Wei et al. 2022, section 4).

Rates are those for about 2000 iterations, ten times fewer than in the papers, and up to ten times as high. Biases are learned too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qdeploy.graph import query
from qdeploy.numerics.learned_rounding import LearnedRounding, RandomDrop, step_quantize
from qdeploy.numerics.quantizer import Quantizer

PROGRESS_EVERY = 50
STEPS_EVERY = 8
"""Iterations from one update of activation steps to the next: the first one of a unit takes a convolution more."""
ECHOES = 2
"""Iterations in a row with the same samples, mixed and dropped anew: fetching them takes time (Choi et al. 2019, data echoing)."""


class Store(Protocol):
    """The values of one tensor for all samples: `[n, ...]` float32 for n indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a unit is reconstructed. Rates are Adam's; those of steps are relative to the step, that of biases to the outputs.

    `keep` is the probability that an activation is quantized while learning: 1 is AdaRound with quantized inputs, 0 is BRECQ, whose
    weights see float activations; there, steps of activations are not learned. Without `learn_rounding` they alone are.
    """

    iterations: int = 2000
    batch: int = 32
    keep: float = 0.5
    learn_rounding: bool = True
    learn_activation_steps: bool = True
    learn_weight_steps: bool = True
    learn_bias: bool = True
    rounding_rate: float = 1e-2
    weight_step_rate: float = 3e-4
    activation_step_rate: float = 2e-3
    bias_rate: float = 1e-3
    regularizer: float = 5e-4
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0


_Data = tuple[Sequence[Store], Sequence[Store], Sequence[Store], Sequence[Store]]
"""Inputs of the quantized and the float network, targets and importance; empty where there are none."""
LossProgress = Callable[[int, float], None]


def _no_progress(iteration: int, loss: float) -> None:
    pass


def reconstruct(
    unit: fx.GraphModule,
    inputs: Sequence[Store],
    float_inputs: Sequence[Store],
    targets: Sequence[Store],
    settings: Settings,
    seed: int,
    importance: Sequence[Store] | None = None,
    progress: LossProgress = _no_progress,
    fixed: Collection[Quantizer] = (),
) -> dict[str, Tensor]:
    """Learn the numbers of `unit`, whose placeholders take `inputs` and whose outputs should be `targets`; leave it with them.

    `inputs` are what the quantized layers before the unit make, `float_inputs` what the float network has there, and `importance`
    weighs the squared errors of each target. All have the same samples. `progress` is told the loss every 50 iterations. What
    quantizers of `fixed` do stays as it is: other units share them.

    Returns all that changed, for `apply`: weights on their grid, scales, and biases as they are in float. Nothing is learned in a unit
    without quantized weights, other than steps of its activations.
    """
    generator = torch.Generator().manual_seed(seed)
    learned = _Learned(unit, settings, RandomDrop(settings.keep, generator), fixed)
    if not learned.anything:
        apply(unit, {})
        return {}
    data = inputs, float_inputs if settings.keep < 1 else (), targets, importance or ()
    rounds = -(-settings.iterations // ECHOES)
    order = torch.randint(len(targets[0]), (rounds, settings.batch), generator=generator)
    learned.attach()
    try:
        _learn(unit, learned, data, order, settings, progress)
    finally:
        learned.detach()
    changed = learned.result()
    apply(unit, changed)
    return changed


def apply(unit: fx.GraphModule, changed: Mapping[str, Tensor]) -> None:
    """Give `unit` the numbers that `reconstruct` returned."""
    quantizers = _quantizers(unit)
    for key, value in changed.items():
        kind, _, path = key.partition(":")
        if kind == "scale":
            quantizers[path].set(value.clone(), quantizers[path].zero_point)
        else:
            with torch.no_grad():
                query.parameter(unit, path).copy_(value)
    for quantizer in quantizers.values():
        quantizer.mode = "quantize"


def _quantizers(unit: fx.GraphModule) -> dict[str, Quantizer]:
    """The quantizers that the unit calls, by path."""
    called = {str(node.target): unit.get_submodule(str(node.target)) for node in unit.graph.find_nodes(op="call_module")}
    return {path: module for path, module in called.items() if isinstance(module, Quantizer)}


def _learn(unit: fx.GraphModule, learned: _Learned, data: _Data, order: Tensor, settings: Settings, progress: LossProgress) -> None:
    batch = _Batch(data, order[0], settings.keep)
    power, size = batch.power()
    optimizers = [torch.optim.Adam(groups, fused=True) for groups in learned.groups(size)]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for iteration in range(settings.iterations):
        share = iteration / settings.iterations
        if iteration % ECHOES == 0 and iteration:
            batch = _Batch(data, order[iteration // ECHOES], settings.keep)
        with_steps = iteration % learned.steps_every == 0
        learned.refresh(with_steps)
        made = unit(*batch.inputs(learned.chance))
        made = made if isinstance(made, (tuple, list)) else (made,)
        reported = iteration % PROGRESS_EVERY == 0
        loss, slopes = batch.loss(made, reported)
        leaves = learned.leaves(with_steps)
        reached = [position for position, output in enumerate(made) if output.requires_grad]
        ends, starts = ([tensors[position] for position in reached] for tensors in (made, slopes))
        gradients = torch.autograd.grad(ends, leaves, starts, allow_unused=True)
        late = max(0.0, share - settings.warmup) / (1 - settings.warmup)
        beta = settings.beta_start + (settings.beta_end - settings.beta_start) * late
        learned.backward(gradients, settings.regularizer * power if late else 0.0, beta)
        for optimizer, fastest in zip(optimizers[: 1 + with_steps], rates, strict=False):
            for group, rate in zip(optimizer.param_groups, fastest, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2 if group["decays"] else rate
            optimizer.step()
        if reported:
            progress(iteration, float(loss))


class _Batch:
    """Some samples of what enters a unit and should leave it; images are laid out channels_last, which convolves faster."""

    def __init__(self, data: _Data, which: Tensor, keep: float):
        quantized, exact, targets, importance = ([_take(store, which) for store in stores] for stores in data)
        self._inputs = [(x, None) for x in quantized] if keep >= 1 else list(zip(quantized, exact, strict=True))
        weights: Sequence[Tensor | None] = importance or [None] * len(targets)
        self._targets = list(zip(targets, weights, strict=True))

    def inputs(self, chance: RandomDrop) -> list[Tensor]:
        """What enters, mixed anew."""
        return [x if exact is None else chance.mix(exact, x) for x, exact in self._inputs]

    @torch.no_grad()
    def loss(self, made: Sequence[Tensor], reported: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The loss, if it is `reported`, and its gradients by the outputs `made`."""
        loss, slopes = torch.zeros(()), []
        for output, (target, importance) in zip(made, self._targets, strict=True):
            error = output - target
            weighted = error if importance is None else error * importance
            factor = output.shape[1] / output.numel()
            if reported:
                loss += factor * (error * weighted).sum()
            slopes.append(weighted.mul_(2 * factor))
        return loss, slopes

    def power(self) -> tuple[float, float]:
        """The loss of outputs that are 0, and the root of the mean square of the targets."""
        loss, _ = self.loss([torch.zeros_like(target) for target, _ in self._targets])
        values = torch.cat([target.flatten() for target, _ in self._targets])
        return float(loss), float(values.double().square().mean().sqrt())


def _take(store: Store, which: Tensor) -> Tensor:
    if isinstance(store, Tensor) and store.dim() == 4:
        return store.permute(0, 2, 3, 1).index_select(0, which).permute(0, 3, 1, 2)
    x = store[which]
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


class _Learned:
    """What is learned in a unit, and the hooks that put it into the unit's quantizers meanwhile."""

    def __init__(self, unit: fx.GraphModule, settings: Settings, chance: RandomDrop, fixed: Collection[Quantizer]):
        self._settings, self.chance = settings, chance
        self._quantizers = _quantizers(unit)
        free = {path: quantizer for path, quantizer in self._quantizers.items() if quantizer not in fixed}
        self._weights = _rounded(unit, free) if settings.learn_rounding else {}
        self._steps = [path for path, quantizer in free.items() if self._learns(quantizer)]
        self.anything = bool(self._weights or self._steps)
        self.steps_every = STEPS_EVERY if self._weights else 1
        rounded = [self._quantizers[path] for path in self._weights]
        weights = [query.parameter(unit, path) for path in self._weights.values()]
        self._rounding = LearnedRounding(weights, [(q.scale, q.zero_point, q.spec) for q in rounded])
        paths = _biases(unit, set(self._weights)) if settings.learn_bias else []
        self._biases = {path: query.parameter(unit, path) for path in paths}
        self._trained = {path: bias.requires_grad for path, bias in self._biases.items()}
        self._log_steps = torch.zeros(len(self._steps))
        self._log_steps.grad = torch.zeros_like(self._log_steps)
        self._step_leaves = [step.detach() for step in self._log_steps.unbind()]
        self._starts = torch.cat([torch.empty(0), *(self._quantizers[path].scale for path in self._steps)])
        self._scales: Sequence[Tensor] = self._starts.unbind()
        self._leaves = [*self._rounding.soft, *self._biases.values()]

    def _learns(self, quantizer: Quantizer) -> bool:
        wanted = self._settings.learn_activation_steps and self._settings.keep > 0
        return wanted and quantizer.role == "activation" and quantizer.spec.grid == "uniform" and quantizer.spec.axis is None

    def groups(self, size: float) -> list[list[dict[str, Any]]]:
        """The parameters for two optimizers, the second for steps of activations; the rates of those with `decays` fall.

        `size` is that of the unit's outputs.
        """
        s = self._settings
        always: list[dict[str, Any]] = [
            {"params": [self._rounding.logits], "lr": s.rounding_rate, "decays": False},
            {"params": [self._rounding.log_steps], "lr": s.weight_step_rate * s.learn_weight_steps, "decays": True},
            {"params": list(self._biases.values()), "lr": s.bias_rate * size, "decays": True},
        ]
        return [always, [{"params": [self._log_steps], "lr": s.activation_step_rate, "decays": True}]]

    def attach(self) -> None:
        """Put the hooks in."""
        for path, leaf in zip(self._weights, self._rounding.soft, strict=True):
            self._quantizers[path].learned = partial(_constant, leaf)
        for position, path in enumerate(self._steps):
            self._quantizers[path].learned = partial(self._step, self._quantizers[path], position)
        for quantizer in self._quantizers.values():
            quantizer.mode = "quantize"
            if quantizer.role == "bias" or (quantizer.role == "activation" and self._settings.keep <= 0):
                quantizer.learned = _same
            elif quantizer.role == "activation" and quantizer.learned is None:
                quantizer.learned = partial(self._fixed, quantizer)
        for bias in self._biases.values():
            bias.requires_grad_()

    def detach(self) -> None:
        """Take the hooks out."""
        for quantizer in self._quantizers.values():
            quantizer.learned = None
        for path, bias in self._biases.items():
            bias.grad = None
            bias.requires_grad_(self._trained[path])

    def _step(self, quantizer: Quantizer, position: int, x: Tensor) -> Tensor:
        leaf, scale = self._step_leaves[position], self._scales[position]
        return step_quantize(x, leaf, scale, int(quantizer.zero_point), quantizer.spec, self.chance)

    def _fixed(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        mask = self.chance.mix(torch.zeros_like(x), torch.ones_like(x))
        return torch.lerp(x, quantizer.quantize(x), mask)

    def leaves(self, with_steps: bool) -> list[Tensor]:
        """What `backward` takes the gradients of."""
        return [*self._leaves, *self._step_leaves] if with_steps else self._leaves

    @torch.no_grad()
    def refresh(self, with_steps: bool) -> None:
        """Make what the hooks give from the parameters; steps have gradients only if asked for."""
        self._rounding.refresh()
        for leaf in self._step_leaves:
            leaf.requires_grad_(with_steps)
        self._scales = (self._starts * self._log_steps.exp()).unbind()

    @torch.no_grad()
    def backward(self, gradients: Sequence[Tensor | None], strength: float, beta: float) -> None:
        """Set the gradients of the parameters from those of the `leaves`."""
        leaves = self.leaves(len(gradients) > len(self._leaves))
        found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
        weights, fixed = len(self._weights), len(self._leaves)
        self._rounding.backward(found[:weights], strength, beta)
        for bias, gradient in zip(self._biases.values(), found[weights:fixed], strict=True):
            bias.grad = gradient
        if found[fixed:]:
            self._log_steps.grad = torch.stack(found[fixed:])

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """All numbers as they are learned."""
        self.refresh(False)
        made = {f"weight:{path}": w for path, w in zip(self._weights.values(), self._rounding.harden(), strict=True)}
        made |= {f"scale:{path}": scale for path, scale in zip(self._weights, self._rounding.scales(), strict=True)}
        made |= {f"scale:{path}": scale.reshape(1) for path, scale in zip(self._steps, self._scales, strict=True)}
        return made | {f"bias:{path}": bias.detach().clone() for path, bias in self._biases.items()}


def _constant(leaf: Tensor, x: Tensor) -> Tensor:
    return leaf


def _same(x: Tensor) -> Tensor:
    return x


def _rounded(unit: fx.GraphModule, quantizers: Mapping[str, Quantizer]) -> dict[str, str]:
    """The paths of the quantizers whose weights are rounded anew, with those of the weights."""
    found: dict[str, str] = {}
    for node in unit.graph.find_nodes(op="call_module"):
        quantizer, source = quantizers.get(str(node.target)), node.args[0]
        fits = quantizer is not None and quantizer.role == "weight" and quantizer.spec.linear
        if fits and isinstance(source, fx.Node) and source.op == "get_attr":
            assert found.setdefault(str(node.target), str(source.target)) == str(source.target)
    return found


def _biases(unit: fx.GraphModule, weights: Collection[str]) -> list[str]:
    """The paths of the biases of all layers whose weight quantizers are among `weights`."""
    found: dict[str, None] = {}
    for node in unit.graph.nodes:
        op = query.op_of(node)
        weight, bias = (query.argument(node, position) for position in (op.weight, op.bias))
        if node.op != "call_function" or weight is None or bias is None or str(weight.target) not in weights:
            continue
        source = bias.args[0] if bias.op == "call_module" else bias
        if isinstance(source, fx.Node) and source.op == "get_attr":
            found[str(source.target)] = None
    return list(found)
