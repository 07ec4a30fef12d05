"""`headgate chat`: one answer, or a chat, in a terminal. `answers` speaks the HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import click

from command.answers import (
    AnswerError,
    Clock,
    Talk,
    WrongUsage,
    offered,
    sampling_of,
    stream,
    visible,
)
from policies.load import PolicyError, port_of

_HELP = """\
  /system TEXT  set the system prompt and start over; without TEXT show it
  /reset        forget what was said
  /quit         leave (also Ctrl-D)
  \"\"\"           begins and ends a message of several lines
  Ctrl-C        stops the answer that is being written"""
_HISTORY_LINES = 1000


def talk(
    url: str | None,
    model: str | None,
    system: str | None,
    message: str | None,
    temperature: float | None = None,
) -> int:
    """One answer for a message or for what stdin holds, else a chat; the exit code."""
    try:
        base = base_url(url)
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.buffer.read().decode("utf-8").strip()
            if not message:
                raise WrongUsage("stdin is empty: give a MESSAGE")
        conversation = _begin(base, model, system, temperature)
        if message is None:
            _converse(conversation)
        else:
            answer(conversation, message)
    except AnswerError as error:
        click.echo(str(error), err=True)
        return 2 if isinstance(error, WrongUsage) else 1
    except KeyboardInterrupt:
        return 130
    except UnicodeDecodeError:
        click.echo("stdin is not UTF-8 text", err=True)
        return 2
    return 0


def _begin(base: str, model: str | None, system: str | None, temperature: float | None) -> Talk:
    """A conversation with the model that was named, or with the first one."""
    try:
        models = asyncio.run(offered(base))
    except AnswerError:
        if model is None:
            raise
        models = {}  # some servers list nothing, and answer all the same
    name = next(iter(models)) if model is None else model
    return Talk(base, name, system, sampling=sampling_of(models.get(name, {}), temperature))


def base_url(url: str | None) -> str:
    """Where the gateway is. Raises WrongUsage."""
    try:
        port = port_of() if url is None else None
    except PolicyError as error:
        raise WrongUsage(str(error)) from None
    if port == 0:
        raise WrongUsage("HEADGATE_PORT=0 names no port: give --url as `headgate serve` printed it")
    base = url or f"http://127.0.0.1:{8080 if port is None else port}"
    base = base if "://" in base else f"http://{base}"
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", base):
        raise WrongUsage(f"{base!r} is not a URL such as http://127.0.0.1:8080")
    return base.rstrip("/").removesuffix("/v1")


# ---- the chat -----------------------------------------------------------------------------------


def _converse(conversation: Talk) -> None:
    click.echo(f"{conversation.model} at {conversation.url}; /help for commands, Ctrl-D leaves")
    with _history():
        while (message := _ask()) is not None:
            if message.startswith("/"):
                if not _obey(message, conversation):
                    return
            elif message:
                _answer_or_tell(conversation, message)


def _ask() -> str | None:
    """The next message; None at the end."""
    try:
        text = input("> ").strip()
        if text.startswith('"""'):
            text = text[3:]
            while not text.endswith('"""'):
                text += "\n" + input("… ")
            text = text[:-3].strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo("\n(Ctrl-D or /quit leaves)")
        return ""
    return text


def _obey(command: str, conversation: Talk) -> bool:
    """Obeys a /command; false to leave."""
    name, _, rest = command.partition(" ")
    if name in ("/quit", "/exit", "/q"):
        return False
    if name == "/reset":
        conversation.messages.clear()
        _dim("forgotten")
    elif name == "/system":
        if rest.strip():
            conversation.system = rest.strip()
            conversation.messages.clear()
        _dim(f"system prompt: {conversation.system or '(none)'}")
    else:
        if name != "/help":
            click.echo(f"there is no command {visible(name)}:")
        click.echo(_HELP)
    return True


def _answer_or_tell(conversation: Talk, message: str) -> None:
    """One turn of the chat: what goes wrong is told, and the chat goes on."""
    try:
        answer(conversation, message)
    except AnswerError as error:
        click.echo(click.style(str(error), fg="red"), err=True)
    except KeyboardInterrupt:
        _dim("\nstopped")


def answer(conversation: Talk, message: str) -> None:
    """Streams one answer to stdout. Half an answer is remembered; a turn without any is not.

    Raises AnswerError, KeyboardInterrupt.
    """
    conversation.messages.append({"role": "user", "content": message})
    said: list[str] = []
    clock = Clock()
    try:
        asyncio.run(_interruptible(_print_answer(conversation, said, clock)))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if said:
            conversation.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            conversation.messages.pop()
    _dim(clock.line())


async def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; Ctrl-C cancels it, even just before the loop falls asleep.

    `asyncio.run` alone sets no wake-up descriptor: a signal between its last look and the selector
    would wait there for the next byte of the answer.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await work
    finally:
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)


async def _print_answer(conversation: Talk, said: list[str], clock: Clock) -> None:
    started_at = time.monotonic()
    try:
        async for delta in stream(conversation, clock):
            clock.last_s = time.monotonic() - started_at
            if clock.first_s is None:
                clock.first_s = clock.last_s
            clock.pieces += 1
            said.append(delta)
            click.echo(visible(delta), nl=False)
    finally:
        if said:
            click.echo()


def _dim(text: str) -> None:
    if sys.stdout.isatty():
        click.echo(click.style(text, dim=True))
    else:
        click.echo(text, err=True)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys reach back to earlier chats, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    file = Path(state).expanduser() / "headgate" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
