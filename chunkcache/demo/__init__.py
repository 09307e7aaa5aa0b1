"""The built-in demo model: a tiny support-chat Llama, trained on generated shops.

`python -m chunkcache.demo.train` makes it, `python -m chunkcache.demo.evaluate` measures it.
"""

from pathlib import Path


def model_path() -> Path:
    """Return the packaged folder that `from_pretrained` loads model and tokenizer from."""
    return Path(__file__).parent / "model"
