"""Attribution graph of an explanation, in the schema that the viewers of Neuronpedia and circuit-tracer read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ...utils.display import visible
from .records import FeatureAttribution, InputAttribution, LayerAttribution, Target

FEATURE, REST, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
"""Types of nodes. The viewers know no others, so a feature and a part of no feature are called as they call theirs."""
EMBEDDINGS = "E"
"""Layer of the embeddings."""
NOTHING = 1e-9
"""Size of a part up to which it is a rounding error, and has no node."""


def attribution_graph(
    target: Target,
    tokens: Sequence[str],
    token_ids: Sequence[int],
    layers: Sequence[LayerAttribution],
    embeddings: InputAttribution | None,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """Makes the graph of an explanation's parts; `Explanation.to_graph` describes it.

    Args:
        target: The predicted token and its value.
        tokens: Tokens that were read.
        token_ids: Their ids.
        layers: Account of each layer.
        embeddings: Account of the value by the tokens' embeddings, if there is one.
        metadata: Name of the graph, its model and its prompt.
    """
    graph = _Graph(target, tokens, token_ids, depth=max(layer.layer for layer in layers) + 1)
    for layer in layers:
        graph.add_layer(layer)
    if embeddings is not None:
        graph.add_account(graph.logit, embeddings, EMBEDDINGS, len(tokens) - 1, "the value")
    graph.add_influences()
    parameters = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": parameters, "nodes": graph.nodes, "links": graph.links}


class _Graph:
    """Nodes and links, with one node per token read and one of the prediction from the start."""

    def __init__(self, target: Target, tokens: Sequence[str], token_ids: Sequence[int], depth: int) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []
        self.rests = 0
        read = enumerate(zip(tokens, token_ids, strict=True))
        self.read = [
            self._add(f"E_{token_id}_{place}", place, EMBEDDINGS, place, EMBEDDING, f'Emb: "{visible(token)}"')
            for place, (token, token_id) in read
        ]
        last = len(tokens) - 1
        # both viewers read the probability out of this text
        text = f'Output "{visible(target.token)}" (p={target.probability:.3f})'
        name = f"{depth}_{target.token_id}_{last}"
        self.logit = self._add(name, target.token_id, str(depth), last, LOGIT, text)
        self.nodes[-1] |= {"token_prob": target.probability, "is_target_logit": True}

    def _add(self, name: str, feature: int, layer: str, place: int, kind: str, text: str) -> str:
        node = {"node_id": name, "jsNodeId": name, "feature": feature, "layer": layer, "ctx_idx": place}
        self.nodes.append(node | {"feature_type": kind, "clerp": text, "influence": None, "activation": None})
        return name

    def _link(self, source: str, target: str, weight: float) -> None:
        self.links.append({"source": source, "target": target, "weight": weight})

    def _add_rest(self, target: str, layer: str, place: int, text: str, part: float) -> None:
        """Adds a node for a part of a number that no feature or token has."""
        if abs(part) > NOTHING:
            self.rests += 1  # negative numbers are of no feature
            name = f"{layer}_rest{self.rests}_{place}"
            self._link(self._add(name, -self.rests, layer, place, REST, text), target, part)

    def add_layer(self, account: LayerAttribution) -> None:
        """Adds a layer's account of the value."""
        layer, unlisted = str(account.layer), list(account.by_token)
        for feature in account.features:
            self._add_feature(feature)
            for place, attribution in zip(feature.positions, feature.attributions, strict=True):
                unlisted[place] -= attribution
        for place, part in enumerate(unlisted):
            self._add_rest(self.logit, layer, place, f"features of L{layer} that are not listed", part)
        last = len(unlisted) - 1
        self._add_rest(self.logit, layer, last, f"value with all features of L{layer} ablated", account.baseline)
        self._add_rest(self.logit, layer, last, f"remainder of L{layer}", account.remainder)

    def _add_feature(self, feature: FeatureAttribution) -> None:
        number, layer = cantor_number(feature.layer, feature.index), str(feature.layer)
        text = visible((feature.atlas and feature.atlas.label) or feature.name)
        rows = zip(feature.positions, feature.activations, feature.attributions, strict=True)
        for place, activation, attribution in rows:
            name = self._add(f"{layer}_{feature.index}_{place}", number, layer, place, FEATURE, text)
            self.nodes[-1]["activation"] = activation
            self._link(name, self.logit, attribution)
        if feature.inputs is not None:
            name = f"{layer}_{feature.index}_{feature.position}"
            self.add_account(name, feature.inputs, layer, feature.position, feature.name)

    def add_account(self, target: str, account: InputAttribution, layer: str, place: int, of: str) -> None:
        """Adds an account of a node's number by the tokens read."""
        for source, part in zip(self.read, account.by_token, strict=True):
            if part:
                self._link(source, target, part)
        self._add_rest(target, layer, place, f"{of} with the mean embedding at every token", account.baseline)
        self._add_rest(target, layer, place, f"remainder of {of}", account.remainder)

    def add_influences(self) -> None:
        """Gives each node circuit-tracer's influence, by which the viewers prune.

        A node hands its own influence to the sources of its links, in proportion to their absolute weights. The figure
        of a node is the share of all influence that this node and those of more influence have.
        """
        raw = {node["node_id"]: 0.0 for node in self.nodes} | {self.logit: 1.0}
        targets: dict[str, list[dict[str, Any]]] = {self.logit: []}  # the logit is first: features get theirs from it
        for link in self.links:
            targets.setdefault(link["target"], []).append(link)
        for target, links in targets.items():
            total = sum(abs(link["weight"]) for link in links) or 1.0
            for link in links:
                raw[link["source"]] += raw[target] * abs(link["weight"]) / total
        sources = [node for node in self.nodes if node["node_id"] != self.logit]
        sources.sort(key=lambda node: -raw[node["node_id"]])
        running = list(accumulate(raw[node["node_id"]] for node in sources))
        for node, share in zip(sources, running, strict=True):
            node["influence"] = share / running[-1] if running[-1] else 1.0


def cantor_number(layer: int, index: int) -> int:
    """Number that Neuronpedia gives to the feature of a layer."""
    return (layer + index) * (layer + index + 1) // 2 + index


__all__ = ["attribution_graph", "cantor_number"]
