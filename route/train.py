"""Train the routers on labelled paths (arXiv 2510.12773, section 3.2 and appendix D); the base model takes no part.

AdamW, a cosine with a linear warm-up, focal loss with weights from the data's own class counts. The routers have no norm, and
streams of some models are a hundred times as large as those of others: while they are trained each layer's states are divided
by their size, which goes into the first weights in the end. That is ours; the routers' form is the paper's.

After every epoch all that is needed to go on is written, and the order of an epoch hangs on the seed and its number alone: a
killed training that goes on ends with the very weights of one that was not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.files import no_space_refusal
from layerprune.route.features import Features
from layerprune.route.loss import class_weights, focal_loss
from layerprune.route.paths import ACTIONS, EXECUTE
from layerprune.route.router import CLASSES, Routers


@dataclass(frozen=True)
class TrainSettings:
    """warmup: steps, but at most a tenth of all. held_out: items that are not trained on, a tenth (at least one) where None.
    scaled: whether states are divided by their size while training.

    Raises UsageError for values out of range.
    """

    epochs: int = 25
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 500
    held_out: int | None = None
    seed: int = 0
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.warmup < 0:
            raise UsageError(f"{self.epochs} epochs in batches of {self.batch} after a warm-up of {self.warmup} are no training")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise UsageError(f"learning rate {self.learning_rate:g} must be above 0, weight decay {self.weight_decay:g} 0 or more")
        if self.held_out is not None and self.held_out < 1:
            raise UsageError("at least one item must be held out: without one nobody knows what the routers learnt")

    def split(self, items: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the items that are trained on, and of those that are held out."""
        out = max(1, items // 10) if self.held_out is None else self.held_out
        if out >= items:
            raise UsageError(f"{items} labelled prompts with {out} held out leave none to train on")
        order_N = torch.randperm(items, generator=torch.Generator().manual_seed(self.seed))
        return order_N[out:].sort().values, order_N[:out].sort().values

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step (from 0) of `steps`."""
        warm = min(self.warmup, steps // 10)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def train_routers(
    features: Features,
    settings: TrainSettings,
    folder: Path,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda epochs: None,
) -> tuple[Routers, dict[str, Any]]:
    """Train routers, and say how well they choose on the held-out items (`scores`).

    folder: where `training.pt` is kept between epochs; a call with the same features and settings goes on there. progress is
    told epochs as they are done. Returns the routers on the CPU, and a report: items, classes of the training labels, alpha,
    the mean loss of each epoch, that of the held-out items after each, and their scores. Raises UsageError for too few items,
    Refused for a folder with another training, and for a loss that is not a number.
    """
    train_N, held_N = settings.split(len(features.labels_NL))
    classes = torch.bincount(features.labels_NL[train_N].flatten(), minlength=CLASSES).tolist()
    alpha_C = class_weights(classes).to(device)
    items, layers, _, width = features.pooled_NLWD.shape
    routers = Routers(layers, width, settings.seed).to(device)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    run = {"features": features.key, **asdict(settings)}
    scale_L = state_sizes(features, train_N, settings.batch).reciprocal() if settings.scaled else torch.ones(layers)
    scale_L11 = scale_L.to(device)[:, None, None]

    def mean_loss(part_B: torch.Tensor) -> torch.Tensor:
        pooled_BLWD = features.pooled_NLWD[part_B].to(device) * scale_L11
        return focal_loss(routers(pooled_BLWD, features.real_NW[part_B].to(device)), features.labels_NL[part_B].to(device), alpha_C)

    losses, held = _resume(folder, run, routers, optimizer)
    progress(len(losses))
    a_epoch = -(-len(train_N) // settings.batch)
    for epoch in range(len(losses), settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order_N = train_N[torch.randperm(len(train_N), generator=generator)]
        total = 0.0
        for at, part_B in enumerate(order_N.split(settings.batch)):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(epoch * a_epoch + at, settings.epochs * a_epoch)
            loss = mean_loss(part_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part_B)
        losses.append(total / len(train_N))
        if not math.isfinite(losses[-1]):
            raise Refused(f"the routers' loss in epoch {epoch + 1} is not a number: use a smaller learning rate")
        with torch.no_grad():
            held.append(sum(float(mean_loss(part_B)) * len(part_B) for part_B in held_N.split(settings.batch)) / len(held_N))
        _save(folder, run, routers, optimizer, losses, held)
        progress(1)
    routers.eval()
    with torch.no_grad():
        routers.up_LHD.mul_(scale_L11)
    confusion_CC = _confusion(routers, features, held_N, device, settings.batch)
    report = {
        "items": items, "trained_on": len(train_N), "classes": dict(zip(ACTIONS, classes, strict=True)),
        "alpha": alpha_C.tolist(), "losses": losses, "held_out_losses": held, "held_out": scores(confusion_CC),
    }  # fmt: skip
    return routers.cpu(), report


def state_sizes(features: Features, items_N: torch.Tensor, batch: int) -> torch.Tensor:
    """(L,), the root mean square of what enters each layer, over items, their windows and features; 1 where that is 0."""
    total_L, count = torch.zeros(features.pooled_NLWD.shape[1], dtype=torch.float64), 0
    for part_B in items_N.split(batch):
        real_BW = features.real_NW[part_B]
        pooled_BLWD = features.pooled_NLWD[part_B].double() * real_BW[:, None, :, None]
        total_L += pooled_BLWD.square().sum(dim=(0, 2, 3))
        count += int(real_BW.sum()) * pooled_BLWD.shape[-1]
    size_L = (total_L / count).sqrt().float()
    return torch.where(size_L > 0, size_L, 1.0)


@torch.no_grad()
def _confusion(routers: Routers, features: Features, held_N: torch.Tensor, device: str, batch: int) -> torch.Tensor:
    """(true class, chosen class) counts over the held-out items' layers, along their labelled paths."""
    found_CC = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for part_B in held_N.split(batch):
        logits_BLC = routers(features.pooled_NLWD[part_B].to(device), features.real_NW[part_B].to(device))
        pair = features.labels_NL[part_B] * CLASSES + logits_BLC.argmax(dim=-1).cpu()
        found_CC += torch.bincount(pair.flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    return found_CC


def scores(confusion_CC: torch.Tensor) -> dict[str, Any]:
    """Precision, recall and F1 of each class from (true, chosen) counts, shares from 0 to 1.

    None where a share has no denominator: precision of a class never chosen, recall of one that is not there, F1 of one that
    is neither. macro_f1 is the mean F1 of the classes that are there. accuracy is to be read beside always_execute, the
    accuracy of routers that execute every layer, since most labels are "execute".
    """
    count = confusion_CC.tolist()
    total = sum(map(sum, count))
    found: dict[str, Any] = {"layers": total, "confusion": count, "precision": {}, "recall": {}, "f1": {}}
    for c, name in enumerate(ACTIONS):
        right, true, chosen = count[c][c], sum(count[c]), sum(row[c] for row in count)
        found["precision"][name] = right / chosen if chosen else None
        found["recall"][name] = right / true if true else None
        found["f1"][name] = 2 * right / (true + chosen) if true + chosen else None
    there = [found["f1"][name] for c, name in enumerate(ACTIONS) if sum(count[c])]
    found["macro_f1"] = sum(there) / len(there)
    found["accuracy"] = sum(count[c][c] for c in range(CLASSES)) / total
    found["always_execute"] = sum(count[EXECUTE]) / total
    return found


def _save(folder: Path, run: dict[str, Any], routers: Routers, optimizer: Any, losses: list[float], held: list[float]) -> None:
    path = folder / "training.pt"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    state = {"run": run, "routers": routers.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "held": held}
    try:
        with no_space_refusal(path, "the epoch before stays"):
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _resume(folder: Path, run: dict[str, Any], routers: Routers, optimizer: Any) -> tuple[list[float], list[float]]:
    """Take over what an earlier call has left; returns the losses of the epochs that are done, trained on and held out."""
    path = folder / "training.pt"
    if not path.exists():
        return [], []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        same = state["run"] == run
    except Exception as error:  # whatever a broken archive raises
        raise Refused(f"{path} cannot be read ({one_line(error)}): remove it to train anew") from error
    if not same:
        raise Refused(f"{path} belongs to a training with other prompts or settings: choose another folder or remove it")
    routers.load_state_dict(state["routers"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"]), list(state["held"])
