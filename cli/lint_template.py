"""`chunkcache lint-template`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .loading import load_tokenizer
from .traces import Bad, tell


@click.command(short_help="Tell where a chat template keeps prefixes from being reused.")
@click.argument("template", metavar="MODEL|FILE")
@click.option(
    "--tokenizer", metavar="MODEL", help="For a FILE, whose tokens to count; `demo` without it."
)
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Dialogues of one's own instead of samples: JSON, or one a line.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def command(
    context: click.Context, template: str, tokenizer: str | None, log: Path | None, as_json: bool
) -> None:
    """Tell where turn k+1 of a dialogue stops extending turn k, and how many tokens that costs.

    The template is that of MODEL, or a FILE of Jinja. Dialogues with system prompts, tools and thinking
    are rendered turn by turn: history that is rewritten, thinking that is left out, answers that are cut
    into other tokens, dates. Exit code 1 if anything was found, or nothing
    could be checked.
    """
    from chunkcache.lab.analysis.lint import Linter, Sample, samples
    from chunkcache.lab.traces.dialogues import numbered_dialogues

    file = Path(template)
    try:
        given = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read {file}: {error}") from error
    loaded = load_tokenizer((tokenizer or "demo") if given is not None else template)
    if given is None and not loaded.chat_template:
        raise click.ClickException(f"{template} has no chat template")
    bad = Bad()
    dialogues = (
        samples()
        if log is None
        else [
            Sample(f"dialogue {n}", one, one.tools) for n, one in numbered_dialogues(log, bad.add)
        ]
    )
    tell(bad)
    found = Linter(loaded, given).lint(dialogues)
    if as_json:
        click.echo(json.dumps({"template": template} | found.to_dict(), indent=2))
    else:
        from chunkcache.lab.views.lint import lint
        from chunkcache.lab.views.tables import console

        console().print(lint(template, found))
    context.exit(1 if found.findings or not found.turns else 0)
