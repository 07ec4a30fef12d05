"""OpenAI's Python client against Headgate: a stream, with its usage and who answered.

`pip install openai`, then `python examples/openai_client.py`, or with a question behind it.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

PORT = os.environ.get("HEADGATE_PORT", "8080")
QUESTION = "Rewrite as year-month-day: July 18, 2032."


def main(question: str) -> None:
    client = OpenAI(
        base_url=os.environ.get("HEADGATE_URL", f"http://127.0.0.1:{PORT}/v1"),
        api_key=os.environ.get("HEADGATE_API_KEY", "none"),  # asked for where there are tenants
    )
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-headgate-tier": "interactive", "x-session-id": "example"},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens", end="")
            print(f" by {model}, {chunk.system_fingerprint}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else QUESTION)
