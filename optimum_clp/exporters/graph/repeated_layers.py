"""A graph of all layers from a graph of some: what was traced of one layer of each kind, again with the others' weights.

What comes out is the graph that a trace of all layers gives, node by node. It is not believed but looked at: the second and the last layer of a
kind must be the same nodes over what they share, and hand on one value; a model whose layers are not is traced whole.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from ...runtime.names import cache_names
from ..layer_kinds import ShortModel
from .file import stored_tensor

_SCOPES = "pkg.torch.onnx.name_scopes"
# larger constants than these are not made one where a graph is simplified
_LARGEST_CONSTANT = 1024


class NotRepeatable(Exception):
    """Layers are not the same nodes over other weights, and how they differ."""


@dataclass
class _Block:
    """The nodes of one traced layer, in order, as they were before any layer was put in.

    Args:
        index (`int`): Of the layer in the short model.
        nodes (`list[Node]`): Its nodes.

    Attributes:
        inputs (`list[tuple[Value | None, ...]]`): What goes into each node.
        places (`dict[int, tuple[int, int]]`): By a value's `id`: which node of the block puts it out, and as which output.
        given (`list[Value]`): What nodes behind the layer take from it.
    """

    index: int
    nodes: list[ir.Node]
    inputs: list[tuple[ir.Value | None, ...]] = field(init=False)
    places: dict[int, tuple[int, int]] = field(init=False)
    given: list[ir.Value] = field(init=False)

    def __post_init__(self) -> None:
        outputs = [(n, k, value) for n, node in enumerate(self.nodes) for k, value in enumerate(node.outputs)]
        own = set(map(id, self.nodes))
        self.inputs = [tuple(node.inputs) for node in self.nodes]
        self.places = {id(value): (n, k) for n, k, value in outputs}
        self.given = [value for _, _, value in outputs if any(id(use.node) not in own for use in value.uses())]

    def handed_on(self) -> ir.Value:
        """The one value that nodes behind the layer take from it."""
        if len(self.given) != 1:
            raise NotRepeatable(f"layer {self.index} hands on {len(self.given)} values")
        return self.given[0]


class _Tensors:
    """The tensors of a traced model by what an initializer stores, and their counterparts in the whole model."""

    def __init__(self, short: nn.Module, whole: nn.Module, path: str):
        self.prefix = f"{path}."
        self.whole = _named_tensors(whole)
        self.names: dict[tuple, list[str]] = {}
        for name, tensor in _named_tensors(short).items():
            self.names.setdefault(_place(tensor), []).append(name)

    def own(self, value: ir.Value, index: int) -> str | None:
        """Name within layer `index` of the tensor that an initializer stores, if it is one of that layer's."""
        raw = getattr(stored_tensor(value), "raw", None)
        start = f"{self.prefix}{index}."
        names = self.names.get(_place(raw), ()) if isinstance(raw, Tensor) else ()
        return next((name.removeprefix(start) for name in names if name.startswith(start)), None)

    def counterpart(self, name: str, layer: int) -> Tensor:
        """The tensor of that name in a layer of the whole model."""
        found = self.whole.get(f"{self.prefix}{layer}.{name}")
        if found is None:
            raise NotRepeatable(f"layer {layer} has no {name}")
        return found


