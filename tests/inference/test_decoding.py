"""Resolution of decoding parameters."""

import pytest
from transformers import GenerationConfig

from raydistill.config.run import Decoding
from raydistill.core.errors import UserError
from raydistill.inference.decoding import BeamSearchParams, resolve_decoding


def test_resolve_decoding_prefers_request_then_checkpoint_then_preset_then_default():
    own = GenerationConfig(num_beams=6, length_penalty=2.0, early_stopping=True, forced_bos_token_id=3)
    preset = Decoding(beams=8, min_length=11, length_penalty=0.6)
    beam = resolve_decoding(Decoding(beams=2), own, preset, 60)
    assert beam == BeamSearchParams(2, 2.0, 11, 61, 0, True, 3)
    assert resolve_decoding(Decoding(), own, preset, 60).beams == 6
    assert resolve_decoding(Decoding(), GenerationConfig(), preset, 60).beams == 8
    assert resolve_decoding(Decoding(), None, None, 60) == BeamSearchParams(4, 1.0, 0, 61, 0, False, None)


def test_max_new_tokens_becomes_a_length_with_the_start_token():
    assert resolve_decoding(Decoding(), GenerationConfig(max_new_tokens=9), None, 60).max_length == 10


def test_max_length_of_a_preset_wins_over_the_checkpoints():
    """The hub's Marian allows 512 tokens and mBART 200, so that a collapsed student would decode for a long time."""
    own, preset = GenerationConfig(max_length=512, num_beams=6), Decoding(max_length=128, beams=4)
    resolved = resolve_decoding(Decoding(), own, preset, 60)
    assert (resolved.max_length, resolved.beams) == (128, 6)
    assert resolve_decoding(Decoding(max_length=40), own, preset, 60).max_length == 40
    assert resolve_decoding(Decoding(), own, None, 60).max_length == 512


def test_requested_min_length_above_max_length_is_an_error():
    with pytest.raises(UserError, match="min_length 30 is above max_length 20"):
        resolve_decoding(Decoding(min_length=30, max_length=20), None, None, 60)
    own = GenerationConfig(min_length=56)  # not the user's doing: bart-large-cnn with a short max_length
    assert resolve_decoding(Decoding(max_length=20), own, None, 60).min_length == 20
