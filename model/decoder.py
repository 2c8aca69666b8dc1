"""A live decoder as a stack of layers: find the stack, watch the residual stream, cut layers virtually.

Nothing here knows a model family. The stack is the ModuleList of `num_hidden_layers` modules; layers are watched
and skipped by shadowing their `forward` on the instance, so the module, its attributes (attention type, layer
index) and accelerate's device hooks stay as they are. Every change is undone in `finally`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.model.config import layer_count
from layerprune.model.cuts import Kept, check_kept
from layerprune.model.errors import Refused


@dataclass(frozen=True)
class Decoder:
    """A causal language model and its stack of L layers; `path` is the stack's module name."""

    model: Any
    path: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where input ids go: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device


def width_of(decoder: Decoder) -> int:
    """D, the numbers in a state: the config's hidden size, or that of the input embedding."""
    config = decoder.model.config.get_text_config()
    return int(getattr(config, "hidden_size", 0) or decoder.model.get_input_embeddings().weight.shape[-1])


def view_decoder(model: Any) -> Decoder:
    """Find the stack: the ModuleList with as many modules as the config has layers. Refused when there is none.

    Of several (a vision tower may be as deep) the one in the text decoder is taken: no name of another
    modality in its path, then the one with the most parameters.
    """
    count = layer_count(model.config)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    # a list inside one layer (experts, per-head parts) is no stack
    found = [(n, m) for n, m in found if not any(n.startswith(other + ".") for other, _ in found if other != n)]
    text = [(n, m) for n, m in found if not is_other_modality(n)]
    text = [(n, m) for n, m in text if not _inside_a_list(n)] or text
    if not text:
        raise Refused(f"no stack of {count} layers was found in this {type(model).__name__}: its layout is not supported")
    name, stack = max(text, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return Decoder(model, name, stack)


def is_other_modality(name: str) -> bool:
    """Whether a module or tensor name lies in a vision, audio or speech part, or in an encoder."""
    words = ("vision", "visual", "image", "audio", "speech", "encoder", "video", "depth_decoder")
    return any(word in part for part in name.lower().split(".") for word in words)


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def hidden_of(output: Any) -> torch.Tensor:
    """A layer's output hidden state: the output itself, or the first element of a tuple (Falcon, BLOOM, GPT-J)."""
    return output[0] if isinstance(output, tuple | list) else output


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a layer's arguments: the first positional one, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def states_BTD(hidden: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    """A hidden state as (batch, tokens, features).

    Gemma-3n carries several streams (streams, batch, tokens, features): they count as one long vector.
    """
    if hidden.dim() != 4:
        return hidden
    if hidden.shape[1:3] == (rows, tokens):
        return hidden.permute(1, 2, 0, 3).flatten(2)
    return hidden.flatten(2)


class Stop(Exception):
    """Ends a forward pass after the last layer, so that the head is never computed."""


@contextlib.contextmanager
def replaced_forwards(layers: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Shadow each module's `forward` by a function of (original forward, *args, **kwargs); restored in the end."""
    absent = object()
    saved: list[tuple[nn.Module, Any]] = []
    try:
        for layer, replacement in layers:
            original = layer.forward
            saved.append((layer, layer.__dict__.get("forward", absent)))

            def shadow(*args: Any, _new: Any = replacement, _old: Any = original, **kwargs: Any) -> Any:
                return _new(_old, *args, **kwargs)

            layer.__dict__["forward"] = shadow
        yield
    finally:
        for layer, before in reversed(saved):
            if before is absent:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = before


@torch.no_grad()
def walk_states(
    decoder: Decoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, see: Callable[[int, torch.Tensor], None]
) -> None:
    """One bare forward pass without the head; `see(l, x)` gets x^(l), the input of layer l, for l = 0..L-1,
    and last x^(L), the output of the last layer *before* the final norm. x is (batch, tokens, features)."""
    rows, tokens = ids_BT.shape
    last = len(decoder) - 1

    def watcher(index: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            see(index, states_BTD(first_hidden(args, kwargs), rows, tokens))
            output = old(*args, **kwargs)
            if index == last:
                see(last + 1, states_BTD(hidden_of(output), rows, tokens))
                raise Stop
            return output

        return forward

    with replaced_forwards((layer, watcher(i)) for i, layer in enumerate(decoder.layers)), contextlib.suppress(Stop):
        forward_logits(decoder, ids_BT, mask_BT)


def forward_logits(
    decoder: Decoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """The model's own logits (batch, tokens, vocabulary), without a KV cache."""
    device = decoder.device
    mask = None if mask_BT is None else mask_BT.to(device)
    if mask is not None and not mask[:, 0].all() and "position_ids" in inspect.signature(decoder.model.forward).parameters:
        # padded on the left: positions count from the first real token, as in a document alone
        kwargs.setdefault("position_ids", (mask.cumsum(dim=1) - 1).clamp(min=0))
    return decoder.model(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False, **kwargs).logits


@contextlib.contextmanager
def virtual_cut(decoder: Decoder, kept: Kept) -> Iterator[None]:
    """Inside the block the model runs only the layers in `kept`: the others hand their input on.

    Exact for passes without a KV cache (a skipped layer leaves its cache slot empty). Each layer that stays gets
    exactly the arguments (mask, rotary embedding) that the whole model would give it.
    """
    check_kept(kept, len(decoder))
    # What a layer returns is the model's contract with it; it is the same for all layers of a stack.
    length = tuple_length(decoder) if len(kept) < len(decoder) else None

    def skip(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = first_hidden(args, kwargs)
        return hidden if length is None else (hidden, *[None] * (length - 1))

    gone = set(range(len(decoder))) - set(kept)
    with replaced_forwards((decoder.layers[i], skip) for i in sorted(gone)):
        yield


def is_cut(model: Any) -> bool:
    """Whether layers of this model are virtually cut (or watched) at this moment."""
    forwards = (layer.__dict__.get("forward") for layer in view_decoder(model).layers)
    return any("replaced_forwards" in getattr(f, "__qualname__", "") for f in forwards)


@torch.no_grad()
def tuple_length(decoder: Decoder) -> int | None:
    """How many values the layers return, None for a bare tensor; found by running the first layer on two tokens."""
    answer: list[int | None] = []

    def look(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = old(*args, **kwargs)
        answer.append(len(output) if isinstance(output, tuple | list) else None)
        raise Stop

    ids = torch.ones((1, 2), dtype=torch.long)
    with replaced_forwards([(decoder.layers[0], look)]), contextlib.suppress(Stop):
        forward_logits(decoder, ids)
    return answer[0]
