"""Linear layers on processors, their weights in the order that the processor multiplies in.

oneDNN puts a plain bfloat16 matrix in order each time it multiplies by it, which costs a step of a few
tokens as much as the multiplication. Here that is done once. Layers that read the same input, such as those
of queries, keys and values, become one multiplication. float32 is left alone: its answers are those of
`model.generate`.
"""

from __future__ import annotations

from typing import Any

import torch

from inference.engines.transformers import placing

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input where they are of one module."""


def pack_in(model: Any) -> bool:
    """Replace the linear layers of `model`, if they are bfloat16 in the memory of a processor that computes
    in it, and not quantised. For inference only. A head that shares its weights with the embedding stays: it
    would take their memory once more."""
    if (
        model.device.type != "cpu"
        or model.dtype != torch.bfloat16
        or getattr(model, "is_quantized", False)
        or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return False
    shared = model.get_input_embeddings().weight
    for module in list(model.modules()):
        plain = {
            name: child
            for name, child in module.named_children()
            if type(child) is torch.nn.Linear
            and child.weight.dtype == torch.bfloat16
            and child.weight is not shared
        }
        for names in TOGETHER:
            if all(name in plain for name in names):
                _replace(module, {name: plain.pop(name) for name in names})
        for name, layer in plain.items():
            _replace(module, {name: layer})
    placing.release(model)
    return True


def _replace(module: torch.nn.Module, layers: dict[str, Any]) -> None:
    product = _Product(list(layers.values()))
    for at, (name, layer) in enumerate(layers.items()):
        setattr(module, name, PackedLinear(product, at, layer.in_features, layer.out_features))


class _Product:
    """One multiplication, whose result is that of several layers side by side."""

    def __init__(self, layers: list[Any]) -> None:
        biases = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
        with torch.no_grad():
            weight = torch.cat([layer.weight for layer in layers])
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            self._bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases)
        self._sizes = [layer.out_features for layer in layers]
        self._input: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, at: int, given: torch.Tensor) -> torch.Tensor:
        """The result of layer `at`. The layers are asked one after the other: what the first one makes is
        kept for the others."""
        if given is not self._input:
            made = torch.ops.mkldnn._linear_pointwise(given, self._weight, self._bias, "none", [], "")
            if len(self._sizes) == 1:
                return made
            self._input, self._parts = given, made.split(self._sizes, dim=-1)
        found = self._parts[at]
        if at == len(self._sizes) - 1:
            self._input, self._parts = None, ()
        return found


class PackedLinear(torch.nn.Module):  # type: ignore[misc]
    """Stands in for an `nn.Linear`."""

    def __init__(self, product: _Product, at: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self._product, self._at = product, at
        self.in_features, self.out_features = in_features, out_features

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self._product.part(self._at, given)
