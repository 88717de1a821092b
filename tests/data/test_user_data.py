import codecs
from importlib.resources import files
from lzma import decompress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_edu.data import Corpus, CorpusError, load_corpus, normalize_text, read_corpus, read_flores, read_tsv
from moe_edu.data.splits import SPLITS
from moe_edu.data.user_data import MAX_SENTENCE_CHARS

HEADER = "split\teng_Latn\tfra_Latn\n"
ROWS = "train\tone\tun\nvalid\ttwo\tdeux\ntest\tthree\ttrois\n"


@pytest.fixture
def flores(tmp_path):
    """A folder in FLORES-200's layout: 20 lines of dev, 5 of devtest, in two languages."""
    for split, lines in (("dev", 20), ("devtest", 5)):
        (tmp_path / split).mkdir()
        for code in ("eng_Latn", "fra_Latn"):
            text = "".join(f"{code[:3]} {split} {i}\n" for i in range(lines))
            (tmp_path / split / f"{code}.{split}").write_text(text, encoding="utf-8")
    (tmp_path / "dev" / "README").write_text("ignored")
    return tmp_path


def test_the_hidden_files_of_macos_are_ignored(flores):
    (flores / "dev" / "._eng_Latn.dev").write_bytes(b"\0\5\x16\7")
    assert read_corpus(flores).languages == ("eng_Latn", "fra_Latn")


def test_a_flores_folder(flores):
    corpus = read_corpus(flores)
    assert corpus.languages == ("eng_Latn", "fra_Latn")
    assert corpus.name == flores.name
    assert [len(corpus.split(name)) for name in SPLITS] == [18, 2, 5]
    assert corpus.pairs("valid", "eng_Latn", "fra_Latn") == [
        ("eng dev 0", "fra dev 0"),
        ("eng dev 10", "fra dev 10"),
    ]
    assert corpus.test.rows[4] == ("eng devtest 4", "fra devtest 4")
    assert set(corpus.train.kinds) == {"sentence"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "dev" / "eng_Latn.dev").unlink(), r"dev: needs files of two languages, such as eng_Latn\.dev"),
        (lambda f: (f / "dev" / "deu_Latn.dev").write_text("a\n" * 20), "deu_Latn is only in dev"),
        (lambda f: (f / "dev" / "engl.dev").write_text("a\n" * 20), r"engl\.dev: unknown language 'engl'; did you"),
        (lambda f: (f / "devtest" / "fra_Latn.devtest").write_text("a\n" * 6), r"fra_Latn\.devtest: 6 lines, but eng_"),
        (lambda f: (f / "devtest" / "fra_Latn.devtest").write_text(""), r"fra_Latn\.devtest: the file is empty"),
        (lambda f: (f / "dev" / "fra_Latn.dev").write_bytes(b"a\nb\n\xe9\n"), r"Latn\.dev:3: not UTF-8 \(byte 0xE9"),
        (lambda f: (f / "dev" / "fra_Latn.dev").write_bytes(b"a\n\0"), r"fra_Latn\.dev:2: a NUL byte"),
        (lambda f: [p.write_text(p.read_text() + "\n") for p in (f / "dev").glob("*.dev")], r"\.dev:21: no sentence"),
        (lambda f: [p.write_text("a\n") for p in (f / "dev").glob("*.dev")], "one line cannot be split"),
        (lambda f: (f / "dev" / "fra_Latn.dev").rename(f / "dev" / "fra_Latn.txt"), "needs files of two languages"),
        (lambda f: (f / "devtest").rename(f / "test"), r"devtest: cannot be read"),
    ],
)  # fmt: skip
def test_a_flores_folder_with_a_mistake(flores, spoil, message):
    spoil(flores)
    with pytest.raises(CorpusError, match=message):
        read_flores(flores)


def write(tmp_path, content):
    path = tmp_path / "mine.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_a_table(tmp_path):
    content = (
        "kind\tfra_Latn\tsplit\teng_Latn\nnumber\tun \ttrain\tone\n\tdeux\tvalid\t\n\ttrois\ttest\tthree"
    )
    corpus = read_corpus(write(tmp_path, content))
    assert (corpus.name, corpus.languages) == ("mine", ("fra_Latn", "eng_Latn"))
    assert (corpus.train.rows, corpus.train.kinds) == ((("un", "one"),), ("number",))
    assert (corpus.valid.rows, corpus.valid.kinds) == ((("deux", None),), ("sentence",))


@pytest.mark.parametrize(
    "encode", [lambda text: codecs.BOM_UTF8 + text.encode(), lambda text: text.replace("\n", "\r\n").encode()]
)
def test_what_spreadsheets_write_is_read_too(tmp_path, encode):
    corpus = read_tsv(write(tmp_path, encode(HEADER + ROWS)))
    assert corpus.test.rows == (("three", "trois"),)