class _Repeater:
    def __init__(self, graph: ir.Model, short: ShortModel, whole: nn.Module, prefix: str):
        self.graph, self.short, self.prefix = graph.graph, short, prefix
        self.tensors = _Tensors(short.model, whole, short.path)
        self.blocks, self.rest = _blocks(self.graph, f"{prefix}{short.path}", len(short.traced))
        self.stored = {_place(raw): value for value, raw in _stored(self.graph)}
        self.inputs = {value.name: value for value in self.graph.inputs}
        self.outputs = {value.name: value for value in self.graph.outputs}

    def repeat(self) -> None:
        traced, kinds = self.short.traced, self.short.kinds
        places = {layer: place for place, layer in enumerate(traced)}
        self._check_caches()
        templates = {kind: self._template(kind) for kind in set(kinds) if self._is_repeated(kind)}
        self._check_neighbours({template.index for template, _ in templates.values()})
        made: dict[int, tuple[ir.Value, ...]] = {}
        # of the layer before, where that was put in; the first layer of a kind is always traced
        handed_on: ir.Value | None = None
        end = self.blocks[0].nodes[-1]
        for layer, kind in enumerate(kinds):
            if layer in places:
                block = self.blocks[places[layer]]
                if handed_on is not None:
                    _take_instead(block, self.blocks[block.index - 1].handed_on(), handed_on)
                handed_on, end = None, block.nodes[-1]
                continue
            template, taken = templates[kind]
            before = self.blocks[places[layer - 1]].handed_on() if handed_on is None else handed_on
            copied, made[layer] = self._copy(template, layer, taken, before)
            self.graph.insert_after(end, copied)
            number, output = template.places[id(template.handed_on())]
            handed_on, end = copied[number].outputs[output], copied[-1]
        self._rename(made)

    def _is_repeated(self, kind: int) -> bool:
        return any(k == kind and layer not in self.short.traced for layer, k in enumerate(self.short.kinds))

    def _template(self, kind: int) -> tuple[_Block, ir.Value]:
        """The second layer of a kind, which must be the last one's equal; and the value that it takes from the one before."""
        members = [
            b for b, layer in zip(self.blocks, self.short.traced, strict=True) if self.short.kinds[layer] == kind
        ]
        template, last = members[1:]
        taken = _Comparison(template, last, self.tensors, self.inputs, self.blocks).taken()
        if template.places[id(template.handed_on())] != last.places[id(last.handed_on())]:
            raise NotRepeatable(f"layers {template.index} and {last.index} hand on different values")
        return template, taken

    def _check_caches(self) -> None:
        for index in range(len(self.blocks)):
            if not {*_cache(index, "past_key_values")} <= self.inputs.keys():
                raise NotRepeatable(f"layer {index} has no cache of keys and values")
            if not {*_cache(index, "present")} <= self.outputs.keys():
                raise NotRepeatable(f"layer {index} puts out no cache of keys and values")

    def _check_neighbours(self, templates: set[int]) -> None:
        """What a layer hands on must go to the next one alone, if it is repeated, or if others come between the two."""
        traced = self.short.traced
        for block in self.blocks:
            last = block.index + 1 == len(self.blocks)
            parted = not last and traced[block.index + 1] != traced[block.index] + 1
            if block.index in templates or parted:
                following = self.rest if last else self.blocks[block.index + 1].nodes
                near = {id(node) for node in (*block.nodes, *following)}
                if any(id(use.node) not in near for use in block.handed_on().uses()):
                    raise NotRepeatable(f"what layer {block.index} hands on goes further than to the next one")

    def _copy(
        self, template: _Block, layer: int, taken: ir.Value, before: ir.Value
    ) -> tuple[list[ir.Node], tuple[ir.Value, ...]]:
        """The template's nodes with the weights and the cache of `layer`, and that cache's inputs and outputs."""
        names = [_cache(template.index, kind) for kind in ("past_key_values", "present")]
        pasts = [_value_like(self.inputs[name], f"{name}.{layer}") for name in names[0]]
        known: dict[int, ir.Value] = {id(taken): before}
        known |= {id(self.inputs[name]): past for name, past in zip(names[0], pasts, strict=True)}
        copied: list[ir.Node] = []
        for node, taken_in in zip(template.nodes, template.inputs, strict=True):
            inputs = [
                None if value is None else self._counterpart(value, template, layer, known) for value in taken_in
            ]
            new = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}.{layer}",
            )
            for old, output in zip(node.outputs, new.outputs, strict=True):
                output.shape, output.type, output.name = _copied(old.shape), old.type, f"{old.name}.{layer}"
                known[id(old)] = output
            copied.append(new)
        presents = [known.get(id(self.outputs[name])) for name in names[1]]
        own = [value for value in presents if value is not None]
        if len(own) < len(presents):
            raise NotRepeatable(f"layer {template.index} puts out no cache of its own")
        return copied, (*pasts, *own)

    def _counterpart(self, value: ir.Value, template: _Block, layer: int, known: dict[int, ir.Value]) -> ir.Value:
        if id(value) not in known:
            known[id(value)] = value
            name = self.tensors.own(value, template.index) if value.is_initializer() else None
            if name is not None:
                known[id(value)] = self._initializer(value, name, template, layer)
        return known[id(value)]

    def _initializer(self, value: ir.Value, name: str, template: _Block, layer: int) -> ir.Value:
        tensor = self.tensors.counterpart(name, layer)
        if _place(tensor) not in self.stored:
            start = f"{self.prefix}{self.short.path}."
            stored: Any = type(stored_tensor(value))
            new = _value_like(value, f"{start}{layer}.{name}")
            new.const_value = stored(tensor.detach(), name=new.name)
            # a traced layer may have that name still
            while new.name in self.graph.initializers:
                new.name = f"{new.name}."
            self.graph.register_initializer(new)
            self.stored[_place(tensor)] = new
        return self.stored[_place(tensor)]

    def _rename(self, made: Mapping[int, tuple[ir.Value, ...]]) -> None:
        """Give inputs, outputs and weights the numbers of their layers, and the cache its order."""
        caches = dict(made)
        for place, layer in enumerate(self.short.traced):
            caches[layer] = tuple(
                values[name]
                for kind, values in (("past_key_values", self.inputs), ("present", self.outputs))
                for name in _cache(place, kind)
            )
        count = len(self.short.kinds)
        own = {id(value) for values in caches.values() for value in values}
        for values, kind, part in ((self.graph.inputs, "past_key_values", 0), (self.graph.outputs, "present", 2)):
            others = [value for value in values if id(value) not in own]
            ordered = [caches[layer][part + k] for layer in range(count) for k in (0, 1)]
            values.clear()
            values.extend([*others, *ordered])
            for value, name in zip(ordered, cache_names(kind, count), strict=True):
                value.name = name
        wanted = {id(value): f"{self.prefix}{name}" for value, name in self._weight_names()}
        # two steps, since one layer's new name may be another's old one
        for step in (lambda name: f"{name} ", str):
            for value in list(self.graph.initializers.values()):
                if id(value) in wanted:
                    value.name = step(wanted[id(value)])
                    stored_tensor(value).name = value.name

    def _weight_names(self) -> Iterator[tuple[ir.Value, str]]:
        """The initializers that store a layer's tensor, and its name in the whole model."""
        start = self.tensors.prefix
        names: dict[tuple, str] = {}
        for name, tensor in self.tensors.whole.items():
            names.setdefault(_place(tensor), name)
        for value, raw in _stored(self.graph):
            if (name := names.get(_place(raw), "")).startswith(start):
                yield value, name


