"""`evo prepare`: texts to a folder of shards, from the command line."""

import pytest

from evo.cli import main
from evo.data import Corpus, TokenShards
from tests.data_cases import texts, word_tokenizer, write


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "texts", {f"{i}.txt": b"one two\n" * (i + 1) for i in range(12)})


def test_it_prepares_what_training_reads(source, tmp_path, capsys):
    out = tmp_path / "tokens"
    assert main(["prepare", str(source), str(out), "--corpus.held-out", "0.3", "--verify"]) == 0
    shown = capsys.readouterr()
    corpus = Corpus.open(out)
    assert sorted(map(len, texts(corpus.train) + texts(corpus.held_out))) == [8 * (i + 1) for i in range(12)]
    assert f"{corpus.train.tokens} tokens" in shown.out.replace(",", "")
    assert f"{corpus.held_out.documents} documents" in shown.out
    assert "1.00 bytes a token" in shown.out
    assert str(out) in shown.err


def test_it_takes_a_tokenizer_of_transformers(source, tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert main(["prepare", str(source), str(tmp_path / "tokens"), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    train = TokenShards.open(tmp_path / "tokens" / "train")
    assert train.vocabulary == 5
    assert train.read(0, 4).tolist() == [0, 3, 4, 1]
    assert train.bytes_per_token == 4


def test_mistakes_are_named(source, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "nowhere"), str(tmp_path / "tokens")]) == 2
    assert "no file or folder at" in capsys.readouterr().err
    assert main(["prepare", str(source), str(tmp_path / "tokens")]) == 0
    capsys.readouterr()
    assert main(["prepare", str(tmp_path / "tokens"), str(tmp_path / "more")]) == 2
    assert "holds prepared tokens already" in capsys.readouterr().err
