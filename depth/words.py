"""Are function words decided earlier than content words? Words by part of speech (arXiv 2510.18871, case study 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from layerprune.depth.decided import DecidedSum, Marked, decided_probe
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused, one_line

TAGS = ("DET", "ADP", "PUNCT", "VERB", "NOUN", "ADJ")
"""The tags that are told apart (Universal Dependencies); words of others are not looked at."""

Tagger = Callable[[str], Sequence[tuple[int, int, str]]]
"""Text -> its words as (start, end, tag), characters of the text, the end not included."""


def spacy_tagger(name: str = "en_core_web_sm") -> Tagger:
    """spaCy's tags. Raises Refused where spaCy or its model is not installed, or they do not go together."""
    try:
        import spacy
    except ImportError:
        raise Refused("spaCy, which tells the parts of speech, is not installed: pip install 'layerprune[words]'") from None
    try:
        # the parser stays: the tags of about one word in a hundred hang on it
        language = spacy.load(name, exclude=["ner", "lemmatizer"])
    except OSError:
        raise Refused(f"spaCy's model {name} is not installed: python -m spacy download {name}") from None
    except (ImportError, ValueError, KeyError, AttributeError) as error:  # a model of another version of spaCy
        raise Refused(f"spaCy's model {name} cannot be loaded: {one_line(error)}") from error

    def tag(text: str) -> list[tuple[int, int, str]]:
        return [(word.idx, word.idx + len(word.text), word.pos_) for word in language(text)]

    return tag


def words_probe(
    decoder: Decoder,
    tokenizer: Any,
    documents: Sequence[str],
    tagger: Tagger,
    *,
    length: int = 512,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> DecidedSum:
    """When the first tokens of words are decided, by the words' tags, over documents cut at `length` tokens.

    Counted are tokens with which a word of `TAGS` begins and that the model predicts from all that stands before; the paper
    takes the first word of each tag in a sentence and at least 17 characters before it. The rest of a word is not looked at.
    Raises Refused for a tokenizer that does not tell where its tokens lie, and for documents without such words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Refused("parts of speech need a fast tokenizer, which tells where in the text its tokens lie; this one is a slow one")
    marked = [mark_words(tokenizer, text, tagger, length) for text in documents]
    texts = [text for text in marked if text.marks]
    if not texts:
        raise Refused(
            f"no word of the {len(documents)} documents is tagged {', '.join(TAGS[:-1])} or {TAGS[-1]}: nothing can be probed"
        )
    total = decided_probe(decoder, texts, TAGS, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
    total.left_out = len(documents) - len(texts)
    return total


def mark_words(tokenizer: Any, text: str, tagger: Tagger, length: int) -> Marked:
    """The ids of a text, and of these the ones with which words of `TAGS` begin; the very first token has no prediction."""
    encoded = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"][:length], encoded["offset_mapping"][:length]
    seen = max((end for _, end in spans), default=0)
    # up to the end of the word that the last token lies in: half a word would get a tag of its own
    rest = re.compile(r"\S*").match(text, seen)
    tags = {start: tag for start, _, tag in tagger(text[: rest.end() if rest else seen])}
    marks = []
    for at, (start, end) in enumerate(spans):
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip())  # some tokenizers count the blank before a word to its token
        if start < end and tags.get(start) in TAGS:
            tag = tags.pop(start)  # the bytes of one character are several tokens that all lie there
            if at > 0:
                marks.append((at, TAGS.index(tag)))
    return Marked(ids, marks)