def test_a_table_without_splits_gets_leak_free_ones(tmp_path):
    rows = "".join(
        f"sentence {i}\tphrase {i // 2}\n" for i in range(200)
    )  # every second pair shares its French
    corpus = read_tsv(write(tmp_path, "eng_Latn\tfra_Latn\n" + rows))
    assert [len(corpus.split(name)) for name in SPLITS] == [180, 10, 10]
    assert not set(corpus.train.texts()) & set(corpus.test.texts())
    assert corpus == read_tsv(tmp_path / "mine.tsv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"mine\.tsv: the file is empty"),
        ("\n", r"mine\.tsv: the file is empty"),
        (HEADER, "the split train has no rows"),
        (HEADER + "train\tone\tun\ntest\tthree\ttrois\n", "the split valid has no rows; add some, or leave out the "
        "column"),
        (HEADER + "train\tone\n", r"mine\.tsv:2: 2 cells, but the header has 3 columns"),
        (HEADER + ROWS + "train\ta\tb\tc\n", r"mine\.tsv:5: 4 cells, but the header has 3"),
        (HEADER + ROWS + "\n", r"mine\.tsv:5: 1 cells"),
        (HEADER + ROWS + "dev\ta\tb\n", r"mine\.tsv:5: unknown split 'dev'; use train, valid, test"),
        (HEADER + ROWS + "train\t \t\n", r"mine\.tsv:5: no sentence in any language"),
        (HEADER + ROWS + "train\ta\t" + "b" * 1_000_000 + "\n", r"mine\.tsv:5: a sentence of 1,000,000 characters"),
        ("x" * 1_000_000 + "\n", r"mine\.tsv:1: unknown language"),
        ("eng_Latn\tfrench\na\tb\n", r"mine\.tsv:1: unknown language 'french'; did you mean fra_Latn"),
        ("eng_Latn\t\na\tb\n", r"mine\.tsv:1: unknown language ''"),
        ("eng_Latn\teng_Latn\na\tb\n", "mine\\.tsv:1: the column 'eng_Latn' is repeated"),
        ("eng_Latn\tkind\na\tb\n", r"mine\.tsv:1: a translation needs columns of two languages"),
        ("eng_Latn\tfra_Latn\na\tb\na\tc\n", "fewer than three rows that share no sentence"),
        (HEADER.encode() + b"train\tcaf\xe9\tcaf\n", r"mine\.tsv:2: not UTF-8 \(byte 0xE9\)"),
        (codecs.BOM_UTF8 + HEADER.encode() + b"\xff", r"mine\.tsv:2: not UTF-8"),
        (HEADER.encode("utf-16"), r"mine\.tsv:1: this is UTF-16"),
        (HEADER.encode() + ROWS.encode() + b"\0", r"mine\.tsv:5: a NUL byte"),
    ],
)  # fmt: skip
def test_a_table_with_a_mistake(tmp_path, content, message):
    with pytest.raises(CorpusError, match=message) as caught:
        read_tsv(write(tmp_path, content))
    assert len(str(caught.value)) < 1000


def test_a_missing_file(tmp_path):
    with pytest.raises(CorpusError, match=r"none\.tsv: cannot be read \(No such file or directory\)"):
        read_corpus(tmp_path / "none.tsv")


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_edu.data.user_data.MAX_FILE_BYTES", 2**20)
    with pytest.raises(CorpusError, match="larger than 1 MiB"):
        read_tsv(write(tmp_path, HEADER + ROWS * 50_000))


def test_the_shipped_corpus_is_such_a_table(tmp_path):
    data = decompress(files("moe_edu.data").joinpath("files/corpus.tsv.xz").read_bytes())
    ours, shipped = read_tsv(write(tmp_path, data)), load_corpus()
    assert all(ours.split(name) == shipped.split(name) for name in SPLITS)


# All examples share one folder: each overwrites the files that it reads.
fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
cell = st.text(max_size=8) | st.sampled_from(
    ["eng_Latn", "fra_Latn", "split", "kind", "train", "valid", "test", ""]
)
table = st.lists(st.lists(cell, min_size=1, max_size=4).map("\t".join), max_size=8).map("\n".join)
likely = st.tuples(
    st.sampled_from([HEADER, "eng_Latn\tfra_Latn\n", "kind\tfra_Latn\tdeu_Latn\n", ""]), table
).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))


@fuzz
@given(st.binary(max_size=200) | likely)
def test_any_bytes_are_a_corpus_or_a_corpus_error(tmp_path, content):
    result = outcome(read_tsv, write(tmp_path, content))
    assert "mine.tsv" in result if isinstance(result, str) else is_sound(result)


@fuzz
@given(st.lists(st.binary(max_size=40) | table.map(str.encode), min_size=4, max_size=4))
def test_any_folder_is_a_corpus_or_a_corpus_error(flores, contents):
    paths = [*(flores / "dev").glob("*.dev"), *(flores / "devtest").glob("*.devtest")]
    for path, content in zip(sorted(paths), contents, strict=True):
        path.write_bytes(content)
    result = outcome(read_flores, flores)
    assert str(flores) in result if isinstance(result, str) else is_sound(result)


def outcome(read, path):
    """The corpus, or the message of the error. Any other error fails the test."""
    try:
        return read(path)
    except CorpusError as error:
        return str(error)


def is_sound(corpus):
    assert isinstance(corpus, Corpus)
    assert len(corpus.languages) >= 2
    for name in SPLITS:
        table = corpus.split(name)
        assert len(table) == len(table.kinds) > 0
        assert all(len(row) == len(corpus.languages) and any(row) for row in table.rows)
        assert all(text and text == normalize_text(text) for text in table.texts())
        assert all(len(text) <= MAX_SENTENCE_CHARS for text in table.texts())
    return True


sentences = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\n"), max_size=12)


@fuzz
@given(
    st.lists(st.tuples(sentences, sentences).filter(lambda row: all(map(normalize_text, row))), min_size=1)
)
def test_a_written_table_is_read_back(tmp_path, rows):
    lines = [f"{split}\t{eng}\t{fra}\n" for split in SPLITS for eng, fra in rows]
    corpus = read_tsv(write(tmp_path, HEADER + "".join(lines)))
    expected = tuple((normalize_text(eng), normalize_text(fra)) for eng, fra in rows)
    assert all(corpus.split(name).rows == expected for name in SPLITS)
