import json
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_edu.data import (
    UNDETERMINED,
    Tokenizer,
    TokenizerError,
    UnknownLanguageError,
    load_corpus,
    normalize_text,
)
from moe_edu.data.tokenizer import BYTES, SPECIALS, split_words

LANGUAGES = ("eng_Latn", "fra_Latn", "ell_Grek", "hin_Deva", "tha_Thai", "zho_Hans")
CONTROLS = (*SPECIALS, *LANGUAGES, UNDETERMINED)
any_text = st.text(st.characters(codec=None), max_size=60)  # lone surrogates too


@pytest.fixture(scope="module")
def texts():
    return list(load_corpus(LANGUAGES).valid.texts())


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, LANGUAGES, vocab_size=900)


def test_ids_are_in_nllbs_order(tokenizer):
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.tokens(range(len(CONTROLS))) == list(CONTROLS)
    assert [tokenizer.language_id(code) for code in (*LANGUAGES, UNDETERMINED)] == list(range(4, 11))
    assert tokenizer.tokens(range(11, 11 + 256)) == list(BYTES)
    assert len(tokenizer) == 900
    assert tokenizer.languages == LANGUAGES


def test_a_sentence_is_framed_by_its_tag_and_the_end(tokenizer):
    ids = tokenizer.encode_source("1 août 1996", "fra_Latn")
    tokens = tokenizer.tokens(ids)
    assert (tokens[0], tokens[-1]) == ("fra_Latn", "</s>")
    assert [token for token in tokens if token.isdigit()] == list("11996")  # every digit on its own
    assert "".join(tokens[1:-1]) == "▁1▁août▁1996"
    assert tokenizer.encode_target("1 août 1996", "fra_Latn") == ids
    assert tokenizer.tokens(tokenizer.encode_source("1 août 1996"))[0] == UNDETERMINED
    assert tokenizer.tokens(tokenizer.encode_source("", "fra_Latn")) == ["fra_Latn", "</s>"]


@given(any_text, st.sampled_from((*LANGUAGES, UNDETERMINED)))
def test_decoding_gives_the_normalized_text_back(tokenizer, text, language):
    ids = tokenizer.encode_source(text, language)
    assert tokenizer.decode(ids) == normalize_text(text)
    assert tokenizer.unk_id not in ids


@given(st.lists(st.sampled_from([*CONTROLS, "<0x41>", "▁", "</s", "a", " "]), max_size=8).map("".join))
def test_text_never_becomes_a_control_token(tokenizer, text):
    for control in CONTROLS:
        assert min(tokenizer.encode_pieces([control])[0]) >= len(CONTROLS)
    ids = tokenizer.encode_pieces([text])[0]
    assert all(i >= len(CONTROLS) for i in ids)
    assert tokenizer.decode(ids) == normalize_text(text)


def test_text_never_becomes_a_control_token_even_when_trained_on_it():
    hostile = [f"{control} {control * 2} <0xAB>" for control in CONTROLS] * 50
    tokenizer = Tokenizer.train(hostile, LANGUAGES, vocab_size=600)
    assert "▁fra_Latn" in tokenizer.tokens(tokenizer.encode_pieces(["fra_Latn"])[0])  # learnt as a word
    for text in hostile:
        ids = tokenizer.encode_pieces([text])[0]
        assert min(ids) >= len(CONTROLS)
        assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 899), max_size=30))
def test_any_ids_decode_to_text_that_can_be_stored(tokenizer, ids):
    tokenizer.decode(ids).encode("utf-8")
    assert len(tokenizer.tokens(ids)) == len(ids)


@pytest.mark.parametrize("wrong", [-1, 900])
def test_ids_outside_are_refused(tokenizer, wrong):
    for read in (tokenizer.decode, tokenizer.tokens):
        with pytest.raises(ValueError, match=rf"token id {wrong} is outside this tokenizer's 0 to 899"):
            read([5, wrong])


def test_a_batch_equals_its_sentences_encoded_separately(tokenizer, texts):
    some = [*texts[:200], "", "🎉"]
    codes = [LANGUAGES[i % len(LANGUAGES)] for i in range(len(some))]
    one_by_one = [tokenizer.encode_source(text, code) for text, code in zip(some, codes, strict=True)]
    assert tokenizer.encode_source_batch(some, codes) == one_by_one
    assert tokenizer.encode_target_batch(some, codes) == one_by_one
    assert tokenizer.encode_source_batch(some) == [tokenizer.encode_source(text) for text in some]
    with pytest.raises(ValueError, match="zip"):
        tokenizer.encode_source_batch(["a", "b"], ["eng_Latn"])


