"""BERTScore: the formula, models in the form of the published ones, and errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from raydistill.core.errors import UserError
from raydistill.evaluation import metrics
from raydistill.evaluation.bertscore import TokenEmbeddings, greedy_f1, load_encoder
from raydistill.evaluation.metric import WORKING_DIR_ENV
from tests.factories.models import lay_out_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "a", "##s"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PREDICTIONS = ["the cat sat on a mat", "dogs", "the dog", "", "sat on " * 30]
REFERENCES = ["a cat on the mat", "a dog sat", "the dog", "the cat", "the mat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers with the head that it is published with, and positions for 32 tokens."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)  # without a limit of tokens, as some published ones
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.5, **SIZES)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of three layers with a byte-level tokenizer, and positions for 32 tokens."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    folder.mkdir()
    trained = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(REFERENCES * 3, vocab_size=300, special_tokens=special_tokens, show_progress=False)
    trained.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=trained.get_vocab_size(), max_position_embeddings=34, initializer_range=0.5, **SIZES
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def embeddings(vectors: list[list[float]], averaged: list[int], tokens: int) -> TokenEmbeddings:
    """One text, of which `tokens` vectors are tokens and those of `averaged` are averaged over."""
    positions = range(len(vectors))
    return TokenEmbeddings(
        torch.tensor([vectors]),
        torch.tensor([[i < tokens for i in positions]]),
        torch.tensor([[i in averaged for i in positions]]),
    )


def test_f1_equals_an_answer_worked_out_by_hand() -> None:
    """Reference [CLS] a b, candidate [CLS] c and padding.

    Cosines of a, b and c with the others: a with [CLS] 0, with c 0.6; b with [CLS] 1, with c 0.8; c with [CLS] 0.8.
    Recall: (max(0, 0.6) + max(1, 0.8)) / 2 = 0.8. Precision: max(0.8, 0.6, 0.8) = 0.8. The padding equals a and would
    make the recall 1.
    """
    reference = embeddings([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [1, 2], 3)
    candidate = embeddings([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]], [1], 2)
    assert greedy_f1(candidate, reference).tolist() == pytest.approx([0.8])
    # With the sides exchanged, precision and recall are exchanged; with another number of tokens they differ:
    other = embeddings([[0.0, 1.0], [1.0, 0.0]], [1], 2)  # a alone: recall 0.6, precision max(0.8, 0.6) = 0.8
    assert greedy_f1(candidate, other).tolist() == pytest.approx([2 * 0.6 * 0.8 / 1.4])
    empty = embeddings([[0.0, 1.0], [0.0, 1.0]], [], 2)
    assert greedy_f1(empty, reference).tolist() == [0]
    assert greedy_f1(reference, empty).tolist() == [0]


def expected_f1(model: PreTrainedModel, tokenizer, layer: int, prediction: str, reference: str) -> float:
    """F1 x 100 in float64 numpy, from the hidden states of the whole model for one text at a time."""
    sides = []
    for text in (prediction, reference):
        ids = tokenizer(f" {text}" if text else "", truncation=True, max_length=32).input_ids
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        vectors = states.double().numpy()
        sides.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    cosines = sides[0] @ sides[1].T
    if min(cosines.shape) == 2:
        return 0.0  # an empty text
    precision, recall = cosines.max(1)[1:-1].mean(), cosines.max(0)[1:-1].mean()
    return 100 * 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(("family", "layer"), [("bert", 2), ("bert", 3), ("roberta", 1)])
def test_rows_equal_the_formula_on_the_hidden_states_of_the_layer(
    family: str, layer: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    loading = (BertForMaskedLM, BertTokenizer) if family == "bert" else (RobertaForMaskedLM, RobertaTokenizer)
    model, tokenizer = (part.from_pretrained(folder) for part in loading)
    name = f"bertscore:{folder}:{layer}"
    # As published, BERT's limit of tokens may be absent: 32 positions, of which 2 may be reserved.
    limit = 30 if family == "bert" else 32
    expected = [
        expected_f1(model.eval(), tokenizer, layer, *pair) for pair in zip(PREDICTIONS[:4], REFERENCES[:4], strict=True)
    ]
    scored = metrics.score(name, PREDICTIONS, REFERENCES, reported=["exact_match"])
    assert scored.row_stats[:4] == pytest.approx(expected, abs=1e-3)
    assert scored.row_stats[2:4] == pytest.approx([100, 0], abs=1e-3)
    assert len(set(np.round(expected, 2))) == 4
    assert 0 < scored.row_stats[4] < 100  # cut, and no error of positions
    assert load_encoder(name, folder, layer).max_tokens == limit
    assert scored.metrics == pytest.approx({name: scored.row_stats.mean(), "exact_match": 20})
    low, high = metrics.bootstrap_interval(name, scored.row_stats)
    assert low < scored.metrics[name] < high


def test_a_text_has_the_tokens_that_it_has_within_a_sentence(roberta: Path) -> None:
    """A byte-level tokenizer has other tokens for the first word of a text than for the same word after a space."""
    tokenizer = RobertaTokenizer.from_pretrained(roberta)
    assert tokenizer("the cat").input_ids != tokenizer(" the cat").input_ids
    rows = metrics.score(f"bertscore:{roberta}:2", ["  the cat\n"], ["the cat"]).row_stats
    assert rows == pytest.approx([100], abs=1e-3)


def test_signature_names_model_layer_and_weights(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is relative to the directory of the command; other weights have another signature."""
    monkeypatch.setenv(WORKING_DIR_ENV, str(bert.parent))
    signature = metrics.signature("bertscore:bert:2")
    assert signature.startswith("bertscore:bert:2|weights:")
    assert "|idf:no|rescaled:no|version:transformers-" in signature
    weights = signature.split("|")[1]
    assert weights == metrics.signature(f"bertscore:{bert}:3").split("|")[1]
    other = tmp_path / "other"
    model = BertForMaskedLM.from_pretrained(bert)
    model.bert.embeddings.word_embeddings.weight.data[5] += 1
    model.save_pretrained(other)
    assert weights != metrics.signature(f"bertscore:{other}:3").split("|")[1]


def test_a_model_of_the_hub_has_its_commit_in_the_signature(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = lay_out_model(tmp_path, "owner/bert", bert)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("bertscore:owner/bert:2", f"bertscore:owner/bert@{commit}:2"):
        assert f"|commit:{commit}|" in metrics.signature(name)
        assert metrics.score(name, ["the dog"], ["the dog"]).metrics[name] == pytest.approx(100, abs=1e-3)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set and the checkpoint is not in the local cache"):
        metrics.get_metric("bertscore:owner/other:2")


def test_models_that_cannot_be_used_are_errors_before_any_row_is_scored(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has 3 layers, and the name asks for 4"):
        metrics.get_metric(f"bertscore:{bert}:4")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    config = json.loads((bert / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps(config))
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors, and pickled weights are not read"):
        metrics.get_metric(f"bertscore:{pickled}:2")
    (pickled / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="t5 is no encoder"):
        metrics.get_metric(f"bertscore:{pickled}:2")
    remote = config | {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}
    (pickled / "config.json").write_text(json.dumps(remote))
    (pickled / "code.py").write_text("raise SystemExit('code of the model ran')\n")
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        metrics.get_metric(f"bertscore:{pickled}:2")
