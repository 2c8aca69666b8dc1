"""Train a tuned lens and measure it: an affine map a layer, fitted to the final prediction (arXiv 2303.08112).

S positions of a slice, N positions of a batch, D features, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.depth.lens import LensSum, comparison, final_of
from layerprune.depth.tuned_file import TunedLens, write_tensors
from layerprune.model.config import vocab_size
from layerprune.model.data import TokenBatch, batches, check_seed, check_token_id
from layerprune.model.decoder import Decoder, walk_states
from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.files import locked, made_folder
from layerprune.model.layerwise import Layerwise
from layerprune.model.memory import in_halves
from layerprune.model.tail import Tail, frozen
from layerprune.model.tree import must_run_layer_by_layer

LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3}
MOMENTUM = 0.9
CLIP = 1.0
"""Largest norm of the gradient of all maps together."""
STATE = "training.safetensors"
_SLICE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of a slice of positions."""


@dataclass(frozen=True)
class Trained:
    """A trained lens and how it got there.

    kl_SL: float64 (steps, L), KL(final || lens) in nats, the mean over the tokens of each step before it was taken.
    tokens: real tokens of all steps, repeats counted again.
    """

    lens: TunedLens
    kl_SL: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class _Recipe:
    steps: int
    tokens_per_step: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    seed: int
    tap: str

    def check(self) -> None:
        if self.optimizer not in LEARNING_RATES:
            raise UsageError(f"optimizer {self.optimizer!r} is neither 'sgd' nor 'adam'")
        for name, least in (("steps", 1), ("tokens_per_step", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} is not a whole number above 0")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"learning_rate {self.learning_rate} is not a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay {self.weight_decay} is below 0 or no number")
        check_seed(self.seed)

    def made(self, parameters: list[Any]) -> Any:
        common = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=MOMENTUM, nesterov=True, **common)
        return torch.optim.Adam(parameters, betas=(MOMENTUM, 0.999), amsgrad=True, **common)


def train_lens(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    *,
    steps: int = 250,
    tokens_per_step: int = 1 << 18,
    optimizer: str = "sgd",
    learning_rate: float | None = None,
    weight_decay: float = 1e-3,
    seed: int = 0,
    tap: str = "input",
    model: str | None = None,
    max_tokens: int | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
    work: str | Path | None = None,
    save_every: int = 10,
    progress: Callable[[int, list[float]], None] = lambda step, kl_L: None,
) -> Trained:
    """Fit the maps of all layers at once to KL(final || lens), by the recipe of the tuned-lens library; the model is frozen.

    sequences: token ids, each seen alone from its first token on, at most the model's context long (`chunks` packs documents
    as the library does). Every epoch is shuffled by `seed`; a step takes whole sequences until it has `tokens_per_step`.
    optimizer: "sgd" (Nesterov, momentum 0.9; learning_rate 0.1 where None) or "adam" (amsgrad; 1e-3). The rate falls linearly to
    0, without a warm-up. weight_decay: of the maps towards the identity. The norm of the gradient is clipped at 1.0.
    model: the name kept in the lens, the config's where None. max_tokens: of one forward pass, padding included.
    One pass gives the states of all depths; the final distribution is computed once a slice of positions, then each layer's
    loss goes back by itself: memory for (L + 1) x max_tokens x D states and a few slices of logits.

    work: a folder for the state of the training, replaced in one step every `save_every` steps; the same call goes on from
    there and, on a CPU, ends with the same bytes as one that was never stopped. progress: the steps done, and KL by layer.
    Raises UsageError for arguments that are none, and for a `work` of other settings, data or model; Refused for a model that
    the layerwise pass does not serve exactly, for losses that are not finite, and where a GPU's memory does not suffice.
    """
    rate = LEARNING_RATES.get(optimizer, 1.0) if learning_rate is None else learning_rate
    recipe = _Recipe(steps, tokens_per_step, optimizer, rate, weight_decay, seed, tap)
    recipe.check()
    if save_every < 1:
        raise UsageError(f"save_every {save_every} is not a whole number above 0")
    vocab = vocab_size(decoder.model.config)
    data, lengths = _fingerprint(sequences, vocab)
    name = str(getattr(decoder.model.config, "_name_or_path", "")) if model is None else model
    with frozen(decoder.model):
        lens = TunedLens(len(decoder), lens_width(decoder), vocabulary=vocab, model=name, tap=tap, device=decoder.device)
        shape = {"layers": lens.layers, "width": lens.width, "vocabulary": vocab, "model": name}
        run = _Run(decoder, lens, recipe, max_tokens, pad_id, padding_side)
        folder = None if work is None else Path(work)
        settings = {**asdict(recipe), **shape, "dtype": str(decoder.model.dtype), "data": data}
        with _held(folder):
            if folder is not None:
                run.resume(folder / STATE, settings)
            for step, rows in enumerate(_plan(lengths, recipe)):
                if step < len(run.kl):
                    continue
                run.step([_ids(sequences[row]) for row in rows])
                if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                    run.save(folder / STATE, settings)
                progress(step + 1, run.kl[-1].tolist())
    return Trained(lens, torch.stack(run.kl), run.tokens)


