"""The one command. Thin: it reads the command line and calls `command/`, imported lazily."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.core import ParameterSource

from command.lazy import LazyGroup

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_FILE = click.Path(path_type=Path)


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        try:
            click.echo(f"headgate {importlib.metadata.version('headgate')}")
        except importlib.metadata.PackageNotFoundError:
            click.echo("headgate, from a checkout that is not installed")
        context.exit()


# Commands that are imported when they are typed: name -> where it is, what it does.
_LAZY: dict[str, tuple[str, str]] = {
    "rollout": (
        "evals.commands.rollout:rollout",
        "Bring a candidate that has passed to live traffic, step by step.",
    ),
    "requests": (
        "command.requests:requests",
        "Requests that a gateway keeps, sifted, a line each.",
    ),
    "replicas": (
        "command.replicas:replicas",
        "Take a replica out of traffic by hand, and back.",
    ),
    "menu": (
        "evals.commands.menu:menu",
        "Measure techniques and their combinations on your own workload.",
    ),
    "replay": (
        "evals.commands.replay:replay",
        "Play recorded traffic to a server, and say what came of it.",
    ),
}


@click.group(cls=LazyGroup, lazy=_LAZY, context_settings=_CONTEXT)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A streaming LLM gateway and runtime on your machine.

    \b
    headgate serve     start it
    headgate chat      talk to it, in a second terminal
    headgate doctor    if something is wrong
    headgate explain   why a request went where it went
    headgate trace     where a request's time went
    headgate requests  which came, and how they ended
    headgate gate      whether an optimization may go live
    headgate menu      what optimizations bring and take, on your workload
    headgate rollout   how it goes live, and back
    headgate replay    play recorded traffic
    headgate replicas  take a replica out of traffic, and back
    """


@main.command(short_help="Serve a policy: runtime workers and the gateway in front.")
@click.argument("policy", type=_FILE, required=False)
@click.option(
    "--on",
    "where",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="Where replicas run: as processes of this machine, or on a Ray cluster (docs/fleet.md).",
)
@click.option(
    "--ray-address",
    envvar="RAY_ADDRESS",
    default="auto",
    help="The Ray cluster, host:port. Default: RAY_ADDRESS, else the one that runs here.",
)
def serve(policy: Path | None, where: str, ray_address: str) -> None:
    """Start runtime workers and gateway, keep them alive, and stop them in order.

    POLICY is a YAML file; without one the policy that ships serves the pocket model on
    http://127.0.0.1:8080. HEADGATE_PORT overrides the port; 0 takes a free one and prints it.
    A worker that dies is started again. Ctrl-C drains: running answers may finish; Ctrl-C again
    ends them now.

    \b
    Examples:
      headgate serve
      HEADGATE_PORT=8081 headgate serve my-policy.yaml
      headgate serve --on ray my-policy.yaml

    \b
    Exit codes:
      0    drained after Ctrl-C or SIGTERM
      1    could not start: port taken, something not installed, a worker that ends as it loads
      2    the policy is wrong; each problem is printed as file:line:col
      130  ended at once by a second Ctrl-C
    """
    typed = click.get_current_context().get_parameter_source("ray_address")
    if where == "here" and typed is ParameterSource.COMMANDLINE:  # the variable is Ray's own
        wrong = f"{ray_address}: replicas run here, on no Ray cluster; add --on ray"
        raise click.BadParameter(wrong, param_hint="--ray-address")
    from command.screen import Screen
    from command.serve import StartError, serve as run
    from policies.load import PolicyError

    try:
        ray = ray_address if where == "ray" else None
        raise SystemExit(run(_default(policy), Screen(), ray))
    except PolicyError as error:
        _fail(str(error), 2)
    except StartError as error:
        _fail(str(error), 1)


@main.command(short_help="Talk to a running gateway in the terminal.")
@click.option("--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port.")
@click.option("--model", help="Model name. Default: the first that the gateway offers.")
@click.option("--system", help="System prompt.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    help="0 takes the likeliest token. Default: as the model's makers sample, else 0.7.",
)
@click.argument("message", required=False)
def chat(
    url: str | None,
    model: str | None,
    system: str | None,
    temperature: float | None,
    message: str | None,
) -> None:
    """Talk to a running gateway; answers stream as they are made.

    With MESSAGE, or with text on stdin, one answer is printed and the command ends. Otherwise a
    chat opens: /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves. HEADGATE_API_KEY is
    sent along where the gateway has tenants.

    \b
    Examples:
      headgate chat
      headgate chat "Rewrite as year-month-day: July 18, 2032."
      headgate chat --system "Answer in one word." < question.txt

    \b
    Exit codes:
      0    answered, or left
      1    nothing answers at the URL, or the answer failed
      2    wrong usage
      130  Ctrl-C during a single answer
    """
    from command.chat import talk

    raise SystemExit(talk(url, model, system, message, temperature))


