"""The decision, before the graph is touched: which tensor gets which spec, which tensors share one encoding, and why.

Placement, in the order in which it is decided:

1. An op reads quantized inputs, or makes a quantized output, where its rule in the backend says so.
2. Between fused ops (conv2d + relu) there is no quantizer.
3. A residual add with `residual = "skip"` leaves the branch in float that ends in a fused convolution, and both that of a linear layer.
4. Ops that share (reshape, max pooling, concat ...) carry one encoding through; a need for it travels up to where the values arise.
   A pad with another number than 0 does not share.
5. A layer whose input is quantized has a quantized weight, and a bias as the backend says.
6. Where the backend widens the first and the last layer, the tensors that they read are widened as well.
7. Through a concat, ops whose range is fixed by their function keep an encoding of their own where the backend says so.
8. The tail is what lies behind the last layers. It is quantized like the rest, or stays in float: a concat of boxes and scores has one
   encoding, in which the smaller part is lost. A target that computes all in integers gets a file that ends before the first such
   concat, at `cuts`; what is behind, `host`, runs in float elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor, fx

from qdeploy.core.backend import Backend, OpRule
from qdeploy.core.errors import InputError, OptionError, unknown_name
from qdeploy.core.ops import COMPUTE, CONVOLUTION, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec, Role
from qdeploy.graph import query
from qdeploy.graph.channels import padding

_SINGULAR = frozenset({"log", "reciprocal"})
"""Ops that are infinite at 0, where a code may stand for a small number: a target that computes them in float reads floats."""
_BEYOND = 1e9
"""From here on a number is none to compute with: infinity, or what stands for it."""

_TAKES = frozenset({"slice", "select", "split", "index_select"})
"""Ops that take a part of a tensor."""
Tail = Literal["auto", "float", "quantized"]
"""What becomes of the tail: `auto` keeps it in float where a part of a concat would be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """The decision on one tensor.

    `spec` is None where it stays float. `group` names the tensor whose quantizer it uses. `readers` are the tensors made by the ops
    that see it quantized; `observe` is False where the values only pass through, and `seen` the tensor that its range is that of, where
    this is what max pooling leaves of it. For a bias, `scales_of` names its layer's input
    and weight. `average` is the kernel of an average pooling that the target does by multiplying and shifting, and its input.
    """

    tensor: str
    role: Role
    op: str
    spec: QuantSpec | None
    reason: str
    group: str = ""
    readers: tuple[str, ...] = ()
    observe: bool = True
    seen: str = ""
    scales_of: tuple[str, str] | None = None
    average: tuple[str, tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All decisions for one model and one backend, in the order of the graph.

    `tie_free` says whether every sum is one of integers that `ties` can keep off the ties of rounding: all grids are linear, and no op
    passes its result on in float to one whose result is quantized again, but to one that is fused with it. `share` is that of the
    multiply-accumulates whose operands are both quantized. `cuts` are the tensors where the target's file ends, and `host` those that
    are made from them elsewhere; both are empty where the file is whole.
    """

    backend: str
    tensors: tuple[TensorPlan, ...]
    tie_free: bool
    share: float
    cuts: tuple[str, ...] = ()
    host: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[TensorPlan, ...]:
        """Those with a spec: each of them must get an encoding."""
        return tuple(t for t in self.tensors if t.spec is not None)

    @property
    def following(self) -> dict[str, TensorPlan]:
        """The biases whose steps follow from the scales of their layer, by tensor."""
        return {t.tensor: t for t in self.tensors if t.scales_of is not None}

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Table rows: tensor, role, op, scheme, reason."""
        return [(t.tensor, t.role, t.op, t.spec.describe() if t.spec else "float", t.reason) for t in self.tensors]

    def __str__(self) -> str:
        rows = [("tensor", "role", "op", "scheme", "why"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        count = f"{len(self.quantized)} of {len(self.tensors)} tensors quantized, {100 * self.share:.1f} % of multiply-accumulates"
        ends = [f"the file ends at {', '.join(self.cuts)}; what is behind runs in float on the host"] if self.cuts else []
        return "\n".join([f"plan for {self.backend}: {count}", *lines, *ends])


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Bit widths that the user chose instead of the backend's."""

    weight: int | None = None
    activation: int | None = None
    first_last: int | None = None


def make_plan(module: fx.GraphModule, backend: Backend, widths: Widths | None = None, tail: Tail = "quantized") -> Plan:
    """The plan for a captured and folded graph; `OptionError` for bit widths that the backend has not.

    `tail` "auto" keeps parts of concats behind the last layers apart: all of the tail stays in float, or, where the target computes
    all in integers, what is behind such a concat. "float" keeps all of the tail in float everywhere.
    """
    return _Planner(module, backend, widths or Widths(), tail).plan()


def make_plans(module: fx.GraphModule, backend: Backend, widths: Widths, tail: Tail) -> tuple[Plan, Plan | None]:
    """The plan to begin with, and with `tail` "auto" the one to take where calibration shows that parts of concats differ, if any."""
    if tail != "auto":
        return make_plan(module, backend, widths, tail), None
    plan = make_plan(module, backend, widths)
    if not tail_concats(module):
        return plan, None
    try:
        other = make_plan(module, backend, widths, "auto")
    except OptionError:  # the tail cannot run apart
        return plan, None
    same = [replace(t, reason="") for t in plan.tensors] == [replace(t, reason="") for t in other.tensors]
    return plan, None if same else other


def check_tail(tail: str) -> Tail:
    """`tail` as one of the words; `OptionError` otherwise."""
    if tail not in get_args(Tail):
        raise unknown_name("tail", tail, get_args(Tail))
    found: Tail = tail  # type: ignore[assignment]
    return found


def tail_concats(module: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """The concats behind the last layers by the tensor that each makes, with the tensors that they put together."""
    found = {}
    for node in _tail([n for n in module.graph.nodes if n.op == "call_function"]):
        parts = [source for source in node.all_input_nodes if query.is_float(source)]
        if query.op_of(node).name == "concat" and query.is_float(node) and len(parts) > 1:
            found[query.tensor_name(node)] = tuple(query.tensor_name(part) for part in parts)
    return found


def _tail(calls: Iterable[fx.Node]) -> list[fx.Node]:
    """The `calls` that no layer or matrix product reads, directly or by others, and that are none themselves."""
    read: set[fx.Node] = set()
    tail = []
    for node in reversed(list(calls)):
        if query.op_of(node).kind == "compute" or any(user in read for user in node.users):
            read.add(node)
        else:
            tail.append(node)
    return tail[::-1]


class _Groups:
    """Union-find over nodes, the earliest node of a set being its root."""

    def __init__(self, order: dict[fx.Node, int]):
        self._parent = {node: node for node in order}
        self._order = order

    def root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        first, second = sorted((self.root(a), self.root(b)), key=self._order.__getitem__)
        self._parent[second] = first


class _Planner:
    def __init__(self, module: fx.GraphModule, backend: Backend, widths: Widths, tail: Tail):
        self.backend = backend
        self.widths = widths
        self.nodes = list(module.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.calls = [n for n in self.nodes if n.op == "call_function"]
        self.op = {n: query.op_of(n) for n in self.calls}
        self.floats = {n for n in self.nodes if query.is_float(n)}
        self.constants = {n: query.constants(n) for n in self.calls}
        self.outputs = set(query.outputs(module.graph))
        self.infinite = {n: n.meta["infinite"] for n in self.nodes if "infinite" in n.meta}
        self._check_infinite()
        shapes = {n: query.geometry(n) for n in self.calls}
        self.rule: dict[fx.Node, OpRule | None] = {n: self._rule(n, backend.rule(self.op[n].name, shapes[n])) for n in self.calls}
        self.data = {n: self._data_inputs(n) for n in self.calls}
        self.edges: dict[tuple[fx.Node, fx.Node], str] = {}
        self.made: dict[fx.Node, str] = {}
        self.notes: dict[fx.Node, str] = {}
        self.apart: set[fx.Node] = set()
        """Concats that do not share one encoding with all that they put together."""
        self.tail = self._float_tail(tail)
        self.head = self._float_head()
        for node in self.tail | self.head:
            self.rule[node] = None
        self.stays = self._staying()
        layers = [n for n in self.calls if self.op[n].weight is not None]
        self.ends = {layers[0], layers[-1]} if layers else set()

    def _rule(self, node: fx.Node, rule: OpRule | None) -> OpRule | None:
        """The backend's `rule` for `node`. A pad that adds a number has a range of its own: that of its input may end before it.

        What no encoding holds is there to lose against every maximum, and does so at the end of any range.
        """
        if rule is None or not rule.share or self.op[node].name != "pad" or not 0 < abs(padding(node)[1]) < _BEYOND:
            return rule
        return replace(rule, share=False, output=rule.output or rule.inputs)

    def plan(self) -> Plan:
        tails = self._fused_tails()
        for node in self.calls:
            self._demand(node, tails)
        self._spread()
        groups = self._groups()
        activation, ends = self._activation_specs()
        wide = {groups.root(s) for s, reader in self.edges if reader in self.ends} if ends != activation else set()
        tensors: list[TensorPlan] = []
        for node in self.nodes:
            if node in self.floats and node.op in ("placeholder", "call_function"):
                tensors.append(self._activation(node, groups, ends if groups.root(node) in wide else activation))
            elif node.op == "get_attr" and node in self.floats:
                tensors.extend(self._constant(node, activation))
        linear = all(t.spec is None or t.spec.linear for t in tensors)
        again = self._quantized_behind()
        tie_free = linear and not any(self._passed_on(node, again) for node in self.nodes)
        cuts = self._cuts() if self.backend.encodes_all else []
        return Plan(
            backend=self.backend.name,
            tensors=tuple(tensors),
            tie_free=tie_free,
            share=self._share(tensors),
            cuts=tuple(query.tensor_name(node) for node in cuts),
            host=tuple(query.tensor_name(node) for node in self.calls if node in self.tail) if cuts else (),
        )

    def _float_tail(self, tail: Tail) -> set[fx.Node]:
        """The calls behind the last layers that stay in float; an activation that is fused with a layer is a part of it."""
        if tail == "quantized" or not self.backend.activation.linear:
            return set()
        fused = self._fused_tails()
        ours = [n for n in _tail(self.calls) if n not in fused]
        if tail == "auto" and self.backend.encodes_all:
            found: set[fx.Node] = set()
            for node in ours:
                parts = [s for s in self.data[node] if s in self.floats]
                if (self.op[node].name == "concat" and len(parts) > 1) or any(s in found for s in node.all_input_nodes):
                    found.add(node)
            ours = [n for n in ours if n in found]
        self.notes.clear()
        return set(ours)

    def _float_head(self) -> set[fx.Node]:
        """What takes an input apart, where the target may do that in float: states of an LSTM may lie in one tensor, a thousand times
        as wide one as the other, and each part has an encoding of its own where it is read."""
        if self.backend.encodes_all or not self.backend.activation.linear:
            return set()
        found: set[fx.Node] = set()
        for given in self.nodes:
            if given.op != "placeholder" or given not in self.floats:
                continue
            moves: list[fx.Node] = []
            ahead = [*given.users]
            while ahead:
                node = ahead.pop()
                rule = self.rule.get(node)
                if rule is not None and rule.share and self.op[node].name in MOVE - {"concat", "pad"} and node not in moves:
                    moves.append(node)
                    ahead += node.users
            if sum(self.op[node].name in _TAKES for node in moves) > 1:
                found.update(moves)
        return found

    def _cuts(self) -> list[fx.Node]:
        """The tensors where the file of a target ends that computes all in integers."""
        found = []
        for node in self.nodes:
            if node.op == "get_attr" or node in self.tail or not any(user in self.tail for user in node.users):
                continue
            if isinstance(query.value(node), Tensor):
                found.append(node)
        whole = [n for n in found if n not in self.floats]
        if whole:
            what = f"the tail of the model cannot run apart from the rest on backend '{self.backend.name}'"
            names = ", ".join(query.tensor_name(n) for n in whole)
            raise OptionError(what, found=f"it reads {names}, which are no float tensors", action="choose --tail quantized")
        return found

    def _staying(self) -> set[fx.Node]:
        """The calls that the target computes in float by a rule, and those that only move data to such."""
        found: set[fx.Node] = set()
        for node in reversed(self.calls):
            rule = self.rule[node]
            if rule is None:
                continue
            alone = bool(node.users) and node not in self.outputs and all(user in found for user in node.users)
            if rule.stay_float or (rule.share and self.op[node].name != "concat" and alone):
                found.add(node)
        return found

    def _quantized_behind(self) -> set[fx.Node]:
        """The nodes behind which a tensor is quantized again."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if any(user in found or (node, user) in self.edges for user in node.users):
                found.add(node)
        return found

    def _share(self, tensors: Iterable[TensorPlan]) -> float:
        """Of multiply-accumulates with two quantized operands."""
        parameters = {one.tensor for one in tensors if one.spec is not None and one.role in ("weight", "constant")}
        done = total = 0
        for node in self.calls:
            macs = query.macs(node)
            bias = query.argument(node, self.op[node].bias)
            fetched = {n for n in node.all_input_nodes if n.op == "get_attr" and n in self.floats and n is not bias}
            stored = all(query.tensor_name(n) in parameters for n in fetched)
            operands = [source for source in self.data[node] if source.op != "get_attr"]
            total += macs
            done += macs * (stored and all((source, node) in self.edges for source in operands))
        return done / total if total else 1.0

    def _passed_on(self, node: fx.Node, again: set[fx.Node]) -> bool:
        """Whether another op reads what `node` makes in float, though the target does not compute the two as one, and it is quantized
        `again` behind that."""
        if node in self.notes or not query.is_float(node) or node.op not in ("placeholder", "call_function"):
            return False
        exact = self.head if node.op == "placeholder" or node in self.head else ()  # the values of an input, as they are given
        return any(u in again and query.is_float(u) and u not in exact and (node, u) not in self.edges for u in node.users)

    def _activation_specs(self) -> tuple[QuantSpec, QuantSpec]:
        """Specs of activations, and of those that the first and the last layer read."""
        backend, widths = self.backend, self.widths
        bits = backend.check_bits("activation", widths.activation) if widths.activation else backend.activation.bits
        ends = (
            bits if backend.first_last_bits is None else backend.check_bits("activation", widths.first_last or backend.first_last_bits)
        )
        return replace(backend.activation, bits=bits), replace(backend.activation, bits=ends)

    def _weight_bits(self, layer: fx.Node, spec: QuantSpec) -> int:
        """The width of a layer's weight, whose rule has `spec`."""
        backend, widths = self.backend, self.widths
        inner = backend.check_bits("weight", widths.weight) if widths.weight else spec.bits
        ends = widths.first_last or backend.first_last_bits
        return backend.check_bits("weight", ends) if ends and layer in self.ends else inner

    def _data_inputs(self, node: fx.Node) -> list[fx.Node]:
        constant = set(self.constants[node])
        if self.op[node].kind == "norm":
            constant |= {n for n in node.all_input_nodes if n.op == "get_attr"} - self._gains(node)
        constant |= self.infinite.keys()
        return [n for n in node.all_input_nodes if (n in self.floats or self._is_split(n)) and n not in constant]

    def _check_infinite(self) -> None:
        """`InputError` where the model means a number beyond all others, and the target computes every op with integers."""
        if not self.infinite or not any(rule.ops == EVERY and rule.inputs for rule in self.backend.rules):
            return
        node, number = next(iter(self.infinite.items()))
        raise InputError(
            f"tensor '{query.tensor_name(node)}' holds {number:g}, for which backend '{self.backend.name}' has no code",
            found="a model that reads it elsewhere than in a softmax, where a mask would do",
            action="write a number near the others' range in its place, or choose a target that computes some ops in float",
        )

    def _gains(self, norm: fx.Node) -> set[fx.Node]:
        """The scale and shift of a norm, where the target computes every op with integers; statistics are never quantized."""
        at = {"layer_norm": slice(2, 4), "group_norm": slice(2, 4), "instance_norm": slice(1, 3)}.get(self.op[norm].name)
        if at is None or not any(rule.ops == EVERY for rule in self.backend.rules):
            return set()
        return {argument for argument in norm.args[at] if isinstance(argument, fx.Node)}

    def _is_split(self, node: fx.Node) -> bool:
        """Whether `node` makes the tuple of parts of one tensor, through which an encoding is carried as through any share op."""
        return node in self.op and self.op[node].name == "split" and node not in self.floats

    def _fused_tails(self) -> dict[fx.Node, fx.Node]:
        """Tail node -> head node, for heads that nothing else reads."""
        tails: dict[fx.Node, fx.Node] = {}
        for node in self.calls:
            for head in self.data[node][:1]:
                alone = len(head.users) == 1 and head not in self.outputs
                if head.op == "call_function" and alone and self.backend.fuses(self.op[head].name, self.op[node].name):
                    tails[node] = head
                    self.notes[head] = f"fused: {self.op[head].name} + {self.op[node].name} are one op on the target"
        return tails

    def _demand(self, node: fx.Node, tails: dict[fx.Node, fx.Node]) -> None:
        head = tails.get(node)
        rule = self.rule[head] if head is not None else self.rule[node]
        if rule is None or node in self.stays:
            return
        name = f"{self.op[node].name} {query.tensor_name(node)}"
        if rule.inputs and head is None:
            skipped = self._float_branches(node)
            for source in self.data[node]:
                if source not in skipped:
                    self.edges.setdefault((source, node), f"input of {name}")
        fused_on = any(user in tails and tails[user] is node for user in node.users)
        if rule.output and query.is_float(node) and not fused_on:
            self._make(node, f"output of {self.op[head].name + ' + ' if head is not None else ''}{self.op[node].name}")

    def _make(self, node: fx.Node, reason: str) -> None:
        if node in self.infinite:
            return
        self.made.setdefault(node, reason)
        for user in node.users:
            alone = user in self.op and self.op[user].name in _SINGULAR and self.rule[user] is None and not self.backend.encodes_all
            if user not in self.stays and not alone:
                self.edges.setdefault((node, user), reason)

    def _float_branches(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a residual add that stay in float: the convolution before it, the last one in graph order, inside of which the
        target computes the add; both, where the last layer is no convolution, since then it computes the add in float."""
        if self.backend.residual != "skip" or self.op[node].name != "add" or len(self.data[node]) != 2:
            return []
        layers = [n for n in self.data[node] if n in self.op and self.op[n].name in COMPUTE and len(n.users) == 1]
        if not layers:
            return []
        branch = max(layers, key=self.order.__getitem__)
        if self.op[branch].name not in CONVOLUTION:
            return self.data[node]
        self.notes[branch] = f"fused: {self.op[branch].name} + residual add are one op on the target; only the skip branch is quantized"
        return [branch]

    def _spread(self) -> None:
        """Carry demands through the ops that share, against the order of the graph so that once is enough, then along it."""
        for node in reversed(self.calls):
            rule = self.rule[node]
            if rule is None or not rule.share or not any((node, user) in self.edges for user in node.users):
                continue
            self._part(node)
            for source in self.data[node]:
                self.edges.setdefault((source, node), f"carried by {self.op[node].name} to {query.tensor_name(node)}")
        for node in self.calls:
            rule = self.rule[node]
            if rule is not None and rule.share and rule.inputs and any((s, node) in self.edges for s in self.data[node]):
                self._make(node, f"{self.op[node].name} keeps the encoding of its input")

    def _groups(self) -> _Groups:
        groups = _Groups(self.order)
        for node in self.calls:
            rule = self.rule[node]
            if rule is None or not rule.share or not self._readers(node):
                continue
            for source in self._joined(node):
                groups.join(source, node)
        for node in self.calls:
            rule = self.rule[node]
            aligned = [s for s in self._moving(node) if (s, node) in self.edges] if rule is not None and rule.align else []
            for source in aligned[1:]:
                groups.join(aligned[0], source)
        return groups

    def _part(self, concat: fx.Node) -> None:
        """Remember a concat of outputs of fixed range and others."""
        sources = self._moving(concat)
        fixed = [self._fixed(source) for source in sources]
        if self.op[concat].name == "concat" and any(fixed) and (not all(fixed) or len(set(fixed)) > 1):
            self.apart.add(concat)

    def _joined(self, node: fx.Node) -> list[fx.Node]:
        """What shares one encoding with `node`."""
        return [s for s in self._moving(node) if node not in self.apart or not self._fixed(s)]

    def _fixed(self, node: fx.Node) -> str:
        """The op of fixed range that makes `node`, if others only move its values; else empty."""
        while node in self.op and (rule := self.rule[node]) is not None and rule.share and self.op[node].name != "concat":
            sources = self._moving(node)
            if len(sources) != 1:
                return ""
            node = sources[0]
        name = self.op[node].name if node in self.op else ""
        return name if name in self.backend.fixed_range else ""

    def _moving(self, node: fx.Node) -> list[fx.Node]:
        """The data inputs that are no parameters: a constant has an encoding of its own wherever it is read."""
        return [source for source in self.data[node] if source.op != "get_attr"]

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if (node, user) in self.edges]

    def _activation(self, node: fx.Node, groups: _Groups, spec: QuantSpec) -> TensorPlan:
        readers = self._readers(node)
        op = self.op[node].name if node in self.op else "input"
        plan = TensorPlan(tensor=query.tensor_name(node), role="activation", op=op, spec=None, reason=self._float_reason(node))
        if not readers:
            return plan
        root = groups.root(node)
        rule = self.rule.get(node)
        carried = (
            rule is not None and rule.share and node not in self.apart and any((s, node) in self.edges for s in self._moving(node))
        )
        reason = self.made.get(node) or self.edges[node, readers[0]]
        if root is not node:
            reason = f"shares the encoding of {query.tensor_name(root)}: {reason}"
        return replace(
            plan,
            spec=spec,
            reason=reason,
            group=query.tensor_name(root),
            readers=tuple(query.reader_name(r) for r in readers),
            observe=not carried,
            seen="" if carried else self._pooled_max(node),
            average=self._average(node),
        )

    def _pooled_max(self, node: fx.Node) -> str:
        """The tensor that max pooling makes of `node`, where nothing else reads it: what lies below its range may be clipped before."""
        found, last = "", node
        while len(last.users) == 1 and last not in self.outputs:
            (user,) = last.users
            rule = self.rule.get(user)
            if rule is None or not rule.share or self.op[user].name not in MAX_POOL | {"pad"} or not query.is_float(user):
                break
            last = user
            found = query.tensor_name(user) if self.op[user].name in MAX_POOL else found
        return found

    def _average(self, node: fx.Node) -> tuple[str, tuple[int, int]] | None:
        """The quantized input and the kernel of an average pooling that the target does not divide exactly."""
        if self.backend.average == "exact" or node not in self.op:
            return None
        kernel = query.pooled(node)
        source = next((s for s in self.data[node] if (s, node) in self.edges), None)
        if kernel is None or source is None or len(kernel) > 2:
            return None
        return query.tensor_name(source), (kernel[0], kernel[-1] if len(kernel) > 1 else 1)

    def _float_reason(self, node: fx.Node) -> str:
        if node in self.notes:
            return self.notes[node]
        if node in self.infinite:
            return f"float: it holds {self.infinite[node]:g}, for which there is no code"
        if node in self.head or any(user in self.head for user in node.users):
            return "float: taken apart first, so that each part has an encoding of its own"
        if node in self.tail:
            return "float: behind the last layers, where one encoding would lose a part"
        readers = ", ".join(sorted({self.op[u].name if u in self.op else "the output" for u in node.users}))
        return f"float: {self.backend.name} does not quantize what {readers} reads here"

    def _constant(self, node: fx.Node, activation: QuantSpec) -> Iterable[TensorPlan]:
        """Plans of a parameter: as a weight, as a bias, or as an operand."""
        path = query.tensor_name(node)
        for user in node.users:
            if user not in self.op:
                continue
            op = self.op[user]
            if query.argument(user, op.weight) is node:
                yield self._weight(node, user)
                return
            if query.argument(user, op.bias) is node:
                yield self._bias(node, user)
                return
        readers = self._readers(node)
        plan = TensorPlan(tensor=path, role="constant", op="constant", spec=None, reason=self._float_reason(node))
        if readers:
            reason = self.edges[node, readers[0]]
            names = tuple(query.tensor_name(r) for r in readers)
            plan = replace(plan, spec=activation, reason=reason, group=path, readers=names)
        yield plan

    def _layer_input(self, layer: fx.Node) -> fx.Node | None:
        """The quantized input of a layer, if the target computes it with quantized ones."""
        rule = self.rule[layer]
        if rule is None or not rule.inputs:
            return None
        return next((s for s in self.data[layer] if (s, layer) in self.edges), None)

    def _weight(self, node: fx.Node, layer: fx.Node) -> TensorPlan:
        op, rule = self.op[layer], self.rule[layer]
        path = query.tensor_name(node)
        plan = TensorPlan(
            tensor=path, role="weight", op=op.name, spec=None, reason=f"float: {self.backend.name} computes {op.name} in float"
        )
        if rule is None or self._layer_input(layer) is None:
            return plan
        spec = rule.weight or self.backend.weight
        spec = replace(spec, bits=self._weight_bits(layer, spec), axis=None if spec.axis is None else op.channel_axis)
        reason = f"weight of {op.name} {query.tensor_name(layer)}"
        return replace(plan, spec=spec, reason=reason, group=path, readers=tuple(query.tensor_name(u) for u in node.users))

    def _bias(self, node: fx.Node, layer: fx.Node) -> TensorPlan:
        path, op = query.tensor_name(node), self.op[layer]
        source, weight = self._layer_input(layer), query.argument(layer, op.weight)
        plan = TensorPlan(tensor=path, role="bias", op=op.name, spec=None, reason=f"float: {self.backend.name} adds biases in float")
        if source is None or weight is None or weight.op != "get_attr":
            return replace(plan, reason=f"float: {self.backend.name} computes {op.name} in float")
        scales = (query.tensor_name(source), query.tensor_name(weight))
        per_channel = self._weight(weight, layer).spec
        assert per_channel is not None and isinstance(query.value(node), Tensor)
        axis = None if per_channel.axis is None else 0
        quantized = replace(plan, group=path, readers=(query.tensor_name(layer),))
        if isinstance(self.backend.bias, QuantSpec):
            own = self.backend.bias
            return replace(quantized, spec=own, reason=f"{own.describe()}, with a range of its own")
        activation = self.backend.activation
        if not (per_channel.linear and activation.linear):
            return plan
        if self.backend.bias == "float":
            return replace(plan, scales_of=scales)
        grid = per_channel.grid if per_channel.grid == activation.grid else "uniform"
        spec = QuantSpec(bits=32, signed=True, symmetric=True, axis=axis, grid=grid)
        return replace(
            quantized, spec=spec, reason="int32 at input scale x weight scale, as it is added to the accumulator", scales_of=scales
        )
