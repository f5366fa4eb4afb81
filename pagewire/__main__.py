"""python -m pagewire: the `pagewire` command."""

from pagewire.cli.main import main

main()
