import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.text import BOS, EOS, PAD, ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_bytes_come_back_also_where_they_are_no_text(data):
    tokens = tokenizer.encode(data)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(data),)
    assert tokenizer.decode_bytes(tokens) == data
    assert tokenizer.decode(tokens) == data.decode(errors="replace")
    # As a command-line argument or a file name they arrive with surrogates.
    assert tokenizer.decode_bytes(tokenizer.encode(data.decode(errors="surrogateescape"))) == data


@given(st.lists(st.integers(0, 258)))
def test_specials_are_never_text(ids):
    assert list(tokenizer.decode_bytes(ids)) == [i for i in ids if i < 256]


def test_specials_wrap_on_request():
    assert tokenizer.encode("a", bos=True, eos=True).tolist() == [BOS, 97, EOS]
    assert tokenizer.encode("").tolist() == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (BOS, EOS, PAD, PAD + 1)


@pytest.mark.parametrize("token", [-1, 259, 70_000])
def test_an_id_that_is_no_token_is_named(token):
    with pytest.raises(ValueError, match=rf"token id {token} is outside \[0, 259\)"):
        tokenizer.decode([97, token])


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        tokenizer.decode(torch.zeros(2, 3, dtype=torch.int64))
