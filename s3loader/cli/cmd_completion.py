"""``s3loader completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes s3loader in SHELL.

    bash: eval "$(s3loader completion bash)" in ~/.bashrc, zsh: the same with zsh in ~/.zshrc,
    fish: s3loader completion fish > ~/.config/fish/completions/s3loader.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(click.get_current_context().find_root().command, {}, "s3loader", "_S3LOADER_COMPLETE")
    click.echo(made.source_template % made.source_vars())
