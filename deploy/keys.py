"""`python -m deploy.keys`: a key for each door of the stack, in `.env` beside compose.yaml.

Knows what has to be secret and from whom; knows no service. Needs Python alone: whoever runs
containers has nothing else of ours installed.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

KEY_BYTES = 32
# What compose.yaml demands, and what it opens. No two of them are the same.
NAMES: Mapping[str, str] = {
    "HEADGATE_KEY": "clients send it",
    "HEADGATE_ADMIN_KEY": "opens /admin, /metrics, the console: rollouts, all receipts and traces",
    "HEADGATE_WORKER_KEY": "gateways send it to the engines",
    "HEADGATE_SECRET": "what the gateways make the salts of tenants of",
    "HEADGATE_GRAFANA_PASSWORD": "of Grafana's user `admin`",
}
FILE = Path(__file__).resolve().parents[1] / ".env"
_LINE = re.compile(r"""\s*(?:export\s+)?(\w+)=(?:"([^"]*)"|'([^']*)'|(.*?))\s*(?:\s#.*)?""")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what is missing; what is there stays."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) > 1 or any(one.startswith("-") for one in given):
        print("usage: python -m deploy.keys [FILE]", file=sys.stderr)
        return 2
    file = Path(given[0]) if given else FILE
    made = write(file, [name for name in NAMES if name not in read(file)])
    print(
        f"{file}: made {', '.join(made)}" if made else f"{file} has all keys; nothing was changed"
    )
    return 0


def read(file: Path) -> dict[str, str]:
    """What a file says that Docker Compose and a shell can read; nothing for none, and for what is
    empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    told = (found for line in lines if (found := _LINE.fullmatch(line)))
    values = {found[1]: found[2] or found[3] or found[4] for found in told}
    return {name: value for name, value in values.items() if value}


def settled(file: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What compose.yaml's variables are: the environment's, else the file's; keys that neither has
    are made, and written there."""
    told = read(file) | {name: value for name, value in environ.items() if value}
    write(file, [name for name in NAMES if name not in told])
    return read(file) | told


def write(file: Path, names: Sequence[str]) -> Sequence[str]:
    """Adds new keys, and sees to it that nobody but the file's owner reads them; these names."""
    if not names:
        return names
    file.touch(0o600)
    file.chmod(0o600)  # it may have been there
    whole = file.read_text(encoding="utf-8")
    more = [f"# {NAMES[name]}\n{name}=hg-{secrets.token_urlsafe(KEY_BYTES)}\n" for name in names]
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" * (whole != "" and not whole.endswith("\n")) + "".join(more))
    return names


if __name__ == "__main__":
    sys.exit(main())