def test_unknown_languages_are_refused(tokenizer):
    with pytest.raises(UnknownLanguageError, match="did you mean eng_Latn"):
        tokenizer.encode_source("a", "engl")
    with pytest.raises(UnknownLanguageError, match=r"deu_Latn .* is not a language of this tokenizer"):
        tokenizer.language_id("deu_Latn")
    with pytest.raises(UnknownLanguageError, match="xxx_Latn"):
        Tokenizer.train(["a"], ["eng_Latn", "xxx_Latn"], 400)


def test_training_is_deterministic_whatever_the_order(tokenizer, texts):
    again = Tokenizer.train(reversed(texts), LANGUAGES, vocab_size=900)
    assert again.to_json() == tokenizer.to_json()


@settings(max_examples=15)
@given(st.lists(any_text, max_size=20), st.integers(268, 400))
def test_any_texts_train_a_tokenizer_that_round_trips(texts, vocab_size):
    tokenizer = Tokenizer.train(texts, LANGUAGES, vocab_size)
    assert len(tokenizer) <= vocab_size
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_source_batch(texts, "eng_Latn")]
    assert decoded == [normalize_text(text) for text in texts]


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(
        ValueError, match="vocab_size 260 is too small for 6 languages: tags and bytes alone take 267"
    ):
        Tokenizer.train(["a"], LANGUAGES, vocab_size=260)


@given(any_text)
def test_words_joined_are_the_text(text):
    words = split_words(text)
    assert "".join(words).replace("▁", " ").removeprefix(" ") == normalize_text(text)
    assert all(len(word) == 1 for word in words if any(char.isdecimal() for char in word))


def test_the_default_tokenizer_of_the_shipped_corpus():
    corpus = load_corpus()
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages)
    assert len(tokenizer) == 3000
    cells = tokenizer.encode_pieces(list(corpus.test.texts()))
    # Measured: 12.7 tokens (without tag and </s>) and 19.6 characters per test sentence.
    assert 12 < sum(map(len, cells)) / len(cells) < 13.5
    spelled = [token for token in tokenizer.tokens(chain.from_iterable(cells)) if token in BYTES]
    assert len(spelled) < 0.03 * sum(map(len, cells))


def test_saving_and_loading(tokenizer, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(path)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode_source_batch(texts, "fra_Latn") == tokenizer.encode_source_batch(texts, "fra_Latn")


def edited(change):
    def edit(parts):
        change(parts)
        return json.dumps(parts)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: "", "Expecting value"),
        (lambda parts: json.dumps(parts)[:-9], "damaged"),
        (lambda parts: "[" * 100_000, "damaged"),
        (lambda parts: "[]", "does not say"),
        (edited(lambda parts: parts.update(format="other")), "does not say"),
        (edited(lambda parts: parts.pop("merges")), "must be lists"),
        (edited(lambda parts: parts.update(pieces={})), "must be lists"),
        (edited(lambda parts: parts["pieces"].append(3)), "must be lists"),
        (edited(lambda parts: parts["pieces"].append(parts["pieces"][-1])), "be unique"),
        (edited(lambda parts: parts["pieces"].remove("▁")), "include ▁"),
        (edited(lambda parts: parts["pieces"].pop(0)), "begin with the 256 bytes"),
        (edited(lambda parts: parts["pieces"].pop()), "is not among the pieces"),
        (edited(lambda parts: parts["merges"].append(["a"])), "pair of pieces"),
        (edited(lambda parts: parts["merges"].append(["a", "no such piece"])), "is not among the pieces"),
        (edited(lambda parts: parts["languages"].append("eng_Latn")), "named twice"),
        (edited(lambda parts: parts["languages"].append("engl")), "unknown language 'engl'"),
    ],
)
def test_a_damaged_file_is_refused(tokenizer, tmp_path, damage, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(json.loads(tokenizer.to_json())))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.load(tmp_path / "binary")


@settings(max_examples=30)
@given(st.data())
def test_no_changed_byte_gives_any_other_error(tokenizer, tmp_path_factory, data):
    content = bytearray(tokenizer.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutated") / "tokenizer.json"
    path.write_bytes(content)
    try:
        loaded = Tokenizer.load(path)
    except TokenizerError:
        return
    assert loaded.decode(loaded.encode_source("1 août")) == "1 août"
