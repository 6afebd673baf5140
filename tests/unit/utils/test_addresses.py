"""Addresses are shown without their credentials, however these are written."""

from __future__ import annotations

import pytest

from megalm.utils.addresses import hide_credentials, hide_credentials_in_word, public_address

SECRET = "hunter2canary"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"https://me:{SECRET}@host:5000/path", "https://host:5000/path"),
        (f"https://{SECRET}@host:5000", "https://host:5000"),
        (f"https://:{SECRET}@host", "https://host"),
        (f"postgresql://me:{SECRET}@host/db", "postgresql://host/db"),
        (f"postgresql+psycopg2://me:a@{SECRET}@host:1/db", "postgresql+psycopg2://host:1/db"),
        (f"mysql://me:a/{SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:12/{SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:a@b/{SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:a {SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:a?{SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:a#{SECRET}@host/db", "mysql://host/db"),
        (f"mysql://me:a%40{SECRET}@host/db", "mysql://host/db"),
        (f"http://host:5000?user=u&password={SECRET}", "http://host:5000"),
        (f"http://host:5000/?token={SECRET}", "http://host:5000/"),
        (f"http://host/?user=me@corp.example&password={SECRET}", "http://host/"),
        (f"postgresql:///db?host=h&password={SECRET}", "postgresql:///db"),
        (f"mssql+pyodbc:///?odbc_connect=DRIVER=x;UID=u;PWD={SECRET}", "mssql+pyodbc:///"),
        (f"http://host/path;password={SECRET}", "http://host/path"),
        (f"http://host/#{SECRET}", "http://host/"),
        (f"http://[::1]:5000/?token={SECRET}", "http://[::1]:5000/"),
        (f"http://me:{SECRET}@[::1]:5000", "http://[::1]:5000"),
        (f"postgresql://me:{SECRET}@a:1,b:2/db", "postgresql://a:1,b:2/db"),
        ("sqlite:////my runs/mlflow.db", "sqlite:////my runs/mlflow.db"),
        ("sqlite:////home/me@corp.example/a#b;c/mlflow.db", "sqlite:////home/me@corp.example/a#b;c/mlflow.db"),
        (f"sqlite:////runs/mlflow.db?cipher={SECRET}", "sqlite:////runs/mlflow.db"),
        (f"s3://me:{SECRET}@bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        (f"s3://bucket/part-?.jsonl?token={SECRET}", "s3://bucket/part-?.jsonl"),
        (f"hf://{SECRET}@datasets/owner/name@v1.0/a#1.jsonl", "hf://datasets/owner/name@v1.0/a#1.jsonl"),
        ("http://host:5000", "http://host:5000"),
        ("file:///runs/mlruns", "file:///runs/mlruns"),
        ("databricks", "databricks"),
        ("./mlruns", "./mlruns"),
    ],
)
def test_scheme_host_and_database_are_shown(address: str, shown: str) -> None:
    assert public_address(address) == shown
    for quoted in (address, repr(address), f"{address}/api/2.0", f"({address})", f"cannot reach {address}: refused"):
        assert SECRET not in hide_credentials(quoted, address)
    for word in (address, f"key={address}"):
        assert SECRET not in hide_credentials_in_word(word)
        assert hide_credentials_in_word(word).endswith(shown)


def test_what_cannot_be_distinguished_is_hidden() -> None:
    assert SECRET not in public_address(f"http://me:{SECRET}")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (f"http://host?token={SECRET}", f"Max retries exceeded with url: /?token={SECRET}/api/2.0/mlflow/runs/create"),
        (f"http://{SECRET}@host", f"401 for user {SECRET}"),
        (f"http://u:{SECRET}/ss@host", f"Port could not be cast to integer value as '{SECRET}'"),
        (f"http://u:a b/{SECRET}@host", f"invalid userinfo a%20b%2F{SECRET}"),
        (f"http://u:a+{SECRET}%21@host", f"wrong: a+{SECRET}!"),
        (None, f"API request to http://me:{SECRET}@h/api failed: http://:{SECRET}@h"),
    ],
)
def test_errors_do_not_quote_a_part_of_the_credentials(address: str | None, text: str) -> None:
    assert SECRET not in hide_credentials(text, address)


def test_other_text_stays() -> None:
    text = "see https://docs.example/a?b (and http://host:5000/x), mlflow at me@corp.example: sslmode require failed"
    address = "postgresql://mlflow:pw@host/mlflow?sslmode=require"
    assert hide_credentials(text, address) == text.replace("?b", "")
    assert hide_credentials_in_word("run.name=mine", address) == "run.name=mine"
