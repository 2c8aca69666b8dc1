"""The probe `tuned`: a tuned lens, loaded or trained, beside the logit lens."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from layerprune.depth_subject import Loaded
from layerprune.model.errors import Refused, UsageError

TOKENS_A_STEP = 1 << 13
"""Of training; the tuned-lens library takes 2^18, which is for GPUs and much more data."""
FOLDER = "tuned-lens"


def lens_folder(given: str | Path) -> Path:
    """The folder of `--lens`, or of the file in it that was given. Raises UsageError where there is none."""
    path = Path(given).expanduser()
    if not path.exists():
        raise UsageError(f"--lens {given} does not exist")
    return path if path.is_dir() else path.absolute().parent


def tuned(loaded: Loaded) -> dict[str, Any]:
    """tuned.json: by layer, KL in nats (both directions), overlap of the top 5 and top-1 agreement of the tuned lens (`tuned`) and
    of the logit lens (`logit`), over the same documents, against the final prediction; `training` where one was trained.

    A trained lens is kept in <label>/tuned-lens, and its training in .work until it is done.
    """
    from layerprune.depth.tuned import evaluate_lens
    from layerprune.depth.tuned_file import load_lens
    from layerprune.model.progress import progress_bar

    decoder, training = loaded.decoder, None
    if loaded.ask.lens is not None:
        lens = load_lens(loaded.ask.lens)
    else:
        training = loaded.opened.once(f"{loaded.subject.label}/{FOLDER}.json", lambda: _train(loaded))
        asked = loaded.ask.settings("tuned", loaded.subject)
        if training["asked"] != asked:
            raise UsageError(
                f"{loaded.opened.path / loaded.subject.label / FOLDER} was trained with other settings ({training['asked']}, now "
                f"{asked}): choose another --out"
            )
        lens = load_lens(loaded.opened.path / loaded.subject.label / FOLDER)
    found: dict[str, Any] = {}
    for name, one in (("tuned", lens.to(decoder.device)), ("logit", None)):
        with progress_bar(len(loaded.sequences), f"{name} lens", "doc", loaded.ask.progress) as bar:
            total = evaluate_lens(decoder, loaded.sequences, one, progress=bar.update)
        found[name] = total.result()
    return {**found, "tokens": total.tokens, "tap": lens.tap, "lens_of": lens.model, "training": training}


def _train(loaded: Loaded) -> dict[str, Any]:
    """Train a lens into <label>/tuned-lens; returns how it went, and on what."""
    from layerprune.depth.tuned import train_lens
    from layerprune.depth.tuned_file import save_lens
    from layerprune.model.data import document_hash
    from layerprune.model.progress import progress_bar

    subject, steps = loaded.subject, loaded.ask.lens_steps
    assert steps is not None
    texts, sequences, left_out = training_documents(loaded, steps * TOKENS_A_STEP)
    work = loaded.opened.work / subject.label / f"lens-{steps}"
    work.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(steps, "training the lens", "step", loaded.ask.progress) as bar:

        def told(step: int, kl_L: list[float]) -> None:
            bar.update(step - bar.n)

        done = train_lens(
            loaded.decoder, sequences, steps=steps, tokens_per_step=TOKENS_A_STEP, optimizer="adam", seed=loaded.ask.seed,
            model=subject.source.name, work=work, progress=told,
        )  # fmt: skip
    folder = loaded.opened.path / subject.label / FOLDER
    if folder.exists():  # of a call that was killed between the lens and its record
        shutil.rmtree(folder)
    save_lens(done.lens, folder)
    return {
        "asked": loaded.ask.settings("tuned", subject),
        "steps": steps,
        "tokens": done.tokens,
        "documents": len(texts),
        "left_out": left_out,
        "hash": _hash(map(document_hash, texts)),
        "evaluated_hash": _hash(map(document_hash, loaded.documents)),
        "kl_first": done.kl_SL[0].tolist(),
        "kl_last": done.kl_SL[-1].tolist(),
    }


def training_documents(loaded: Loaded, tokens: int) -> tuple[list[str], list[list[int]], int]:
    """Documents for training until they hold `tokens`, their token ids, and how many that are evaluated were left out.

    None is one that is evaluated, by `document_hash`. Raises Refused where nothing else is there.
    """
    from layerprune.model.data import document_hash, stream_documents, tokenise

    subject, ask = loaded.subject, loaded.ask
    held = set(map(document_hash, loaded.documents))
    texts: list[str] = []
    sequences: list[list[int]] = []
    left_out = 0
    stream = stream_documents(subject.lens_data, "train", ask.seed)
    while sum(map(len, sequences)) < tokens and (some := list(islice(stream, 256))):
        fresh = [text for text in some if document_hash(text) not in held]
        left_out += len(some) - len(fresh)
        texts += fresh
        sequences += tokenise(loaded.tokenizer, fresh, subject.length) if fresh else []
    if not sequences:
        raise Refused(
            f"all {left_out} documents of {subject.lens_data} are evaluated, and none is left to train a lens on: give fewer "
            "--samples, or a lens with --lens"
        )
    return texts, sequences, left_out


def _hash(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
