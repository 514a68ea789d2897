"""Decoding engines behind one protocol: CTranslate2 and transformers."""
