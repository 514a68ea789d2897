"""Trims the vocabulary of a model: tokens are removed from the tokenizer, the embeddings and the LM head.

The tokens that stay keep their order. Their new ids are 0, 1, 2 and so on. A text whose tokens all stay is split into
the same tokens as before. Any other text is split into smaller tokens, since bytes and single characters always stay.

- Unigram (Kudo 2018, "Subword Regularization"): a text is split into the most probable tokens. The split of the full
  vocabulary stays the most probable one as long as its tokens and their scores stay. The score of unknown characters
  depends on the lowest score, so the token with the lowest score stays too.
- Byte pair encoding (Sennrich et al. 2016): merges are applied in a fixed order. The merges on the way to a token stay
  with the token, so that the same merges are applied in the same order.
"""

import copy
import itertools
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from raydistill.config.shapes import VocabularySize
from raydistill.core.errors import UserError
from raydistill.models.families import untie_lm_head
from raydistill.models.tokenization import (
    BYTE_TOKEN,
    language_tokens,
    line_break,
    set_line_break,
    set_source_prefix,
    source_prefix,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tensors with a row (or, the bias of the logits, a column) for each token, by the last two parts of their names.
TOKEN_ROWS = re.compile(r"(?:^|\.)(?:shared|embed_tokens|lm_head)\.weight$")
LOGITS_BIAS = "final_logits_bias"
# Marian's multilingual models start a source with such a token.
MARIAN_LANGUAGE = re.compile(r">>.+<<")
TOKENIZER_JSON = "tokenizer.json"
_PROTOS: Any = sentencepiece_model_pb2  # generated classes without type hints

# The symbols that byte pair encoding creates on the way to a token, the token included.
PartsOf = Callable[[str], set[str]]


def count_tokens(rows: Iterable[Sequence[int]]) -> Counter[int]:
    """Return how often each token id occurs in rows of token ids."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row)
    return counts


def select_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, counts: Mapping[int, int], size: VocabularySize
) -> tuple[int, ...]:
    """Return the ids of the tokens to keep, in ascending order.

    Special tokens, language codes, bytes and single characters are always kept, and all merges on the way to a kept
    token of byte pair encoding.

    Args:
        tokenizer: The tokenizer of the full vocabulary.
        config: The config of its model.
        counts: How often each token occurs in the training data.
        size: "used" for all tokens that occur, or the number of tokens, the most frequent first.

    Raises:
        UserError: `size` is too small for the tokens that are always kept, or the tokenizer cannot be trimmed.
    """
    id_by_token = tokenizer.get_vocab()
    token_by_id = {i: token for token, i in id_by_token.items()}
    parts_of = _parts_function(tokenizer)

    def with_parts(i: int) -> set[int]:
        return {i} | {id_by_token[part] for part in parts_of(token_by_id[i]) if part in id_by_token}

    kept = _required_tokens(tokenizer, config)
    if size == "used":
        for i in counts:
            kept |= with_parts(i)
        return tuple(sorted(kept))
    if len(kept) > size:
        raise UserError(
            f"student.vocabulary: {size} is too small: special tokens, bytes and single characters alone are "
            f"{len(kept)} tokens; give at least {len(kept)}"
        )
    order = sorted(token_by_id.keys() - kept, key=lambda i: (-counts.get(i, 0), i))
    # A token may not fit together with its parts. Its parts alone may fit, and a later pass then adds the token.
    while len(kept) < min(size, len(token_by_id)):
        for i in order:
            missing = with_parts(i) - kept
            if len(kept) + len(missing) <= size:
                kept |= missing
            if len(kept) == size:
                break
    return tuple(sorted(kept))


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the tokens of `token_ids` alone; token `token_ids[i]` has the id i.

    Raises:
        UserError: The tokenizer is of a kind that cannot be trimmed.
    """
    new_ids = {old: new for new, old in enumerate(token_ids)}
    with tempfile.TemporaryDirectory(prefix="raydistill-vocabulary-") as folder_name:
        folder = Path(folder_name)
        tokenizer.save_pretrained(folder)
        if (folder / TOKENIZER_JSON).is_file():
            _edit_json(folder / TOKENIZER_JSON, lambda state: _trim_tokenizer_json(state, new_ids))
            # Other vocabulary files have all tokens, and tokenizer.json alone is sufficient.
            for path in folder.iterdir():
                if path.name not in (TOKENIZER_JSON, "tokenizer_config.json"):
                    path.unlink()
        else:
            _trim_sentencepiece_files(folder, tokenizer, new_ids)
        _edit_json(folder / "tokenizer_config.json", lambda state: _renumber_added_tokens(state, new_ids))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sacremoses.*")
            trimmed = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    trimmed.name_or_path = tokenizer.name_or_path
    _copy_settings(tokenizer, trimmed)
    return trimmed


def trim_model(model: "PreTrainedModel", token_ids: Sequence[int]) -> "PreTrainedModel":
    """Return a copy of a model, in eval mode, with the tokens of `token_ids` alone; token `token_ids[i]` has the id i.

    Rows of the embedding without a token are removed too. Tokens without a row, such as the <mask> of published BART
    models, have no row in the copy either. The copy has the model's logits for the kept tokens.

    Raises:
        UserError: The encoder and the decoder have vocabularies of their own.
    """
    rows = torch.tensor([i for i in token_ids if i < model.config.vocab_size])
    config = trimmed_config(model.config, token_ids)
    with torch.random.fork_rng(devices=[]):
        trimmed = untie_lm_head(type(model)(config))
    trimmed.load_state_dict({name: _select_rows(name, tensor, rows) for name, tensor in model.state_dict().items()})
    torch.nn.Module.to(trimmed, next(model.parameters()).dtype).eval()
    trimmed.generation_config = copy.deepcopy(model.generation_config)
    _renumber_settings(trimmed.generation_config, {old: new for new, old in enumerate(token_ids)})
    return trimmed


def trimmed_config(config: PretrainedConfig, token_ids: Sequence[int]) -> PretrainedConfig:
    """Return the config of a trimmed model, see `trim_model`.

    Raises:
        UserError: The encoder and the decoder have vocabularies of their own.
    """
    if not getattr(config, "share_encoder_decoder_embeddings", True):
        raise UserError(
            "student.vocabulary: the teacher's encoder and decoder have vocabularies of their own, and these cannot "
            "be trimmed; remove student.vocabulary"
        )
    trimmed = with_vocab_size(config, sum(i < config.vocab_size for i in token_ids))
    _renumber_settings(trimmed, {old: new for new, old in enumerate(token_ids)})
    return trimmed


def with_vocab_size(config: PretrainedConfig, vocab_size: int) -> PretrainedConfig:
    """Return a copy of a config with another number of tokens; the ids of special tokens stay as they are."""
    config = copy.deepcopy(config)
    config.vocab_size = vocab_size
    if getattr(config, "decoder_vocab_size", None) is not None:
        config.decoder_vocab_size = vocab_size
    return config


# Tokens that are always kept


def _required_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> set[int]:
    """Return the ids of special tokens, language codes, bytes and single characters."""
    vocabulary = tokenizer.get_vocab()
    required = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    required |= {i for key, i in config.to_dict().items() if key.endswith("_token_id") and isinstance(i, int)}
    required |= {
        i
        for token, i in vocabulary.items()
        if len(token) == 1 or BYTE_TOKEN.fullmatch(token) or MARIAN_LANGUAGE.fullmatch(token)
    }
    others = {*_lowest_scored_pieces(tokenizer), *language_tokens(tokenizer).values()}
    required |= {vocabulary[token] for token in others if token in vocabulary}
    return required & set(vocabulary.values())


def _lowest_scored_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the piece with the lowest score of each unigram model of a tokenizer."""
    if protos := _read_protos(tokenizer):
        unigrams = (proto for proto in protos.values() if not _is_bpe(proto))
        return [min(proto.pieces, key=lambda piece: float(piece.score)).piece for proto in unigrams]
    model = _read_model(tokenizer)
    return [min(model["vocab"], key=lambda entry: float(entry[1]))[0]] if model["type"] == "Unigram" else []


# Byte pair encoding


def _parts_function(tokenizer: PreTrainedTokenizerBase) -> PartsOf:
    """Return the function that gives the parts of a token; a token of a unigram model has one part, the token itself.

    Raises:
        UserError: The tokenizer is of a kind that cannot be trimmed.
    """
    if protos := _read_protos(tokenizer):
        models = [  # the highest score is merged first
            {piece.piece: -piece.score for piece in proto.pieces} for proto in protos.values() if _is_bpe(proto)
        ]
        rank_functions = [partial(_sentencepiece_rank, ranks) for ranks in models]
        return lambda token: {token}.union(*(merge_symbols(token, rank) for rank in rank_functions))
    model = _read_model(tokenizer)
    if model["type"] == "Unigram":
        return lambda token: {token}
    ranks = {pair: rank for rank, pair in enumerate(map(_merge_pair, model["merges"]))}
    return lambda token: merge_symbols(token, lambda a, b: ranks.get((a, b)))


def _sentencepiece_rank(ranks: Mapping[str, float], left: str, right: str) -> float | None:
    """Return the rank of a merge: SentencePiece merges any two symbols whose concatenation is a piece."""
    return ranks.get(left + right)


def merge_symbols(token: str, rank: Callable[[str, str], float | None]) -> set[str]:
    """Return all symbols that byte pair encoding creates while it encodes a token, its characters included.

    Args:
        token: The characters to merge.
        rank: The rank of the merge of two symbols, the lowest is applied first; None if there is no such merge.
    """
    symbols = list(token)
    created = set(symbols)
    while True:
        pairs = ((rank(*pair), i) for i, pair in enumerate(itertools.pairwise(symbols)))
        applicable = [(value, i) for value, i in pairs if value is not None]
        if not applicable:
            return created
        _, i = min(applicable)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        created.add(symbols[i])


def _merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two symbols of an entry of `merges` in tokenizer.json, which has two forms."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


# Files of tokenizers


def _read_model(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the model of a tokenizer of the `tokenizers` library, as in tokenizer.json.

    Raises:
        UserError: The tokenizer is of a kind that cannot be trimmed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = json.loads(backend.to_str())["model"] if backend is not None else {"type": None}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] not in ("Unigram", "BPE") or affixes:
        raise UserError(
            f"student.vocabulary: the tokenizer {type(tokenizer).__name__} with the model {model['type']} cannot be "
            f"trimmed; supported are unigram models and byte pair encoding of SentencePiece, and byte-level byte pair "
            f"encoding"
        )
    return model


def _trim_tokenizer_json(state: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Remove tokens from the content of tokenizer.json, in place."""
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])
    else:
        vocabulary = {token: new_ids[i] for token, i in model["vocab"].items() if i in new_ids}
        model["vocab"] = vocabulary
        model["merges"] = [
            merge for merge in model["merges"] if {*_merge_pair(merge), "".join(_merge_pair(merge))} <= set(vocabulary)
        ]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    state["truncation"] = state["padding"] = None
    state["post_processor"] = _renumber_post_processor(state["post_processor"], new_ids)


