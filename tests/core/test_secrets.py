"""Masking of credentials in URLs and of secrets in environment variables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.core.secrets import find_credentials, has_credentials, redact, redact_nested


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("at http://user:pass@host:5000/x", "at http://***@host:5000/x"),
        ("http://token@host", "http://***@host"),
        ("postgresql+psycopg2://me:p@ss/w:rd@db:5432/x?a=b", "postgresql+psycopg2://***@db:5432/x?a=b"),
        ("http://h/?a=1&api_key=abc&b=2", "http://h/?a=1&api_key=***&b=2"),
        ("s3://KEY:SECRET@bucket/path", "s3://***@bucket/path"),
        ("https://b/x?X-Amz-Signature=ab&y=1", "https://b/x?X-Amz-Signature=***&y=1"),
        ("http://h/#/runs?viewStateShareKey=raydistill", "http://h/#/runs?viewStateShareKey=raydistill"),
        ("owner/model@main and http://host:5000/#/experiments/1", "owner/model@main and http://host:5000/#/experiments/1"),
        ("", ""),
    ],
)  # fmt: skip
def test_credentials_in_urls_are_masked(text, masked):
    assert redact(text) == masked
    assert has_credentials(text) == (text != masked)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY"]
)
def test_secrets_of_the_environment_are_masked(name, monkeypatch):
    monkeypatch.setenv(name, "secret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "public-value")
    assert redact("x secret-value, public-value") == "x ***, public-value"
    assert redact_nested({"a": ["secret-value", 3], "b": {"c": "is secret-value"}}) == {
        "a": ["***", 3],
        "b": {"c": "is ***"},
    }
    monkeypatch.setenv(name, "short")
    assert redact("a short word") == "a short word"


PASSWORD = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1).filter(
    lambda text: "@" not in text
)


@given(PASSWORD)
def test_any_password_in_a_url_is_masked(password):
    assert redact(f"in http://u:{password}@host/x") == "in http://***@host/x"


def test_credentials_in_nested_data_are_located():
    data = {"a": ["x", "http://u:p@h"], "b": {"c": "http://h/?token=x"}, "d": 3}
    assert list(find_credentials(data)) == [("a", 1), ("b", "c")]
