"""What a healing tells people: its cost, its settings and where they came from, its plan, its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.heal.memory import Memory
from layerprune.heal.settings import Healing
from layerprune.heal.world import world_size


def cost_line(settings: Healing) -> str:
    """What a healing will cost in steps and tokens, for people."""
    where = {"paper": "the paper's settings", "ours": "our settings"}
    others = sorted({where[o] for key, o in settings.origin.items() if o in where and key not in ("seed", "micro_batch")})
    return (
        f"healing: {settings.steps:,} steps of {settings.batch_size} x {settings.length} = {settings.tokens:,} tokens of "
        f"{settings.data}, LoRA rank {settings.lora_rank}, peak learning rate {settings.learning_rate:g}"
        + (f" ({', '.join(others)} where you gave none)" if others else "")
    )


def origin_lines(settings: Healing) -> str:
    """Every setting with where it came from, for people."""
    shown = {**settings.record(), "lora_alpha": settings.lora_rank, "targets": ", ".join(settings.targets) or "the MLP's"}
    by: dict[str, list[str]] = {}
    for key, value in shown.items():
        who = settings.origin.get(key, settings.origin["lora_rank"])
        if value is not None and (value != 0.0 or who == "user"):
            by.setdefault(who, []).append(f"{key} {value}")
    return "\n".join(f"  {who}: {', '.join(by[who])}" for who in ("user", "paper", "ours") if who in by)


def plan_line(memory: Memory, student: Any, settings: Healing) -> str:
    """What the memory plan keeps, and the hours that the measured step makes, for people."""
    from layerprune.heal.memory import GIB, trained_layers
    from layerprune.heal.watch import duration

    trained, layers = len(trained_layers(student)), len(student.decoder)
    share = settings.batch_size // world_size()
    told = [f"{memory.micro_batch} of {share} sequences at once"]
    told.append(f"weights decoded in {memory.decoded} of {layers} layers")
    kept = f"activations of {trained - memory.recomputed} of {trained} trained layers kept"
    told.append(kept + (", the others computed again" if memory.recomputed else ""))
    if memory.compiled:
        told.append("layers compiled")
    line = "plan: " + "; ".join(told)
    if memory.estimate is not None:
        line += f"; at most {memory.estimate / GIB:.1f} GiB"
    if memory.seconds:
        rate = settings.batch_size * settings.length / memory.seconds
        line += f"\nmeasured: {memory.seconds:.3g} s a step, {rate:,.0f} tokens/s: {settings.steps:,} steps take about "
        line += duration(memory.seconds * settings.steps)
    return line


def format_healing(result: Mapping[str, Any], out: str | None) -> str:
    """The result of `heal_checkpoint` for people."""
    from layerprune.heal.bridge import format_bridges

    if "losses" not in result:  # bridged, and not trained
        return "\n".join([*format_bridges(result), *([f"checkpoint: {out}"] if out is not None else [])])
    losses, seconds = result["losses"], result["seconds"]
    taught = ", distillation's part included," if result["settings"].get("distil") else ""
    chosen = ", ".join(f"{key} {value}" for key, value in _told(result).items())
    lines = [
        f"{result['model']}: {result['steps']:,} steps, {result['tokens']:,} tokens of {result['documents']:,} documents",
        f"settings: {chosen}",
        f"trained: {result['trainable']:,} parameters in {', '.join(result['modules'])} ({result['quantisation']})",
        f"training loss {losses['first']:.4f} -> {losses['last']:.4f} nats a token{taught} in {seconds['train']:,.0f} s; merged in "
        f"{seconds['merge']:,.0f} s",
        *_held_out(result),
        f"adapter: {result['adapter'] if out is None else Path(out) / result['adapter']}",
    ]
    return "\n".join(lines + ([f"checkpoint: {out}"] if out is not None else []))


def _held_out(result: Mapping[str, Any]) -> list[str]:
    """The held-out loss at both ends, where it was measured there."""
    measured = result.get("held_out") or []
    if len(measured) < 2:
        return []
    return [f"held-out loss {measured[0][1]:.4f} -> {measured[-1][1]:.4f} (normalised)"]


def _told(result: Mapping[str, Any]) -> dict[str, str]:
    settings, origin = result["settings"], result["origin"]
    wanted = ("lora_rank", "learning_rate", "batch_size", "length", "warmup_steps", "dropout")
    return {key: f"{settings[key]:g} ({origin[key]})" for key in wanted}
