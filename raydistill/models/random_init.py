"""Builds a new, randomly initialised model of the BART or Marian architecture and trains its tokenizer."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    BartConfig,
    GenerationConfig,
    MarianConfig,
    MarianTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from raydistill.config.run import NewModel
from raydistill.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_tokenizer(new_model: NewModel, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """Train a tokenizer of at most `new_model.vocab_size` tokens on `texts`, save it in `folder` and return it.

    Marian models get a SentencePiece unigram model with one vocabulary for both sides, BART models byte-level BPE.

    Raises:
        UserError: SentencePiece cannot train a vocabulary of this size on the texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if new_model.family == "marian":
        return _train_sentencepiece(new_model, texts, folder)
    return _train_byte_level_bpe(new_model, texts, folder)


def make_random_model(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase, dropout: float, seed: int
) -> "PreTrainedModel":
    """Return a model with random weights drawn with `seed`, in eval mode, for a tokenizer of `build_tokenizer`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            _make_marian(new_model, tokenizer, dropout)
            if new_model.family == "marian"
            else _make_bart(new_model, tokenizer, dropout)
        )
    return model.eval()


def _make_bart(new_model: NewModel, tokenizer: PreTrainedTokenizerBase, dropout: float) -> "PreTrainedModel":
    from transformers import BartForConditionalGeneration

    config = BartConfig(
        vocab_size=len(tokenizer),
        init_std=new_model.d_model**-0.5 / 2,
        scale_embedding=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **_architecture_kwargs(new_model, dropout),
    )
    model = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _make_marian(new_model: NewModel, tokenizer: PreTrainedTokenizerBase, dropout: float) -> "PreTrainedModel":
    from transformers import MarianMTModel

    config = MarianConfig(
        vocab_size=len(tokenizer),
        decoder_vocab_size=len(tokenizer),
        init_std=new_model.d_model**-0.5 / 2,
        scale_embedding=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu",
        share_encoder_decoder_embeddings=True,
        **_architecture_kwargs(new_model, dropout),
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _architecture_kwargs(new_model: NewModel, dropout: float) -> dict[str, Any]:
    return {
        "d_model": new_model.d_model,
        "encoder_layers": new_model.encoder_layers,
        "decoder_layers": new_model.decoder_layers,
        "encoder_attention_heads": new_model.heads,
        "decoder_attention_heads": new_model.heads,
        "encoder_ffn_dim": new_model.ffn_dim,
        "decoder_ffn_dim": new_model.ffn_dim,
        "max_position_embeddings": new_model.max_positions,
        "dropout": dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }


def _train_byte_level_bpe(new_model: NewModel, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=new_model.vocab_size,
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
        model_max_length=new_model.max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def _train_sentencepiece(new_model: NewModel, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    import sentencepiece

    model_proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model_proto,
            vocab_size=new_model.vocab_size,
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
            f"SentencePiece could not train {new_model.vocab_size} pieces on the training text: {error}; "
            f"change start.vocab_size"
        ) from None
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model_proto.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    vocabulary["<pad>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    tokenizer = MarianTokenizer(
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        vocab=str(folder / "vocab.json"),
        model_max_length=new_model.max_positions,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
