"""`headgate rollout`: a candidate that has passed, step by step to its users."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from evals.candidate import Servers
    from evals.rollout import Plan, Progress, Result
    from policies.hypothesis import Hypothesis
    from policies.ledger import Ledger
    from policies.patching import Configured
    from policies.side import Side
    from policies.standing import Standing

_FILE = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_URL = "http://127.0.0.1:8080"
_KEYS = ("HEADGATE_ADMIN_KEY", "HEADGATE_API_KEY")  # the first that is set is sent
EXITS: Mapping[str, int] = {"promoted": 0, "rolled back": 1, "refused": 2, "stopped": 3}


@click.command()
@click.argument("hypothesis", type=_FILE)
@click.option("--url", help=f"The gateway that serves. Default: {_URL}, with HEADGATE_PORT's port.")
@click.option(
    "--candidate-url",
    "candidates",
    multiple=True,
    help="A server of the candidate that runs already; repeatable. Default: it is started here, "
    "unless the hypothesis changes the gateway alone.",
)
@click.option("--ledger", type=_FOLDER, help="Default: where `headgate gate` keeps its verdicts.")
@click.option("--stay", is_flag=True, help="Once promoted, keep it at the last step until Ctrl-C.")
def rollout(
    hypothesis: Path,
    url: str | None,
    candidates: tuple[str, ...],
    ledger: Path | None,
    stay: bool,
) -> None:
    """Bring HYPOTHESIS's candidate to live traffic: as a shadow first, then by steps.

    Needs a live pass in the ledger for exactly this baseline, candidate and hypothesis. The
    candidate's share is leased from here: whatever happens to this command, seconds later the
    baseline serves everything. Started again, it goes on where it was. HEADGATE_ADMIN_KEY is sent
    along where the gateway has an admin's key, HEADGATE_API_KEY where that is not set.

    \b
    Examples:
      headgate rollout policies/int8.yaml
      headgate rollout policies/int8.yaml --url http://10.0.0.5:8080 --candidate-url http://10.0.0.9:8000

    \b
    Exit codes:
      0    promoted: every step has held
      1    rolled back, and quarantined; the incident's folder is printed
      2    wrong usage, or the gateway refuses
      3    no live pass, or it stands no longer
      130  Ctrl-C: the baseline serves; start it again to go on
    """
    from policies.fields import base_url
    from policies.problems import PolicyError

    try:
        for one in (*candidates, *filter(None, [url])):
            base_url(one)
    except ValueError as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    try:
        result = asyncio.run(_run(hypothesis, url or _default_url(), candidates, ledger, stay))
    except PolicyError as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        click.echo("interrupted; the lease ends within seconds. Start it again to go on.", err=True)
        raise SystemExit(130) from None
    raise SystemExit(EXITS[result])


async def _run(
    file: Path, url: str, candidates: tuple[str, ...], ledger: Path | None, stay: bool
) -> Result:
    from evals.monitor import Monitor, signals
    from evals.processes import NotServing
    from evals.rollout import Rollout
    from evals.steering import Steered

    case = await asyncio.to_thread(case_of, file, ledger)
    if isinstance(case, str):
        click.echo(case, err=True)
        return "stopped"
    wanted, roots, stands = case.hypothesis, case.roots, standing(case)
    if not (now := stands(_now())).enabled:
        click.echo(f"{wanted.name} may not go live: {now.why}", err=True)
        return "stopped"
    watched, unseen = signals(wanted)
    if unseen:
        click.echo(f"not watched live, for want of expected answers: {', '.join(unseen)}")
    place = case.state / "rollouts" / f"{wanted.name}-{roots['candidate'][:8]}"
    progress = _progress(place / "progress.json", wanted.name, roots)
    async with contextlib.AsyncExitStack() as stack:
        try:
            servers = await _servers(stack, case, candidates, place)
        except NotServing as error:
            click.echo(f"the candidate does not serve: {error}", err=True)
            return "refused"
        plan = _plan(case, progress.id, servers, now.evidence)
        keys = (os.environ.get(name, "").strip() for name in _KEYS)
        gateway = Steered(url, next(filter(None, keys), None))
        await stack.enter_async_context(gateway)
        monitor = Monitor(watched, wanted.stats.alpha)
        run = Rollout(
            plan, gateway, monitor, progress, place / "progress.json", case.ledger,
            lambda moment: None if (one := stands(moment)).enabled else one.why,
            case.state / "incidents", click.echo, stays=stay,
        )  # fmt: skip
        return await run.run()


@dataclass(frozen=True, slots=True)
class Case:
    """A hypothesis, and what it is bound to."""

    file: Path
    hypothesis: Hypothesis
    pair: tuple[Configured | None, ...]
    sides: tuple[Side, Side, Side]  # baseline, candidate, spec
    ledger: Ledger

    @property
    def roots(self) -> Mapping[str, str]:
        named = zip(("baseline", "candidate", "spec"), self.sides, strict=True)
        return {name: side.root for name, side in named}

    @property
    def state(self) -> Path:
        return self.file.absolute().parent / ".headgate"


def case_of(file: Path, ledger: Path | None) -> Case | str:
    """Why there is none, where a side cannot be told. Raises PolicyError."""
    from policies.binding import Unknown, ledger_of, pair, sides
    from policies.ledger import Ledger
    from policies.load import load_hypothesis

    wanted = load_hypothesis(file)
    try:
        found = sides(file, wanted)
    except Unknown as error:
        return str(error)
    book = Ledger.open(ledger) if ledger is not None else ledger_of(file, wanted)
    return Case(file, wanted, pair(file, wanted), found, book)


def standing(case: Case) -> Callable[[float], Standing]:
    """How the hypothesis stands at a moment, by the ledger as it is then: strictly, whatever the
    policy says, and by the sides as they were at the start.
    """
    from policies.gating import Gate
    from policies.standing import Question, judged

    baseline = case.pair[0]
    gate = baseline.deployment.gate if baseline is not None else Gate()
    strict = gate.model_copy(update={"enforce": "strict"})

    def stands(now: float) -> Standing:
        reading = case.ledger.read()
        return judged(
            Question(
                case.file, case.hypothesis, lambda: case.sides, strict, case.ledger, reading, now
            )
        )

    return stands


def _progress(file: Path, name: str, roots: Mapping[str, str]) -> Progress:
    """Where the last run of this rollout was; a new one, where that has come to its end."""
    from evals.rollout import Progress

    known = Progress.load(file)
    if known is not None and not known.ended:
        return known
    return Progress(f"{name}-{roots['candidate'][:8]}-{int(_now()):x}")


async def _servers(
    stack: contextlib.AsyncExitStack, case: Case, candidates: tuple[str, ...], place: Path
) -> Servers:
    """Those that run already, or new ones; none where the gateway alone changes."""
    from evals.candidate import Servers, known, needs_workers, started

    variant = case.hypothesis.candidate
    urls = candidates or ((variant.url,) if variant.url is not None else ())
    if urls:
        key = {"api_key_env": variant.api_key_env} if variant.api_key_env else {}
        return await known([{"url": one.rstrip("/").removesuffix("/v1"), **key} for one in urls])
    baseline, candidate = case.pair
    if not needs_workers(baseline, candidate):
        return Servers()
    assert candidate is not None, "without one nothing needs workers"
    click.echo("starting the candidate's workers")
    return await stack.enter_async_context(started(candidate, place))


def _plan(case: Case, name: str, servers: Servers, evidence: str) -> Plan:
    """The gateway is told the roots of the verdict that speaks for the candidate: leaves that spoil
    nothing of it may be others now, and then it finds no verdict for what there is.
    """
    from evals.candidate import gateway_patch
    from evals.rollout import Plan
    from evals.steering import Candidate

    spoken = next(one for one in reversed(case.ledger.verdicts()) if one.evidence == evidence)
    roots = {"baseline": spoken.baseline, "candidate": spoken.candidate, "spec": spoken.spec}
    candidate = Candidate(
        name, case.hypothesis.name, gateway_patch(*case.pair), servers.replicas,
        servers.fingerprints, roots,
    )  # fmt: skip
    rollout = case.hypothesis.rollout
    return Plan(candidate, rollout.shadow, rollout.steps, rollout.min_step, evidence)


def _default_url() -> str:
    """Raises PolicyError."""
    from policies.load import port_of

    port = port_of()
    return f"http://127.0.0.1:{port}" if port else _URL


def _now() -> float:
    import time

    return time.time()
