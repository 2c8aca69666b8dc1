"""A decoder whose layers' weights stay on disk: each is brought in when its turn comes, and goes again.

The skeleton is what transformers' own loader makes of the checkpoint on the meta device; everything outside the stack is loaded
for good. A layer's tensors are read from their byte ranges (never mapped: mapped pages count as the process's memory), go
through transformers' own conversion (renaming, fusing of experts, dtype), and replace the placeholders of that layer; what
is then still without weights, or was changed elsewhere, is a layout that cannot be streamed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprune.model.config import auto_class, layer_count, load_config
from layerprune.model.decoder import Decoder, view_decoder
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.feed import DTYPES, read_onto
from layerprune.model.fingerprint import checkpoint_fingerprint
from layerprune.model.load import check_keys, pick_device, pick_dtype, quiet_transformers, refuse_quantised
from layerprune.model.nf4 import CPU_PACKING_BYTES, NF4_BYTES, is_packable, pack, unquantised
from layerprune.model.plan import by_layer
from layerprune.model.tensors import StoredTensor, read_checkpoint

Slot = tuple[dict[str, Any], str, Any]
"""Where a module holds a parameter or buffer: the dictionary, the name in it, the placeholder."""


class StreamedModel:
    """The skeleton of a checkpoint, and its layers one at a time.

    decoder: the live view; calling a layer that is not in raises torch's own error about meta tensors. device: where weights
    go. read: bytes requested from the weight files so far. rest_bytes: weights outside the stack, which stay. layer_bytes: of
    each layer, as it lies in memory; stored_bytes: as it lies in the files.
    """

    def __init__(self, folder: Path, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        """Load everything but the layers.

        dtype: as for `load_model`; with `nf4` a layer's linear layers are quantised when it arrives. Raises Refused for a
        checkpoint that `load_model` refuses, one that is stored quantised, and a layout whose layers cannot be loaded one by one.
        """
        self.folder, self.device = folder, torch.device(pick_device(device))
        self._stored = read_checkpoint(folder)
        config = load_config(folder, trust_remote_code)
        if dtype == "nf4":
            refuse_quantised(folder, config)
        odd = sorted({t.dtype for t in self._stored.values()} - set(DTYPES))
        if odd or getattr(config, "quantization_config", None) is not None:
            raise Refused(f"{folder} is stored quantised ({', '.join(odd) or 'its config says so'}): it can only be loaded whole")
        self.read = 0
        model = _skeleton(folder, config, pick_dtype(dtype, self.device.type), trust_remote_code, len(self._stored))
        self.decoder = view_decoder(model)
        self._groups, rest = by_layer(self._stored, len(self.decoder))
        self._slots = [_slots(layer) for layer in self.decoder.layers]
        self.dtype = "nf4" if dtype == "nf4" else str(model.dtype).removeprefix("torch.")
        self._packed = _to_pack(self.decoder, self.device.type) if dtype == "nf4" else [[] for _ in self.decoder.layers]
        self._refuse_shared()
        self._arrive(rest, None)
        model.tie_weights()
        missing = [n for n, t in _tensors(model) if t.is_meta and not n.startswith(self.decoder.path + ".")]
        if missing:
            raise Refused(f"{folder} cannot be read layer by layer: {missing[0]} has no weights of its own; load it whole")
        self.held: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.decoder)

    def identity(self) -> str:
        """What of this model decides the numbers that it gives."""
        import transformers

        versions = (torch.__version__, transformers.__version__)
        return repr((checkpoint_fingerprint(self.folder), self.dtype, self.device.type, versions))

    @property
    def rest_bytes(self) -> int:
        """Bytes of the weights outside the stack, tied ones once."""
        inside = {id(t) for layer in self.decoder.layers for _, t in _tensors(layer)}
        return sum({id(t): t.nbytes for _, t in _tensors(self.decoder.model) if id(t) not in inside}.values())

    def layer_bytes(self, layer: int) -> int:
        packed = {id(linear._parameters) for linear in self._packed[layer]}
        sizes = [
            t.numel() * NF4_BYTES if id(held) in packed and name == "weight" else t.nbytes for held, name, t in self._slots[layer]
        ]
        return int(sum(sizes))

    def arriving_bytes(self, layer: int) -> int:
        """What a layer takes for a while when it comes, beside what it takes then: as it is stored, and before it is packed."""
        sizes = [linear.weight.numel() for linear in self._packed[layer]]
        if not sizes:
            return self.stored_bytes(layer)
        packing = CPU_PACKING_BYTES * max(sizes) if self.device.type == "cpu" else 0
        return int(sum(t.nbytes for _, _, t in self._slots[layer])) + max(self.stored_bytes(layer), packing)

    def stored_bytes(self, layer: int) -> int:
        return sum(t.nbytes for t in self._groups[layer].values())

    def layers(self, order: Sequence[int], hold: Sequence[int] = ()) -> Generator[int, None, None]:
        """Each layer of `order` in turn, in while its number is out; the next one is read meanwhile by a thread.

        hold: layers that are brought in first and stay until the end. The iterator must be run to its end, or closed.
        """
        if self.held:
            raise RuntimeError("the layers of this model are being streamed already")
        self.held = frozenset(hold)
        waiting = iter([i for i in order if i not in self.held])
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:

            def ask() -> Future[None] | None:
                coming = next(waiting, None)
                return None if coming is None else pool.submit(self._load, coming)

            ahead: Future[None] | None = None
            try:
                for layer in sorted(self.held):
                    self._load(layer)
                ahead = ask()
                for layer in order:
                    if layer not in self.held:
                        assert ahead is not None
                        ahead.result()
                        ahead = ask()
                    yield layer
                    if layer not in self.held:
                        if self.device.type == "cuda":  # else the next layers pile up behind kernels that wait for this one
                            torch.cuda.current_stream(self.device).synchronize()
                        self._drop(layer)
            finally:
                self.held = frozenset()
                if ahead is not None and not ahead.cancel():
                    ahead.exception()  # a read that is under way is waited for
                for layer in range(len(self)):
                    self._drop(layer)

    def _load(self, layer: int) -> None:
        self._arrive(self._groups[layer], layer)
        missing = [name for name, t in _tensors(self.decoder.layers[layer]) if t.is_meta]
        if missing:
            raise Refused(
                f"{self.folder} cannot be read layer by layer: layer {layer} takes {missing[0]} from elsewhere; load it whole"
            )
        for linear in self._packed[layer]:
            # not in the tree: transformers looks at all of it when the next layer comes, and 4-bit layers change when looked at
            linear.__dict__["forward"] = pack(linear, self.decoder.model.dtype)
            linear._parameters["weight"] = self._placeholder(layer, linear)

    def _placeholder(self, layer: int, linear: Any) -> Any:
        return next(t for held, name, t in self._slots[layer] if held is linear._parameters and name == "weight")

    def _drop(self, layer: int) -> None:
        for linear in self._packed[layer]:
            linear.__dict__.pop("forward", None)
        for attributes, name, placeholder in self._slots[layer]:
            attributes[name] = placeholder

    def _arrive(self, tensors: Mapping[str, StoredTensor], layer: int | None) -> None:
        """Read these tensors, and let transformers put them into the skeleton."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model = self.decoder.model
        found = read_onto(list(tensors.values()), self.device)
        self.read += sum(tensor.nbytes for tensor in tensors.values())
        settings = LoadStateDictConfig(
            device_map={"": self.device}, dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
        )
        try:
            convert_and_load_state_dict_in_model(model, dict(zip(tensors, found, strict=True)), settings)
        except model_errors() as error:
            where = "the rest" if layer is None else f"layer {layer}"
            raise Refused(f"transformers cannot load {where} of {self.folder} by itself: {one_line(error)}") from error

    def _refuse_shared(self) -> None:
        """Layers that share a tensor, with each other or with what lies outside, do not come and go alone."""
        owner: dict[int, int] = {}
        for number, slots in enumerate(self._slots):
            for _, name, placeholder in slots:
                if owner.setdefault(id(placeholder), number) != number:
                    raise Refused(
                        f"{self.folder} cannot be read layer by layer: its layers {owner[id(placeholder)]} and {number} share "
                        f"{name}; load it whole"
                    )


