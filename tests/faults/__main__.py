"`python -m faults`, with tests/ on the path: all faults, and a record of them."
import typer

from .suite import main

typer.run(main)