@dataclass
class _Comparison:
    """Of two layers of one kind, which must be the same nodes over other weights."""

    first: _Block
    second: _Block
    tensors: _Tensors
    inputs: Mapping[str | None, ir.Value]
    blocks: list[_Block]

    def taken(self) -> ir.Value:
        """The value that the first one takes from the layer before it.

        Raises:
            NotRepeatable: If the two differ in more than their weights, caches, and the layers before them.
        """
        if len(self.first.nodes) != len(self.second.nodes):
            self._refuse("have other numbers of nodes")
        # a dictionary of pairs, so that a value with two counterparts counts as two
        found: dict[tuple[int, int], ir.Value] = {}
        for a, b in zip(self.first.nodes, self.second.nodes, strict=True):
            if _said(a) != _said(b):
                self._refuse(f"have other nodes, such as {a.op_type} and {b.op_type}")
            for value, other in zip(a.inputs, b.inputs, strict=True):
                if not self._alike(value, other):
                    if value is None or other is None or not self._from_before(value, other):
                        self._refuse(f"give other inputs to {a.op_type}")
                    assert value is not None and other is not None
                    found[id(value), id(other)] = value
        if len(found) != 1:
            self._refuse(f"take {len(found)} values from the layers before them")
        return next(iter(found.values()))

    def _refuse(self, how: str) -> None:
        raise NotRepeatable(f"layers {self.first.index} and {self.second.index} {how}")

    def _alike(self, value: ir.Value | None, other: ir.Value | None) -> bool:
        if value is None or other is None:
            return value is other
        place = self.first.places.get(id(value))
        if place is not None:
            return place == self.second.places.get(id(other))
        if value.is_initializer() and other.is_initializer():
            return self._same_weight(value, other)
        if value.is_graph_input() and other.is_graph_input():
            caches = [_cache(block.index, "past_key_values") for block in (self.first, self.second)]
            if value.name in caches[0]:
                return other.name == caches[1][caches[0].index(value.name)]
        return value is other

    def _same_weight(self, value: ir.Value, other: ir.Value) -> bool:
        names = self.tensors.own(value, self.first.index), self.tensors.own(other, self.second.index)
        if names != (None, None) or value is other:
            return names[0] == names[1]
        a, b = stored_tensor(value), stored_tensor(other)
        return a.size <= _LARGEST_CONSTANT and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()

    def _from_before(self, value: ir.Value, other: ir.Value) -> bool:
        pairs = ((self.first, value), (self.second, other))
        return all(b.index > 0 and id(v) in self.blocks[b.index - 1].places for b, v in pairs)


