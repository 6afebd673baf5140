"""containers/Dockerfile and containers/megalm.def, read as their tools read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "containers" / "Dockerfile"
DEFINITION = ROOT / "containers" / "megalm.def"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their words, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, words.strip()) for name, _, words in (line.partition(" ") for line in joined.splitlines() if line)]


def sections(text: str) -> dict[str, str]:
    """The sections of an Apptainer definition; "" has the header."""
    parts = re.split(r"^%(\w+)[^\n]*\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def copied() -> list[str]:
    """What of the checkout the Dockerfile copies into the image."""
    words = [words.split() for name, words in instructions(DOCKERFILE.read_text()) if name == "COPY"]
    return [source for line in words for source in line[:-1]]


def apt_packages(text: str) -> list[str]:
    """The system packages that a shell text installs."""
    found = re.search(r"apt-get install ((?:[^&\n]|\\\n)*)", text.replace("\\\n", " "))
    return [word for word in found[1].split() if not word.startswith("-")] if found else []
