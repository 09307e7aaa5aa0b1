"""`chunkcache verify`."""

from __future__ import annotations

import json

import click

from .loading import dtype_option, load


@click.command(short_help="Prove that reuse changes nothing.")
@click.argument("model")
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def command(ctx: click.Context, model: str, dtype: str, as_json: bool) -> None:
    """Prove on MODEL that reusing KV changes nothing, or say why not (exit code 1)."""
    loaded, _ = load(model, dtype, tokens=False)
    from chunkcache import verify
    from chunkcache.lab.views.tables import console, pairs
    from chunkcache.lab.views.words import size

    report = verify(loaded)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        values = {
            "model type": report.model_type,
            "supported": "yes" if report.supported else "no",
            "tier": f"{report.tier}: {report.tier_name}",
            "bit-exact": report.bit_exact,
            "largest logit error": f"{report.max_logit_error:.2e}",
            "number type": report.dtype,
            "a token takes": size(report.details.get("token_bytes", 0)),
            "a snapshot takes": size(report.details.get("snapshot_bytes", 0)),
            "attention kernel": report.details.get("kernel", "none"),
            "linear layers": report.details.get("linear", "none"),
            "reason": report.reason,
        }
        console().print(pairs(f"Verification of {model}", values))
    if not report.supported:
        ctx.exit(1)