def repeat_layers(graph: ir.Model, short: ShortModel, whole: nn.Module, prefix: str) -> None:
    """Put the layers into a graph that were not traced, in place.

    Args:
        graph (`onnx_ir.Model`): A trace of `short.model`, with torch's notes on where each node comes from. It is of no use after an error.
        short ([`ShortModel`]): What was traced.
        whole (`nn.Module`): The model with all layers, and as many modules of experts as the traced one.
        prefix (`str`): Of the model's names in the graph.

    Raises:
        NotRepeatable: If the traced layers of a kind are not the same nodes over other weights.
    """
    _Repeater(graph, short, whole, prefix).repeat()


def _blocks(graph: ir.Graph, path: str, count: int) -> tuple[list[_Block], list[ir.Node]]:
    """The nodes of each layer, and those behind the layers."""
    nodes, pattern = list(graph), re.compile(rf"'{re.escape(path)}\.(\d+)[.']")
    seen = [set(map(int, pattern.findall(node.metadata_props.get(_SCOPES, "")))) for node in nodes]
    ends: list[int] = []
    begin = [i for i, found in enumerate(seen) if found == {0}]
    if not begin:
        raise NotRepeatable("torch does not say which nodes are a layer's")
    for layer in range(count):
        own = [i for i, found in enumerate(seen) if found == {layer}]
        if not own or (ends and own[0] <= ends[-1]):
            raise NotRepeatable(f"the nodes of layer {layer} do not follow those of the one before")
        ends.append(own[-1])
    starts = [begin[0], *[end + 1 for end in ends[:-1]]]
    blocks = [_Block(i, nodes[start : end + 1]) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    if any(attribute.type in _GRAPHS for block in blocks for n in block.nodes for attribute in n.attributes.values()):
        raise NotRepeatable("a layer has nodes with graphs of their own")
    return blocks, nodes[ends[-1] + 1 :]


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _said(node: ir.Node) -> tuple:
    """All about a node but its names and what goes in."""
    attributes = {name: (a.type, _content(a.value)) for name, a in node.attributes.items()}
    outputs = [(str(value.shape), str(value.type)) for value in node.outputs]
    return node.domain, node.op_type, node.overload, node.version, attributes, outputs, len(node.inputs)


def _content(value: Any) -> Any:
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, ir.TensorProtocol) else value


def _take_instead(block: _Block, old: ir.Value, new: ir.Value) -> None:
    for node in block.nodes:
        for index, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(index, new)


def _cache(index: int, kind: str) -> list[str]:
    """Names of a layer's keys and values."""
    return list(cache_names(kind, index + 1))[-2:]


def _value_like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=_copied(value.shape), type=value.type)


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else shape.copy()


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def _stored(graph: ir.Graph) -> Iterator[tuple[ir.Value, Tensor]]:
    """The initializers that are tensors of torch."""
    for value in graph.initializers.values():
        if isinstance(raw := getattr(value.const_value, "raw", None), Tensor):
            yield value, raw


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
