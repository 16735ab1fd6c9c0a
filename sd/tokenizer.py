"""CLIP's tokenizer: text to the ids that the text encoder reads, by byte-pair encoding over data/.

Ids equal those of transformers' CLIPTokenizer, which Stable Diffusion was trained with. OpenAI's own tokenizer also
repairs text with ftfy and unescapes HTML; this one does not: `&amp;` stays five characters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Pipeline

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DATA = Path(__file__).resolve().parent.parent / "data"
START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
# OpenAI's pattern: a special token, a contraction, a run of letters, a digit, a run of what else is not white space.
# Special tokens are gone before it runs, but lower-casing can make new ones: `!<|ENDOFTEXT|>` splits after the `!`.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text to ids and back; `tokenizer(prompts)` gives the padded batch that the text encoder takes.

    Args:
        vocab: JSON object, token -> id; default data/vocab.json.
        merges: merges, one a line, most frequent first; default data/merges.txt.
        pad: the id that follows the end id in what is shorter than the batch; default the end id.

    `on_cut(tokens, length, text)` is told of a prompt that has more tokens than the model reads, with the text of those
    that are left out; at first that is a warning in the log.

    Raises:
        FileNotFoundError: one of the two does not exist.
        ValueError: they do not hold a vocabulary and its merges.
    """

    def __init__(self, vocab: Path | None = None, merges: Path | None = None, pad: int | None = None) -> None:
        self._pipeline = build_pipeline(read_bpe(vocab or DATA / "vocab.json", merges or DATA / "merges.txt"))
        self.start_id: int = self._pipeline.token_to_id(START)
        self.end_id: int = self._pipeline.token_to_id(END)
        self.pad_id: int = self.end_id if pad is None else pad
        self.on_cut: Callable[[int, int, str], None] = warn_of_cut

    def encode(self, text: str) -> list[int]:
        """Ids of the whole text, however long, between a start and an end id.

        The strings `<|startoftext|>` and `<|endoftext|>` inside the text become the special ids, as in transformers.

        Raises:
            ValueError: the text holds a lone surrogate, such as a terminal that is not UTF-8 can produce.
        """
        try:
            return self._pipeline.encode(text).ids
        except TypeError as error:  # all that `tokenizers` says of a surrogate is that it wants a string
            raise ValueError(f"prompt is not valid Unicode text: {text!r}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Lower-case text of the ids (a list or a 1-D tensor), without special tokens.

        Every token that ends a word is followed by a space, punctuation too: `a cat, asleep` returns as
        `a cat , asleep`. Where the ids stop inside a character, U+FFFD stands for it.
        """
        text = self._pipeline.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.replace(WORD_END, " ").strip()

    def names(self, ids: Iterable[int]) -> list[str]:
        """The tokens as data/vocab.json spells them: `fox</w>` ends a word."""
        return [self._pipeline.id_to_token(i) for i in ids]

    def __call__(self, prompts: str | Sequence[str], length: int = 77) -> torch.LongTensor:
        """Ids of a batch, [B, length] int64; one prompt is a batch of one.

        A short prompt is padded with `pad_id`. A long one keeps its first `length - 1` ids and the end id, and what was
        cut is logged as a warning.

        Raises:
            ValueError: a prompt is not valid Unicode, or `length` is under 2 and cannot hold the start and end ids.
        """
        import torch  # here, because it takes far longer to import than the rest of this file

        if length < 2:
            raise ValueError(f"length must be at least 2, for the start and end ids; got {length}")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.fit(self.encode(prompt), length) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)

    def fit(self, ids: list[int], length: int) -> list[int]:
        """Pad or cut `ids`, which end in the end id, to `length`; `on_cut` is told of what was cut."""
        if len(ids) <= length:
            return ids + [self.pad_id] * (length - len(ids))
        self.on_cut(len(ids), length, self.decode(ids[length - 1 :]))
        return [*ids[: length - 1], self.end_id]


def warn_of_cut(tokens: int, length: int, text: str) -> None:
    message = "prompt has %d tokens with start and end, but the model reads %d; ignored from here on: %r"
    logger.warning(message, tokens, length, text)


def read_bpe(vocab: Path, merges: Path) -> models.BPE:
    """Read the byte-pair model; see Tokenizer for the files and the errors."""
    for path in (vocab, merges):
        if not Path(path).is_file():  # `tokenizers` would not say which of the two is missing
            raise FileNotFoundError(f"tokenizer file not found: {path}")
    try:
        return models.BPE.from_file(str(vocab), str(merges), unk_token=END, end_of_word_suffix=WORD_END)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"cannot read a vocabulary from {vocab} and {merges}: {error}") from error


def build_pipeline(bpe: models.BPE) -> Pipeline:
    """Normalise, split into words, merge the bytes of each into tokens, add the start and end tokens."""
    pipeline = Pipeline(bpe)
    # The order matters: J and a caron stay two characters, since only their lower case has a composed form.
    # CLIPTokenizer also collapses white space here, which cannot change an id: the split drops all of it.
    pipeline.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # ByteLevel splits once more, by GPT-2's pattern, as in CLIPTokenizer: a lower-cased `<|ENDOFTEXT|>` becomes three
    # words, and with use_regex=False it would get other ids.
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([START, END])  # found before the text is lower-cased: `<|ENDOFTEXT|>` is plain text
    start, end = ((token, pipeline.token_to_id(token)) for token in (START, END))
    pipeline.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return pipeline
