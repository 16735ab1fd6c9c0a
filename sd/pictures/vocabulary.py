"""Words of prompts that a small model has never seen: it would draw something, and nobody would know why.

A model that was trained on few words, as the demo model, has rows of zeros in its token table for all others.
"""

import difflib
import re
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sd.pictures.parameters import shown
from sd.pictures.plan import Job

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

WORD_END = "</w>"
MOST = 6
"""Words that one line names."""

_NOT_WORDS = re.compile(r"<lora:[^<>]*>|\bBREAK\b")
_LETTERS = re.compile(r"[^\W\d_]+")


def unknown_words(pipe: "StableDiffusion", jobs: Iterable[Job]) -> list[str]:
    """Of all these prompts, the words that the model has not learned, each once, in lower case."""
    words = dict.fromkeys(word for job in jobs for word in _words(pipe, job))
    return [word for word in words if not _is_known(pipe, word)]


def _words(pipe: "StableDiffusion", job: Job) -> Iterator[str]:
    texts = [_NOT_WORDS.sub(" ", text) for text in (job.prompt, job.negative_prompt) if text]
    if pipe.words:
        learned = re.compile("|".join(re.escape(word) for word in pipe.words.words), re.IGNORECASE)
        texts = [learned.sub(" ", text) for text in texts]
    return (word for text in texts for word in _LETTERS.findall(text.lower()))


def _is_known(pipe: "StableDiffusion", word: str) -> bool:
    """Whether the model has a row for each of its tokens."""
    ids = pipe.tokenizer.encode(word)[1:-1]
    return bool(_table(pipe)[ids].any(1).all())


def _table(pipe: "StableDiffusion"):
    """The token table, [tokens, C]."""
    return pipe.clip.embeddings.token_embedding.weight


def near(pipe: "StableDiffusion", words: Iterable[str]) -> dict[str, list[str]]:
    """For each word up to three that the model knows and that are spelled like it, or a part of it."""
    words = list(words)
    if not words:  # as of most prompts: the table is 49408 x 768 numbers to look through
        return {}
    known = _known_words(pipe)
    return {word: _near(word, known) for word in words}


_found: "weakref.WeakKeyDictionary[StableDiffusion, tuple[object, list[str]]]" = weakref.WeakKeyDictionary()
"""Of each pipeline, its token table's stamp when it was looked through, and the words that were found."""


def _known_words(pipe: "StableDiffusion") -> list[str]:
    """Those of one token; looked for again where the table was replaced or written to."""
    from sd.checkpoints.stamps import Stamp  # which imports torch

    now = Stamp([_table(pipe)])
    then, words = _found.get(pipe, (None, []))
    if now != then:
        words = list(_look_for_words(pipe))
        _found[pipe] = now, words
    return words


def _look_for_words(pipe: "StableDiffusion") -> Iterator[str]:
    """Shorter ones are mostly pieces of others."""
    names = pipe.tokenizer.names(_table(pipe).any(1).nonzero().flatten().tolist())
    words = (name.removesuffix(WORD_END) for name in names if name.endswith(WORD_END))
    return (word for word in words if len(word) > 2 and word.isalpha())


def _near(word: str, known: list[str]) -> list[str]:
    """foxes: fox. lighthouse: house, light. storm: thunderstorm. aple: maple, apple."""
    stems = [one for one in known if word.startswith(one) and len(word) - len(one) <= 3]
    parts = [one for one in known if (len(one) > 4 and one in word) or (len(word) > 3 and word in one)]
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.85)
    found = dict.fromkeys([*sorted(stems, key=len, reverse=True)[:1], *sorted(parts, key=len), *close])
    return list(found)[:3]


def notice(pipe: "StableDiffusion", jobs: Iterable[Job]) -> str:
    """One line about the words of all these prompts that the model has not learned, with what is near; "" for none."""
    words = unknown_words(pipe, jobs)
    if not words:
        return ""
    named = (
        f"{shown(word)} (near: {', '.join(others)})" if others else shown(word)
        for word, others in near(pipe, words[:MOST]).items()
    )
    more = f" and {len(words) - MOST} others" if len(words) > MOST else ""
    return f"the model has not learned {', '.join(named)}{more}, and draws something else for them"