def _renumber_post_processor(value: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a part of the post-processor in tokenizer.json with new token ids.

    Ids are in lists named "ids", and the second entry of "sep" and "cls" (a token and its id).
    """
    if isinstance(value, list):
        return [_renumber_post_processor(entry, new_ids) for entry in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, entry in value.items():
        if key == "ids":
            result[key] = [new_ids[i] for i in entry]
        elif key in ("sep", "cls") and isinstance(entry, list):
            result[key] = [entry[0], new_ids[entry[1]]]
        else:
            result[key] = _renumber_post_processor(entry, new_ids)
    return result


def _renumber_added_tokens(state: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Renumber the added tokens in the content of tokenizer_config.json, in place."""
    if "added_tokens_decoder" in state:
        state["added_tokens_decoder"] = {
            str(new_ids[int(i)]): token for i, token in state["added_tokens_decoder"].items()
        }


def _trim_sentencepiece_files(folder: Path, tokenizer: PreTrainedTokenizerBase, new_ids: Mapping[int, int]) -> None:
    """Remove tokens from vocab.json and from the SentencePiece models of Marian or M2M100.

    M2M100's languages are not in vocab.json: their ids follow the ids of all other tokens.

    A piece of SentencePiece that vocab.json lacks stays: a text with this piece has an unknown token, as before.
    """
    vocabulary = tokenizer.get_vocab()
    removed = {token for token, i in vocabulary.items() if i not in new_ids}
    for name, proto in _read_protos(tokenizer).items():
        normal = _PROTOS.ModelProto.SentencePiece.NORMAL
        pieces = [piece for piece in proto.pieces if piece.type != normal or piece.piece not in removed]
        del proto.pieces[:]
        proto.pieces.extend(pieces)
        proto.trainer_spec.vocab_size = len(pieces)
        (folder / name).write_bytes(proto.SerializeToString())
    languages = set(language_tokens(tokenizer).values())
    kept = {token: new_ids[i] for token, i in vocabulary.items() if i in new_ids and token not in languages}
    (folder / "vocab.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def _read_protos(tokenizer: Any) -> dict[str, Any]:
    """Return the SentencePiece models that Marian and M2M100 tokenizers read, by file name; empty for others.

    Raises:
        UserError: Source and target have vocabularies of their own.
    """
    processors: dict[str, Any] = {}
    if hasattr(tokenizer, "spm_source"):
        if tokenizer.separate_vocabs:
            raise UserError("student.vocabulary: a tokenizer with two vocabularies cannot be trimmed")
        processors = {"source.spm": tokenizer.spm_source, "target.spm": tokenizer.spm_target}
    elif hasattr(tokenizer, "sp_model"):
        processors = {"sentencepiece.bpe.model": tokenizer.sp_model}
    protos: dict[str, Any] = {}
    for name, processor in processors.items():
        protos[name] = _PROTOS.ModelProto()
        protos[name].ParseFromString(processor.serialized_model_proto())
    return protos


def _is_bpe(proto: Any) -> bool:
    return bool(proto.trainer_spec.model_type == _PROTOS.TrainerSpec.BPE)


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    edit(state)
    path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _copy_settings(tokenizer: Any, trimmed: Any) -> None:
    """Copy the settings that `load_tokenizer` makes, languages included."""
    set_source_prefix(trimmed, source_prefix(tokenizer))
    set_line_break(trimmed, line_break(tokenizer))
    trimmed.split_special_tokens = tokenizer.split_special_tokens
    if hasattr(tokenizer, "src_lang"):
        trimmed.tgt_lang = tokenizer.tgt_lang
        trimmed.src_lang = tokenizer.src_lang  # sets the special tokens of the source


# Models


def _select_rows(name: str, tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor of a model with the rows of the kept tokens; tensors without such rows are returned as is."""
    if TOKEN_ROWS.search(name):
        return tensor[rows]
    return tensor[:, rows] if name == LOGITS_BIAS else tensor


def _renumber_settings(settings: Any, new_ids: Mapping[int, int]) -> None:
    """Renumber the token ids of a config or a generation config, in place; settings of removed tokens are removed."""
    for key, value in settings.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int | list):
            ids = [new_ids[i] for i in ([value] if isinstance(value, int) else value) if i in new_ids]
            setattr(settings, key, (ids[0] if ids else None) if isinstance(value, int) else ids)
        elif key in ("suppress_tokens", "begin_suppress_tokens") and value:
            setattr(settings, key, [new_ids[i] for i in value if i in new_ids] or None)
        elif key == "bad_words_ids" and value:
            words = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)]
            setattr(settings, key, words or None)
