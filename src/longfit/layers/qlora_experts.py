"""LoRA on stacked experts whose weights are in few bits: what PEFT's ``target_parameters`` puts on them.

PEFT adapts a parameter by adding ``scaling B_e A_e`` to all experts' dense weights, around the call of their module.
Here nothing is added to a weight: the adapter is handed to the packed experts for the call, which run it beside each
expert's product (`ExpertsMatmul`). Names, shapes and files stay PEFT's: each expert has a pair A ``[R, in]`` and B
``[out, R]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as DenseParamWrapper
from torch import Tensor, nn

from longfit.errors import ModelError
from longfit.layers.experts import ExpertAdapter, PackedExperts, packed_experts
from longfit.layers.peft_variants import start_of


class ParamWrapper(DenseParamWrapper):  # PEFT looks for wrappers of parameters by this name
    """PEFT's wrapper of one parameter of a module of packed experts; equal to PEFT's own on dense experts of dq(W).

    Raises: ModelError: a start that reads the weight, or several adapters at once.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if start_of(config):
            raise ModelError(
                f"init_lora_weights={config.init_lora_weights!r} on quantised experts: there is no dense weight to "
                "start from; leave it True"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def packed(self) -> PackedExperts:
        """What the experts know of their bytes."""
        found = packed_experts(self.get_base_layer())
        assert found is not None, "registered for packed experts only"
        return found

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        packed = self.packed()
        if self.parameter_name not in packed.formats:
            raise ModelError(
                f"target_parameters {self.parameter_name!r}: not a weight of quantised experts; give "
                + " or ".join(packed.formats)
            )
        self.num_experts, self._param_ndim = packed.num_experts, 3
        layer = packed.formats[self.parameter_name]
        return layer.out_features, layer.in_features  # as PEFT reads a dense [E, first, second]; it swaps them itself

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        if len(names) > 1:
            raise ModelError(f"adapters {', '.join(names)} at once on quantised experts: activate one of them")
        adapters = self.packed().adapters
        if names:
            (name,) = names
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            adapters[self.parameter_name] = ExpertAdapter(A, B, self.scaling[name])
        try:
            yield
        finally:
            adapters.pop(self.parameter_name, None)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """What the adapter adds to all experts, in the shape of the dense parameter, fp32."""
        a = self.lora_A[adapter_name].weight.float()
        b = self.lora_B[adapter_name].weight.float()
        a = a.view(self.num_experts, -1, a.shape[1])  # [E, R, I]
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # [E, O, R]
        delta = (b @ a) * self.scaling[adapter_name]
        return delta.transpose(1, 2).contiguous() if self.packed().transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: codes of few bits are too coarse to hold an adapter.

        Raises: ModelError: always.
        """
        raise ModelError(
            "merge into quantised experts: the adapter would be rounded away; call merge_and_unload(), which returns "
            "dense 16-bit experts"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts without their adapters: packed as they are, or dense and with the adapters in them.

        Raises: ModelError: ``safe_merge`` and a merged weight is not finite.
        """
        base: nn.Module = self.get_base_layer()
        if not merge:
            return base
        wrappers: dict[str, ParamWrapper] = {}
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            wrappers[layer.parameter_name] = layer
            layer = layer.base_layer
        packed = self.packed()
        for name, expert_format in packed.formats.items():
            dense = packed.dequantize(name, getattr(base, name), dtype=None)
            if name in wrappers:
                dense = wrappers[name].added_to(dense, adapter_names, safe_merge=safe_merge)
            dense = dense.to(expert_format.dense_dtype)
            base.register_parameter(name, nn.Parameter(dense, requires_grad=False))
        del base.packed
        return base

    def added_to(self, dense: Tensor, adapter_names: list[str] | None, *, safe_merge: bool) -> Tensor:
        """A dense parameter with the named, or the active, adapters added in fp32."""
        names = [name for name in adapter_names or self.active_adapters if name in self.lora_A]
        merged = dense.float()
        for name in names:
            merged += self.get_delta_weight(name)
        if safe_merge and not bool(merged.isfinite().all()):
            raise ModelError(
                f"merge: adapters {', '.join(names)} hold values that are not finite; train again or skip safe_merge"
            )
        return merged
