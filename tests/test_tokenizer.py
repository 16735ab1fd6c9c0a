"""sd.tokenizer against transformers' CLIPTokenizer, and its batches, warnings and errors."""

import hashlib
import json
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sd.tokenizer import DATA, END, START, Tokenizer

START_ID, END_ID = 49406, 49407
CONTEXT = 77

# Each aims at one stage: normalisation, lower-casing, splitting, bytes, special tokens.
CORNER_CASES = [
    "",
    " \t\r\n\v\f\x1c\x85\xa0\u2028\u3000",
    "\x00\x01\x7f\x80\ufffd\ufffe\uffff",
    "\u200b\u200d\u2060\ufeff\xad",
    "a photo of an ASTRONAUT riding a horse, 4k (highly detailed:1.2)",
    "I'M it's they'RE don't we'll 'tis rock'n'roll ''s ’s",
    "İ ı ſ ß ẞ Ǆ ǅ ΑΣ ΑΣΑ Å K Ω ﬁ ꭰ Ა",  # odd casing: one to many, final sigma, compatibility letters
    "e\u0301 \u00e9 q\u0307\u0323 \u0958 \u1100\u1161\u11a8 각 \u0344 \ufb1d",  # composed, reordered, excluded from NFC
    "J\u030c H\u0331 T\u0308 \u0301a \u0301 a\u0300\u0301\u0302\u0303",
    "3.14 １２ ² ½ Ⅷ ⅷ ٣ 四 1st 2D 1000000",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 ☃️ 1️⃣",
    "日本語のプロンプト, คนขี่ม้า, नमस्ते क्षि, العربية, עברית, Ελληνικά",
    f"a{START}b{END}c {END} {START}{START} {END}",
    f"!!{START.upper()}!! <|Endoftext|>'s <|endoftext |> <|endof{END}text|>",
    "<|İ|> </w> a</w>b #version: 0.2 Ġ ġ Ċ &amp; \\n",
    "x" * 5000,
    "!?" * 2500,
    "\U0001f600" * 1000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    # In transformers 5, `vocab_file=` is accepted and ignored: it leaves a vocabulary of three tokens.
    return CLIPTokenizer(vocab=str(DATA / "vocab.json"), merges=str(DATA / "merges.txt"))


def texts() -> st.SearchStrategy[str]:
    """Text of every Unicode category but surrogates, mixed with what CLIP's rules treat specially."""
    anything = st.characters(exclude_categories=["Cs"])
    invisible = st.characters(categories=["Cc", "Cf", "Mn", "Mc", "Me", "Zs", "Zl", "Zp"])
    cased = st.characters(categories=["Lu", "Lt"]) | st.sampled_from("İıſßẞǅΣςﬁÅ")
    pieces = [
        " ",
        "a cat",
        "12",
        "'s",
        "'LL",
        "’s",
        "</w>",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "e\u0301",
        START,
        END,
        START.upper(),
        f"!{END.upper()}",
    ]
    part = st.text(anything, max_size=12) | st.text(invisible, max_size=4) | st.text(cased, max_size=4)
    return st.lists(part | st.sampled_from(pieces), max_size=12).map("".join)


def words(count: int) -> str:
    """`count` words of one token each, so `count + 2` tokens."""
    return " ".join(str(i % 10) for i in range(count))


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("vocab.json", "469be27c5c010538f845f518c4f5e8574c78f7c8"),
        ("merges.txt", "76e821f1b6f0a9709293c3b6b51ed90980b3166b"),
    ],
)
def test_files_are_the_published_ones(name, blob):
    """Their git blob hashes are those of the folder tokenizer/ in Stable Diffusion 1.5's repository."""
    content = (DATA / name).read_bytes()
    assert hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob


@pytest.mark.parametrize("text", CORNER_CASES, ids=range(len(CORNER_CASES)))
def test_corner_cases_equal_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


# 100 examples of 100 texts each: a call for every one of 10,000 would spend its time in hypothesis and transformers.
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(texts(), min_size=100, max_size=100))
def test_random_text_equals_transformers(tokenizer, reference, batch):
    expected = reference(batch).input_ids
    assert [tokenizer.encode(text) for text in batch] == expected
    assert [tokenizer.decode(ids) for ids in expected] == reference.batch_decode(expected, skip_special_tokens=True)


