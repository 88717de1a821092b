import subprocess
import sys

from moe_edu.data.corpus import make_corpus
from moe_edu.data.summary import corpus_summary, count_kinds


def test_a_missing_file_gives_one_line(tmp_path):
    command = [sys.executable, "-m", "moe_edu.data.summary", str(tmp_path / "none.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_the_summary_counts_the_corpus():
    rows = [
        ["train", "unit", "one two", "un"],
        ["train", "date", "three", ""],
        ["valid", "date", "four", "quatre"],
    ]
    corpus = make_corpus("small", ("eng_Latn", "fra_Latn"), [*rows, ["test", "date", "five", "cinq"]])
    assert count_kinds(corpus) == {"unit": 1, "date": 3}
    first, _, train, valid, test, kinds, languages = corpus_summary(corpus).splitlines()
    assert first == "corpus small: 2 languages, 1 scripts, 1 families"
    # Three sentences with 4 words and 14 characters in all; a quarter of the cells is missing.
    assert train.split()[:6] == ["train", "2", "3", "25.0%", "1.3", "4.7"]
    assert valid.split()[:4] == ["valid", "1", "2", "0.0%"]
    assert test.split()[:4] == ["test", "1", "2", "0.0%"]
    assert kinds == "meanings by kind: unit 1, date 3"
    assert languages == "languages: eng_Latn (English), fra_Latn (French)"
