"""`python -m modeling_vlmoe`: the command, as launchers of several processes start it."""

from modeling_vlmoe.cli import main

if __name__ == "__main__":
    main()
