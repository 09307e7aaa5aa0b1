"""`python -m chunkcache`."""

from chunkcache.cli.main import main  # type: ignore[import-not-found]  # it lies in cli/

if __name__ == "__main__":
    main(prog_name="chunkcache")
