"""Derive vocab.json and merges.txt, CLIP's byte-pair encoding, from OpenAI's published merge list.

The list is the file bpe_simple_vocab_16e6.txt.gz of https://github.com/openai/CLIP (MIT licence); the wheels of
clip-anytorch and open-clip-torch carry the same bytes:

    pip download --no-deps clip-anytorch
    unzip -j clip_anytorch-*.whl clip/bpe_simple_vocab_16e6.txt.gz
    python data/make_vocab.py bpe_simple_vocab_16e6.txt.gz
"""

import argparse
import gzip
import json
from pathlib import Path

VOCAB_SIZE = 49_408
SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]
# 256 bytes, 256 bytes that end a word, and the special tokens need no merge. The list itself is longer than CLIP uses.
NUM_MERGES = VOCAB_SIZE - 2 * 256 - len(SPECIAL_TOKENS)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in the order of their ids (GPT-2's encoder.py::bytes_to_unicode).

    Printable Latin-1 characters stand for their own byte and come first; the other bytes, in ascending order, follow
    as U+0100, U+0101, ..., so that no token contains white space or a control character.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    num_unprintable = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(0x100, 0x100 + num_unprintable)]]


def read_merges(path: Path) -> list[str]:
    """The merges that CLIP uses, each `left right`, most frequent first. The first line of the file is a header."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + NUM_MERGES]


def build_vocab(merges: list[str]) -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, what each merge makes, special tokens."""
    alphabet = byte_alphabet()
    word_ends = [character + "</w>" for character in alphabet]
    merged = [merge.replace(" ", "") for merge in merges]
    return {token: i for i, token in enumerate([*alphabet, *word_ends, *merged, *SPECIAL_TOKENS])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merge_list", type=Path, help="path to bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: data/)")
    args = parser.parse_args()

    merges = read_merges(args.merge_list)
    vocab = json.dumps(build_vocab(merges), sort_keys=True, ensure_ascii=False, indent=2)
    # Bytes, not text: the files' hashes are tested, so no platform may change the encoding or the line ends.
    (args.out / "vocab.json").write_bytes(f"{vocab}\n".encode())
    (args.out / "merges.txt").write_bytes("\n".join(["#version: 0.2", *merges, ""]).encode())


if __name__ == "__main__":
    main()
