"""`python -m engine`: the `engine-worker` command, without the imports of the other commands."""

from engine.worker.cli import main

if __name__ == "__main__":
    main()