@contextlib.contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """The work folder, made where it is not there, for this process alone."""
    if folder is None:
        yield
        return
    with made_folder(folder), locked(folder, "training a tuned lens"):
        yield


class _Run:
    """The training between two steps."""

    def __init__(
        self, decoder: Decoder, lens: TunedLens, recipe: _Recipe, max_tokens: int | None, pad_id: int, padding_side: str
    ) -> None:
        self.decoder, self.lens, self.recipe = decoder, lens, recipe
        self.tail = Tail(decoder)
        self.parameters = list(lens.parameters())
        self.optimizer = recipe.made(self.parameters)
        self.max_tokens, self.padding = max_tokens or _default_tokens(decoder), (pad_id, padding_side)
        self.kl: list[torch.Tensor] = []
        self.tokens = 0

    def step(self, sequences: list[list[int]]) -> None:
        total_L = torch.zeros(self.lens.layers, dtype=torch.float64, device=self.decoder.device)
        tokens = sum(map(len, sequences))
        try:
            for batch in batches(sequences, self.max_tokens, *self.padding):
                for states in _slices(self.decoder, batch):
                    self._backward(states, total_L)
        except torch.cuda.OutOfMemoryError as error:
            raise Refused(f"max_tokens {self.max_tokens} do not fit on the GPU: use fewer ({one_line(error)})") from error
        kl_L = total_L.cpu() / tokens
        step = len(self.kl)
        if not bool(torch.isfinite(kl_L).all()):
            bad = int((~torch.isfinite(kl_L)).nonzero()[0])
            raise Refused(
                f"the loss of layer {bad} is not a number at step {step + 1}: the model overflows in this dtype (try --dtype "
                f"float32), or learning_rate {self.recipe.learning_rate} is too large"
            )
        for parameter in self.parameters:
            parameter.grad.div_(tokens)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * (1 - step / self.recipe.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.kl.append(kl_L)
        self.tokens += tokens

    def _backward(self, states: list[torch.Tensor], total_L: torch.Tensor) -> None:
        """Add the gradients of one slice's summed KL, layer by layer; states: x^(l) (S, D) for l = 0..L."""
        with torch.no_grad():
            final_SV = _log_probabilities(self.tail, states[-1])
            p_SV = final_SV.exp()
        for layer in range(self.lens.layers):
            with torch.enable_grad():
                logits_SV = _logits(self.tail, self.lens(layer, states[self.lens.state(layer)]))
            with torch.no_grad():
                lens_SV = logits_SV.float().log_softmax(-1)
                total_L[layer] += (final_SV - lens_SV).mul_(p_SV).sum(dtype=torch.float64)
                gradient_SV = lens_SV.exp_().sub_(p_SV)  # of KL(p || softmax(logits)) by the logits
            logits_SV.backward(gradient_SV.to(logits_SV.dtype))

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {f"lens.{name}": tensor for name, tensor in self.lens.state_dict().items()} | {"kl": torch.stack(self.kl)}
        for index, held in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in held.items()}
        write_tensors(path, tensors, {"settings": json.dumps(settings), "tokens": str(self.tokens)})

    def resume(self, path: Path, settings: dict[str, Any]) -> None:
        """Take up the state at `path`, where there is one."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                before, tokens = json.loads(metadata["settings"]), int(metadata["tokens"])
                different = [key for key in settings if before.get(key) != settings[key]]
                if different:
                    key = different[0]
                    raise UsageError(
                        f"{path} is of a training with {key} {before.get(key)!r}, not {settings[key]!r}: choose another work folder"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    state.setdefault(int(index), {})[key] = tensor
            self.lens.load_state_dict({n.removeprefix("lens."): t for n, t in tensors.items() if n.startswith("lens.")})
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.kl, self.tokens = list(tensors["kl"]), tokens
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise Refused(f"{path} is no state of a tuned lens's training ({one_line(error)}): remove it to begin anew") from error


def evaluate_lens(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    lens: TunedLens | None,
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
    progress: Callable[[int], None] = lambda rows: None,
) -> LensSum:
    """Hold a tuned lens, or with None the logit lens at the layers' inputs, against the final prediction; all real tokens count.

    By layer, as `LensSum` says: KL in both directions in nats, the top-1 agreement, the overlap of the top 5. Where
    logits are equal to the bit, which of them is first is the library's choice. The lens may lie on any device; on the decoder's
    it is fastest. Raises UsageError for a lens of another shape, Refused for a model that the layerwise pass does not serve
    exactly, for values that are not finite, and where one sequence does not fit into the memory of a GPU.
    """
    vocab = vocab_size(decoder.model.config)
    made = [_ids(one) for one in sequences if len(one)]
    if not made:
        raise UsageError("no sequence has a token: nothing can be measured")
    check_token_id(max(map(max, made)), vocab)
    total = LensSum(len(decoder))
    with frozen(decoder.model):
        width = lens_width(decoder)
        if lens is not None:
            lens.must_fit(decoder, width)
        tail = Tail(decoder)

        def add(part: Sequence[int], batch: TokenBatch) -> None:
            if len(part) < len(batch.rows):
                again = [made[batch.rows[row]] for row in part]
                (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id, padding_side)
            found = LensSum(len(decoder))  # of this part alone: a half that does not fit must not count
            for states in _slices(decoder, batch):
                found.update(_compare(tail, lens, states), len(states[-1]))
            total.merge(found)

        for batch in batches(made, max_tokens or _default_tokens(decoder), pad_id, padding_side):
            in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
            progress(len(batch.rows))
    if not bool(torch.isfinite(total.total_4L).all()):
        raise Refused("the logits are not a number: the model or the lens overflows in this dtype (try --dtype float32)")
    return total


@torch.no_grad()
def _compare(tail: Tail, lens: TunedLens | None, states: list[torch.Tensor]) -> torch.Tensor:
    """The sums (4, L) that `LensSum` takes, of one slice."""
    final_SV = _logits(tail, states[-1])
    compare, final = comparison(final_SV.device.type), final_of(final_SV)
    sums = []
    for layer in range(len(states) - 1):
        hidden_SD = states[layer] if lens is None else lens(layer, states[lens.state(layer)])
        sums.append(compare(_logits(tail, hidden_SD), *final))
    return torch.stack(sums, dim=1)


def chunks(documents: Sequence[Sequence[int]], length: int, separator: int | None = None) -> list[list[int]]:
    """Documents end to end, `separator` (the end-of-text id) after each, cut into sequences of `length` tokens.

    As the tuned-lens library packs its data; what is left at the end is dropped. Raises UsageError where nothing is left.
    """
    if length < 1:
        raise UsageError(f"a length of {length} tokens is none")
    made: list[list[int]] = [[]]
    for document in documents:
        for token in [*_ids(document), *([] if separator is None else [separator])]:
            made[-1].append(token)
            if len(made[-1]) == length:
                made.append([])
    made.pop()
    if not made:
        raise UsageError(f"the {len(documents)} documents have fewer than {length} tokens together: shorten the sequences")
    return made


def lens_width(decoder: Decoder) -> int:
    """D of the states x^(l). Refused for a model whose states or whose end a lens cannot read."""
    must_run_layer_by_layer(decoder, "no lens can be read off its layers")
    hidden = Layerwise(decoder).begin(torch.ones((1, 2), dtype=torch.long)).start().hidden
    if hidden.dim() != 3:
        kind = type(decoder.model).__name__
        raise Refused(f"this {kind} carries several streams of states: a lens of one map a layer is not defined for it")
    return hidden.shape[-1]


def _default_tokens(decoder: Decoder) -> int:
    return 2048 if decoder.device.type == "cpu" else 8192


@torch.no_grad()
def _slices(decoder: Decoder, batch: TokenBatch) -> Iterator[list[torch.Tensor]]:
    """x^(l), l = 0..L, of all real tokens of a batch, from one forward pass: slice by slice L + 1 tensors (S, D)."""
    mask_BT = torch.ones_like(batch.ids_BT) if batch.mask_BT is None else batch.mask_BT
    row_N, position_N = mask_BT.nonzero(as_tuple=True)
    states: list[torch.Tensor] = []

    def see(layer: int, states_BTD: torch.Tensor) -> None:
        at = states_BTD.device
        picked = states_BTD[row_N.to(at), position_N.to(at)]  # a copy, which a layer that adds in place does not change
        states.append(picked.to(decoder.device))

    walk_states(decoder, batch.ids_BT, batch.mask_BT, see)
    if len(states) != len(decoder) + 1:
        kind = type(decoder.model).__name__
        raise Refused(f"this {kind} runs {len(states) - 1} of its {len(decoder)} layers on text alone: it has no lens")
    each = max(1, _SLICE["cpu" if decoder.device.type == "cpu" else "cuda"] // vocab_size(decoder.model.config))
    for at in range(0, len(row_N), each):
        yield [state[at : at + each] for state in states]


def _logits(tail: Tail, hidden_SD: torch.Tensor) -> torch.Tensor:
    """Logits (S, V): S rows of one position each, so that no position embedding ends and no mask is S x S."""
    return tail(hidden_SD[:, None])[:, 0]


def _log_probabilities(tail: Tail, hidden_SD: torch.Tensor) -> torch.Tensor:
    """Float32 (S, V)."""
    return _logits(tail, hidden_SD).float().log_softmax(-1)


def _ids(sequence: Any) -> list[int]:
    return sequence.tolist() if hasattr(sequence, "tolist") else list(sequence)


def _fingerprint(sequences: Sequence[Sequence[int]], vocab: int) -> tuple[str, list[int]]:
    """SHA-256 of the token ids and the lengths. Refused for ids that the model has not."""
    digest, lengths = hashlib.sha256(), []
    for sequence in sequences:
        ids = torch.tensor(_ids(sequence), dtype=torch.long)
        lengths.append(len(ids))
        if len(ids):
            check_token_id(int(ids.max()), vocab)
        digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    if not any(lengths):
        raise UsageError("no sequence has a token: nothing can be learnt from them")
    return digest.hexdigest(), lengths


def _plan(lengths: Sequence[int], recipe: _Recipe) -> Iterator[list[int]]:
    """The sequences of each step: whole ones until it has its tokens, every epoch in an order of its own."""
    order: list[int] = []
    epoch = 0
    for _ in range(recipe.steps):
        rows: list[int] = []
        tokens = 0
        while tokens < recipe.tokens_per_step:
            if not order:
                order = [row for row, length in enumerate(lengths) if length]
                random.Random(f"{recipe.seed}, epoch {epoch}").shuffle(order)
                epoch += 1
            rows.append(order.pop())
            tokens += lengths[rows[-1]]
        yield rows
