"""BERTScore, the similarity of contextual token embeddings (Zhang et al. 2020, "BERTScore: Evaluating Text Generation
with BERT", https://arxiv.org/abs/1904.09675), without idf weights and without rescaling by a baseline.

The name of the metric, `bertscore:MODEL:LAYER`, holds the model and the number of its layers that are computed.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from raydistill.config.metric_names import parse_bertscore
from raydistill.core.errors import UserError
from raydistill.evaluation.metric import WORKING_DIR_ENV, Metric
from raydistill.models.fingerprints import weights_fingerprint
from raydistill.models.hub import (
    check_no_missing_weights,
    check_weights,
    first_error_line,
    resolve_checkpoint,
    weight_files,
)
from raydistill.models.loading import loading_errors

BATCH_ROWS = 32


class TokenEmbeddings(NamedTuple):
    """Embeddings of the tokens of texts.

    Attributes:
        vectors: Unit vectors, [texts, tokens, width].
        is_token: Whether there is a token, and no padding, bool [texts, tokens].
        is_averaged: Whether the token is of the text, and no token such as [CLS] or [SEP], bool [texts, tokens].
    """

    vectors: Tensor
    is_token: Tensor
    is_averaged: Tensor


@dataclass(frozen=True)
class Encoder:
    """A model whose output is that of the last computed layer, its tokenizer, and the most tokens of a text."""

    model: Any
    tokenizer: Any
    max_tokens: int


def greedy_f1(candidates: TokenEmbeddings, references: TokenEmbeddings) -> Tensor:
    """Return the F1 of each pair of texts, -1 to 1, float [texts].

    With unit vectors x_i of the reference and y_j of the candidate:

        R = mean over i of max over j of x_i . y_j
        P = mean over j of max over i of x_i . y_j
        F1 = 2 P R / (P + R)

    As in the package bert-score, tokens that the tokenizer adds, such as [CLS] and [SEP], may be matched, and are not
    averaged over. A text without tokens of its own has a precision or recall of 0, and the pair an F1 of 0.
    """
    similarity = references.vectors @ candidates.vectors.transpose(1, 2)  # [texts, reference tokens, candidate tokens]
    best_candidate = similarity.masked_fill(~candidates.is_token[:, None, :], -torch.inf).amax(2)
    best_reference = similarity.masked_fill(~references.is_token[:, :, None], -torch.inf).amax(1)
    recall = _mean(best_candidate, references.is_averaged)
    precision = _mean(best_reference, candidates.is_averaged)
    total = precision + recall
    defined = candidates.is_averaged.any(1) & references.is_averaged.any(1) & (total > 0)
    return torch.where(defined, 2 * precision * recall / torch.where(defined, total, 1), 0)


def _mean(values: Tensor, included: Tensor) -> Tensor:
    """The mean over the included tokens, [texts], of values [texts, tokens]; 0 where no token is included."""
    return values.masked_fill(~included, 0).sum(1) / included.sum(1).clamp(min=1)


@torch.inference_mode()
def embed(encoder: Encoder, texts: list[str]) -> TokenEmbeddings:
    """Return the embeddings of the tokens of texts; a text is cut after `max_tokens` tokens.

    Texts begin with a space, as in bert-score: a byte-level tokenizer has other tokens for a word without a space.
    """
    stripped = [text.strip() for text in texts]
    batch = encoder.tokenizer(
        [f" {text}" if text else "" for text in stripped],
        padding=True,
        truncation=True,
        max_length=encoder.max_tokens,
        return_special_tokens_mask=True,
        return_tensors="pt",
    ).to(encoder.model.device)
    output = encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    vectors = torch.nn.functional.normalize(output.last_hidden_state, dim=-1)
    return TokenEmbeddings(vectors, batch["attention_mask"].bool(), ~batch["special_tokens_mask"].bool())


def bertscore_rows(encoder: Encoder, predictions: list[str], references: list[str]) -> np.ndarray:
    """Return F1 x 100 of each row, float64 [rows]; the corpus score is the mean. A GPU is used if there is one.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    pairs = list(zip(predictions, references, strict=True))
    order = sorted(range(len(pairs)), key=lambda row: sum(map(len, pairs[row])))  # less padding
    scores = np.zeros(len(pairs))
    encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            candidate_texts, reference_texts = zip(*(pairs[row] for row in rows), strict=True)
            f1 = greedy_f1(embed(encoder, list(candidate_texts)), embed(encoder, list(reference_texts)))
            scores[rows] = 100 * f1.double().cpu().numpy()
    finally:
        encoder.model.to("cpu")  # leaves the GPU's memory to training
    return scores


@lru_cache(8)
def load_bertscore(name: str) -> Metric:
    """Return the metric of a name `bertscore:MODEL:LAYER`; downloads the model, and loads it when rows are scored.

    MODEL is a folder, or a hub name such as `owner/name@revision`. Only safetensors are read, and no code of the model.

    Raises:
        UserError: The model does not exist, is no encoder, has no safetensors or fewer than LAYER layers.
    """
    model, layer = parse_bertscore(name)
    local = Path(os.environ.get(WORKING_DIR_ENV) or os.getcwd()) / model
    checkpoint = str(local) if local.is_dir() else model
    config = _load_config(name, resolve_checkpoint(checkpoint, weights=False))
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(
            f"metric {name}: the model has {config.num_hidden_layers} layers, and the name asks for {layer}"
        )
    folder = resolve_checkpoint(checkpoint, convert_pickles=False)
    if not weight_files(folder):
        raise UserError(
            f"metric {name}: {model} has no model.safetensors, and pickled weights are not read. Name a revision that "
            f"has it, as bertscore:owner/name@revision:{layer}, or convert the model with save_pretrained"
        )
    check_weights(folder, checkpoint)

    def signature() -> str:
        weights = f"weights:{weights_fingerprint(folder)}" if local.is_dir() else f"commit:{folder.name}"
        version = f"transformers-{transformers.__version__}"
        return f"{name}|{weights}|nrefs:1|f1:mean|idf:no|rescaled:no|version:{version}"

    return Metric(
        lambda rows: bertscore_rows(
            load_encoder(name, folder, layer), [row.prediction for row in rows], [row.reference for row in rows]
        ),
        lru_cache(1)(signature),
    )


@lru_cache(1)
def load_encoder(name: str, folder: Path, layer: int) -> Encoder:
    """Return the first `layer` layers of the model in a folder, on the CPU in float32.

    Raises:
        UserError: The model or the tokenizer cannot be loaded, or weights are missing.
    """
    config = _load_config(name, folder)
    config.num_hidden_layers = layer
    with loading_errors(f"metric {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]  # no part of the embeddings
    check_no_missing_weights({"missing_keys": missing}, name)
    return Encoder(model.eval(), tokenizer, _max_tokens(tokenizer, config))


def _max_tokens(tokenizer: Any, config: Any) -> int:
    """The tokenizer's limit, or where it has none, the positions without the two that RoBERTa reserves."""
    positions = getattr(config, "max_position_embeddings", 514)
    return int(min(tokenizer.model_max_length, positions if tokenizer.model_max_length <= positions else positions - 2))


def _load_config(name: str, folder: Path) -> Any:
    """The configuration of an encoder.

    Raises:
        UserError: The configuration cannot be read, or is not that of an encoder.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"metric {name}: config.json cannot be used: {first_error_line(error)}") from None
    if config.is_encoder_decoder or not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UserError(
            f"metric {name}: {config.model_type} is no encoder; BERTScore needs one, such as BERT or RoBERTa"
        )
    return config
