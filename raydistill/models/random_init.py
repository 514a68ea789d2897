"""A random start: a tokenizer built from the training split and a new model of BART or Marian form."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from raydistill.config.run import Start
from raydistill.core.errors import UserError


def build_tokenizer(start: Start, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of at most `start.vocab_size` tokens, saved into `folder` and loaded from there.

    SentencePiece (unigram, one vocabulary for both sides) for the Marian form, byte-level BPE for BART's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if start.form == "marian":
        return _sentencepiece(start, texts, folder)
    return _byte_level_bpe(start, texts, folder)


def new_model(start: Start, tokenizer: PreTrainedTokenizerBase, dropout: float, seed: int) -> PreTrainedModel:
    """A model with random weights, in eval mode, for a tokenizer made by `build_tokenizer`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _marian(start, tokenizer, dropout) if start.form == "marian" else _bart(start, tokenizer, dropout)
    return model.eval()


def _bart(start: Start, tokenizer: PreTrainedTokenizerBase, dropout: float) -> PreTrainedModel:
    config = BartConfig(
        vocab_size=len(tokenizer),
        init_std=start.d_model**-0.5 / 2,
        scale_embedding=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **_shape(start, dropout),
    )
    model = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _marian(start: Start, tokenizer: PreTrainedTokenizerBase, dropout: float) -> PreTrainedModel:
    config = MarianConfig(
        vocab_size=len(tokenizer),
        decoder_vocab_size=len(tokenizer),
        init_std=start.d_model**-0.5 / 2,
        scale_embedding=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu",
        share_encoder_decoder_embeddings=True,
        **_shape(start, dropout),
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _shape(start: Start, dropout: float) -> dict[str, Any]:
    return {
        "d_model": start.d_model,
        "encoder_layers": start.encoder_layers,
        "decoder_layers": start.decoder_layers,
        "encoder_attention_heads": start.heads,
        "decoder_attention_heads": start.heads,
        "encoder_ffn_dim": start.ffn_dim,
        "decoder_ffn_dim": start.ffn_dim,
        "max_position_embeddings": start.max_positions,
        "dropout": dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }


def _byte_level_bpe(start: Start, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=start.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=start.max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def _sentencepiece(start: Start, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=start.vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            bos_id=-1,
            eos_id=0,
            unk_id=1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"SentencePiece could not make {start.vocab_size} pieces of the training text: {error}"
        ) from None
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(written.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    vocabulary["<pad>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    tokenizer = MarianTokenizer(
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        vocab=str(folder / "vocab.json"),
        model_max_length=start.max_positions,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
