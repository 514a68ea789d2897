"""BART and Pegasus of published sizes with random weights, and rows of invented words: speed needs no download."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MBartConfig,
    PegasusConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY_SIZE = 50_265
PEGASUS_VOCABULARY_SIZE = 96_103
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
# Of the published configurations: layers of the encoder and of the decoder, width, heads, feed-forward width.
SIZES = {"base": (6, 768, 12, 3072), "large": (12, 1024, 16, 4096)}


def save_bart(size: str, folder: Path) -> Path:
    """Save a random BART of a published size, with a tokenizer of one token per invented word, to `folder`."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(_bart_config(size))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    word_tokenizer(VOCABULARY_SIZE, SPECIAL_TOKENS).save_pretrained(folder)
    return folder


def large_config(family: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """The configuration of BART-large or Pegasus-large (16-16), and a tokenizer of one token per invented word."""
    if family == "bart":
        return _bart_config("large"), word_tokenizer(VOCABULARY_SIZE, SPECIAL_TOKENS)
    config = PegasusConfig(
        vocab_size=PEGASUS_VOCABULARY_SIZE,
        d_model=1024,
        encoder_layers=16,
        decoder_layers=16,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        max_position_embeddings=1024,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return config, word_tokenizer(PEGASUS_VOCABULARY_SIZE, ["<pad>", "</s>", "<s>", "<unk>"])


def mbart_config(tokens: int, encoder: int, decoder: int, width: int = 1024) -> MBartConfig:
    """The configuration of an mBART with `tokens` words and the heads and feed-forward width of mBART-large."""
    return MBartConfig(
        vocab_size=tokens,
        d_model=width,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        scale_embedding=True,
        decoder_start_token_id=5,
        tie_word_embeddings=True,
    )


def _bart_config(size: str) -> BartConfig:
    layers, width, heads, ffn = SIZES[size]
    return BartConfig(
        vocab_size=VOCABULARY_SIZE,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_position_embeddings=1024,
    )


def save_rows(file: Path, count: int, min_tokens: int, max_tokens: int) -> Path:
    """Write `count` JSON lines whose sources have `min_tokens` to `max_tokens` tokens, with two special tokens."""
    generator = torch.Generator().manual_seed(0)
    num_words = VOCABULARY_SIZE - len(SPECIAL_TOKENS) - 1
    lengths = torch.randint(min_tokens - 2, max_tokens - 1, (count,), generator=generator).tolist()
    with file.open("w", encoding="utf-8") as out:
        for i, length in enumerate(lengths):
            words = torch.randint(num_words, (length,), generator=generator).tolist()
            row = {"id": str(i), "source": " ".join(f"w{word}" for word in words), "target": "w0"}
            out.write(json.dumps(row) + "\n")
    return file


def word_tokenizer(vocabulary_size: int, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds the special tokens, the words w0, w1, ... and <mask>."""
    words = [*special_tokens, *(f"w{i}" for i in range(vocabulary_size - len(special_tokens) - 1)), "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = special_tokens.index("<s>"), special_tokens.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
