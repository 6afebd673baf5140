"""Show addresses of servers and databases without the credentials in them.

A tracking address may hold a password, a token as the user name, or both in its query. Only scheme, host, port and
database (or path) are shown. Credentials need not be quoted as the URL standard asks: what could be one is hidden.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, quote_plus, unquote

HIDDEN = "***"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*://"
_ADDRESS = re.compile(rf"({_SCHEME})(.*)", re.DOTALL)
# In text an address ends at a space or a quotation mark.
_IN_TEXT = re.compile(rf"{_SCHEME}[^\s\"'<>`]*")
_AFTER = ").,;:!]}"  # ends a sentence or a bracket around an address
_WHOLE_WORD = re.compile(rf"([\w.\-]*=)?({_SCHEME}.*)", re.DOTALL)
_QUERY = re.compile(r"\?(?=[\w.\-%\[\]]+=)")
_QUERY_OR_MARK = re.compile(r"[?#;]")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/?#@;\[\]]*)(:\d*)?(,[^\s/?#@;]*)?")
# Names there may hold what elsewhere begins a query: `?` in a glob, `#`, `;`.
_OBJECT_STORES = ("s3://", "gs://", "hf://")
# Query parameters whose values, if short, are words of any message: `sslmode=require`.
_SECRET_NAME = re.compile(r"pass|pwd|token|secret|key|sig|cred|auth|user|uid", re.IGNORECASE)
_LONG = 8


def public_address(address: str) -> str:
    """Return scheme, host, port and database or path of an address; one without `://` is a path and stays."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return address
    scheme, (_, place, _) = match[1], _split(match[1], match[2])
    host = _HOST.match(place)
    end = 0 if host is None else host.end()
    if end < len(place) and place[end] != "/":
        return f"{scheme}{HIDDEN}"
    return scheme + place


def hide_credentials(text: str, address: str | None = None) -> str:
    """Return a text, such as an error, without the credentials of any address that it quotes.

    Args:
        address: an address in use; its credentials are hidden wherever they stand, in parts and quoted, too.
    """
    if address:
        text = text.replace(address, public_address(address))
        for secret in sorted(_secrets(address), key=len, reverse=True):
            before = r"(?<!\w)" if re.match(r"\w", secret) else ""
            after = r"(?!\w)" if re.search(r"\w$", secret) else ""
            text = re.sub(before + re.escape(secret) + after, HIDDEN, text)
    return _IN_TEXT.sub(_public_in_text, text)


def hide_credentials_in_word(word: str, address: str | None = None) -> str:
    """Return a word of a command line, which an address may fill with spaces and quotation marks, as above."""
    whole = _WHOLE_WORD.fullmatch(word)
    return hide_credentials(word if whole is None else (whole[1] or "") + public_address(whole[2]), address)


def _public_in_text(match: re.Match[str]) -> str:
    address = match[0].rstrip(_AFTER)
    return public_address(address) + match[0][len(address) :]


def _split(scheme: str, rest: str) -> tuple[str, str, str]:
    """Split what follows the scheme into credentials, place and query."""
    if rest.startswith("/"):  # a path, in which all but a query may be part of a name
        place = _QUERY.split(rest, maxsplit=1)[0]
        return "", place, rest[len(place) + 1 :]
    query = _QUERY.search(rest)
    before = rest[: query.start()] if query is not None else rest
    if scheme.lower() == "hf://":  # behind a slash, @ begins a revision
        before = before.partition("/")[0]
    at = before.rfind("@")
    credentials, rest = rest[: max(at, 0)], rest[at + 1 :]
    place = (_QUERY if scheme.lower() in _OBJECT_STORES else _QUERY_OR_MARK).split(rest, maxsplit=1)[0]
    return credentials, place, rest[len(place) + 1 :]


def _secrets(address: str) -> set[str]:
    """Return the secret parts of an address, each as it is, quoted and unquoted."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return set()
    credentials, _, query = _split(match[1], match[2])
    user, colon, password = credentials.partition(":")
    found = {credentials, password if colon else user, query}
    found |= set(re.split(r"[@/:?#&\s]", password if colon else user))  # an error may name a part of it
    for name, value in parse_qsl(query.replace(";", "&"), keep_blank_values=True):
        if _SECRET_NAME.search(name) or len(value) >= _LONG:
            found.add(value)
    spelled = {form(secret) for secret in found for form in (str, unquote, quote, quote_plus, lambda it: quote(it, ""))}
    return {secret for secret in spelled if len(secret) > 1}
