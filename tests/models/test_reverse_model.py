"""The cross-entropy of sources given labels, against the forward pass of transformers, row by row."""

import pytest
import torch

from raydistill.models import reverse_model
from raydistill.models.loading import load_model
from raydistill.models.reverse_model import ReverseModel
from raydistill.models.tokenization import load_tokenizer
from tests.factories.models import save_tiny, sentences


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_losses_are_those_of_the_forward_pass_of_each_pair(family, tmp_path, monkeypatch):
    """Small batches and chunks: rows of a batch have different lengths, and a row is split between two chunks."""
    monkeypatch.setattr(reverse_model, "BATCH_TOKENS", 60)
    monkeypatch.setattr(reverse_model, "CHUNK_TOKENS", 7)
    folder = save_tiny(family, tmp_path / "reverse", dropout=0.0, logits_bias=family != "t5")
    texts = sentences(12)
    labels, sources = texts[:6], [" ".join(texts[i].split()[: 1 + i % 4]) for i in range(6, 12)]
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    prefix = getattr(tokenizer, "source_prefix", "")
    expected = []
    for label, source in zip(labels, sources, strict=True):
        inputs = tokenizer(prefix + label, return_tensors="pt")
        targets = tokenizer(text_target=source, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(float(model(**inputs, labels=targets).loss))
    assert ReverseModel(folder).losses(labels, sources) == pytest.approx(expected, rel=1e-4)
