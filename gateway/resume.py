"""A stream that goes on when its replica fails: on another one, with what the client has already.

Stands before an answer and reads like one. Knows when to go on; how is splice.py's, where is the
pool's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from gateway.answer import Answer, Attempt
from gateway.call import Call
from gateway.journal import Journal
from gateway.replica import Replica
from gateway.response import Cut
from gateway.splice import Diverged, Splice, Way
from runtime.wire import DONE, Problem, event

log = logging.getLogger("headgate.gateway")

RESUMES_MAX = 3  # of one answer
DECLARED = b": the replica failed, another one goes on\n\n"

# Gives the answer of another replica, one that has not failed if there is, and how it goes on.
# Raises Problem.
Reopen = Callable[[Call, Journal, Sequence[Replica]], Awaitable[tuple[Answer, Way]]]


class Resumable:
    """An answer of whole events, whose end is the client's or comes with [DONE]."""

    def __init__(self, answer: Answer, call: Call, reopen: Reopen) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.raw_headers = answer.raw_headers
        self.refused = answer.refused
        self.is_stream = answer.is_stream
        self.encoding = answer.encoding
        self.resumes = 0
        self._answer = answer
        self._call = call
        self._reopen = reopen
        self._journal = Journal()
        self._splice: Splice | None = None
        self._failed: list[Replica] = []

    @property
    def attempt(self) -> Attempt:
        return self._answer.attempt

    @property
    def well(self) -> bool | None:
        return self._answer.well

    @property
    def told_tokens(self) -> int | None:
        """How many tokens have come in the stream, where its replica told each of them."""
        journal = self._journal
        return len(journal.ids) if journal.exact and journal.ids else None

    @property
    def told_guesses(self) -> tuple[int, int] | None:
        """How many guesses of a draft the stream says were right, and how many wrong, where its one
        replica marks each token."""
        journal = self._journal
        if self.resumes or journal.guessed is None:
            return None
        return journal.guessed, journal.rejected

    async def readany(self) -> bytes:
        """The next events, b"" at the end. Raises Cut or Problem where nobody can go on."""
        while True:
            fault: Exception | None = None
            try:
                if self._journal.fault is not None:
                    raise Cut(self._journal.fault)
                piece = await self._answer.readany()
                if not piece and not self._journal.done:
                    raise Cut("it ended without [DONE]")
                out = self._pass(piece)
            except (Cut, Problem, Diverged) as error:
                fault, out = error, await self._go_on(error)
            if out or (fault is None and not piece):
                return out

    async def flow(self, sink: Callable[[bytes], bool]) -> None:
        """As `Answer.flow`."""
        while piece := await self.readany():
            if sink(piece):
                return

    def pause(self) -> None:
        self._answer.pause()

    def resume(self) -> None:
        self._answer.resume()

    def interrupt(self, problem: Problem) -> None:
        self._answer.interrupt(problem)

    def at_eof(self) -> bool:
        return self._answer.at_eof()

    def close(self, *, well: bool | None) -> None:
        self._answer.close(well=well)

    def _pass(self, piece: bytes) -> bytes:
        """Of the events that are complete, those that the client gets. Raises Diverged."""
        out: list[bytes] = []
        for raw, chunk, ids in self._journal.take(piece):
            if chunk is None:
                out.append(raw)
            elif self._splice is None:
                self._journal.note(chunk, ids)
                out.append(raw)
            elif (spliced := self._splice.chunk(chunk)) is None:
                self._journal.hold(ids)
            else:
                self._journal.note(spliced, ids)
                out.append(event(spliced))
        return b"".join(out) if len(out) != 1 else out[0]

    async def _go_on(self, fault: Exception) -> bytes:
        """Opens the rest elsewhere. Raises the fault, as one of the stream, where that fails."""
        journal, failed = self._journal, self._answer.attempt.replica
        if isinstance(fault, Diverged):
            self._answer.close(well=None)
            raise Cut(f"{fault}, asked for again after a cut")
        self._answer.close(well=False)
        self._failed.append(failed)
        failed.doubt.set()
        if journal.finished:  # only the end is missing: nothing is left to be said
            journal.done = True
            return DONE
        given_up = fault if isinstance(fault, Problem) else Cut(str(fault))
        if self.resumes >= RESUMES_MAX or not journal.plain:
            raise given_up
        try:
            answer, way = await self._reopen(self._call, journal, self._failed)
        except Problem:
            raise given_up from None
        self.resumes += 1
        log.warning("%s failed inside a stream (%s); %s goes on, by %s",
                    failed.url, fault, answer.attempt.replica.url, way.value)  # fmt: skip
        self._answer = answer
        self._splice = Splice(journal, way)
        known = {Way.TOKENS: journal.ids, Way.AGAIN: [], Way.TEXT: None}[way]
        journal.begin_again(ids=known)
        return DECLARED


Opened = Answer | Resumable