def test_every_code_point_equals_transformers(tokenizer, reference):
    """Each assigned code point, alone and where its class decides the split and its case the bytes."""
    characters = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in {"Cs", "Co", "Cn"}]
    lines = ["".join(f"{c} a{c}1" for c in characters[i : i + 64]) for i in range(0, len(characters), 64)]
    assert [tokenizer.encode(line) for line in lines] == reference(lines).input_ids


@pytest.mark.parametrize("count", [0, 1, 76, 77, 78, 200])
def test_batch_equals_transformers(tokenizer, reference, count):
    """`count` tokens, start and end included (0 stands for the empty prompt, of two)."""
    prompts = [words(max(count - 2, 0)), "a cat", f"a {END} b"]
    ids = tokenizer(prompts)
    expected = reference(prompts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    assert ids.shape == (3, CONTEXT)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.input_ids)


def test_one_prompt_is_a_batch_of_one(tokenizer):
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    assert tokenizer("a cat").tolist() == [[START_ID, 320, 2368] + [END_ID] * 74]


def test_other_lengths(tokenizer):
    assert tokenizer("a cat", length=4).tolist() == [[START_ID, 320, 2368, END_ID]]
    assert tokenizer("a cat", length=3).tolist() == [[START_ID, 320, END_ID]]
    assert tokenizer([], length=5).shape == (0, 5)
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer("a cat", length=1)


def test_special_ids(tokenizer):
    assert (tokenizer.start_id, tokenizer.end_id) == (START_ID, END_ID)


@pytest.mark.parametrize("count", [75, 76, 77])
def test_no_warning_when_nothing_is_cut(tokenizer, caplog, count):
    tokenizer(words(count - 2))
    assert not caplog.records


@pytest.mark.parametrize("cut", ["castle", "castle, at Dawn", "castle " * 100])
def test_warning_prints_what_was_cut(tokenizer, caplog, cut):
    tokenizer(["a cat", f"{words(75)} {cut}"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "sd.tokenizer"
    assert repr(tokenizer.decode(tokenizer.encode(cut))) in record.message
    assert f"{len(tokenizer.encode(cut)) + 75} tokens" in record.message
    assert "reads 77" in record.message


def test_warning_is_one_line(tokenizer, caplog):
    """A prompt is untrusted text: its control characters must not reach a terminal or forge a line of a log."""
    tokenizer(f"{words(75)} \x1b[31m \x08 \U0001f600")
    assert caplog.records[0].message.isprintable()


def test_decode_takes_tensors_and_half_characters(tokenizer):
    assert tokenizer.decode(tokenizer("A cat,  asleep")[0]) == "a cat , asleep"
    first_half = tokenizer.encode("\U00010348")[1:3]
    assert "\ufffd" in tokenizer.decode(first_half)


def test_bytes_missing_from_a_vocabulary_become_the_end_id(tmp_path):
    """CLIP's vocabulary holds every byte; another one may not, and then each unknown byte counts."""
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"a": 0, "a</w>": 1, "aa</w>": 2, START: 3, END: 4}))
    merges.write_text("#version: 0.2\na a</w>\n")
    ids = Tokenizer(vocab, merges).encode("aa xyz a")
    assert ids == [3, 2, 4, 4, 4, 1, 4]
    assert ids == CLIPTokenizer(vocab=str(vocab), merges=str(merges))("aa xyz a").input_ids


def test_lone_surrogate_is_an_error_that_shows_the_prompt(tokenizer):
    with pytest.raises(ValueError, match=r"not valid Unicode text: 'caf\\udce9'"):
        tokenizer("caf\udce9")


@pytest.mark.parametrize("missing", ["vocab", "merges"])
def test_missing_file_is_named(tmp_path, missing):
    with pytest.raises(FileNotFoundError, match=f"no_{missing}"):
        Tokenizer(**{missing: tmp_path / f"no_{missing}"})


def test_unreadable_vocabulary_is_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        Tokenizer(vocab=broken)


def test_encode_needs_no_torch_and_no_transformers():
    """Importing them takes far longer than building the tokenizer."""
    code = (
        "import sys; from sd.tokenizer import Tokenizer; Tokenizer().encode('a cat'); "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)
