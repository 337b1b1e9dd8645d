"""``python -m normuon_plugins``: the command ``normuon`` where its script is not on the path."""

from normuon_plugins.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
