"""What a gateway keeps of the requests that go through it, for whom, and for how long."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from policies.fields import PolicyModel, Size
from policies.slo import Name

Redacted = Literal["card", "email", "iban", "ip", "key", "phone"]
REDACTED: tuple[Redacted, ...] = ("card", "email", "iban", "ip", "key", "phone")


def _pattern(text: str) -> str:
    """Raises ValueError for what is no regular expression, or one that finds nothing everywhere."""
    try:
        found = re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    if found.match(""):
        raise ValueError(f"{text!r} matches the empty text, and so everywhere")
    return text


class Record(PolicyModel):
    """Requests and answers on disk, to replay and to judge by. Off by default."""

    consent: Literal["given", "asked"] = Field(
        description="`given`: all whose requests come have agreed, says whoever writes this. "
        "`asked`: only requests with the header `x-headgate-record: yes` are kept. With "
        "`x-headgate-record: no` none ever is.",
    )
    path: str = Field(
        ".headgate/recorded",
        min_length=1,
        max_length=4096,
        description="Folder of the files, beside the policy file; nobody else may read it.",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of conversations that are kept, each of them whole or not at all.",
    )
    tenants: tuple[Name, ...] = Field(
        (), max_length=1024, strict=False, description="Only requests of these. None named: of all."
    )
    content: bool = Field(
        True,
        description="Whether texts are kept. Without them replays make up text as long as it was.",
    )
    redact: tuple[Redacted, ...] = Field(
        REDACTED,
        strict=False,
        max_length=len(REDACTED),
        description="What is blotted out of texts before they reach the disk: numbers of payment "
        "cards, mail addresses, IBANs, IP addresses, keys and passwords, phone numbers.",
    )
    patterns: tuple[Annotated[str, AfterValidator(_pattern)], ...] = Field(
        (),
        strict=False,
        max_length=64,
        description="More of that, as regular expressions of Python.",
    )
    max_bytes: Size = Field(
        256 * 2**20,
        ge=2**20,
        le=2**44,
        description="The folder's most; the oldest files go first. A size such as `256 MiB`.",
    )
    file_bytes: Size = Field(
        8 * 2**20,
        ge=2**16,
        le=2**30,
        description="A file is closed, and its lines put together by conversation, at this size.",
    )

    @model_validator(mode="after")
    def _files_fit(self) -> Record:
        if self.file_bytes * 4 > self.max_bytes:
            raise ValueError("`max_bytes` has to hold at least four files of `file_bytes`")
        return self