def _skeleton(folder: Path, config: Any, dtype: Any, trust_remote_code: bool, stored: int) -> Any:
    """The model that `load_model` would give, without weights: parameters on the meta device, buffers computed."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    quiet_transformers()
    kind = auto_class(config)
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, device_map={"": "meta"}, trust_remote_code=trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        check_keys(folder, info, layer_count(config), stored)
        with init_empty_weights(include_buffers=False), no_init_weights():
            twin = type(model)._from_config(config, dtype=model.dtype)
        _compute_buffers(twin)
    except ImportError as error:
        raise Refused(f"{folder} needs a package that is not installed to be loaded: {one_line(error)}") from error
    except model_errors() as error:
        raise Refused(f"transformers cannot load {folder}: {one_line(error)}") from error
    computed = dict(twin.named_modules())
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = computed[name]._buffers[key]
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Fill buffers as the loader does: by the initialisation of the (sub-)model that a module belongs to, in float32."""
    from transformers import PreTrainedModel

    owners = {"": model} | {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    with torch.no_grad():
        for name, module in model.named_modules():
            if module._buffers:
                nearest = max((o for o in owners if o in ("", name) or name.startswith(o + ".")), key=len)
                owners[nearest]._init_weights(module)


def _to_pack(decoder: Decoder, device: str) -> list[list[Any]]:
    """Of each layer the linear layers that NF4 takes."""
    keep = {decoder.model.get_submodule(name) for name in unquantised(decoder.model, device)}
    return [[m for m in layer.modules() if is_packable(m) and m not in keep] for layer in decoder.layers]


def _slots(layer: nn.Module) -> list[Slot]:
    """The places of a layer's weights, each with its placeholder."""
    found: list[Slot] = []
    for module in layer.modules():
        for held in (module._parameters, module._buffers):
            found += [(held, name, t) for name, t in held.items() if t is not None and t.is_meta]
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
