"""`python -m moe_edu` is `moe-edu`."""

from moe_edu.cli import main

main(prog_name="moe-edu")