@main.command(short_help="What is installed, what would run, what is wrong.")
@click.argument("policy", type=_FILE, required=False)
@click.option("--deep", is_flag=True, help="Also start torch and ask it for its devices (seconds).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def doctor(policy: Path | None, deep: bool, as_json: bool) -> None:
    """Look at this machine, this installation and POLICY; say what would run and what is wrong.

    \b
    Examples:
      headgate doctor
      headgate doctor my-policy.yaml --json

    \b
    Exit codes:
      0  nothing is wrong; warnings are allowed
      1  something is wrong; the line says what to do next
    """
    from command.doctor import examine

    raise SystemExit(examine(_default(policy), deep=deep, as_json=as_json))


@main.command(short_help="Why a request went to the replica that it went to.")
@click.argument("receipt")
@click.option("--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port.")
@click.option("--policy", type=_FILE, help="Decide by this policy's routing instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def explain(receipt: str, url: str | None, policy: Path | None, as_json: bool) -> None:
    """Decide again what a receipt says was decided, and show why.

    RECEIPT is the id of an answer's header x-headgate-receipt, another id of the request or its
    answer, `all` for every receipt that the gateway still keeps, or a file with what GET
    /v1/receipts/ID or GET /v1/receipts answered. Where the gateway has keys, HEADGATE_ADMIN_KEY
    reads those of all tenants, HEADGATE_API_KEY those of its own.

    \b
    Examples:
      headgate explain rcpt_0123456789abcdef
      headgate explain all --policy other.yaml

    \b
    Exit codes:
      0  every decision came out as it was made, or --policy was given
      1  nothing answers at the URL, or a decision came out differently
      2  wrong usage, a wrong policy, or no such receipt
    """
    from command.explain import explain as run

    raise SystemExit(run(receipt, url, policy, as_json=as_json))


@main.command(short_help="Where a request's time went, span by span.")
@click.argument("name", metavar="ID")
@click.option("--url", help="Base URL. Default: http://127.0.0.1:8080, with HEADGATE_PORT's port.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of bars.")
def trace(name: str, url: str | None, as_json: bool) -> None:
    """Draw a request's spans through gateway and worker as bars in time.

    ID is that of the trace, of the request (x-request-id), of the receipt (x-headgate-receipt) or
    of the answer; `latest` and `slow` list requests that the gateway keeps, `headgate requests`
    sifts them. HEADGATE_ADMIN_KEY is sent along where the gateway has an admin's key,
    HEADGATE_API_KEY where that is not set.

    \b
    Examples:
      headgate trace latest
      headgate trace chatcmpl-0123456789abcdef01234567

    \b
    Exit codes:
      0  drawn
      1  nothing answers at the URL, or no gateway
      2  wrong usage, or no such trace
    """
    from command.trace import trace as run

    raise SystemExit(run(name, url, as_json=as_json))


_GATE = {
    "matrix": ("evals.commands.matrix:matrix", "Say what several changes add to each other."),
    "plan": ("evals.commands.plan:show_plan", "Say what could be shown, before anything is spent."),
    "compare": (
        "evals.commands.compare:compare",
        "Judge two runs of inspect_ai, lm-eval, promptfoo, guidellm or aiperf as pairs.",
    ),
    "report": (
        "evals.commands.report:report",
        "Write a run's verdict as a page, as Markdown and as JUnit.",
    ),
    "new": ("evals.commands.new:new", "Write the beginning of a hypothesis."),
    "run": ("evals.commands.run:run", "Try a hypothesis, judge it, and record the verdict."),
    "schema": ("evals.commands.gate:schema", "Print the JSON Schema of hypothesis files."),
    "suite": ("evals.commands.suite:suite", "Make a suite of a task of another tool."),
    "verify": ("evals.commands.verify:verify", "Recompute a verdict from the rows beside it."),
    "drift": ("evals.commands.drift:drift", "Say whether traffic is still what was judged."),
    "status": ("evals.commands.status:status", "Say which optimizations are on, and why not."),
}


@main.group(cls=LazyGroup, lazy=_GATE, short_help="Find out whether an optimization may go live.")
def gate() -> None:
    """Compare two configurations by your own evals and traffic. docs/hypothesis.md says how."""


@main.group(short_help="Check a policy file, show it with its defaults, make keys for it.")
def policy() -> None:
    """Work with policy files. docs/policy.md describes every field."""


@policy.command(short_help="Say whether files are valid.")
@click.argument("files", type=_FILE, nargs=-1, required=True)
def check(files: tuple[Path, ...]) -> None:
    """Check policy files, and that the model of each is there and can be loaded.

    Each problem is one line: file:line:col  path  problem; did you mean …

    \b
    Example:
      headgate policy check my-policy.yaml

    \b
    Exit codes:
      0  all are valid
      2  at least one is not
    """
    from command.policy import check_files

    raise SystemExit(check_files(files))


@policy.command(short_help="Print a policy with every default filled in.")
@click.argument("file", type=_FILE, required=False)
def show(file: Path | None) -> None:
    """Print the whole effective policy as YAML that can be loaded again.

    Every field carries its description; `set` marks what the file says, the rest are defaults.

    \b
    Example:
      headgate policy show my-policy.yaml > whole.yaml

    \b
    Exit codes:
      0  printed
      2  the policy is wrong
    """
    from command.policy import show_file
    from policies.load import PolicyError

    try:
        click.echo(show_file(_default(file), os.environ), nl=False)
    except PolicyError as error:
        _fail(str(error), 2)


@policy.command(short_help="Make a key for a tenant, and print its hash.")
def key() -> None:
    """Print a new random key, and its SHA-256 hash for the policy, which keeps no keys.

    \b
    Example:
      headgate policy key

    \b
    Exit codes:
      0  printed
    """
    from command.policy import key_lines

    click.echo(key_lines(), nl=False)


def _default(policy: Path | None) -> Path:
    """The policy that ships, where none is named."""
    import policies

    return policy or Path(policies.__file__).parent / "local.yaml"


def _fail(message: str, code: int) -> None:
    click.echo(message, err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main(prog_name="headgate")
